"""Connections to several servers: who answers, who is slow, when to ask again."""

import contextlib
import functools
import http.client
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from internvl_mpo.engines import StopSign
from internvl_mpo.errors import BadInputError
from internvl_mpo.settings import holds_password

FAULTS = (OSError, http.client.HTTPException, ValueError, KeyError, IndexError)
MAX_ANSWER_BYTES = 64 << 20


@dataclass
class Answer:
    """What a server answers, to be read while `ServerPool.exchange` lasts.

    Attributes:
        status: of HTTP.
        headers: of HTTP.
        parts: the body as it comes.
    """

    status: int
    headers: Message
    parts: Iterator[bytes]

    @property
    def is_stream(self) -> bool:
        """Whether the body is server-sent events."""
        return self.headers.get_content_type() == "text/event-stream"

    @functools.cached_property
    def content(self) -> bytes:
        """The whole body."""
        return b"".join(self.parts)


class ServerPool:
    """One base URL, how busy it is, and its connections that are free."""

    def __init__(self, url: str):
        if holds_password(url, is_url=True):  # it would be printed, and saved with the settings
            raise BadInputError(
                "the base URL holds a password; take it out and give it by --api_key_env instead; "
                "an '@' of the path is written %40"
            )
        try:
            parts = urlsplit(url if "//" in url else f"http://{url}")
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("no http(s) host")
            self.host, self.port = parts.hostname, parts.port
        except ValueError as error:
            raise BadInputError(f"'{url}' is no base URL ({error}); give one like http://localhost:8000/v1") from error
        self.url = url
        self.streams = True  # until it says otherwise
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
                if not is_readable(connection.sock):
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

    @contextlib.contextmanager
    def exchange(
        self,
        path: str,
        body: bytes | None,
        headers: dict[str, str],
        *,
        timeout: float,
        silence: float,
        sign: StopSign,
    ) -> Iterator[Answer]:
        """Send one request and yield what comes back, as it comes.

        Args:
            path: behind the base URL.
            body: of a POST; None is a GET.
            headers: of the request.
            timeout: seconds it may take all together.
            silence: seconds the server may say nothing.
            sign: breaks it off.

        Raises:
            OSError, HTTPException, ValueError: the server is not there, breaks off, takes too long or says too much.
        """
        deadline = time.monotonic() + timeout
        connection = self.take(timeout)
        sock = connection.sock

        def wait() -> None:  # a server that drips bytes must not hold the thread for ever
            if (left := deadline - time.monotonic()) <= 0:
                raise TimeoutError
            sock.settimeout(min(left, silence))

        def parts() -> Iterator[bytes]:
            size = 0
            while response.length != 0 and not response.isclosed():
                wait()
                part = response.read1(1 << 16)
                if (size := size + len(part)) > MAX_ANSWER_BYTES:
                    raise ValueError(f"the answer has more than {MAX_ANSWER_BYTES >> 20} MB")
                yield part
            if response.length:
                raise http.client.IncompleteRead(b"", response.length)

        try:
            with breaking_off(sock, sign):
                wait()
                connection.request("GET" if body is None else "POST", self.path + path, body, headers)
                wait()
                response = connection.getresponse()
                yield Answer(response.status, response.headers, parts())
        except TimeoutError as error:
            connection.close()
            late = time.monotonic() >= deadline
            reason = f"no complete answer in {timeout:g} s" if late else f"nothing came for {silence:g} s"
            raise TimeoutError(reason) from error
        except BaseException:
            connection.close()
            raise
        is_read = response.length == 0 or response.isclosed()
        response.close()
        if is_read and not response.will_close:
            self._free.append(connection)
        else:
            connection.close()

    def close(self) -> None:
        """Close the connections that are free."""
        with contextlib.suppress(IndexError):
            while connection := self._free.pop():
                connection.close()


@contextlib.contextmanager
def breaking_off(sock: socket.socket, sign: StopSign) -> Iterator[None]:
    """Let a stop sign end what is done on a socket meanwhile; a caller that goes must not wait for its reply."""

    def end() -> None:
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

    with sign.wakes(end):
        yield


def seconds_to_wait(value: str) -> float:
    """Seconds a Retry-After header asks for, given as a number or as a date; 0 where there is none."""
    if value.strip().isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0


def is_readable(sock: socket.socket) -> bool:
    """Whether reading would not wait: between two requests only a closed connection has something to say."""
    with selectors.DefaultSelector() as selector:
        selector.register(sock, selectors.EVENT_READ)
        return bool(selector.select(0))


class Pace:
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
