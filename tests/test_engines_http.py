"""The engine behind a URL, against our server and against servers that misbehave."""

import json
import socket
import threading
import time
from collections import Counter
from email.utils import formatdate

import pytest
from PIL import Image

from internvl_mpo.engines import Request, Sampling
from internvl_mpo.engines.chat_format import chat_payload, data_uri, read_requests
from internvl_mpo.engines.connections import seconds_to_wait
from internvl_mpo.engines.http_engine import HttpEngine
from internvl_mpo.engines.serve import BatchServer
from internvl_mpo.errors import BadInputError
from tests.chat_servers import ANSWER, EchoEngine, misbehaving, questions

PIXEL = data_uri(Image.new("RGB", (1, 1)))


def test_question_pictures_prefix_and_sampler_arrive(serve, tmp_path):
    server = serve(BatchServer(EchoEngine(), "echo"))
    picture = tmp_path / "a.png"
    Image.new("RGB", (5, 7)).save(picture)
    request = Request(
        id="x",
        question="Image-1: <image>\nImage-2: <image>\nSame?",
        images=(str(picture), Image.new("L", (3, 2))),
        prefix="They are",
        seed=9,
        sampling=Sampling(max_new_tokens=11),
    )
    (reply,) = HttpEngine(server.url).generate([request])
    assert reply.text == "They are|Image-1: <image>\nImage-2: <image>\nSame?|[(5, 7), (3, 2)]|9|11"
    assert (reply.id, reply.finish_reason, reply.num_tokens, reply.error) == ("x", "stop", 3, None)


def test_64_in_flight_fill_the_server(serve):
    engine = EchoEngine(seconds=0.05)
    server = serve(BatchServer(engine, "echo", batch_size=64))
    replies = list(HttpEngine(server.url, concurrency=64).generate(questions(640)))
    assert {reply.id for reply in replies} == {str(number) for number in range(640)}
    assert max(engine.batch_sizes) > 32
    assert len(engine.batch_sizes) < 64  # 10 is the least, 17 on a busy machine; one after another it would be 640


def test_every_reply_arrives_from_a_server_that_breaks_in_every_way(serve):
    def behave(handler, number):
        kind = number % 7 if number < 80 else 0
        if kind == 1:
            handler.send(429, b"slow down", Retry_After="0")
        elif kind == 2:
            handler.send(500, b"oops")
        elif kind == 3:
            handler.send(200, b"<html>garbage")
        elif kind == 4:
            handler.send(200, b'{"choices": []}')
        elif kind == 5:  # cuts the connection in the middle of the answer
            handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"cho')
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
        elif kind == 6:  # stalls
            time.sleep(0.6)
            handler.close_connection = True
        else:
            return None
        return True

    server = serve(misbehaving(behave))
    engine = HttpEngine(server.url, concurrency=8, timeout=0.3, backoff=0.001, max_attempts=30)
    replies = {reply.id: reply for reply in engine.generate(questions(40))}
    assert {id: reply.text for id, reply in replies.items()} == {str(n): f"q{n}" for n in range(40)}
    assert not any(reply.error for reply in replies.values())


def test_what_does_not_arrive_is_named_with_the_reason(serve):
    server = serve(misbehaving(lambda handler, number: handler.send(503, b"overloaded") or True))
    engine = HttpEngine(server.url, concurrency=2, backoff=0.001, max_attempts=3)
    replies = list(engine.generate(questions(5)))
    assert len(replies) == 5
    assert all("HTTP 503: overloaded (after 3 attempts)" in reply.error for reply in replies)
    assert server.asked["all"] == 15


def test_a_refusal_is_not_asked_again(serve):
    server = serve(misbehaving(lambda handler, number: handler.send(400, b"bad picture") or True))
    (reply,) = HttpEngine(server.url, backoff=0.001).generate(questions(1))
    assert "bad picture" in reply.error
    assert server.asked["all"] == 1


def test_a_dead_server_ends_the_run_early(serve):
    server = serve(misbehaving(lambda handler, number: handler.send(500, b"dead") or True))
    engine = HttpEngine(server.url, concurrency=2, backoff=0.0, max_attempts=2)
    replies = list(engine.generate(questions(200)))
    assert len(replies) == 200
    assert all(reply.error for reply in replies)
    assert server.asked["all"] < 100


def test_a_dripping_server_is_cut_off(serve):
    def behave(handler, number):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
        for _ in range(20):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.05)
        handler.close_connection = True
        return True

    server = serve(misbehaving(behave))
    start = time.monotonic()
    (reply,) = HttpEngine(server.url, timeout=0.3, max_attempts=1).generate(questions(1))
    assert "no complete answer in 0.3 s" in reply.error
    assert time.monotonic() - start < 0.9


@pytest.mark.parametrize(
    "body",
    [
        b'{"choices": [null]}',
        b'{"choices": ["text"]}',
        b'{"choices": [{"message": null, "finish_reason": "stop"}]}',
        b'{"choices": [{"message": {"content": null}, "finish_reason": "stop"}]}',
        b'{"choices": [{"message": {"content": "half"}, "finish_reason": "abort"}]}',
        b'{"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}], "usage": [1]}',
        b"null",
        b"[" * 100_000,
    ],
)
def test_json_of_another_shape_is_asked_again_and_ends_no_run(serve, body):
    server = serve(misbehaving(lambda handler, number: handler.send(200, body) or True if number < 3 else None))
    engine = HttpEngine(server.url, concurrency=1, backoff=0.0, max_attempts=2)
    first, second = sorted(engine.generate(questions(2)), key=lambda reply: reply.id)  # both may be there at once
    assert "ValueError" in first.error
    assert (first.text, second.text, second.error) == ("", "q1", None)


def test_half_a_character_is_replaced(serve):
    answer = json.dumps(ANSWER).replace(" 42 ", "4\\ud83d2\\ud83d\\ude00").encode()
    server = serve(misbehaving(lambda handler, number: handler.send(200, answer) or True))
    (reply,) = HttpEngine(server.url).generate(questions(1))
    assert reply.text == "4\ufffd2\U0001f600"


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 524, 529])
def test_a_passing_fault_is_asked_again(serve, status):
    server = serve(misbehaving(lambda handler, number: handler.send(status, b"later") or True if number < 3 else None))
    (reply,) = HttpEngine(server.url, backoff=0.0, max_attempts=3).generate(questions(1))
    assert reply.text == "q0"


def test_retry_after_is_waited_for(serve):
    def behave(handler, number):
        return handler.send(429, b"slow down", Retry_After="1") or True if number == 1 else None

    server = serve(misbehaving(behave))
    start = time.monotonic()
    (reply,) = HttpEngine(server.url, backoff=0.0).generate(questions(1))
    assert reply.text == "q0"
    assert time.monotonic() - start >= 1


def test_retry_after_may_be_a_date():
    assert seconds_to_wait("7") == 7
    assert 28 < seconds_to_wait(formatdate(time.time() + 30, usegmt=True)) <= 30
    for value in ("", "Wed, 21 Oct 2015 07:28:00 GMT", "soon", "²", "Wed, 99 Foo"):
        assert seconds_to_wait(value) == 0


def test_pauses_grow_up_to_a_minute(serve):
    engine = HttpEngine(serve(misbehaving(lambda handler, number: None)).url, backoff=1.0)
    assert [engine._pause(attempt, 0.0, 0.0) for attempt in (0, 1, 4, 10)] == [0.5, 1, 8, 30]
    assert 0.5 < engine._pause(0, 0.0, 0.7) < 1  # not all at the same moment
    assert engine._pause(0, 7.0, 0.0) == 7
    assert engine._pause(0, 3600.0, 0.0) == 60


def test_refused_requests_do_not_stop_those_after_them(serve):
    # with 32 samples of each question five that are too long are 160 refusals in a row, in every rerun again
    server = serve(misbehaving(lambda handler, number: handler.send(400, b"too long") or True if number < 41 else None))
    replies = sorted(HttpEngine(server.url, concurrency=1).generate(questions(50)), key=lambda reply: int(reply.id))
    assert [reply.error is None for reply in replies] == [False] * 40 + [True] * 10


def test_a_reply_now_and_then_keeps_the_run_going(serve):
    def behave(handler, number):
        return None if number % 9 == 0 else handler.send(500, b"oops") or True

    server = serve(misbehaving(behave))
    replies = list(HttpEngine(server.url, concurrency=1, max_attempts=1).generate(questions(90)))
    assert sum(reply.error is None for reply in replies) == 10
    assert server.asked["all"] == 90


@pytest.mark.parametrize("status", [401, 404])
def test_a_server_with_another_model_or_key_loses_no_reply(serve, status):
    good = serve(misbehaving(lambda handler, number: time.sleep(0.01)))
    wrong = serve(misbehaving(lambda handler, number: handler.send(status, b"no such model") or True))
    engine = HttpEngine([good.url, wrong.url], concurrency=4, backoff=0.001)
    assert not any(reply.error for reply in engine.generate(questions(40)))
    assert wrong.asked["all"] < 20


def test_a_server_that_is_down_at_the_start_is_done_without(serve):
    good = serve(misbehaving(lambda handler, number: None))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        down = f"http://127.0.0.1:{free.getsockname()[1]}"
    engine = HttpEngine([down, good.url], concurrency=2, backoff=0.001)
    assert engine.model_id == "m"
    assert not any(reply.error for reply in engine.generate(questions(10)))


def test_a_server_without_a_list_of_models_is_asked_by_name_only(serve):
    server = misbehaving(lambda handler, number: None)
    server.RequestHandlerClass.do_GET = lambda handler: handler.send(200, b'{"data": []}')
    serve(server)
    with pytest.raises(BadInputError, match="lists no model"):
        HttpEngine(server.url)
    (reply,) = HttpEngine(server.url, "m").generate(questions(1))
    assert reply.text == "q0"


def test_the_key_travels_without_the_line_break_of_its_file(serve):
    def behave(handler, number):
        return None if handler.headers["Authorization"] == "Bearer sk-1" else handler.send(401, b"who?") or True

    (reply,) = HttpEngine(serve(misbehaving(behave)).url, api_key="sk-1\n").generate(questions(1))
    assert reply.error is None


def test_a_connection_that_the_server_closed_meanwhile_is_no_fault(serve):
    def behave(handler, number):  # closes as servers do after a few idle seconds, without having said so
        body = json.dumps(ANSWER).encode()
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        handler.close_connection = True
        return True

    def slowly():
        for request in questions(4):
            yield request
            time.sleep(0.1)

    server = serve(misbehaving(behave))
    replies = list(HttpEngine(server.url, concurrency=1, max_attempts=1).generate(slowly()))
    assert [reply.error for reply in replies] == [None] * 4


def test_connections_are_used_again(serve):
    opened = Counter()
    server = misbehaving(lambda handler, number: None)
    verify = server.verify_request
    server.verify_request = lambda *given: opened.update(all=1) or verify(*given)
    serve(server)
    list(HttpEngine(server.url, concurrency=4).generate(questions(60)))
    assert opened["all"] <= 4


def test_one_attempt_takes_no_longer_than_the_timeout(serve):
    def behave(handler, number):  # each wait is shorter than the timeout, both together are not
        time.sleep(0.8)
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
        handler.wfile.flush()
        time.sleep(0.8)
        handler.close_connection = True
        return True

    server = serve(misbehaving(behave))
    start = time.monotonic()
    (reply,) = HttpEngine(server.url, timeout=1.0, max_attempts=1).generate(questions(1))
    assert "no complete answer in 1 s" in reply.error
    assert time.monotonic() - start < 1.5


def test_a_server_that_says_nothing_is_waited_for_no_longer_than_the_timeout(serve):
    ended = threading.Event()

    def behave(handler, number):
        ended.wait(3)
        handler.close_connection = True
        return True

    server = serve(misbehaving(behave))
    start = time.monotonic()
    (reply,) = HttpEngine(server.url, timeout=0.3, max_attempts=1).generate(questions(1))
    seconds = time.monotonic() - start
    ended.set()
    assert "no complete answer in 0.3 s" in reply.error
    assert seconds < 1.5


def test_a_caller_that_goes_leaves_nothing_waiting(serve):
    """Else Ctrl-C, or a full disk, would hang until replies come that nobody reads."""
    others, ended = set(threading.enumerate()), threading.Event()
    kinds = [lambda handler: None, lambda handler: ended.wait(20), lambda handler: handler.send(500, b"oops") or True]
    server = serve(misbehaving(lambda handler, number: kinds[0 if number == 1 else 1 + number % 2](handler)))
    replies = HttpEngine(server.url, concurrency=6, timeout=4, backoff=8, max_attempts=2).generate(questions(20))
    try:
        assert next(replies).text
        start = time.monotonic()
        replies.close()
        for thread in set(threading.enumerate()) - others:
            if thread.name.startswith("http-engine"):
                thread.join(max(0.0, start + 2 - time.monotonic()))
                assert not thread.is_alive()
    finally:
        ended.set()


def test_several_servers_share_the_work_and_a_dead_one_is_left_out(serve):
    good = [serve(misbehaving(lambda handler, number: time.sleep(0.01))) for _ in range(2)]
    dead = serve(misbehaving(lambda handler, number: handler.send(500, b"dead") or True))
    engine = HttpEngine([dead.url, *(server.url for server in good)], concurrency=6, backoff=0.01)
    replies = list(engine.generate(questions(60)))
    assert not any(reply.error for reply in replies)
    assert min(server.asked["all"] for server in good) > 15
    assert dead.asked["all"] < 20


def test_done_requests_are_not_sent(serve):
    server = serve(misbehaving(lambda handler, number: None))
    replies = list(HttpEngine(server.url).generate(questions(10), done={"3", "4"}))
    assert {reply.id for reply in replies} == set("01256789")
    assert server.asked["all"] == 8


def test_rate_limit_spaces_requests(serve):
    server = serve(misbehaving(lambda handler, number: None))
    start = time.monotonic()
    list(HttpEngine(server.url, requests_per_minute=1200).generate(questions(7)))
    assert time.monotonic() - start >= 6 * 0.05


def test_wrong_url_or_model_is_bad_input(serve):
    server = serve(misbehaving(lambda handler, number: None))
    with pytest.raises(BadInputError, match="serves m, not 'other'"):
        HttpEngine(server.url, "other")
    with pytest.raises(BadInputError, match="is no base URL"):
        HttpEngine("ftp://host")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(BadInputError, match="does not answer"):
        HttpEngine(f"http://127.0.0.1:{port}")


def test_a_picture_that_is_none_never_travels(serve, tmp_path):
    server = serve(misbehaving(lambda handler, number: None))
    fake = tmp_path / "fake.png"
    fake.write_text("no picture")
    (reply,) = HttpEngine(server.url).generate([Request(id="x", question="?", images=(str(fake),))])
    assert "cannot identify image" in reply.error
    assert server.asked["all"] == 0


def test_picture_files_keep_their_bytes_unless_mislabelled(tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.jpg")
    Image.new("RGB", (2, 2)).save(tmp_path / "b.png", "BMP")
    assert data_uri(tmp_path / "a.jpg").startswith("data:image/jpeg;base64,/9j/")
    assert data_uri(tmp_path / "b.png").startswith("data:image/png;base64,iVBOR")


def test_seed_and_sampler_are_in_the_payload():
    request = Request(id="x", question="q", seed=7, sampling=Sampling(temperature=0.5, top_k=3, top_p=0.9))
    payload = chat_payload(request, "m")
    assert {key: payload[key] for key in ("temperature", "top_k", "top_p", "max_tokens", "seed")} == {
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.9,
        "max_tokens": 1024,
        "seed": 7,
    }


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ({"messages": "hi"}, "must be a list"),
        ({"messages": []}, "expected user and assistant in turn"),
        ({"messages": [{"role": "user", "content": "a"}] * 2}, "expected user and assistant in turn"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "expected user and assistant in turn"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "a user last",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "a"},
                    {"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]},
                    {"role": "user", "content": "c"},
                ]
            },
            "only user messages may",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "type 'audio'"),
        ({"messages": [{"role": "user", "content": "a"}], "temperature": -1}, "temperature is -1"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}
                ]
            },
            "must be data URIs",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/"}}]}
                ]
            },
            "must be data URIs",
        ),
    ],
)
def test_server_refuses_what_it_does_not_do(payload, message):
    with pytest.raises(BadInputError, match=message):
        read_requests(payload)


def test_system_message_and_n_are_served():
    requests = read_requests(
        {
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}],
            "n": 3,
            "seed": 5,
            "max_tokens": 4,
        }
    )
    assert [request.seed for request in requests] == [5, 6, 7]
    assert (requests[0].system, requests[0].question) == ("Be brief.", "Why?")
    assert requests[0].sampling == Sampling(temperature=1.0, max_new_tokens=4)
