"""The two models of the demo in this process: two checkpoints, or one base with an adapter."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from internvl_mpo.demo.conversation import SIDES, Answer, Message
from internvl_mpo.demo.pictures import Cutter
from internvl_mpo.demo.streaming import Activity, Names, Pane, VisitorQuestion, follow
from internvl_mpo.errors import BadInputError
from internvl_mpo.families.registry import family_of_source

T = TypeVar("T")


class Turns:
    """Lets threads compute one step each in turn.

    Two models that step at once on one device finish no sooner, and Python's lock makes them wait for each other at
    every layer; in turn, the second pane costs what its model costs.
    """

    def __init__(self, num_threads: int):
        self._line = deque(range(num_threads))
        self._moved = threading.Condition()

    def wait(self, me: int) -> None:
        """Return when it is this thread's turn."""
        with self._moved:
            self._moved.wait_for(lambda: self._line[0] == me)

    def step_done(self, me: int) -> None:
        """Let the others take a step each, and return when it is this thread's turn again."""
        with self._moved:
            if len(self._line) > 1:
                self._line.rotate(-1)
                self._moved.notify_all()
                self._moved.wait_for(lambda: self._line[0] == me)

    def leave(self, me: int) -> None:
        """Take this thread out of the line."""
        with self._moved:
            self._line.remove(me)
            self._moved.notify_all()


class Lazy(Generic[T]):
    """Something made at first use, once, however many ask."""

    def __init__(self, make: Callable[[], T]):
        self._make, self._lock, self._value = make, threading.Lock(), None

    def get(self) -> T:
        """Return it, made now if need be."""
        with self._lock:
            if self._value is None:
                self._value = self._make()
            return self._value

    @property
    def is_there(self) -> bool:
        """Whether it has been made."""
        return self._value is not None


class LocalModels:
    """Two checkpoints in this process, or one base with a LoRA adapter answered in one mixed batch.

    Two checkpoints run in a thread each. With an adapter there is one copy of the weights, and one batch of two rows of
    which only the second passes through the adapter.

    Args:
        base: model folder or Hub id.
        mpo: the same for the other side; None with an adapter.
        adapter: LoRA folder or Hub id.
        options: `device`, `dtype`, `four_bit` of `ChatModel`.

    Raises:
        BadInputError: a folder holds a model that no family takes.
    """

    concurrency = 1

    def __init__(self, base: str, mpo: str | None = None, *, adapter: str | None = None, **options: Any):
        for source in filter(None, (base, mpo)):
            _check_source(source)
        self.activity = Activity()
        self._base, self._mpo, self._adapter, self._options = base, mpo, adapter, options
        self._models = Lazy(self._load)
        self._cutter = Lazy(self._load_cutter)

    def stream(self, question: VisitorQuestion) -> Iterator[tuple[Answer, Answer]]:
        """See `Backend.stream`."""
        models = self._models.get()
        stop, changed = threading.Event(), threading.Event()
        panes = [Pane(model.decode, changed, self.activity) for model in (models if len(models) > 1 else models * 2)]
        if self._adapter:
            from internvl_mpo.demo.generation import BASE

            chats = [question.chats[side] for side in SIDES]
            work = [_job(models[0], panes, chats, question, stop, adapters=[BASE, "default"])]
        else:
            turns = Turns(len(SIDES))
            work = [
                _job(models[me], [panes[me]], [question.chats[side]], question, stop, turns, me)
                for me, side in enumerate(SIDES)
            ]
        yield from follow(panes, work, stop, changed, self.activity)

    def names(self) -> dict[str, Names]:
        """See `Backend.names`; revisions are known once the models are loaded."""
        revisions = [model.revision for model in self._models.get()] if self._models.is_there else [None]
        base = _public_name(self._base)
        other = f"{base} + {_public_name(self._adapter)}" if self._adapter else _public_name(self._mpo)
        return {"base": Names(base, revisions[0]), "mpo": Names(other, revisions[-1])}

    def cutter(self) -> Cutter:
        """See `Backend.cutter`."""
        return self._models.get()[0].cutter if self._models.is_there else self._cutter.get()

    def load(self) -> None:
        """See `Backend.load`."""
        self._models.get()

    def _load(self) -> list[Any]:
        from internvl_mpo.demo.family_model import load_chat_model

        if self._adapter:
            return [load_chat_model(self._base, adapter=self._adapter, **self._options)]
        return [load_chat_model(path, **self._options) for path in (self._base, self._mpo)]

    def _load_cutter(self) -> Cutter:
        from internvl_mpo.demo.family_model import load_cutter

        return load_cutter(self._base)


def _check_source(source: str) -> None:
    """Refuse a folder that no class here takes; what is not here is found when it is loaded.

    Raises:
        BadInputError: naming its family, those there are, and the way out.
    """
    if (Path(source) / "config.json").is_file():
        try:
            family_of_source(source)
        except BadInputError as error:
            raise BadInputError(
                f"{error}; a server can show it in the demo (vllm serve, transformers serve): give its address as "
                "base_url or mpo_url"
            ) from error


def _public_name(path: str) -> str:
    """A model's name for pages, votes and API: of an absolute path only the last part."""
    return Path(path).name if Path(path).is_absolute() else path


def _job(
    model: Any,
    panes: list[Pane],
    chats: list[list[Message]],
    question: VisitorQuestion,
    stop: threading.Event,
    turns: Turns | None = None,
    me: int = 0,
    adapters: list[str] | None = None,
) -> Callable[[], None]:
    """One call of a model that fills a pane per row, step by step in turn with the other model's."""

    def put(tokens: list[int]) -> None:
        for pane, token in zip(panes, tokens, strict=True):
            if pane.finish_reason:
                continue  # this row has ended, the batch goes on
            pane.add(token)
            if model.has_ended(token):
                pane.finish("stop")
        if turns:
            turns.step_done(me)

    def work() -> None:
        try:
            if turns:
                turns.wait(me)
            model.generate(
                chats,
                sampling=question.sampling,
                seed=question.seed,
                max_tiles=question.max_tiles,
                adapters=adapters,
                put=put,
                stop=stop,
            )
        finally:
            if turns:
                turns.leave(me)
        for pane in panes:
            pane.finish("stopped" if stop.is_set() else "length")

    return work
