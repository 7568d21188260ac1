"""A small server with OpenAI's chat completions over the transformers engine, for one machine.

    python -m internvl_mpo.engines.serve --model outputs/mini/model --port 8000

Requests that arrive together are answered in one batch, and streamed to those who ask for it (`stream: true`). A client
that hangs up ends its own replies. Conversations may have any number of turns, and an assistant turn to be continued.
It exists so that the HTTP path can be used and tested without a serving engine; for real loads put vLLM, SGLang or
LMDeploy behind the same URL. Listens on this machine only unless told otherwise, reads pictures from data URIs only.
"""

import json
import queue
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from PIL import Image

from internvl_mpo.engines import Draft, Engine, Reply, Request
from internvl_mpo.engines.chat_format import read_requests
from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.settings import parse_settings, setting, show_settings

MAX_BODY_BYTES = 256 << 20
GATHER_SECONDS = 0.005  # a batch waits for company as long as requests follow each other this closely
LOOK_SECONDS = 0.1  # between two looks at whether a client that waits is still there


@dataclass
class Settings:
    """Settings of the server; `--help` prints them."""

    model: str = setting(help="folder or Hub id of the model")
    name: str | None = setting(None, help="name clients call the model by; empty is the value of model")
    host: str = setting("127.0.0.1", help="address to listen on; 0.0.0.0 is every network of the machine")
    port: int = setting(8000, help="port; 0 takes a free one")
    batch_size: int = setting(32, help="replies generated at the same time")
    max_tiles: int | None = setting(None, help="most crops per request; empty keeps the model's limit")
    device: str = setting("auto", help="torch device")
    dtype: str = setting("auto", help="auto, float32, bfloat16 or float16")


class BatchServer(ThreadingHTTPServer):
    """Serves an engine: a thread per connection, and one that batches.

    Args:
        engine: who answers.
        name: of the model, as `/v1/models` lists it.
        host, port: where to listen; port 0 takes a free one, `server_address` tells which.
        batch_size: requests handed to the engine together, at most.
    """

    daemon_threads = True
    request_queue_size = 1024

    def __init__(self, engine: Engine, name: str, *, host: str = "127.0.0.1", port: int = 0, batch_size: int = 32):
        super().__init__((host, port), _Handler)
        self.engine, self.model_name, self.batch_size = engine, name, batch_size
        self._waiting: queue.Queue[tuple[Request, Future[Reply]] | None] = queue.Queue()
        self._batcher = threading.Thread(target=self._run_batches, name="batcher", daemon=True)
        self._batcher.start()

    @property
    def url(self) -> str:
        """Base URL for clients."""
        return f"http://{self.server_address[0]}:{self.server_address[1]}/v1"

    def submit(self, request: Request) -> Future[Reply]:
        """Queue a request."""
        future: Future[Reply] = Future()
        self._waiting.put((request, future))
        return future

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that break off are no news; anything else is printed."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        """Stop listening and batching."""
        super().server_close()
        self._waiting.put(None)
        self._batcher.join()

    def _run_batches(self) -> None:
        while (first := self._waiting.get()) is not None:
            batch = [first]
            while len(batch) < self.batch_size:
                try:
                    item = self._waiting.get(timeout=GATHER_SECONDS)
                except queue.Empty:
                    break
                if item is None:
                    self._waiting.put(None)
                    break
                batch.append(item)
            batch = [
                (request, future) for request, future in batch if not (request.draft and request.draft.stopped.is_set())
            ]
            futures = {request.id: future for request, future in batch}
            try:
                for reply in self.engine.generate([request for request, _ in batch]):
                    futures.pop(reply.id).set_result(reply)
            except Exception as error:  # the server outlives a batch that fails; each client is told
                for future in futures.values():
                    future.set_exception(error)


class _Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body must not wait for the client's acknowledgement of the head, 40 ms
    server: BatchServer

    def do_GET(self) -> None:
        """Answer /health and /v1/models."""
        if self.path == "/health":
            self._send(200, {"status": "ok"})
        elif self.path == "/v1/models":
            self._send(200, {"object": "list", "data": [{"id": self.server.model_name, "object": "model"}]})
        else:
            self._send_error(404, f"no such path {self.path}")

    def do_POST(self) -> None:
        """Answer /v1/chat/completions."""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            self._send_error(413, f"give a body with Content-Length up to {MAX_BODY_BYTES}")
            return
        body = self.rfile.read(int(length))
        if self.path != "/v1/chat/completions":
            self._send_error(404, f"no such path {self.path}")
            return
        try:
            payload = json.loads(body)
            if not isinstance(payload, dict):
                raise BadInputError("the body is not a JSON object")
            changed = threading.Event()
            requests = [replace(request, draft=Draft(changed)) for request in read_requests(payload)]
        except (ValueError, TypeError, OSError, Image.DecompressionBombError) as error:
            self._send_error(400, str(error))
            return
        stream = _Stream(self, payload) if payload.get("stream") else None
        try:
            for _ in self._growth(futures := [self.server.submit(request) for request in requests], changed):
                if stream:
                    stream.send_texts([request.draft.text for request in requests])
            replies = [future.result() for future in futures]
            failed = next((reply.error for reply in replies if reply.error), None)
            if failed is not None:
                self._refuse(stream, 400, failed)
            elif stream:
                stream.finish(replies)
            else:
                self._send(200, self._completion(replies))
        except ConnectionError:
            self.close_connection = True  # the client has gone
        except Exception as error:
            self._refuse(stream, 500, f"{type(error).__name__}: {error}")
        finally:
            for request in requests:
                request.draft.stop()

    def _growth(self, futures: Sequence[Future[Reply]], changed: threading.Event) -> Iterator[None]:
        """Yield whenever a reply has grown, until all are there.

        Raises:
            ConnectionError: the client has gone.
        """
        for future in futures:
            future.add_done_callback(lambda _: changed.set())
        while not all(future.done() for future in futures):
            if changed.wait(LOOK_SECONDS):
                changed.clear()
                yield
            try:
                if not self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                    raise ConnectionAbortedError("the client has hung up")
            except BlockingIOError:
                pass  # it is there and says nothing, as it should

    def _refuse(self, stream: "_Stream | None", status: int, message: str) -> None:
        """Report an error by the status, or as the last event where the status has been sent."""
        if stream and stream.has_begun:
            self.close_connection = True
            stream.send({"error": {"message": message, "code": status}})
        else:
            self._send_error(status, message)

    def _completion(self, replies: list[Reply]) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": self.server.model_name,
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": reply.text},
                    "finish_reason": reply.finish_reason,
                }
                for index, reply in enumerate(replies)
            ],
            "usage": {"completion_tokens": sum(reply.num_tokens for reply in replies)},
        }

    def _send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content, ensure_ascii=False).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
        except ConnectionError:
            self.close_connection = True  # the client has gone

    def _send_error(self, status: int, message: str) -> None:
        self._send(status, {"error": {"message": message, "code": status}})

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing per request."""


class _Stream:
    """Replies as server-sent events in OpenAI's form; nothing is sent before there is something to say.

    The status line goes out with the first words, so that a request that cannot be answered gets its 400 all the same.
    """

    def __init__(self, handler: _Handler, payload: dict[str, Any]):
        self._handler = handler
        self._wants_usage = bool((payload.get("stream_options") or {}).get("include_usage"))
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": handler.server.model_name,
        }
        self._sent: list[str] = []
        self.has_begun = False

    def send_texts(self, texts: Sequence[str]) -> None:
        """Send what is new. Whitespace and half of a character at the end wait for what follows them."""
        if any(texts):
            self._send_growth([text.rstrip("\ufffd").rstrip() for text in texts])

    def finish(self, replies: Sequence[Reply]) -> None:
        """Send the rest, why each reply ended, and the end of the stream."""
        self._send_growth([reply.text for reply in replies])
        for index, reply in enumerate(replies):
            self._send_choice(index, {}, reply.finish_reason)
        if self._wants_usage:
            tokens = sum(reply.num_tokens for reply in replies)
            self.send({**self._head, "choices": [], "usage": {"completion_tokens": tokens}})
        self._handler.wfile.write(b"data: [DONE]\n\n")

    def send(self, event: dict[str, Any]) -> None:
        """Send one event."""
        self._handler.wfile.write(b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n")

    def _send_growth(self, texts: Sequence[str]) -> None:
        if not self.has_begun:
            self._begin(len(texts))
        for index, (text, sent) in enumerate(zip(texts, self._sent, strict=True)):
            if text.startswith(sent) and len(text) > len(sent):
                self._send_choice(index, {"content": text[len(sent) :]})
                self._sent[index] = text

    def _begin(self, num_choices: int) -> None:
        self.has_begun, self._sent = True, [""] * num_choices
        self._handler.close_connection = True  # the end of the connection is the end of the body
        self._handler.send_response(200)
        for key, value in (
            ("Content-Type", "text/event-stream"),
            ("Cache-Control", "no-cache"),
            ("Connection", "close"),
        ):
            self._handler.send_header(key, value)
        self._handler.end_headers()
        for index in range(num_choices):
            self._send_choice(index, {"role": "assistant", "content": ""})

    def _send_choice(self, index: int, delta: dict[str, str], reason: str | None = None) -> None:
        self.send({**self._head, "choices": [{"index": index, "delta": delta, "finish_reason": reason}]})


def main(argv: list[str]) -> int:
    """Serve until interrupted."""
    settings = parse_settings(Settings, argv, program="-m internvl_mpo.engines.serve", about=__doc__)
    print(show_settings(settings, "Serving"))
    from internvl_mpo.engines.loading import load_model_engine

    engine = load_model_engine(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        batch_size=settings.batch_size,
        max_tiles=settings.max_tiles,
    )
    server = BatchServer(
        engine,
        settings.name or settings.model,
        host=settings.host,
        port=settings.port,
        batch_size=settings.batch_size,
    )
    print(f"listening on {server.url}", flush=True)
    try:
        server.serve_forever()
    finally:
        server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
