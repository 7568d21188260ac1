"""Pictures from addresses: what a hostile address can do to a server that fetches it."""

import asyncio
import contextlib
import gzip
import http.server
import io
import ipaddress
import json
import socket
import threading
import time

import pytest
from PIL import Image

httpx = pytest.importorskip("httpx", reason="the demo's packages bring httpx")

from internvl_mpo.demo import fetch as module  # noqa: E402
from internvl_mpo.demo.fetch import fetch, is_public  # noqa: E402
from internvl_mpo.demo.guard import Guard  # noqa: E402
from internvl_mpo.demo.pictures import Limits, fetch_data_uri, read_data_uri  # noqa: E402
from internvl_mpo.errors import BadInputError  # noqa: E402


def png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (30, 20), "red").save(buffer, "PNG")
    return buffer.getvalue()


class Pages(http.server.BaseHTTPRequestHandler):
    """/picture, /gzip, /endless, /redirect?to=.., /loop, /drip (headers that never end)."""

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers["Host"]))
        name, _, to = self.path.partition("?to=")
        if name == "/drip":
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nX-A: 1\r\n" if not self.close_connection else b"X")
                    self.wfile.flush()
                    self.close_connection = True
                    time.sleep(0.02)
            return
        code = {"/redirect": 302, "/loop": 302, "/missing": 404}.get(name, 200)
        self.send_response(code)
        body = {"/picture": png(), "/gzip": gzip.compress(bytes(10_000_000))}.get(name, b"")
        if name == "/gzip":
            self.send_header("Content-Encoding", "gzip")
        if code == 302:
            self.send_header("Location", to or "/loop")
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)
            while name == "/endless":
                self.wfile.write(bytes(65536))

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    """A server on the loopback interface, which counts as public in this test and nothing else does."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.asked = []
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(module, "is_public", lambda address: str(address) == "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def url(server, path: str) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}{path}"


def test_a_picture_arrives_by_name_from_the_address_that_was_looked_at(server, monkeypatch):
    port = server.server_address[1]
    looked_up = []

    def look_up(name, *args, **kwargs):  # a second answer could name another address than the one that was checked
        looked_up.append(name.decode() if isinstance(name, bytes) else name)
        assert looked_up.count("pictures.example") == 1, "the name is looked up again to connect"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(module.socket, "getaddrinfo", look_up)
    picture = read_data_uri(fetch_data_uri(f"http://pictures.example:{port}/picture", Limits()), Limits())
    assert (picture.width, picture.height) == (30, 20)
    assert server.asked == [("/picture", f"pictures.example:{port}")]


def test_a_port_that_cannot_be_is_refused_in_one_sentence():
    with pytest.raises(BadInputError, match="could not be fetched"):
        fetch("http://8.8.8.8:99999/a.png", 1000)


@pytest.mark.parametrize("path", ["/drip", "/silent"])
def test_an_address_that_says_nothing_costs_no_more_than_the_deadline(server, monkeypatch, path):
    monkeypatch.setattr(module, "DEADLINE_SECONDS", 0.4)
    start = time.monotonic()
    with socket.socket() as silent, pytest.raises(BadInputError, match=r"gave no picture within 0.4 seconds"):
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        fetch(url(server, path) if path == "/drip" else f"http://127.0.0.1:{silent.getsockname()[1]}/", 1000)
    assert time.monotonic() - start < 3


def test_a_name_that_is_never_found_costs_no_more_than_the_deadline(monkeypatch):
    monkeypatch.setattr(module, "DEADLINE_SECONDS", 0.2)
    monkeypatch.setattr(module, "public_host", lambda name: threading.Event().wait(2))
    start = time.monotonic()
    with pytest.raises(BadInputError, match=r"gave no picture within 0.2 seconds"):
        fetch("http://slow.example/a.png", 1000)
    assert time.monotonic() - start < 1.5


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/endless", "is larger than 0.0953674 MB"),
        ("/gzip", "sends the picture compressed"),
        ("/missing", "answers 404"),
        ("/loop", "leads on to more than 3 other addresses"),
        ("/redirect?to=http://10.0.0.1/a.png", "10.0.0.1 is not a public address"),
        ("/redirect?to=file:///etc/passwd", "is no http"),
        ("/redirect?to=http://[::1]/a.png", "::1 is not a public address"),
    ],
)
def test_what_comes_is_bounded_and_public(server, path, reason):
    with pytest.raises(BadInputError, match=reason):
        fetch(url(server, path), 100_000)


def test_one_private_address_among_public_ones_is_enough_to_refuse(monkeypatch):
    both = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (ip, 0)) for ip in ("8.8.8.8", "192.168.0.1")]
    monkeypatch.setattr(module.socket, "getaddrinfo", lambda *args, **kwargs: both)
    with pytest.raises(BadInputError, match=r"rebind.example is not a public address"):
        fetch("http://rebind.example/", 1000)


def call(guard, body: dict) -> tuple[int, dict]:
    """POST a body to /compare through a guard; returns the status, and what came behind it or the refusal."""
    sent, content = [], json.dumps(body).encode()

    async def receive() -> dict:
        return {"type": "http.request", "body": content}

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/gradio_api/call/compare", "headers": []}
    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"])


async def behind(scope, receive, send) -> None:
    body = (await receive())["body"]
    assert dict(scope["headers"])[b"content-length"] == str(len(body)).encode()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def test_pictures_are_fetched_ahead_of_the_queue_and_the_question_is_left_alone(tmp_path):
    asked = []
    guard = Guard(behind, tmp_path, 10_000, fetch=lambda address: asked.append(address) or "data:image/png;base64,AA")
    images = ["http://a.example/1.png", {"path": "https://b.example/2.png", "meta": {}}, "data:image/png;base64,BB"]
    status, passed = call(guard, {"data": ["http://c.example/ what is this?", images, "cot"]})
    assert (status, asked) == (200, ["http://a.example/1.png", "https://b.example/2.png"])
    data = ["data:image/png;base64,AA", "data:image/png;base64,AA", "data:image/png;base64,BB"]
    assert passed == {"data": ["http://c.example/ what is this?", data, "cot"]}


def test_an_address_that_gives_nothing_is_refused_before_the_queue(tmp_path):
    def fetch(address: str) -> str:
        raise BadInputError(f"{address} gave no picture within 15 seconds")

    status, refusal = call(Guard(behind, tmp_path, 10_000, fetch=fetch), {"data": ["?", ["http://a.example/"]]})
    assert (status, refusal) == (400, {"detail": "http://a.example/ gave no picture within 15 seconds"})


@pytest.mark.parametrize("address", ["8.8.8.8", "2001:4860:4860::8888", "::ffff:8.8.8.8", "2002:808:808::1"])
def test_public_addresses(address):
    assert is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "0.0.0.0", "224.0.0.1"),
        *("100.64.0.1", "100.100.100.200", "198.18.0.1", "192.0.0.1", "240.0.0.1", "255.255.255.255"),
        *("::1", "::", "fe80::1", "fc00::1", "ff02::1", "::ffff:127.0.0.1", "::ffff:100.64.0.1", "::127.0.0.1"),
        *("2002:7f00:1::", "2002:a00:1::", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "2001:0:7f00:1::"),
    ],
)
def test_addresses_of_this_machine_and_its_neighbours_in_every_spelling(address):
    assert not is_public(ipaddress.ip_address(address))
