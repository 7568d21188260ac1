"""Connections to several servers: who answers, who is slow, when to ask again."""

import contextlib
import http.client
import selectors
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from internvl_mpo.errors import BadInputError

FAULTS = (OSError, http.client.HTTPException, ValueError, KeyError, IndexError)


class RequestRun:
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


class ServerPool:
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

    def give_back(self, connection: http.client.HTTPConnection) -> None:
        """Take back a connection whose answer has been read to the end."""
        self._free.append(connection)

    def close(self) -> None:
        """Close the connections that are free."""
        with contextlib.suppress(IndexError):
            while connection := self._free.pop():
                connection.close()


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
