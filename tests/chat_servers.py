"""Servers and an engine without a model for the tests of what asks them."""

import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from internvl_mpo.engines import Reply, Request

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
