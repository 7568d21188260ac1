"""A backend without a model for the tests of the demo: it writes a script and counts as the real ones do."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

from internvl_mpo.demo.conversation import SIDES, Answer
from internvl_mpo.demo.pictures import Cutter
from internvl_mpo.demo.settings import DemoSettings
from internvl_mpo.demo.sharing import Shelf
from internvl_mpo.demo.streaming import Activity, Names, Pane, VisitorQuestion, follow
from internvl_mpo.demo.votes import VoteBox

REPLY = {
    "base": "We add: $3 + 4 = 7$.\n\nFinal answer: 7",
    "mpo": "We multiply: \\(3 \\cdot 4 = 12\\), that is \\[x = 12\\]\n\nFinal answer: 12",
}


class ScriptedBackend:
    """Answers "say: TEXT" with TEXT, everything else with `REPLY` and what it remembers of the conversation.

    Args:
        pause: seconds between two words.
    """

    concurrency = 1

    def __init__(self, pause: float = 0.0):
        self.pause, self.activity = pause, Activity()
        self.questions: list[VisitorQuestion] = []

    def stream(self, question: VisitorQuestion) -> Iterator[tuple[Answer, Answer]]:
        """See `Backend.stream`."""
        self.questions.append(question)
        stop, changed = threading.Event(), threading.Event()
        panes = [Pane("".join, changed, self.activity) for _ in SIDES]

        def write(side: str, pane: Pane) -> None:
            for word in self._reply(side, question).replace(" ", " \0").split("\0"):
                if stop.wait(self.pause) or stop.is_set():
                    pane.finish("stopped")
                    return
                pane.add(word)
            pane.finish("stop")

        work = [lambda side=side, pane=pane: write(side, pane) for side, pane in zip(SIDES, panes, strict=True)]
        yield from follow(panes, work, stop, changed, self.activity)

    def _reply(self, side: str, question: VisitorQuestion) -> str:
        messages = question.chats[side]
        _, said, text = messages[-1].text.partition("say:")
        if said:
            return text.strip()
        if "count" in messages[-1].text:
            return " ".join(str(number) for number in range(2000))
        earlier = sum(message.role == "user" for message in messages) - 1
        remembered = f"Earlier questions: {earlier}.\n\n" if earlier else ""
        return remembered + REPLY[side]

    def names(self) -> dict[str, Names]:
        """See `Backend.names`."""
        return {"base": Names("tiny/base", "r1"), "mpo": Names("tiny/mpo", "r2")}

    def cutter(self) -> Cutter:
        """See `Backend.cutter`."""
        return Cutter(side=32, num_image_token=4, max_tiles=6)

    def load(self) -> None:
        """Nothing is loaded."""


def finish(stream: Iterator[tuple[Answer, Answer]]) -> dict[str, Answer]:
    """Return the last answers of a stream by side."""
    *_, pair = stream
    return dict(zip(SIDES, pair, strict=True))


def settings_for(folder: Path, **changes) -> DemoSettings:
    """Return settings whose files stay in `folder`."""
    values = {
        "base": "tiny/base",
        "mpo": "tiny/mpo",
        "votes": str(folder / "votes"),
        "shared": str(folder / "shared"),
        "runs": [str(folder / "runs")],
        "port": 0,
        "max_upload_mb": 0.5,
        "max_megapixels": 1.0,
    }
    return DemoSettings(**{**values, **changes})


def make_page(folder: Path, backend: ScriptedBackend, **changes):
    """Return a page whose files stay in `folder`; GRADIO_TEMP_DIR must be folder/uploads."""
    from internvl_mpo.demo.examples import make_examples
    from internvl_mpo.demo.page import Page

    settings = settings_for(folder, **changes)
    votes = VoteBox(settings.votes)
    shelf = Shelf(settings.shared, settings.shared_days, settings.limits)
    return Page(backend, votes, shelf, settings, make_examples(folder / "examples"), folder / "uploads")


def wait_until(condition, seconds: float = 60.0) -> bool:
    """Return whether a condition came true in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return bool(condition())
