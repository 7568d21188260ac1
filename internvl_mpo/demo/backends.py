"""Who answers: two checkpoints, one base with a LoRA adapter, or two servers. All stream both sides at the same time.

    for base, mpo in backend.stream(question):      # Answers so far, until both have a finish_reason
        ...

An answer is written by threads of the backend and read here. Closing the generator stops the threads and waits for
them, so nothing goes on computing for a visitor who has left. Models are loaded with the first question, once, behind
a lock; the page asks for one answer at a time per device.
"""

import contextlib
import http.client
import json
import os
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

from internvl_mpo.demo.conversation import SIDES, Answer, Message
from internvl_mpo.demo.pictures import Cutter
from internvl_mpo.demo.settings import DemoSettings
from internvl_mpo.engines import Sampling
from internvl_mpo.engines.http_engine import data_uri
from internvl_mpo.errors import BadInputError

FRAME_SECONDS = 0.08  # between two pictures of the page: twelve a second look fluent and cost next to nothing
SILENCE_SECONDS = 120.0  # a server that says nothing for so long has hung up

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
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


class Backend(Protocol):
    """Anything that answers both sides.

    `activity` counts what runs; `concurrency` is how many questions may be answered at once.
    """

    activity: "Activity"
    concurrency: int

    def stream(self, question: Question) -> Iterator[tuple[Answer, Answer]]:
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
) -> Iterator[tuple[Answer, ...]]:
    """Run `work` in threads and yield the panes' answers until all of it is done.

    However the iteration ends, `stop` is set and every thread has returned before this function does.
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
        for thread in threads:
            thread.join()
        activity.end(stopped=not completed)
    for pane in panes:
        pane.finish("error", "the model gave no answer")
    yield tuple(pane.answer() for pane in panes)


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
    """

    concurrency = 1

    def __init__(self, base: str, mpo: str | None = None, *, adapter: str | None = None, **options: Any):
        self.activity = Activity()
        self._base, self._mpo, self._adapter, self._options = base, mpo, adapter, options
        self._models = Lazy(self._load)
        self._cutter = Lazy(self._load_cutter)

    def stream(self, question: Question) -> Iterator[tuple[Answer, Answer]]:
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
        from internvl_mpo.demo.generation import ChatModel

        if self._adapter:
            return [ChatModel(self._base, adapter=self._adapter, **self._options)]
        return [ChatModel(path, **self._options) for path in (self._base, self._mpo)]

    def _load_cutter(self) -> Cutter:
        from internvl_mpo.demo.generation import load_cutter

        return load_cutter(self._base)


def _public_name(path: str) -> str:
    """A model's name for pages, votes and API: of an absolute path only the last part."""
    return Path(path).name if Path(path).is_absolute() else path


def _job(
    model: Any,
    panes: list[Pane],
    chats: list[list[Message]],
    question: Question,
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


class Servers:
    """Two OpenAI-compatible servers (vLLM, SGLang, LMDeploy, `internvl_mpo.engines.serve`).

    Args:
        urls: base URL by side.
        models: served names by side; None asks the server.
        api_key: sent as a bearer token.

    Raises:
        BadInputError: a URL is malformed.
    """

    concurrency = 16

    def __init__(self, urls: dict[str, str], models: dict[str, str | None], api_key: str | None = None):
        self.activity = Activity()
        self._servers = {side: _Server(urls[side], models[side], api_key) for side in SIDES}

    def stream(self, question: Question) -> Iterator[tuple[Answer, Answer]]:
        """See `Backend.stream`."""
        stop, changed = threading.Event(), threading.Event()
        panes = [Pane("".join, changed, self.activity) for _ in SIDES]
        work = [
            lambda side=side, pane=pane: self._servers[side].answer(question.chats[side], question, pane, stop)
            for side, pane in zip(SIDES, panes, strict=True)
        ]
        yield from follow(panes, work, stop, changed, self.activity)

    def names(self) -> dict[str, Names]:
        """See `Backend.names`."""
        return {side: Names(server.model or server.url, None) for side, server in self._servers.items()}

    def cutter(self) -> Cutter:
        """InternVL2's way; what the server does cannot be asked."""
        return Cutter()

    def load(self) -> None:
        """Ask both servers for their model's name.

        Raises:
            BadInputError: one of them does not answer.
        """
        for server in self._servers.values():
            server.find_model()


class _Server:
    """One base URL."""

    def __init__(self, url: str, model: str | None, api_key: str | None):
        parts = urlsplit(url if "//" in url else f"http://{url}")
        try:
            self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        except ValueError as error:
            raise BadInputError(f"'{url}' is no base URL ({error}); give one like http://localhost:8000/v1") from error
        if parts.scheme not in ("http", "https") or not self._host:
            raise BadInputError(f"'{url}' is no base URL; give one like http://localhost:8000/v1")
        path = parts.path.rstrip("/")
        self._path = path if path.endswith("/v1") else f"{path}/v1"
        self.url, self.model = url, model
        self._headers = {"Content-Type": "application/json", "User-Agent": "internvl-mpo"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def find_model(self) -> str:
        """Return the name of the model, the first the server lists unless one was given."""
        if self.model is None:
            try:
                with contextlib.closing(self._connect()) as connection:
                    connection.request("GET", f"{self._path}/models", headers=self._headers)
                    self.model = json.loads(connection.getresponse().read())["data"][0]["id"]
            except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
                raise BadInputError(f"{self.url} does not answer as a server should ({error})") from error
        return self.model

    def answer(self, chat: list[Message], question: Question, pane: Pane, stop: threading.Event) -> None:
        """Fill a pane from a stream of server-sent events; a server that cannot stream is asked for all at once."""
        try:
            payload = {
                "model": self.find_model(),
                "messages": [_as_json(message) for message in chat],
                "temperature": question.sampling.temperature,
                "max_tokens": question.sampling.max_new_tokens,
                "seed": question.seed,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            with contextlib.closing(self._connect()) as connection:
                response = self._post(connection, payload)
                if response.status == 400 and b"stream" in (body := response.read()):
                    plain = {key: value for key, value in payload.items() if not key.startswith("stream")}
                    response = self._post(connection, plain)
                elif response.status == 400:
                    raise BadInputError(f"{self.url} answers 400: {body[:200].decode('utf-8', 'replace')}")
                if response.status != 200:
                    text = response.read(200).decode("utf-8", "replace")
                    raise BadInputError(f"{self.url} answers {response.status}: {text}")
                if "event-stream" in response.headers.get("Content-Type", ""):
                    self._read_stream(response, pane, stop)
                else:
                    whole = json.loads(response.read())
                    choice = whole["choices"][0]
                    pane.add(choice["message"]["content"])
                    count = (whole.get("usage") or {}).get("completion_tokens")
                    pane.finish(choice.get("finish_reason") or "stop", num_tokens=count)
        except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
            pane.finish("error", str(error) if isinstance(error, BadInputError) else f"{self.url}: {error}")

    def _post(self, connection: http.client.HTTPConnection, payload: dict[str, Any]) -> http.client.HTTPResponse:
        connection.request("POST", f"{self._path}/chat/completions", json.dumps(payload).encode(), self._headers)
        return connection.getresponse()

    def _read_stream(self, response: http.client.HTTPResponse, pane: Pane, stop: threading.Event) -> None:
        """Take the pieces as they come. Leaving closes the connection, upon which a server stops generating."""
        reason, count = "", None
        for line in response:
            if stop.is_set():
                pane.finish("stopped")
                return
            name, _, data = line.decode("utf-8", "replace").strip().partition(":")
            if name != "data":
                continue
            if data.strip() == "[DONE]":
                break
            event = json.loads(data)
            if "error" in event:
                raise BadInputError(f"{self.url}: {event['error']}")
            count = (event.get("usage") or {}).get("completion_tokens", count)
            for choice in event.get("choices", [])[:1]:
                if piece := (choice.get("delta") or {}).get("content"):
                    pane.add(piece)
                reason = choice.get("finish_reason") or reason
        if not reason:
            raise BadInputError(f"{self.url} broke off in the middle of its answer")
        pane.finish(reason, num_tokens=count)

    def _connect(self) -> http.client.HTTPConnection:
        if self._secure:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(self._host, self._port, timeout=SILENCE_SECONDS, context=context)
        return http.client.HTTPConnection(self._host, self._port, timeout=SILENCE_SECONDS)


def _as_json(message: Message) -> dict[str, Any]:
    """One message in OpenAI's form, pictures as data URIs before the text."""
    if not message.images:
        return {"role": message.role, "content": message.text}
    pictures = [{"type": "image_url", "image_url": {"url": data_uri(picture.open())}} for picture in message.images]
    text = message.text.replace("<image>\n", "").replace("<image>", "")
    return {"role": message.role, "content": [*pictures, {"type": "text", "text": text}]}


def _sentence(error: Exception) -> str:
    """What a visitor is told; details stay in the server's log."""
    if isinstance(error, BadInputError):
        return str(error)
    if type(error).__name__ == "OutOfMemoryError":
        return "there is not enough memory for this question; use fewer tiles or tokens"
    import traceback

    traceback.print_exception(error)
    return f"the model failed ({type(error).__name__}); the operator's log says more"


def make_backend(settings: DemoSettings) -> Backend:
    """Return who answers, by the settings; nothing is loaded yet."""
    if settings.base_url:
        return Servers(
            {"base": settings.base_url, "mpo": settings.mpo_url},
            {"base": settings.base, "mpo": settings.mpo},
            os.environ.get(settings.api_key_env),
        )
    options = {"device": settings.device, "dtype": settings.dtype, "four_bit": settings.four_bit}
    return LocalModels(settings.base, settings.mpo, adapter=settings.adapter, **options)
