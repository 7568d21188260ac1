"""The two models of the demo behind OpenAI-compatible servers, asked through `engines.http_engine`."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

from internvl_mpo.demo.conversation import SIDES, Answer, Message
from internvl_mpo.demo.local_models import Lazy
from internvl_mpo.demo.pictures import Cutter
from internvl_mpo.demo.streaming import Activity, Names, Pane, VisitorQuestion, follow
from internvl_mpo.engines import Draft, Request
from internvl_mpo.engines.http_engine import HttpEngine
from internvl_mpo.errors import BadInputError


class Servers:
    """Two OpenAI-compatible servers (vLLM, SGLang, LMDeploy, `internvl_mpo.engines.serve`).

    Args:
        urls: base URL by side.
        models: served names by side; None asks the server.
        api_key: sent as a bearer token.
    """

    concurrency = 16

    def __init__(self, urls: dict[str, str], models: dict[str, str | None], api_key: str | None = None):
        self.activity = Activity()
        self._urls, self._models = urls, models

        def connect(side: str) -> HttpEngine:
            # a visitor waits: one attempt, and a sentence where it fails
            return HttpEngine(urls[side], models[side], concurrency=1, api_key=api_key, max_attempts=1)

        self._engines = {side: Lazy(lambda side=side: connect(side)) for side in SIDES}

    def stream(self, question: VisitorQuestion) -> Iterator[tuple[Answer, Answer]]:
        """See `Backend.stream`."""
        stop, changed = threading.Event(), threading.Event()
        panes = [Pane("".join, changed, self.activity) for _ in SIDES]
        drafts = [_PaneDraft(pane, changed) for pane in panes]

        def job(side: str, pane: Pane, draft: _PaneDraft) -> Callable[[], None]:
            request = as_request(question.chats[side], question, draft)
            return lambda: self._answer(self._engines[side], request, pane)

        work = [job(*one) for one in zip(SIDES, panes, drafts, strict=True)]
        stream = follow(panes, work, stop, changed, self.activity, hang_up=[draft.stop for draft in drafts])
        yield from stream

    def names(self) -> dict[str, Names]:
        """See `Backend.names`; a name nobody gave is known once the server has been asked."""
        return {
            side: Names(self._models[side] or (lazy.get().model_id if lazy.is_there else self._urls[side]), None)
            for side, lazy in self._engines.items()
        }

    def cutter(self) -> Cutter:
        """InternVL2's way; what the server does cannot be asked."""
        return Cutter()

    def load(self) -> None:
        """Ask both servers for their model's name.

        Raises:
            BadInputError: one does not answer, or serves another model.
        """
        for engine in self._engines.values():
            engine.get()

    def _answer(self, engine: Lazy[HttpEngine], request: Request, pane: Pane) -> None:
        try:
            (reply,) = engine.get().generate([request])
        except BadInputError as error:  # no such server or model; the other side may well answer
            pane.finish("error", str(error))
            return
        if reply.error:
            pane.finish("error", reply.error)
            return
        if not pane.has_begun:  # a server that cannot stream
            pane.add(reply.text)
        pane.finish(reply.finish_reason or "stop", num_tokens=reply.num_tokens)


class _PaneDraft(Draft):
    """Shows every piece in a pane as it comes; a question is asked once, so none is taken back."""

    def __init__(self, pane: Pane, changed: threading.Event):
        super().__init__(changed)
        self._pane = pane

    def add(self, piece: Any) -> None:
        super().add(piece)
        self._pane.add(piece)


def as_request(chat: list[Message], question: VisitorQuestion, draft: Draft) -> Request:
    """Return a side's conversation as the engines take it."""
    *earlier, last = chat
    questions, answers = earlier[::2], earlier[1::2]
    return Request(
        id="answer",
        question=last.text,
        images=tuple(picture.open() for message in chat for picture in message.images),
        history=tuple((one.text, other.text) for one, other in zip(questions, answers, strict=True)),
        seed=question.seed,
        sampling=question.sampling,
        draft=draft,
    )
