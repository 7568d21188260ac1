"""The engine behind a URL: any server that speaks OpenAI's chat completions (vLLM, SGLang, LMDeploy, `engines.serve`).

One request per reply, each with its own seed, since servers disagree about `n`. Pictures travel as data URIs. A reply
is asked for again, later and later, when the server is busy, breaks, stalls or talks nonsense; after the last attempt
it comes back with the error. Standard library only.
"""

import base64
import contextlib
import http.client
import io
import json
import random
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from internvl_mpo.engines import Reply, Request, chat_messages
from internvl_mpo.errors import BadInputError

RETRIED_STATUS = frozenset({408, 409, 425, 429, *range(500, 600)})  # proxies have codes of their own above 504
REFUSED_STATUS = frozenset({400, 413, 422})  # the request is at fault: the server is well, every other would refuse too
MAX_WAIT_SECONDS = 60.0
_MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp", ".gif": "image/gif"}


class HttpEngine:
    """Answers requests through one or several servers.

    Args:
        base_urls: one URL or several, with or without `/v1`; the least busy one gets the next request.
        model: name the servers know the model by; None asks the first server.
        concurrency: requests in flight at the same time.
        api_key: sent as a bearer token.
        timeout: seconds one attempt may take from connecting to the last byte.
        max_attempts: how often a reply is asked for.
        backoff: seconds before the second attempt; doubles each time, half of it random, up to a minute.
        requests_per_minute: most requests sent per minute; None is no limit.

    Raises:
        BadInputError: a URL is malformed, or no server answers.
    """

    name = "http"
    revision = None

    def __init__(
        self,
        base_urls: str | Sequence[str],
        model: str | None = None,
        *,
        concurrency: int = 64,
        api_key: str | None = None,
        timeout: float = 600.0,
        max_attempts: int = 6,
        backoff: float = 1.0,
        requests_per_minute: float | None = None,
    ):
        urls = [base_urls] if isinstance(base_urls, str) else list(base_urls)
        if not urls or concurrency < 1 or max_attempts < 1:
            raise BadInputError("the http engine needs a base_url, and concurrency and max_attempts of at least 1")
        self._servers = [_Server(url) for url in urls]
        self._headers = {"Content-Type": "application/json", "User-Agent": "internvl-mpo"}
        if api_key and api_key.strip():  # a line break from the file the key was read from would be shown in errors
            self._headers["Authorization"] = f"Bearer {api_key.strip()}"
        self.concurrency, self.timeout = concurrency, timeout
        self.max_attempts, self.backoff = max_attempts, backoff
        self._pace = _Pace(requests_per_minute)
        self._lock = threading.Lock()
        self._failures_in_row = 0
        names = self._served_models()
        if not names and not model:
            raise BadInputError(f"{urls[0]} lists no model; give the model's name as --model")
        self.model_id = model or names[0]
        if names and model and model not in names:
            raise BadInputError(f"{urls[0]} serves {', '.join(names)}, not '{model}'; give one of these as --model")

    def generate(self, requests: Iterable[Request], done: Collection[str] = ()) -> Iterator[Reply]:
        """Yield replies as they come; see `Engine.generate`."""
        stream = (request for request in requests if request.id not in done)
        self._failures_in_row = 0
        run = _Run()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="http-engine")
        pending: set[Future[Reply]] = set()
        try:
            for request in stream:
                pending.add(pool.submit(self._answer, request, run))
                if len(pending) >= 2 * self.concurrency:  # the next request is ready when a thread is
                    finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in finished)
            while pending:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        finally:
            run.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            for server in self._servers:
                server.close()

    def _answer(self, request: Request, run: "_Run") -> Reply:
        try:
            body = json.dumps(chat_payload(request, self.model_id)).encode()
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            return Reply(id=request.id, error=str(error))
        error, status, num_asked = "", 0, 0
        jitter = random.Random(request.seed)
        for attempt in range(self.max_attempts):
            if self._failures_in_row > 2 * self.concurrency + 8:
                error = f"not asked, the last {self._failures_in_row} requests all failed {error}".rstrip()
                break
            self._pace.wait(run.stopped)
            if run.stopped.is_set():
                error = "the run was stopped"
                break
            server = self._pick()
            num_asked += 1
            try:
                status, answer, retry_after = self._post(server, "/chat/completions", body, run)
                if status == 200:
                    reply = _read_reply(request, answer)
                    self._release(server, failed=False)
                    self._failures_in_row = 0
                    return reply
                error = f"HTTP {status}: {answer[:200].decode('utf-8', 'replace')}"
            except _FAULTS as fault:
                status, retry_after = 0, 0.0
                error = f"{type(fault).__name__}: {fault}"
            self._release(server, failed=status not in REFUSED_STATUS and status != 429)
            if status in REFUSED_STATUS:
                break
            if status and status not in RETRIED_STATUS and len(self._servers) == 1:
                break  # with several, one that has another model or key must not lose what the others can answer
            if attempt + 1 < self.max_attempts:
                run.stopped.wait(self._pause(attempt, retry_after, jitter.random()))
        if status not in REFUSED_STATUS:
            with self._lock:
                self._failures_in_row += 1
        return Reply(id=request.id, error=f"{error} (after {num_asked} attempts)")

    def _pause(self, attempt: int, retry_after: float, jitter: float) -> float:
        """Return the seconds between an attempt, counted from 0, and the next; jitter is in [0, 1)."""
        backoff = min(MAX_WAIT_SECONDS, self.backoff * 2**attempt) * (0.5 + 0.5 * jitter)
        return min(MAX_WAIT_SECONDS, max(backoff, retry_after))

    def _pick(self) -> "_Server":
        with self._lock:
            now = time.monotonic()
            server = min(self._servers, key=lambda server: (server.resting_until > now, server.in_flight))
            server.in_flight += 1
            return server

    def _release(self, server: "_Server", failed: bool) -> None:
        with self._lock:
            server.in_flight -= 1
            server.resting_until = time.monotonic() + 5.0 if failed else 0.0

    def _post(
        self, server: "_Server", path: str, body: bytes | None, run: "_Run | None" = None
    ) -> tuple[int, bytes, float]:
        """Send one request and return status, body and Retry-After in seconds; a run that is stopped ends it."""
        deadline = time.monotonic() + self.timeout
        connection = server.take(self.timeout)
        sock = connection.sock
        with run.watch(sock) if run else contextlib.nullcontext():
            try:
                sock.settimeout(self._left(deadline))
                connection.request("GET" if body is None else "POST", server.path + path, body, self._headers)
                sock.settimeout(self._left(deadline))
                response = connection.getresponse()
                parts = []
                while response.length != 0 and not response.isclosed():
                    sock.settimeout(self._left(deadline))  # a server that drips bytes must not hold the thread for ever
                    parts.append(response.read1(1 << 16))
                response.close()  # read to the end or not, the connection is free for the next request only then
                if response.length:
                    raise http.client.IncompleteRead(b"".join(parts), response.length)
            except TimeoutError as error:
                connection.close()
                raise TimeoutError(f"no complete answer in {self.timeout:g} s") from error
            except BaseException:
                connection.close()
                raise
        if not response.will_close:
            server.give_back(connection)
        return response.status, b"".join(parts), _retry_after(response.headers.get("Retry-After", ""))

    def _left(self, deadline: float) -> float:
        """Return the seconds an attempt has left.

        Raises:
            TimeoutError: none.
        """
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _served_models(self) -> list[str]:
        """Names the servers list; waits for a server that is still starting only as long as a reply may take."""
        errors = []
        for server in self._servers:
            try:
                status, answer, _ = self._post(server, "/models", None)
                if status == 200:
                    return [entry["id"] for entry in json.loads(answer)["data"]]
                errors.append(f"{server.url} answers {status}")
            except (*_FAULTS, TypeError) as fault:
                errors.append(f"{server.url} does not answer ({fault})")
        raise BadInputError(f"{'; '.join(errors)}; start a server there or give another --base_url")


_FAULTS = (OSError, http.client.HTTPException, ValueError, KeyError, IndexError)


class _Run:
    """One call of `generate`: what it has under way, and how to end that.

    A caller that goes, by Ctrl-C or for a full disk, would else wait at the interpreter's end for replies that nobody
    reads.
    """

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def watch(self, sock: socket.socket) -> Iterator[None]:
        """Let `stop` break off what is done on the socket meanwhile."""
        with self._lock:
            if self.stopped.is_set():
                raise ConnectionAbortedError("the run was stopped")
            self._sockets.add(sock)
        try:
            yield
        finally:
            with self._lock:
                self._sockets.discard(sock)

    def stop(self) -> None:
        """End pauses at once and requests that are open."""
        self.stopped.set()
        with self._lock:
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)


class _Server:
    """One base URL, how busy it is, and its connections that are free."""

    def __init__(self, url: str):
        parts = urlsplit(url if "//" in url else f"http://{url}")
        try:
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("no http(s) host")
            self.host, self.port = parts.hostname, parts.port
        except ValueError as error:
            raise BadInputError(f"'{url}' is no base URL ({error}); give one like http://localhost:8000/v1") from error
        self.url = url
        self.secure = parts.scheme == "https"
        path = parts.path.rstrip("/")
        self.path = path if path.endswith("/v1") else f"{path}/v1"
        self.in_flight = 0
        self.resting_until = 0.0
        self._free: list[http.client.HTTPConnection] = []

    def take(self, timeout: float) -> http.client.HTTPConnection:
        """Return an open connection: of the free ones the last used that the server has not closed, or a new one.

        Threads share them, since one to every server for each thread would be more than a process may open. Servers
        close what is idle for seconds; a request on such a connection would look like a broken server.
        """
        with contextlib.suppress(IndexError):
            while connection := self._free.pop():
                if not _is_readable(connection.sock):
                    return connection
                connection.close()
        if self.secure:
            connection = http.client.HTTPSConnection(
                self.host, self.port, timeout=timeout, context=ssl.create_default_context()
            )
        else:
            connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        connection.connect()
        return connection

    def give_back(self, connection: http.client.HTTPConnection) -> None:
        """Take back a connection whose answer has been read to the end."""
        self._free.append(connection)

    def close(self) -> None:
        """Close the connections that are free."""
        with contextlib.suppress(IndexError):
            while connection := self._free.pop():
                connection.close()


def _retry_after(value: str) -> float:
    """Seconds a Retry-After header asks for, given as a number or as a date; 0 where there is none."""
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def _is_readable(sock: socket.socket) -> bool:
    """Whether reading would not wait: between two requests only a closed connection has something to say."""
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(0))


class _Pace:
    """Spaces requests evenly."""

    def __init__(self, per_minute: float | None):
        self.seconds = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self, stopped: threading.Event) -> None:
        """Return when the next request may be sent, or the run is stopped."""
        if not self.seconds:
            return
        with self._lock:
            moment = max(self._next, time.monotonic())
            self._next = moment + self.seconds
        stopped.wait(max(0.0, moment - time.monotonic()))


def chat_payload(request: Request, model: str) -> dict[str, Any]:
    """Return the body of a chat completion; pictures stand where the question has `<image>`, or before it.

    Raises:
        OSError, ValueError: a picture cannot be read, or placeholders and pictures differ in number.
    """
    messages: list[dict[str, Any]] = chat_messages(
        request.question, len(request.images), request.history, request.system
    )
    marks = sum(message["content"].count("<image>") for message in messages)
    if marks != len(request.images):
        raise ValueError(f"{marks} <image> placeholders for {len(request.images)} pictures")
    images = iter(request.images)
    for message in messages:
        message["content"] = _content(message["content"], images)
    sampling = request.sampling
    payload = {
        "model": model,
        "messages": messages,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "seed": request.seed,
    }
    if sampling.top_k:
        payload["top_k"] = sampling.top_k
    if request.prefix:
        payload["messages"].append({"role": "assistant", "content": request.prefix})
        payload |= {"continue_final_message": True, "add_generation_prompt": False}
    return payload


def _content(text: str, images: Iterator[Any]) -> str | list[dict[str, Any]]:
    """Text as it is, or as parts where `<image>` marks take the next pictures."""
    first, *others = text.split("<image>")
    if not others:
        return text
    content: list[dict[str, Any]] = [{"type": "text", "text": first.strip("\n")}] if first.strip() else []
    for piece in others:
        content.append({"type": "image_url", "image_url": {"url": data_uri(next(images))}})
        if piece.strip():
            content.append({"type": "text", "text": piece.strip("\n")})
    return content


def data_uri(image: Any) -> str:
    """Return a picture as a data URI; files of a common type keep their bytes."""
    if isinstance(image, Image.Image):
        return _encode(image)
    return _file_data_uri(str(image))


@lru_cache(maxsize=128)  # the samples of one question follow each other
def _file_data_uri(path: str) -> str:
    mime = _MIME.get(Path(path).suffix.lower())
    with Image.open(path) as opened:  # also finds files that are no pictures before they travel
        if mime is None or Image.MIME.get(opened.format) != mime:
            return _encode(opened)
    return f"data:{mime};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def _encode(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _read_reply(request: Request, answer: bytes) -> Reply:
    """Turn a chat completion into a reply.

    Raises:
        ValueError: it is not one.
    """
    try:
        completion = json.loads(answer)
        choice = completion["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
        tokens = int((completion.get("usage") or {}).get("completion_tokens") or 0)
        model = str(completion.get("model") or "")
    except (AttributeError, LookupError, TypeError, RecursionError) as error:  # JSON, but of another shape
        raise ValueError(f"the answer is no chat completion ({type(error).__name__}: {error})") from error
    if not isinstance(text, str):
        raise ValueError("the answer holds no text")
    if reason not in ("stop", "length"):
        raise ValueError(f"finish_reason is {reason!r}")
    # JSON can hold half of a character outside the basic plane, which no UTF-8 file can
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Reply(
        id=request.id,
        text=text if request.prefix else text.strip(),
        finish_reason=reason,
        num_tokens=tokens,
        served_model=model,
    )
