"""Conversations and streams of the chat server, from a real engine."""

import http.client
import json
import threading
import time
from collections import Counter

import pytest
import torch
from PIL import Image

from internvl_mpo.engines import Request, Sampling
from internvl_mpo.engines.chat_format import data_uri, read_requests
from internvl_mpo.engines.http_engine import HttpEngine
from internvl_mpo.engines.internvl_engine import InternVLEngine
from internvl_mpo.engines.serve import BatchServer
from tests.chat_servers import EchoEngine
from tests.tiny_world import make_model_folder


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> InternVLEngine:
    return InternVLEngine(make_model_folder(tmp_path_factory.mktemp("served_model")))


@pytest.fixture
def shown_at_once(monkeypatch):
    monkeypatch.setattr("internvl_mpo.engines.DRAFT_SECONDS", 0.0)


def post(server, **payload) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=30)
    connection.request("POST", "/v1/chat/completions", json.dumps(payload))
    return connection.getresponse()


def events(response: http.client.HTTPResponse) -> list:
    """Events of a stream; the last one is "[DONE]"."""
    assert response.headers["Content-Type"] == "text/event-stream"
    lines = [line for line in response.read().decode().split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [*(json.loads(line[6:]) for line in lines[:-1]), lines[-1][6:]]


def user(text: str, *images) -> dict:
    pictures = [{"type": "image_url", "image_url": {"url": data_uri(image)}} for image in images]
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}] if images else text}


def test_a_follow_up_is_answered_as_chat_with_history_answers(serve, engine):
    first, second = Image.new("RGB", (56, 28), "red"), Image.new("RGB", (28, 28), "blue")
    history = [("<image>\nWhat is it?", "A red field.\n"), ("Sure?", "Yes, **very**.")]
    messages = [
        {"role": "system", "content": "Be brief."},
        *(user("What is it?", first), {"role": "assistant", "content": history[0][1]}),
        *(user("Sure?"), {"role": "assistant", "content": history[1][1]}),
        user("And this?", second),
    ]
    (request,) = read_requests({"messages": messages, "temperature": 0, "max_tokens": 8})
    question = "<image>\nAnd this?"
    model, processor = engine.model, engine.processor
    model.system_message, own = "Be brief.", model.system_message
    try:
        turns = [*history, (question, None)]
        assert engine.render(request.question, 2, "", request.history, request.system) == model._render(turns)
        tiles = [
            processor.image_processor(image, max_dynamic_patch=engine.max_tiles // 2, return_tensors="pt").pixel_values
            for image in (first, second)
        ]
        expected = model.chat(
            engine.tokenizer,
            torch.cat(tiles).to(model.dtype),
            question,
            {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": engine.suppressed.nonzero()[:, 0].tolist()},
            history=list(history),
            num_patches_list=[len(one) for one in tiles],
        )
    finally:
        model.system_message = own
    server = serve(BatchServer(engine, "tiny"))
    answer = json.loads(post(server, messages=messages, temperature=0, max_tokens=8).read())
    assert answer["choices"][0]["message"]["content"] == expected
    (reply,) = HttpEngine(server.url).generate(
        [
            Request(
                id="x",
                question=question,
                images=(first, second),
                history=tuple(history),
                system="Be brief.",
                sampling=Sampling(max_new_tokens=8),
            )
        ]
    )
    assert reply.text == expected


def test_streamed_pieces_are_the_whole_answer_in_the_form_clients_know(serve, engine, shown_at_once):
    server = serve(BatchServer(engine, "tiny"))
    asked = {"messages": [user("Tell")], "temperature": 1.0, "seed": 3, "max_tokens": 24, "n": 2}
    whole = json.loads(post(server, **asked).read())
    *stream, done = events(post(server, **asked, stream=True, stream_options={"include_usage": True}))
    assert done == "[DONE]"
    assert {event["object"] for event in stream} == {"chat.completion.chunk"}
    assert stream.pop()["usage"] == whole["usage"]
    for choice in whole["choices"]:
        mine = [event["choices"][0] for event in stream if event["choices"][0]["index"] == choice["index"]]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        pieces = [one["delta"]["content"] for one in mine[1:-1]]
        assert len(pieces) > 2
        assert "".join(pieces) == choice["message"]["content"]
        assert [one["finish_reason"] for one in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]


def test_an_engine_that_shows_no_drafts_is_streamed_in_one_piece(serve):
    server = serve(BatchServer(EchoEngine(), "echo"))
    *_, text, end, _ = events(post(server, messages=[user("Hi")], seed=1, max_tokens=2, stream=True))
    assert text["choices"][0]["delta"] == {"content": "|Hi|[]|1|2"}
    assert end["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_ends_its_reply_and_no_other(serve, engine, shown_at_once, monkeypatch, stream):
    steps, begun = Counter(), threading.Event()
    forward = engine.model.forward

    def counted(*args, **kwargs):
        steps[len(kwargs["input_ids"])] += 1
        begun.set()
        time.sleep(0.005)
        return forward(*args, **kwargs)

    monkeypatch.setattr(engine.model, "forward", counted)
    monkeypatch.setattr(engine, "context", 10_000)
    monkeypatch.setattr(engine, "stop_ids", [])  # replies end at their limit only
    server = serve(BatchServer(engine, "tiny", batch_size=1))
    body = json.dumps({"messages": [user("Tell")], "temperature": 0, "max_tokens": 5000, "stream": stream})
    client = http.client.HTTPConnection(*server.server_address[:2], timeout=30)
    client.request("POST", "/v1/chat/completions", body)
    assert begun.wait(10)
    if stream:
        response = client.getresponse()
        assert response.read(20).startswith(b"data: {")
        response.close()
    client.close()
    other = json.loads(post(server, messages=[user("Tell")], temperature=0, max_tokens=3).read())
    assert other["usage"]["completion_tokens"] == 3
    assert sum(steps.values()) < 1000


def test_a_request_that_nobody_waits_for_is_not_begun(serve):
    engine = EchoEngine(seconds=0.4)
    server = serve(BatchServer(engine, "echo", batch_size=1))
    first = http.client.HTTPConnection(*server.server_address[:2], timeout=30)
    body = json.dumps({"messages": [user("first")]})
    first.request("POST", "/v1/chat/completions", body)
    while not engine.batch_sizes:
        time.sleep(0.01)
    second = http.client.HTTPConnection(*server.server_address[:2], timeout=30)
    second.request("POST", "/v1/chat/completions", body)
    second.close()
    assert first.getresponse().status == 200
    assert post(server, messages=[user("third")]).status == 200
    assert sum(engine.batch_sizes) == 2


def test_a_malformed_conversation_is_a_400_with_one_sentence_streamed_or_not(serve, engine):
    server = serve(BatchServer(engine, "tiny"))
    wrong = [
        [user("a"), user("b")],
        [{"role": "tool", "content": "a"}, user("b")],
        [user("a"), {"role": "assistant", "content": None}, user("b")],
        [user("<image> without a picture")],
    ]
    for messages in wrong:
        for stream in (False, True):
            response = post(server, messages=messages, stream=stream)
            message = json.loads(response.read())["error"]["message"]
            assert response.status == 400
            assert message
            assert "\n" not in message
