"""What an answer that grows looks like to the page: one question, two panes, a stop sign."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from internvl_mpo.demo.conversation import Answer, Message
from internvl_mpo.demo.pictures import Cutter
from internvl_mpo.engines import Sampling
from internvl_mpo.errors import BadInputError

FRAME_SECONDS = 0.08  # between two pictures of the page: twelve a second look fluent and cost next to nothing


@dataclass(frozen=True)
class VisitorQuestion:
    """What both sides are asked.

    Attributes:
        chats: messages by side, each ending with the user's.
        sampling: how tokens are drawn.
        seed: of both draws.
        max_tiles: most tiles of all pictures together; None keeps the model's limit.
    """

    chats: dict[str, list[Message]]
    sampling: Sampling
    seed: int = 0
    max_tiles: int | None = None


class Names(NamedTuple):
    """What stands above a pane and in a vote."""

    model: str
    revision: str | None


class Activity:
    """Counts of generations; shown at /health and looked at by the tests."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.started = self.running = self.stopped = self.num_tokens = 0

    def begin(self) -> None:
        """A question is being answered."""
        with self._lock:
            self.started += 1
            self.running += 1

    def end(self, stopped: bool) -> None:
        """All threads of a question have ended."""
        with self._lock:
            self.running -= 1
            self.stopped += stopped

    def add_token(self) -> None:
        """A token was generated."""
        with self._lock:
            self.num_tokens += 1

    def as_dict(self) -> dict[str, int]:
        """Return the counts."""
        with self._lock:
            return {key: getattr(self, key) for key in ("started", "running", "stopped", "num_tokens")}


class Backend(Protocol):
    """Anything that answers both sides.

    `activity` counts what runs; `concurrency` is how many questions may be answered at once.
    """

    activity: "Activity"
    concurrency: int

    def stream(self, question: VisitorQuestion) -> Iterator[tuple[Answer, Answer]]:
        """Yield (base, mpo) as they grow; the last pair has finish reasons."""
        ...

    def names(self) -> dict[str, Names]:
        """Return who answers on each side."""
        ...

    def cutter(self) -> Cutter:
        """Return how pictures are cut."""
        ...

    def load(self) -> None:
        """Load what is loaded lazily."""
        ...


class Pane:
    """One side's answer while it grows: pieces go in from an engine's thread, `Answer`s come out.

    Args:
        join: pieces -> text.
        changed: is set whenever there is something new to show.
        activity: is told about every piece.
    """

    def __init__(self, join: Callable[[list[Any]], str], changed: threading.Event, activity: Activity):
        self._join, self._changed, self._activity = join, changed, activity
        self._pieces: list[Any] = []
        self._start = time.monotonic()
        self._first: float | None = None
        self._end: float | None = None
        self._num_tokens: int | None = None
        self.finish_reason = ""
        self._error = ""

    def add(self, piece: Any) -> None:
        """Take a token or a piece of text."""
        if self._first is None:
            self._first = time.monotonic()
            self._changed.set()
        self._pieces.append(piece)
        self._activity.add_token()

    @property
    def has_begun(self) -> bool:
        """Whether a piece has come."""
        return bool(self._pieces)

    def finish(self, reason: str, error: str = "", num_tokens: int | None = None) -> None:
        """End the answer; only the first end counts."""
        if not self.finish_reason:
            self._end, self._error, self._num_tokens = time.monotonic(), error, num_tokens
            self.finish_reason = reason
            self._changed.set()

    def answer(self) -> Answer:
        """Return what is there now."""
        reason = self.finish_reason
        pieces = self._pieces[:]
        end = self._end if reason and self._end else time.monotonic()
        text = self._join(pieces)
        return Answer(
            text=text if reason else text.rstrip("\ufffd"),  # half of a character of several bytes
            num_tokens=self._num_tokens or len(pieces),
            first_token_s=None if self._first is None else self._first - self._start,
            elapsed_s=end - self._start,
            finish_reason=reason,
            error=self._error,
        )


def follow(
    panes: Sequence[Pane],
    work: Sequence[Callable[[], None]],
    stop: threading.Event,
    changed: threading.Event,
    activity: Activity,
    hang_up: Sequence[Callable[[], None]] = (),
) -> Iterator[tuple[Answer, ...]]:
    """Run `work` in threads and yield the panes' answers until all of it is done.

    However the iteration ends, `stop` is set, `hang_up` is called, and every thread has returned before this function
    does.
    """

    def run(one: Callable[[], None]) -> None:
        try:
            one()
        except Exception as error:  # whatever an engine throws becomes a sentence on the page
            for pane in panes:
                pane.finish("error", _sentence(error))
        finally:
            changed.set()

    threads = [threading.Thread(target=run, args=(one,), name="answer", daemon=True) for one in work]
    activity.begin()
    completed = False
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            changed.wait(FRAME_SECONDS)
            changed.clear()
            if all(pane.finish_reason for pane in panes):
                break
            yield tuple(pane.answer() for pane in panes)
        completed = True
    finally:
        stop.set()
        for end in hang_up:
            end()
        for thread in threads:
            thread.join()
        activity.end(stopped=not completed)
    for pane in panes:
        pane.finish("error", "the model gave no answer")
    yield tuple(pane.answer() for pane in panes)


def _sentence(error: Exception) -> str:
    """What a visitor is told; details stay in the server's log."""
    if isinstance(error, BadInputError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return "there is not enough memory for this question; use fewer tiles or tokens"
    import traceback

    traceback.print_exception(error)
    return f"the model failed ({type(error).__name__}); the operator's log says more"
