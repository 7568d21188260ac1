"""What a visitor can do: ask, stop, ask again, clear, leave, and the same for programs. Knows nothing of the page.

A visitor's conversation lives in the page's session; here is only what must be known across calls: whether an answer
is being written for a page, and the event that ends it.
"""

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from internvl_mpo.demo.conversation import (
    SIDES,
    Answer,
    Controls,
    Conversation,
    Turn,
    check_question,
    split_answer,
)
from internvl_mpo.demo.pictures import (
    SUFFIXES,
    Limits,
    Picture,
    read_data_uri,
    read_upload,
    take_uploads,
)
from internvl_mpo.demo.streaming import Backend, VisitorQuestion
from internvl_mpo.errors import BadInputError

STOP_SECONDS = 5.0  # a token takes less on any machine one would show this on


@dataclass
class Session:
    """One open page.

    Attributes:
        stop: ends the answers of the last question.
        asked: whether a question waits for its answer to begin.
        idle: set unless answers are being written.
        conversation: what the page shows.
    """

    stop: threading.Event = field(default_factory=threading.Event)
    asked: bool = False
    idle: threading.Event = field(default_factory=threading.Event)
    conversation: Conversation | None = None

    def __post_init__(self) -> None:
        self.idle.set()

    def start(self, conversation: Conversation) -> None:
        """A question has been asked; its answer is on the way."""
        self.stop, self.asked, self.conversation = threading.Event(), True, conversation


class Service:
    """Answers visitors.

    Args:
        backend: who answers.
        limits: what visitors may send.
        uploads: the folder uploads are in; no other file of a visitor is read.
        max_new_tokens: longest answer anyone may ask for.
    """

    def __init__(
        self,
        backend: Backend,
        limits: Limits,
        uploads: Path,
        max_new_tokens: int = 1024,
    ):
        self.backend, self.limits, self.uploads = backend, limits, uploads.resolve()
        self.max_new_tokens = max_new_tokens
        self._sessions: dict[str, Session] = {}

    def controls(self, style: Any, temperature: Any, max_new_tokens: Any, max_tiles: Any, seed: Any) -> Controls:
        """Return checked controls; whatever a page or a program sent is looked at here.

        Raises:
            BadInputError: one of them is no number, or out of range.
        """
        seed = 0 if seed is None else seed
        numbers = {"max_new_tokens": max_new_tokens, "max_tiles": max_tiles, "seed": seed, "temperature": temperature}
        for name, value in numbers.items():
            if not _is_number(value, whole=name != "temperature"):
                kind = "number" if name == "temperature" else "whole number"
                raise BadInputError(f"{name} is no {kind} that can be used")
        if not isinstance(style, str):
            raise BadInputError("style must be text")
        if not 1 <= max_new_tokens <= self.max_new_tokens:
            raise BadInputError(f"The longest answer must have 1 to {self.max_new_tokens} tokens.")
        return Controls(style, float(temperature), int(max_new_tokens), int(max_tiles), int(seed))

    def begin(
        self,
        page: str,
        conversation: Conversation,
        text: str | None,
        files: Sequence[str],
        controls: Controls,
        blind: bool = False,
    ) -> None:
        """Check a question and add it to the conversation; its uploads are read into memory and deleted.

        Args:
            page: names the open page.
            conversation: gets a turn.
            text: the question.
            files: paths of uploads.
            controls: how it is asked.
            blind: whether a conversation that begins now hides its sides.

        Raises:
            BadInputError: the question or a picture is not acceptable, or an answer is still being written.
        """
        session = self._idle(page)
        question = check_question(text, conversation.num_images + len(files), self.limits.max_images)
        images = take_uploads([self.upload(path) for path in files], self.limits)
        if not conversation.turns:
            conversation.restart(blind)
        conversation.turns.append(Turn(question, controls, images))
        session.start(conversation)

    def retry(self, page: str, conversation: Conversation, controls: Controls) -> Controls:
        """Put the last question again, with the controls as they are now; where tokens are drawn, with the next seed.

        Returns:
            The controls it is asked with.

        Raises:
            BadInputError: there is no question, or an answer is still being written.
        """
        session = self._idle(page)
        if not conversation.turns:
            raise BadInputError("There is no question to ask again yet.")
        last = conversation.turns[-1]
        if controls.temperature > 0 and controls.seed == last.controls.seed:
            controls = dataclasses.replace(controls, seed=(controls.seed + 1) % 2**31)
        conversation.turns[-1] = Turn(last.question, controls, last.images)
        session.start(conversation)
        return controls

    def answer(self, page: str, conversation: Conversation) -> Iterator[None]:
        """Write the answers to the last question into the conversation; yields whenever there is more to show.

        Does nothing where no question waits (it was refused, or the page was cleared since).
        """
        session = self._session(page)
        if not session.asked:
            return
        session.asked = False
        session.idle.clear()
        try:
            for _ in self._answer(conversation, session.stop):
                if session.conversation is not conversation:
                    return
                yield
        finally:
            session.idle.set()

    def stop(self, page: str) -> None:
        """End the answers of a page, whether they are being written or wait in the queue."""
        self._session(page).stop.set()

    def clear(self, page: str, blind: bool) -> Conversation:
        """End the answers of a page and return an empty conversation."""
        session = self._session(page)
        session.stop.set()
        session.asked, session.conversation = False, Conversation()
        session.conversation.restart(blind)
        return session.conversation

    def current(self, page: str) -> Conversation | None:
        """Return the conversation a page is in now; None before its first question."""
        return self._session(page).conversation

    def leave(self, page: str) -> None:
        """A page was closed: end its answers and forget what was said."""
        session = self._sessions.pop(page, None)
        if session is not None:
            session.stop.set()
            session.asked, forgotten, session.conversation = False, session.conversation, None
            if forgotten is not None and session.idle.wait(STOP_SECONDS):
                forgotten.turns.clear()

    def compare(self, question: str, images: Sequence[Any], controls: Controls) -> Iterator[dict[str, Any]]:
        """Yield the growing result of one question without a page; the last one is whole.

        Args:
            question: the text.
            images: uploads as `{"path": ...}`, or data URIs; `Guard` turns addresses into these where they are allowed.
            controls: how it is asked.

        Raises:
            BadInputError: the question or a picture is not acceptable, or a side gave no answer.
        """
        question = check_question(question, len(images), self.limits.max_images)
        turn = Turn(question, controls, tuple(self._sent_picture(image) for image in images))
        for _ in self._answer(Conversation([turn]), threading.Event()):
            yield self._result(turn)
        errors = [answer.error for answer in turn.answers.values() if answer.error]
        if errors:
            raise BadInputError(errors[0])

    def upload(self, path: str) -> str:
        """Return the path of an uploaded picture.

        Raises:
            BadInputError: it lies elsewhere, or its name is not that of a picture.
        """
        if not Path(path).resolve().is_relative_to(self.uploads):
            raise BadInputError("Only uploaded pictures are read; please upload it again.")
        if Path(path).suffix.lower() not in SUFFIXES:
            raise BadInputError(f"{Path(path).name} is not a picture. Please add a PNG, JPEG, WebP, GIF or BMP file.")
        return path

    def _session(self, page: str) -> Session:
        return self._sessions.setdefault(page, Session())

    def _idle(self, page: str) -> Session:
        """The session of a page that may ask; one that has just been stopped gets the moment it needs."""
        session = self._session(page)
        if session.stop.is_set():
            session.idle.wait(STOP_SECONDS)
        if session.asked or not session.idle.is_set():
            raise BadInputError("The last question is still being answered; wait for it or press Stop.")
        return session

    def _answer(self, conversation: Conversation, stop: threading.Event) -> Iterator[None]:
        """What is there when the visitor stops counts as the answer."""
        turn = conversation.turns[-1]
        question = VisitorQuestion(
            chats={side: conversation.messages(side) for side in SIDES},
            sampling=turn.controls.sampling,
            seed=turn.controls.seed,
            max_tiles=turn.controls.max_tiles,
        )
        stream = self.backend.stream(question)
        try:
            shown = None
            while not stop.is_set() and (pair := next(stream, None)) is not None:
                turn.answers = dict(zip(SIDES, pair, strict=True))
                new = [(answer.num_tokens, answer.finish_reason) for answer in pair]
                if new != shown and not stop.is_set():
                    shown = new
                    yield
        except BadInputError as error:  # a model that cannot be loaded
            turn.answers = {side: Answer(finish_reason="error", error=str(error)) for side in SIDES}
        finally:
            stream.close()  # returns when the engine's threads have ended
            for side, answer in turn.answers.items():
                if not answer.finish_reason:
                    turn.answers[side] = dataclasses.replace(answer, finish_reason="stopped")
        yield

    def _result(self, turn: Turn) -> dict[str, Any]:
        names = self.backend.names()
        result: dict[str, Any] = {
            side: {
                "text": answer.text,
                "final_answer": split_answer(answer.text, turn.answer_format).final,
                "num_tokens": answer.num_tokens,
                "tokens_per_s": answer.tokens_per_s,
                "first_token_s": answer.first_token_s,
                "finish_reason": answer.finish_reason,
                "model": names[side].model,
            }
            for side, answer in turn.answers.items()
        }
        result["agreement"] = turn.agreement.state if turn.is_finished else "unknown"
        return result

    def _sent_picture(self, image: Any) -> Picture:
        address = image.get("path") if isinstance(image, dict) else image
        if not isinstance(address, str):
            raise BadInputError("a picture is an uploaded file or a data:image/...;base64,... text")
        if address.startswith(("http://", "https://")):
            raise BadInputError("this demo fetches no addresses; upload the picture")  # or `Guard` has fetched it
        if isinstance(image, dict):
            return take_uploads([self.upload(address)], self.limits)[0]
        return read_data_uri(address, self.limits)

    def preview(self, files: Sequence[str]) -> list[Picture]:
        """Return uploads that have not been sent yet, for the drawing of their tiles.

        Raises:
            BadInputError: one of them is not acceptable.
        """
        return [read_upload(self.upload(path), self.limits) for path in files]


def _is_number(value: Any, whole: bool) -> bool:
    """Whether a value out of JSON is a number, neither true, infinite nor thousands of digits long."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 2**53 and (not whole or value == int(value))
