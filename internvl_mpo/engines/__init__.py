"""Who answers prompts: one interface, several engines.

    engine = InternVLEngine("outputs/mini/model")
    for reply in engine.generate([Request(id="1", question="What is shown?", images=("a.png",))]):
        print(reply.id, reply.text)

Every engine takes `Request`s and yields one `Reply` for each, in any order; a request that could not be answered comes
back with `error` set and is never dropped. This file has no heavy imports, so that settings can be checked first.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from internvl_mpo.errors import BadInputError
from internvl_mpo.records import IMAGE_PLACEHOLDER

ENGINES = ("transformers", "http", "vllm")
DRAFT_SECONDS = 0.03  # between two looks at a reply that grows; decoding every token anew would slow long ones down


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 is greedy; then top_k and top_p mean nothing.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the smallest set of tokens with at least this probability; 1 keeps all.
        max_new_tokens: longest reply; a reply cut there has `finish_reason` "length".
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 1024

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 0.001 <= self.temperature <= 1000:  # beyond, float32 logits are 0, inf or NaN
            raise BadInputError(f"temperature is {self.temperature}; give 0 (greedy) or 0.001 to 1000")
        if self.top_k < 0:
            raise BadInputError(f"top_k is {self.top_k}; give 0 (off) or a positive number")
        if not 0 < self.top_p <= 1:
            raise BadInputError(f"top_p is {self.top_p}; give a number above 0 and up to 1")
        if self.max_new_tokens < 1:
            raise BadInputError(f"max_new_tokens is {self.max_new_tokens}; give at least 1")


class StopSign:
    """Ends work from another thread: whoever waits for something says how to be woken."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._wakers: list[Callable[[], None]] = []

    @contextlib.contextmanager
    def wakes(self, wake: Callable[[], None]) -> Iterator[None]:
        """Let `stop` call `wake` meanwhile; never afterwards, and at once if it has been stopped before."""
        with self._lock:
            self._wakers.append(wake)
        if self.stopped.is_set():
            wake()
        try:
            yield
        finally:
            with self._lock:
                self._wakers.remove(wake)

    def stop(self) -> None:
        """Stop, and wake all who wait."""
        self.stopped.set()
        with self._lock:
            for wake in self._wakers:
                wake()


class Draft(StopSign):
    """A reply while it is written: an engine adds tokens or pieces of text, a reader takes the text so far.

    `stop` is for a reader that has gone: an engine in this process drops the reply at its next token, a request to a
    server is hung up, and the reply ends with `finish_reason` "stopped".

    Args:
        changed: is set whenever the text has grown.

    Attributes:
        text: what is there; the end of it may still change, and all of it after an attempt that broke off.
        num_pieces: how many tokens it has; of a server that streams, how many pieces came.
    """

    def __init__(self, changed: threading.Event):
        super().__init__()
        self.text = ""
        self.num_pieces = 0
        self._changed = changed
        self._decode: Callable[[list[Any]], str] = "".join
        self._pieces: list[Any] = []
        self._looked = 0.0

    def begin(self, decode: Callable[[list[Any]], str]) -> None:
        """Start, or start again: a batch did not fit into memory, or a server broke off. The seed draws the same."""
        self._decode, self._pieces, self._looked = decode, [], 0.0
        self.text, self.num_pieces = "", 0

    def add(self, piece: Any) -> None:
        """Take a token or piece. Decodes in the engine's thread, since tokenizers are not made for two at a time."""
        self._pieces.append(piece)
        self.num_pieces = len(self._pieces)
        if time.monotonic() - self._looked >= DRAFT_SECONDS:
            self._looked = time.monotonic()
            self.text = self._decode(self._pieces)
            self._changed.set()

    def all_text(self) -> str:
        """Return the text up to the last piece; for the engine, when nothing is added any more."""
        return self._decode(self._pieces)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One reply that is wanted.

    Attributes:
        id: names the reply.
        question: the user's text; `<image>` marks where a picture goes, in the order of `images`.
        images: paths, PIL images or `pictures.EncodedPicture`s, those of earlier turns first.
        history: earlier turns, (question, answer) pairs; their questions mark pictures as well.
        system: replaces the model's own system message; None keeps it.
        prefix: beginning of the assistant's turn, to be continued; the reply's text holds only what follows it.
        seed: fixes the draw of this reply, whatever else is in the batch.
        sampling: how tokens are drawn.
        draft: filled while the reply grows (by `VllmEngine` not); None where nobody looks.
    """

    id: str
    question: str
    images: tuple[Any, ...] = ()
    history: tuple[tuple[str, str], ...] = ()
    system: str | None = None
    prefix: str = ""
    seed: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    draft: Draft | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back for the request with the same id.

    Attributes:
        text: the reply; after a prefix it keeps the space at the join.
        finish_reason: "stop" (the model ended its turn), "length" (cut), "stopped" (by the reader of the draft; the
            text is what there was), or "" with an error.
        num_tokens: tokens generated, the end of the turn included.
        error: why there is no reply, or None.
        served_model: the name a server signed the reply with; "" in this process.
    """

    id: str
    text: str = ""
    finish_reason: str = ""
    num_tokens: int = 0
    error: str | None = None
    served_model: str = ""


def chat_messages(
    question: str, num_images: int, history: Sequence[tuple[str, str]] = (), system: str | None = None
) -> list[dict[str, str]]:
    """Return a conversation as role and content; pictures of a first question that marks none come before it."""
    if num_images and not history and IMAGE_PLACEHOLDER not in question:
        question = f"{IMAGE_PLACEHOLDER}\n" * num_images + question
    messages = [{"role": "system", "content": system}] if system is not None else []
    for asked, answer in history:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": question}]


class Engine(Protocol):
    """Anything that answers requests; its name, model and revision are written into every row."""

    name: str
    model_id: str
    revision: str | None

    def generate(self, requests: Iterable[Request], done: Collection[str] = ()) -> Iterator[Reply]:
        """Yield a reply for every request whose id is not in `done`.

        Requests in `done` are passed all the same: an engine that batches forms the same batches as in an unbroken
        run, so that a resumed run draws the same replies.
        """
        ...
