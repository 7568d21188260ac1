"""Clients that are slow, silent, many or none at all: each costs a place for a moment, and nobody waits for them."""

import contextlib
import http.client
import json
import socket
import threading
import time

import pytest

from internvl_mpo.engines import Reply
from internvl_mpo.engines.serve import BatchServer
from tests.chat_servers import LookingEngine, asked


@pytest.fixture
def hurried(serve, monkeypatch):
    """A server whose patience is short."""
    monkeypatch.setattr("internvl_mpo.engines.http_limits.HEAD_SECONDS", 0.5)
    monkeypatch.setattr("internvl_mpo.engines.http_limits.TAKE_SECONDS", 0.5)
    monkeypatch.setattr("internvl_mpo.engines.chat_app.BODY_SECONDS", 0.5)
    return serve(BatchServer(LookingEngine(), "m"))


def connect(server) -> socket.socket:
    return socket.create_connection(server.server_address, timeout=5)


def read_to_the_end(sock: socket.socket) -> bytes:
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := sock.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def head(*lines: str) -> bytes:
    return "\r\n".join(["POST /v1/chat/completions HTTP/1.1", "Host: x", *lines, "", ""]).encode()


GOOD = json.dumps(asked(max_tokens=5)).encode()


def is_well(server) -> bool:
    connection = http.client.HTTPConnection(*server.server_address, timeout=5)
    connection.request("POST", "/v1/chat/completions", GOOD)
    return connection.getresponse().status == 200


@pytest.mark.parametrize(
    "request_bytes",
    [
        head("Content-Length: five") + GOOD,
        head("Content-Length: -5") + GOOD,
        head(f"Content-Length: {len(GOOD)}", "Content-Length: 5") + GOOD,
        head("Transfer-Encoding: gzip") + GOOD,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20,
        b"POST /v1/chat/completions HTTP/1.1\r\n\r\n" + GOOD,
    ],
)
def test_what_is_no_http_is_a_400_and_hung_up(hurried, capfd, request_bytes):
    with connect(hurried) as sock:
        sock.sendall(request_bytes)
        answer = read_to_the_end(sock)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert is_well(hurried)
    assert "Traceback" not in capfd.readouterr().err


def test_a_second_request_is_not_smuggled_behind_two_lengths(hurried):
    smuggled = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    with connect(hurried) as sock:
        chunked = head("Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n"
        sock.sendall(chunked + smuggled)
        answer = read_to_the_end(sock)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"HTTP/1.1") == 1


def test_a_body_in_chunks_is_read(hurried):
    connection = http.client.HTTPConnection(*hurried.server_address, timeout=5)
    connection.request("POST", "/v1/chat/completions", iter([GOOD[:10], GOOD[10:]]), encode_chunked=True)
    assert connection.getresponse().status == 200


@pytest.mark.parametrize("drips", [b"", b"P", b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-"])
def test_a_client_that_says_nothing_or_drips_its_head_is_hung_up(hurried, drips):
    with connect(hurried) as sock:
        start = time.monotonic()
        sock.settimeout(0.1)
        answer = None
        while answer is None and time.monotonic() - start < 4:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(drips[:1] if drips else b"")
            try:
                answer = sock.recv(100)
            except TimeoutError:
                continue
            except ConnectionResetError:
                answer = b""
        assert answer == b""
        assert 0.3 < time.monotonic() - start < 3


def test_a_connection_that_was_used_before_has_no_more_patience(hurried):
    with connect(hurried) as sock:
        sock.sendall(head(f"Content-Length: {len(GOOD)}") + GOOD)
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 200")
        start = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            assert sock.recv(1 << 16) == b""
        assert time.monotonic() - start < 3


def test_a_body_that_does_not_come_is_a_408(hurried):
    with connect(hurried) as sock:
        sock.sendall(head("Content-Length: 500") + b"{")
        answer = read_to_the_end(sock)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"did not come within 0.5 s" in answer


def test_silent_clients_beyond_the_places_are_turned_away_and_the_others_answered(serve, monkeypatch):
    monkeypatch.setattr("internvl_mpo.engines.http_limits.MAX_CONNECTIONS", 40)
    monkeypatch.setattr("internvl_mpo.engines.http_limits.HEAD_SECONDS", 1.0)
    server = serve(BatchServer(LookingEngine(), "m"))
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(server)) for _ in range(60)]
        answer = read_to_the_end(silent[-1])
        assert answer.startswith(b"HTTP/1.1 503 ")
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if is_well(server):
                    break
            time.sleep(0.1)
        assert is_well(server)
    assert threading.active_count() < 40  # a place is no thread


def test_a_client_that_reads_nothing_is_hung_up(hurried, monkeypatch):
    class Talker(LookingEngine):
        context = None

        def generate(self, requests, done=()):
            for request in requests:
                request.draft.begin("".join)
                for number in range(300):
                    request.draft.add(f"{number} " + "y" * 40_000)
                    if request.draft.stopped.is_set():
                        break
                yield Reply(id=request.id, text=request.draft.all_text(), finish_reason="stop", num_tokens=1)

    ended = threading.Event()
    engine = Talker()
    generate = engine.generate
    engine.generate = lambda requests, done=(): (yield from generate(requests)) or ended.set()
    hurried._batcher.engine = engine
    body = json.dumps(asked(stream=True)).encode()
    with connect(hurried) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(head(f"Content-Length: {len(body)}") + body)
        assert ended.wait(20)
        deadline = time.monotonic() + 5
        while hurried._uvicorn.server_state.connections and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not hurried._uvicorn.server_state.connections
