"""OpenAI's chat completions as an ASGI application: bodies in, replies or streams of them out.

What a body may be is decided in `chat_format`, how long a client may take in `http_limits`; here is the conversation
between the two and the batching thread. Nothing a client sends ends in anything but an answer with one sentence.
"""

import asyncio
import contextlib
import dataclasses
import json
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from internvl_mpo.engines import Draft, Engine, Reply, Request
from internvl_mpo.engines.batching import Batcher, BusyError
from internvl_mpo.engines.chat_format import (
    asked_max_tokens,
    error_body,
    parse_body,
    read_requests,
    read_streaming,
    shown,
)
from internvl_mpo.errors import BadInputError

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

MAX_BODY_BYTES = 64 << 20
MAX_HELD_BYTES = 128 << 20  # bodies of all requests that are read or wait; who comes then is told to come back
SMALL_BODY_BYTES = 16 << 10  # is read at once; a larger one in a thread, so that nobody waits for it
BODY_SECONDS = 60.0  # until a body is whole


class RefusedError(Exception):
    """A request that is answered with an error; `args` are status and sentence."""


class ClientGoneError(Exception):
    """Nobody is there to be answered."""


class ChatApp:
    """Serves an engine.

    Args:
        engine: who answers. One that knows its `context` and `num_prompt_tokens` is asked nothing beyond it.
        name: of the model, as `/v1/models` lists it.
        batcher: hands requests to the engine.
    """

    def __init__(self, engine: Engine, name: str, batcher: Batcher):
        self.engine, self.model_name, self.batcher = engine, name, batcher
        self._held_bytes = 0
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="reader")  # a body and its pictures may be large

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        exchange = Exchange(receive, send)
        try:
            await self._answer(scope, exchange)
        except ClientGoneError:
            pass
        except RefusedError as refused:
            await exchange.refuse(*refused.args)
        except Exception as error:  # the server outlives what it cannot do; its operator is told what it was
            traceback.print_exc()
            await exchange.refuse(500, f"{type(error).__name__}: {error}")

    async def _answer(self, scope: Scope, exchange: "Exchange") -> None:
        served = {"/health": "GET", "/v1/models": "GET", "/v1/chat/completions": "POST"}
        path, method = scope["path"], scope["method"]
        if path not in served:
            raise RefusedError(404, f"no such path {shown(path)}")
        if method != served[path]:
            raise RefusedError(405, f"{path} takes {served[path]}, not {shown(method)}")
        if path == "/health":
            await exchange.send_json({"status": "ok"})
        elif path == "/v1/models":
            loaded = {"root": self.engine.model_id, "revision": self.engine.revision}
            await exchange.send_json({"object": "list", "data": [{"id": self.model_name, "object": "model", **loaded}]})
        else:
            with self._place() as grow:
                body = await exchange.read_body(scope["headers"], grow)
                if len(body) < SMALL_BODY_BYTES:
                    read = self._read(body)
                else:
                    read = await asyncio.get_running_loop().run_in_executor(self._readers, self._read, body)
                del body  # the pictures in it are held by the requests from here on
                await self._complete(exchange, *read)

    @contextlib.contextmanager
    def _place(self) -> Iterator[Callable[[int], None]]:
        """Let a request hold memory as it grows."""
        mine = 0

        def grow(size: int) -> None:
            nonlocal mine
            mine += size
            self._held_bytes += size
            if self._held_bytes > MAX_HELD_BYTES:
                raise RefusedError(503, "there are too many requests; try again in a moment")

        try:
            yield grow
        finally:
            self._held_bytes -= mine

    def _read(self, body: bytes) -> tuple[list[Request], bool, bool, int]:
        """Requests, whether to stream, whether to tell the usage, tokens of the prompt."""
        try:
            payload = parse_body(body)
            model = payload.get("model", self.model_name)
            if not isinstance(model, str):
                raise BadInputError(f"'model' is {shown(model)}; give a text")
            requests, streaming = read_requests(payload), read_streaming(payload)
            if model != self.model_name:
                raise RefusedError(404, f"'model' is {shown(model)}; this server has {self.model_name}")
            requests, num_tokens = self._fit(requests, asked_max_tokens(payload))
        except (ValueError, OSError) as error:
            raise RefusedError(400, str(error)) from error
        return requests, *streaming, num_tokens

    def _fit(self, requests: list[Request], asked: int | None) -> tuple[list[Request], int]:
        """Refuse what does not fit into the context; a client that names no length gets what is left of it."""
        context = getattr(self.engine, "context", None)
        if context is None:
            return requests, 0
        num_tokens = self.engine.num_prompt_tokens(requests[0])
        room = context - num_tokens
        if room < (asked or 1):
            raise BadInputError(
                f"the prompt has {num_tokens} tokens{' or more' if num_tokens > context else ''}; with max_tokens "
                f"{asked or 1} that is beyond the context of {context}"
            )
        sampling = requests[0].sampling
        sampling = dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        return [dataclasses.replace(request, sampling=sampling) for request in requests], num_tokens

    async def _complete(
        self, exchange: "Exchange", requests: list[Request], streamed: bool, tells_usage: bool, num_prompt_tokens: int
    ) -> None:
        """Answer with a chat completion, whole or streamed."""
        bell = _Bell(asyncio.get_running_loop())
        requests = [dataclasses.replace(request, draft=Draft(bell)) for request in requests]
        stream = _Stream(exchange, self.model_name) if streamed else None
        try:
            futures = self.batcher.submit(requests)
            async for _ in _growth(futures, bell, exchange):
                if stream:
                    await stream.send_texts([request.draft.text for request in requests])
            replies = [future.result() for future in futures]
        except BusyError as error:
            raise RefusedError(503, "there are too many requests; try again in a moment") from error
        finally:
            for request in requests:
                request.draft.stop()
        failed = next((reply.error for reply in replies if reply.error), None)
        if failed is not None:
            raise RefusedError(400, failed)
        usage = _usage(num_prompt_tokens, replies)
        if stream:
            await stream.finish(replies, usage if tells_usage else None)
        else:
            await exchange.send_json(self._completion(replies, usage))

    def _completion(self, replies: list[Reply], usage: dict[str, int]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": reply.text},
                "finish_reason": reply.finish_reason,
            }
            for index, reply in enumerate(replies)
        ]
        return {**_head("chat.completion", self.model_name), "choices": choices, "usage": usage}


class Exchange:
    """One request and its answer."""

    def __init__(self, receive: Receive, send: Send):
        self._receive, self._send = receive, send
        self.has_begun = False

    async def read_body(self, headers: Sequence[tuple[bytes, bytes]], grow: Callable[[int], None]) -> bytes:
        """Return the body; `grow` is told about every part of it.

        Raises:
            RefusedError: it is too large, comes too slowly, or its length is told in two ways.
            ClientGoneError: the client hung up in the middle.
        """
        told = dict(headers)
        if b"content-length" in told and b"transfer-encoding" in told:
            raise RefusedError(400, "give Content-Length or Transfer-Encoding, not both")
        if told.get(b"content-encoding", b"identity") != b"identity":
            raise RefusedError(400, "'Content-Encoding' is not served; send the body as it is")
        too_large = RefusedError(413, f"give a body of at most {MAX_BODY_BYTES >> 20} MB")
        if int(told.get(b"content-length", b"0")) > MAX_BODY_BYTES:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    part = message.get("body", b"")
                    grow(len(part))
                    body += part
                    if len(body) > MAX_BODY_BYTES:
                        raise too_large
                    if not message.get("more_body"):
                        return bytes(body)
        except TimeoutError as error:
            raise RefusedError(408, f"the body did not come within {BODY_SECONDS:g} s") from error

    @contextlib.asynccontextmanager
    async def gone(self, tell: Callable[[], None]) -> AsyncIterator[asyncio.Event]:
        """An event that is set when the client hangs up meanwhile; `tell` is called then."""
        gone = asyncio.Event()

        async def listen() -> None:
            while (await self._receive())["type"] != "http.disconnect":
                pass
            gone.set()
            tell()

        task = asyncio.create_task(listen())
        try:
            yield gone
        finally:
            task.cancel()

    async def send_json(self, content: dict[str, Any]) -> None:
        """Answer with an object."""
        await self._send_whole(200, json.dumps(content, ensure_ascii=False).encode())

    async def refuse(self, status: int, message: str) -> None:
        """Answer with an error; where a stream has begun, as its last event."""
        body = error_body(status, message)
        if self.has_begun:
            await self.send_part(b"data: " + body + b"\n\n", more=False)
        else:
            again = [(b"retry-after", b"1")] if status == 503 else []
            await self._send_whole(status, body, [(b"connection", b"close"), *again])

    async def begin(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Send status and headers."""
        self.has_begun = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def send_part(self, part: bytes, more: bool = True) -> None:
        """Send a part of the body."""
        await self._send({"type": "http.response.body", "body": part, "more_body": more})

    async def _send_whole(self, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
        size = str(len(body)).encode()
        await self.begin(status, [(b"content-type", b"application/json"), (b"content-length", size), *headers])
        await self.send_part(body, more=False)


class _Bell:
    """What an engine's thread rings, and the event loop hears."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop, self._rung = loop, asyncio.Event()

    def set(self) -> None:
        """Ring."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and with it whoever listened
            self._loop.call_soon_threadsafe(self._rung.set)

    async def wait(self) -> None:
        """Return after the next ring."""
        await self._rung.wait()
        self._rung.clear()


async def _growth(futures: Sequence["Future[Reply]"], bell: _Bell, exchange: Exchange) -> AsyncIterator[None]:
    """Yield whenever a reply has grown, until all are there.

    Raises:
        ClientGoneError: nobody waits for them any more.
    """
    for future in futures:
        future.add_done_callback(lambda _: bell.set())
    async with exchange.gone(bell.set) as gone:
        while not all(future.done() for future in futures):
            await bell.wait()
            if gone.is_set():
                raise ClientGoneError
            yield


class _Stream:
    """Replies as server-sent events in OpenAI's form; nothing is sent before there is something to say.

    The status line goes out with the first words, so that a request that cannot be answered gets its 400 all the same.
    """

    def __init__(self, exchange: Exchange, model_name: str):
        self._exchange = exchange
        self._head = _head("chat.completion.chunk", model_name)
        self._sent: list[str] = []

    async def send_texts(self, texts: Sequence[str]) -> None:
        """Send what is new. Whitespace and half of a character at the end wait for what follows them."""
        if any(texts):
            await self._send_growth([text.rstrip("\ufffd").rstrip() for text in texts])

    async def finish(self, replies: Sequence[Reply], usage: dict[str, int] | None) -> None:
        """Send the rest, why each reply ended, the usage if it is wanted, and the end of the stream."""
        await self._send_growth([reply.text for reply in replies])
        for index, reply in enumerate(replies):
            await self._send_choice(index, {}, reply.finish_reason)
        if usage:
            await self._send({"choices": [], "usage": usage})
        await self._exchange.send_part(b"data: [DONE]\n\n", more=False)

    async def _send_growth(self, texts: Sequence[str]) -> None:
        if not self._exchange.has_begun:
            await self._begin(len(texts))
        for index, (text, sent) in enumerate(zip(texts, self._sent, strict=True)):
            if text.startswith(sent) and len(text) > len(sent):
                self._sent[index] = text
                await self._send_choice(index, {"content": text[len(sent) :]})

    async def _begin(self, num_choices: int) -> None:
        self._sent = [""] * num_choices
        await self._exchange.begin(200, [(b"content-type", b"text/event-stream"), (b"cache-control", b"no-cache")])
        for index in range(num_choices):
            await self._send_choice(index, {"role": "assistant", "content": ""})

    async def _send_choice(self, index: int, delta: dict[str, str], reason: str | None = None) -> None:
        await self._send({"choices": [{"index": index, "delta": delta, "finish_reason": reason}]})

    async def _send(self, event: dict[str, Any]) -> None:
        data = json.dumps({**self._head, **event}, ensure_ascii=False).encode()
        await self._exchange.send_part(b"data: " + data + b"\n\n")


def _head(kind: str, model_name: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model_name}


def _usage(num_prompt_tokens: int, replies: Sequence[Reply]) -> dict[str, int]:
    written = sum(reply.num_tokens for reply in replies)
    total = num_prompt_tokens + written
    return {"prompt_tokens": num_prompt_tokens, "completion_tokens": written, "total_tokens": total}
