"""Replies that are streamed from a server into a draft, and what ends them."""

import json
import threading
import time

import pytest

from internvl_mpo.engines import Draft, Request, StopSign
from internvl_mpo.engines.chat_format import read_stream
from internvl_mpo.engines.http_engine import HttpEngine
from internvl_mpo.errors import BadInputError
from tests.chat_servers import misbehaving


def event(text: str | None = None, reason: str | None = None, **more) -> bytes:
    choice = {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": reason}
    return b"data: " + json.dumps({"model": "m", "choices": [choice], **more}).encode() + b"\n\n"


END = event(reason="stop") + b'data: {"choices": [], "usage": {"completion_tokens": 7}}\n\ndata: [DONE]\n\n'


def streaming(write):
    """A server that streams what `write(handler, number)` writes."""

    def behave(handler, number):
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream; charset=utf-8")
        handler.send_header("Connection", "close")
        handler.end_headers()
        write(handler, number)
        handler.close_connection = True
        return True

    return misbehaving(behave)


def asked(**more) -> Request:
    return Request(id="x", question="q", draft=Draft(threading.Event()), **more)


@pytest.fixture(autouse=True)
def shown_at_once(monkeypatch):
    monkeypatch.setattr("internvl_mpo.engines.DRAFT_SECONDS", 0.0)


def test_pieces_appear_in_the_draft_before_the_reply_is_whole(serve):
    go_on = threading.Event()

    def write(handler, number):
        handler.wfile.write(event("It is "))
        go_on.wait(5)
        handler.wfile.write(event("four. ") + END)

    server, request = serve(streaming(write)), asked()
    engine = HttpEngine(server.url, max_attempts=1)
    replies = []
    thread = threading.Thread(target=lambda: replies.extend(engine.generate([request])))
    thread.start()
    deadline = time.monotonic() + 5
    while request.draft.text != "It is " and time.monotonic() < deadline:
        time.sleep(0.005)
    assert (request.draft.text, request.draft.num_pieces, replies) == ("It is ", 1, [])
    go_on.set()
    thread.join(5)
    (reply,) = replies
    assert (reply.text, reply.finish_reason, reply.num_tokens, reply.served_model) == ("It is four.", "stop", 7, "m")


@pytest.mark.parametrize("silent_from", ["the start", "the first word"])
def test_a_reader_that_stops_ends_a_reply_of_which_nothing_comes(serve, silent_from):
    begun, ended = threading.Event(), threading.Event()

    def write(handler, number):
        if silent_from == "the first word":
            handler.wfile.write(event("It is "))
        begun.set()
        ended.wait(10)

    server, request = serve(streaming(write)), asked()
    replies = HttpEngine(server.url).generate([request])
    timer = threading.Thread(target=lambda: (begun.wait(5), time.sleep(0.1), request.draft.stop()))
    timer.start()
    start = time.monotonic()
    (reply,) = replies
    ended.set()
    assert time.monotonic() - start < 3
    text = "It is " if silent_from == "the first word" else ""
    assert (reply.text, reply.finish_reason, reply.error) == (text, "stopped", None)
    assert server.asked["all"] == 1


def test_a_stop_between_two_attempts_ends_the_pause(serve):
    server = serve(misbehaving(lambda handler, number: handler.send(503, b"later") or True))
    request = asked()
    threading.Timer(0.2, request.draft.stop).start()
    start = time.monotonic()
    (reply,) = HttpEngine(server.url, backoff=30).generate([request])
    assert (reply.finish_reason, reply.error) == ("stopped", None)
    assert time.monotonic() - start < 3


def test_a_stream_that_falls_silent_is_left_after_the_silence_it_may_have(serve):
    ended = threading.Event()
    server = serve(streaming(lambda handler, number: (handler.wfile.write(event("It")), ended.wait(5))))
    start = time.monotonic()
    (reply,) = HttpEngine(server.url, silence=0.3, max_attempts=1).generate([asked()])
    ended.set()
    assert reply.error == f"{server.url}: TimeoutError: nothing came for 0.3 s"
    assert time.monotonic() - start < 2


def test_an_attempt_that_breaks_off_is_begun_afresh(serve):
    broken = [
        event("It was"),
        event("It was") + b'data: {"error": {"message": "out of memory"}}\n\n',
        event("It was") + b"data: {half\n\n",
        event("It was") + b"data: 7\n\n",
        event("It was") + b"data: " + b"[" * 100_000 + b"\n\n",
        event("It was") + event(reason="abort") + b"data: [DONE]\n\n",
    ]

    def write(handler, number):
        handler.wfile.write(broken[number - 1] if number <= len(broken) else event("It is") + END)

    server, request = serve(streaming(write)), asked()
    (reply,) = HttpEngine(server.url, backoff=0.0, max_attempts=len(broken) + 1).generate([request])
    assert (reply.text, reply.error) == ("It is", None)
    assert server.asked["all"] == len(broken) + 1
    assert request.draft.all_text() == "It is"


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_a_stream_may_be_cut_anywhere(line_end):
    whole = (b": hello\n\n" + event("3 \u2264 \U0001f600") + event(" yes") + END).replace(b"\n", line_end)
    for size in (1, 2, 3, 7, len(whole)):
        request = asked(prefix="So ")
        reply = read_stream(request, [whole[at : at + size] for at in range(0, len(whole), size)])
        assert reply.text == "3 \u2264 \U0001f600 yes"


def test_an_event_without_end_is_not_kept():
    with pytest.raises(ValueError, match="more than 4 MB"):
        read_stream(asked(), (b"x" * (1 << 20) for _ in range(100)))


def test_a_server_that_cannot_stream_is_asked_for_the_whole_and_remembered(serve):
    payloads = []

    def behave(handler, number):
        payloads.append(handler.payload)
        return handler.send(400, b"stream is not supported") or True if "stream" in handler.payload else None

    server = serve(misbehaving(behave))
    engine = HttpEngine(server.url)
    assert [reply.text for reply in engine.generate([asked()])] == ["q"]
    assert [reply.text for reply in engine.generate([asked()])] == ["q"]
    assert ["stream" in payload for payload in payloads] == [True, False, False]


def test_only_requests_with_a_draft_are_streamed(serve):
    payloads = []
    server = serve(misbehaving(lambda handler, number: payloads.append(handler.payload)))
    list(HttpEngine(server.url).generate([Request(id="x", question="q")]))
    assert "stream" not in payloads[0]


def test_an_answer_without_end_is_left(serve, monkeypatch):
    monkeypatch.setattr("internvl_mpo.engines.connections.MAX_ANSWER_BYTES", 1 << 20)

    def write(handler, number):
        for _ in range(400):
            handler.wfile.write(event("x" * 10_000))

    (reply,) = HttpEngine(serve(streaming(write)).url, max_attempts=1).generate([asked()])
    assert "more than 1 MB" in reply.error


def test_a_password_in_a_base_url_is_refused_without_being_shown():
    with pytest.raises(BadInputError, match="holds a password") as refused:
        HttpEngine("http://me:hunter2@host:8000/v1")
    assert "hunter2" not in str(refused.value)


def test_a_stop_sign_wakes_those_who_wait_and_nobody_else():
    sign, woken = StopSign(), []
    with sign.wakes(lambda: woken.append("gone")):
        pass
    with sign.wakes(lambda: woken.append("waits")):
        sign.stop()
    with sign.wakes(lambda: woken.append("comes later")):
        pass
    assert woken == ["waits", "comes later"]
