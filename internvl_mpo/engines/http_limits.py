"""What a connection may take: places, time before a request is whole, time to take what is written to it.

uvicorn limits none of these; it lets a protocol of one's own do so.
"""

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from internvl_mpo.engines.chat_format import error_body

MAX_CONNECTIONS = 512
HEAD_SECONDS = 20.0  # until the head of a request is whole; one that drips it has no more
TAKE_SECONDS = 30.0  # until a client that does not read is hung up


class LimitedProtocol(H11Protocol):
    """A connection of uvicorn with an end to its patience."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Take a connection, or turn it away where there is no place."""
        self._head_timer: asyncio.TimerHandle | None = None
        self._take_timer: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self._refuse(503, "there are too many connections; try again in a moment")
        else:
            self._watch_head()

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request."""
        super().data_received(data)
        self._watch_head()

    def on_response_complete(self) -> None:
        """A response has been written; the next request may come."""
        super().on_response_complete()
        self._watch_head()

    def pause_writing(self) -> None:
        """The client does not take what is written."""
        super().pause_writing()
        self._take_timer = self.loop.call_later(TAKE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """The client takes it again."""
        super().resume_writing()
        if self._take_timer:
            self._take_timer.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        for timer in (self._head_timer, self._take_timer):
            if timer:
                timer.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP; uvicorn calls it."""
        self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        """Answer without the application, as long as nothing else has been answered, and hang up."""
        if self.cycle is None or self.cycle.response_complete:
            body = error_body(status, message)
            head = f"HTTP/1.1 {status} Error\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            self.transport.write(head.encode() + b"Connection: close\r\n\r\n" + body)
        self.transport.close()

    def _watch_head(self) -> None:
        """Hang up unless a whole head comes in time; what comes of it in between does not count."""
        under_way = self.cycle is not None and not self.cycle.response_complete
        if under_way and self._head_timer:
            self._head_timer.cancel()
            self._head_timer = None
        elif not under_way and self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self.transport.abort)
