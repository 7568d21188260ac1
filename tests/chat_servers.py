"""Servers, and engines without a model, for the tests of what asks them and of what they are asked."""

import asyncio
import io
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

from internvl_mpo.engines import Reply, Request
from internvl_mpo.engines.batching import Batcher
from internvl_mpo.engines.chat_app import ChatApp
from internvl_mpo.engines.local import load_picture

ANSWER = {"choices": [{"message": {"content": " 42 "}, "finish_reason": "stop"}], "usage": {"completion_tokens": 2}}


class EchoEngine:
    """Answers with question, prefix, number of pictures and seed; takes `seconds` per batch."""

    name = model_id = "echo"
    revision = None

    def __init__(self, seconds: float = 0.0):
        self.seconds = seconds
        self.batch_sizes: list[int] = []

    def generate(self, requests, done=()):
        requests = list(requests)
        self.batch_sizes.append(len(requests))
        time.sleep(self.seconds)
        for request in requests:
            sizes = [image.size for image in request.images]
            text = f"{request.prefix}|{request.question}|{sizes}|{request.seed}|{request.sampling.max_new_tokens}"
            yield Reply(id=request.id, text=text, finish_reason="stop", num_tokens=3)


def misbehaving(behave):
    """Return a server whose answer to the n-th chat completion is up to `behave(handler, n)`; None answers well."""
    asked = Counter()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else each answer waits 40 ms for the client's acknowledgement of its head

        def send(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.send(200, json.dumps({"data": [{"id": "m"}]}).encode())

        def do_POST(self) -> None:
            self.payload = body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                asked["all"] += 1
                number = asked["all"]
            if behave(self, number) is None:
                answer = json.loads(json.dumps(ANSWER))
                answer["choices"][0]["message"]["content"] = body["messages"][0]["content"]
                self.send(200, json.dumps(answer).encode())

        def log_message(self, *args) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.asked = asked
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    return server


def questions(count: int) -> list[Request]:
    return [Request(id=str(number), question=f"q{number}", seed=number) for number in range(count)]


class LookingEngine:
    """Looks at every picture as a model would, and says how many tokens it was asked for."""

    name = model_id = "looks"
    revision, context = None, 4096

    def num_prompt_tokens(self, request: Request) -> int:
        return len(request.question) + 256 * len(request.images)

    def generate(self, requests, done=()):
        for request in requests:
            try:
                for image in request.images:
                    load_picture(image)
            except (OSError, ValueError) as error:
                yield Reply(id=request.id, error=str(error))
                continue
            yield Reply(id=request.id, text=str(request.sampling.max_new_tokens), finish_reason="stop", num_tokens=1)


class Served:
    """An application asked without a socket."""

    def __init__(self, engine=None):
        self.app = ChatApp(engine or LookingEngine(), "m", Batcher(engine or LookingEngine(), 8))

    async def post(self, body: bytes, path: str = "/v1/chat/completions", **headers: str) -> tuple[int, bytes]:
        sent, given = [], False
        ended = asyncio.Event()

        async def receive():
            nonlocal given
            if given:
                await ended.wait()
                return {"type": "http.disconnect"}
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message):
            sent.append(message)

        pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        await self.app({"type": "http", "path": path, "method": "POST", "headers": pairs}, receive, send)
        ended.set()
        assert sent[-1]["more_body"] is False
        return sent[0]["status"], b"".join(message["body"] for message in sent[1:])

    def ask(self, body: bytes | dict, **headers: str) -> tuple[int, str]:
        """Status, and the sentence of an error or the text of a reply."""
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, answer = asyncio.run(self.post(body, **headers))
        answer = json.loads(answer)
        return status, answer["error"]["message"] if status != 200 else answer["choices"][0]["message"]["content"]

    def close(self) -> None:
        self.app.batcher.close()


def user(text: str = "Hi", *urls: str) -> dict:
    pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}] if urls else text}


def asked(**fields) -> dict:
    return {"messages": [user()], **fields}


def encoded(kind: str, size=(8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, kind)
    return buffer.getvalue()
