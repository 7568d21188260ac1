"""What strangers send to the server: every body is answered with one sentence, and nobody waits for another's."""

import asyncio
import base64
import io
import json
import random
import re
import struct
import time
import zlib

import hypothesis
import pytest
from hypothesis import strategies as st
from PIL import Image

from internvl_mpo.engines import Request, Sampling
from internvl_mpo.engines.chat_format import chat_payload, join_pieces, parse_body, read_requests
from internvl_mpo.engines.internvl_engine import InternVLEngine
from internvl_mpo.engines.local import load_picture
from internvl_mpo.engines.pictures import EncodedPicture, data_uri, read_picture
from internvl_mpo.errors import BadInputError
from tests.chat_servers import EchoEngine, Served, asked, encoded, user
from tests.tiny import tiny_processor
from tests.tiny_world import make_model_folder


@pytest.fixture
def served():
    app = Served()
    yield app
    app.close()


def uri(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def png_that_claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises many pixels."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


PIXEL = data_uri(Image.new("RGB", (4, 4)))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
DEEP = b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def with_part(part: dict) -> dict:
    return {"messages": [{"role": "user", "content": [part]}]}


REFUSED = {
    "no object": (b"[1]", "not a JSON object"),
    "no JSON": (b"{", "no JSON"),
    "empty": (b"", "no JSON"),
    "not UTF-8": (b'{"messages": "\xff"}', "not UTF-8"),
    "UTF-16": ('{"messages": []}'.encode("utf-16"), "not UTF-8"),
    "nested": (DEEP, "more than 100,000 values|nested too deeply"),
    "nested less": (b'{"messages": ' + b"[" * 20_000 + b"]" * 20_000 + b"}", "nested too deeply"),
    "many values": (b'{"logit_bias": [' + b"{}," * 200_000 + b"{}]}", "more than 100,000 values"),
    "NaN": (b'{"messages": [], "temperature": NaN}', "NaN"),
    "Infinity": (b'{"messages": [], "temperature": -Infinity}', "Infinity"),
    "a key twice": (b'{"messages": [], "seed": 1, "seed": 2}', "'seed' twice"),
    "many digits": (b'{"messages": [], "seed": ' + b"9" * 5000 + b"}", "integer of 5000 digits"),
    "no messages": ({}, "'messages' must be a list"),
    "n is no integer": (b'{"messages": [{"role": "user", "content": "a"}], "n": 1e999}', "n is inf"),
    "n zero": (asked(n=0), "n is 0"),
    "n many": (asked(n=65), "n is 65"),
    "n true": (asked(n=True), "n is True"),
    "seed is no integer": (b'{"messages": [{"role": "user", "content": "a"}], "seed": 1e999}', "seed is inf"),
    "seed float": (asked(seed=1e308), r"seed is 1e\+308"),
    "seed too large": (asked(seed=2**63), "seed is"),
    "temperature text": (asked(temperature="hot"), "temperature is 'hot'"),
    "temperature tiny": (asked(temperature=1e-300), "temperature is 1e-300"),
    "temperature huge": (asked(temperature=10**29), "temperature is"),
    "top_p zero": (asked(top_p=0), "top_p is 0"),
    "top_k": (asked(top_k=-2), "top_k is -2"),
    "max_tokens huge": (asked(max_tokens=1_000_000_000), "beyond the context of 4096"),
    "max_tokens zero": (asked(max_tokens=0), "max_tokens is 0"),
    "max_tokens float": (asked(max_tokens=5.5), "max_tokens is 5.5"),
    "two lengths": (asked(max_tokens=5, max_completion_tokens=6), "differ"),
    "long question": (asked(messages=[user("x" * 1_000_000)]), "beyond the context of 4096"),
    "stream_options text": (asked(stream=True, stream_options="x"), "'stream_options' is 'x'"),
    "stream_options alone": (asked(stream_options={"include_usage": True}), "needs 'stream': true"),
    "stream_options other": (asked(stream=True, stream_options={"chunk": 1}), "'chunk' of 'stream_options'"),
    "stream text": (asked(stream="yes"), "'stream' is 'yes'"),
    "surrogate": (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "half a character"),
    "surrogate in a name": (b'{"messages": [], "\\ud83d": 1}', "no field"),
    "stop": (asked(stop=["\n"]), "'stop' is a list"),
    "tools": (asked(tools=[{"type": "function"}]), "'tools' is a list"),
    "logprobs": (asked(logprobs=True), "'logprobs' is True"),
    "penalty": (asked(frequency_penalty=0.5), "'frequency_penalty' is 0.5"),
    "penalty false": (asked(frequency_penalty=False), "'frequency_penalty' is False"),
    "response_format": (asked(response_format={"type": "json_object"}), "'response_format' is an object"),
    "unknown": (asked(min_p=0.1), "'min_p' is no field"),
    "label": (asked(user=5), "'user' is 5"),
    "model number": (asked(model=5), "'model' is 5"),
    "message field": ({"messages": [{**user(), "name": "Ann"}]}, "'name' of a message"),
    "part field": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "b": 1}]}]},
        "'b' of a text",
    ),
    "detail": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}}]}
            ]
        },
        "'detail' of an image_url is 'low'",
    ),
    "role object": ({"messages": [{"role": {}, "content": "a"}]}, "found an object"),
    "continue nothing": (asked(continue_final_message=True), "needs a last message"),
    "no header": (asked(add_generation_prompt=False), "one true, one false"),
    "EPS": (
        asked(messages=[user("a", uri(EPS, "eps"))]),
        "no picture that can",
    ),
    "TIFF": (asked(messages=[user("a", uri(encoded("TIFF"), "tiff"))]), "no picture that can"),
    "no picture": (asked(messages=[user("a", uri(b"hello"))]), "no picture that can"),
    "damaged": (asked(messages=[user("a", uri(encoded("PNG", (300, 300))[:200]))]), "damaged"),
    "no base64": (asked(messages=[user("a", "data:image/png;base64,%%%")]), "not base64"),
    "many pixels": (asked(messages=[user("a", uri(png_that_claims(9400, 9400)))]), "9400 x 9400 pixels; at most 25"),
    "more pixels": (asked(messages=[user("a", uri(png_that_claims(60_000, 60_000)))]), "at most 25 megapixels"),
    "pixels together": (asked(messages=[user("a", *[uri(png_that_claims(4900, 5000))] * 3)]), "50 megapixels together"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_malformed_or_not_served_is_a_400_with_one_sentence(served, case):
    body, sentence = REFUSED[case]
    status, message = served.ask(body)
    assert status == 400
    assert re.search(sentence, message)
    assert "\n" not in message
    assert len(message) <= 500


def test_another_model_is_not_found(served):
    assert served.ask(asked(model="gpt-5")) == (404, "'model' is 'gpt-5'; this server has m")


NEUTRAL = {
    "model": "m",
    "temperature": 0.7,
    "frequency_penalty": 0.0,
    "logprobs": False,
    "response_format": {"type": "text"},
    "tools": None,
    "stop": None,
    "user": "u-1",
    "stream_options": None,
    "store": False,
    "max_completion_tokens": 7,
    "max_tokens": 7,
}


def test_fields_that_ask_for_what_comes_anyway_are_taken(served):
    assert served.ask(asked(**NEUTRAL)) == (200, "7")
    messages = [user(), {"role": "assistant", "content": "Ho", "refusal": None, "annotations": []}, user()]
    assert served.ask({"messages": messages, "max_tokens": 3}) == (200, "3")


def test_without_a_length_a_reply_has_what_is_left_of_the_context(served):
    assert served.ask(asked(messages=[user("x" * 4090)])) == (200, "6")
    assert served.ask(asked()) == (200, "1024")
    assert served.ask(asked(messages=[user("x" * 4090)], max_tokens=6)) == (200, "6")
    assert served.ask(asked(messages=[user("x" * 4090)], max_tokens=7))[0] == 400


def test_lengths_told_in_two_ways_and_packed_bodies_are_refused(served):
    body = json.dumps(asked()).encode()
    told = served.ask(body, content_length=str(len(body)), transfer_encoding="chunked")
    assert told == (400, "give Content-Length or Transfer-Encoding, not both")
    assert served.ask(body, content_encoding="gzip")[0] == 400


def test_a_body_that_is_too_large_is_not_read(served):
    assert served.ask(b"", content_length=str(1 << 40)) == (413, "give a body of at most 64 MB")


def test_bodies_that_are_held_together_are_bounded_and_given_free(served, monkeypatch):
    monkeypatch.setattr("internvl_mpo.engines.chat_app.MAX_HELD_BYTES", 1000)
    assert served.ask(asked(messages=[user("x" * 2000)]))[0] == 503
    assert [served.ask(asked())[0] for _ in range(50)] == [200] * 50


def test_an_engine_that_fails_or_forgets_is_a_500_and_the_next_request_is_answered(capsys):
    class Failing(EchoEngine):
        def generate(self, requests, done=()):
            if requests[0].question == "fail":
                raise RuntimeError("no such kernel\nat all")
            return iter(()) if requests[0].question == "forget" else super().generate(requests)

    served = Served(Failing())
    assert served.ask(asked(messages=[user("fail")])) == (500, "RuntimeError: no such kernel at all")
    assert served.ask(asked(messages=[user("forget")])) == (500, "RuntimeError: the engine gave no reply")
    assert served.ask(asked(messages=[user("else")]))[0] == 200
    served.close()


# --- bodies that nobody thought of ------------------------------------------------------------------------------------

LEAVES = [
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**63, 2**64, -(2**63), 10**29, 0.5, -0.0, 1e-320, 1e308, 3.0),
    *("", "a", "user", "assistant", "system", "tool", "text", "image_url", "auto", "m", "x" * 5000, "<image>"),
    *(
        "\ud83d",
        "\x00",
        "<IMG_CONTEXT>",
        "😀",
        "http://127.0.0.1/a.png",
        PIXEL,
        uri(b"GIF89a"),
        uri(encoded("PNG")[:40]),
    ),
    *([], {}, [[[]]], {"type": "text"}, {"url": PIXEL}, {"url": 5}, [{"type": "text", "text": "a"}]),
    *([user()], user("b", PIXEL)),
]
NAMES = [
    *("messages", "model", "n", "stream", "stream_options", "seed", "temperature", "top_k", "top_p", "max_tokens"),
    *("max_completion_tokens", "continue_final_message", "add_generation_prompt", "stop", "tools", "logit_bias"),
    *("user", "logprobs", "response_format", "frequency_penalty", "role", "content", "type", "text", "image_url"),
    *("url", "detail", "include_usage", "name", "x", "\ud83d", "x" * 300),
]


def mutated(value, draw: random.Random):
    """A body with one place changed: another value, another name, something more, something less."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        name = draw.choice(list(value))
        kind = draw.random()
        if kind < 0.6:
            return {**value, name: mutated(value[name], draw)}
        if kind < 0.7:
            return {key: one for key, one in value.items() if key != name}
        return {**value, draw.choice(NAMES): draw.choice(LEAVES)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        kind = draw.random()
        if kind < 0.7:
            return [*value[:place], mutated(value[place], draw), *value[place + 1 :]]
        return value[:place] + value[place + 1 :] if kind < 0.8 else [*value, draw.choice(LEAVES)]
    return draw.choice(LEAVES)


def fuzzed(number: int) -> list[bytes]:
    draw, system = random.Random(20), {"role": "system", "content": "s"}
    good = [
        asked(),
        asked(temperature=0.5, seed=3, n=2, max_tokens=9),
        asked(messages=[user("a", PIXEL, PIXEL)], stream=True, stream_options={"include_usage": True}),
        {"messages": [system, user("b", PIXEL), {"role": "assistant", "content": "c"}, user()]},
        {
            "messages": [user(), {"role": "assistant", "content": "It"}],
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
    ]
    bodies = []
    for _ in range(number):
        body = draw.choice(good)
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            body = mutated(body, draw)
        text = bytearray(json.dumps(body).encode())
        if draw.random() < 0.15 and text:  # bytes as well, not only values
            for _ in range(draw.randint(1, 3)):
                text[draw.randrange(len(text))] = draw.choice(b'{}[]",:\\0e9\xffN')
        bodies.append(bytes(text))
    return bodies


@pytest.mark.parametrize("number", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_whatever_a_body_is_it_is_answered(served, capfd, number):
    async def ask_all():
        return [await asyncio.wait_for(served.post(body), 10) for body in fuzzed(number)]

    answers = asyncio.run(ask_all())
    statuses = [status for status, _ in answers]
    assert set(statuses) <= {200, 400, 404}
    assert statuses.count(200) > number / 50  # not all die at the first check
    for status, answer in answers:
        if status != 200:
            message = json.loads(answer)["error"]["message"]
            assert message.isascii()
            assert 0 < len(message) <= 500
    assert "Traceback" not in capfd.readouterr().err
    assert served.app._held_bytes == 0


# --- pictures and prompts of a real engine ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tmp_path_factory) -> InternVLEngine:
    return InternVLEngine(make_model_folder(tmp_path_factory.mktemp("model")))


def turned(size, orientation: int) -> EncodedPicture:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", size, "red").save(buffer, "JPEG", exif=exif)
    return read_picture(buffer.getvalue(), "p")


def test_the_length_of_a_prompt_is_what_the_model_will_read(engine):
    wide, tall = read_picture(encoded("PNG", (90, 30)), "p"), turned((90, 30), 6)
    assert (wide.size, tall.size) == ((90, 30), (30, 90))
    history = (("<image>\nWhat?", "A field."),)
    requests = [
        Request(id="1", question="Hello there"),
        Request(id="2", question="What is it?", images=(wide,)),
        Request(id="3", question="First <image> and then <image>.", images=(wide, tall)),
        Request(id="4", question="And <image>?", images=(tall, wide), history=history, system="Be brief.", prefix="It"),
    ]
    for request in requests:
        inputs = engine._inputs([request], [[load_picture(image) for image in request.images]])
        assert engine.num_prompt_tokens(request) == inputs["input_ids"].shape[1]


def test_a_question_of_a_million_tokens_is_refused_at_once(engine):
    served = Served(engine)
    start = time.monotonic()
    status, message = served.ask(asked(messages=[user("word " * 1_000_000)]))
    assert status == 400
    assert f"beyond the context of {engine.context}" in message
    assert time.monotonic() - start < 5
    assert served.ask(asked(max_tokens=2))[0] == 200
    served.close()


def test_prompts_are_counted_while_others_are_answered(engine):
    """A tokenizer that pads one batch must not be counted with by another thread."""
    served, statuses = Served(engine), []

    async def ask_all():
        bodies = [asked(messages=[user("word " * number)], max_tokens=2) for number in range(50)]
        return await asyncio.gather(*(served.post(json.dumps(body).encode()) for body in bodies))

    statuses = [status for status, _ in asyncio.run(ask_all())]
    served.close()
    assert statuses == [200] * 50


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
def test_every_format_of_browsers_is_opened_and_keeps_its_bytes(kind):
    content = encoded(kind)
    (request,) = read_requests(parse_body(json.dumps(asked(messages=[user("a", uri(content, kind.lower()))])).encode()))
    (picture,) = request.images
    assert picture.content == content
    assert load_picture(picture).getpixel((0, 0))[0] > 240
    assert data_uri(picture) == uri(content, kind.lower())


def test_a_picture_is_decoded_only_when_it_is_looked_at():
    with pytest.raises(BadInputError, match="9000 x 9000"):
        read_picture(png_that_claims(9000, 9000), "p")
    picture = read_picture(png_that_claims(4000, 4000), "p")  # broken behind its header
    with pytest.raises(OSError, match="damaged"):
        picture.open()


@pytest.mark.parametrize("temperature", [1e-300, -1, float("nan"), float("inf"), 1e308])
def test_temperatures_that_leave_no_distribution_are_refused(temperature):
    with pytest.raises(BadInputError, match="temperature is"):
        Sampling(temperature=temperature)


@hypothesis.given(
    st.lists(
        st.sampled_from([None, "", "a", "b.", " c", "\n", "\nd", "e\n", ".", "? f", "。g", "\u3000h", "\t", "-"]),
        max_size=6,
    )
)
def test_the_server_reads_a_list_as_the_chat_template_writes_it(pieces):
    content = [{"type": "image"} if piece is None else {"type": "text", "text": piece} for piece in pieces]
    prompt = tiny_processor().apply_chat_template([{"role": "user", "content": content}])
    _, _, turn = prompt.partition("<|im_start|>user\n")
    assert turn.removesuffix("<|im_end|>") == join_pieces(pieces)


@pytest.mark.parametrize(
    "question",
    [
        "First look at <image> and then at <image>.",
        "Image-1: <image>\nImage-2: <image>\nSame?",
        "<image>\nWhat?",
        "<image>\n<image>\nWhat?",
        "<image> What?",
        "<image>\n\nWhat?",
        "Look:\n<image>\nWhat?",
        "What is this? <image>",
        "Options: (A) <image>, (B) <image>; choose.\n",
        "看<image>，然后看<image>。",
        "<image>\n.5 or <image>\n?",
    ],
)
def test_a_question_with_pictures_in_its_middle_arrives_as_it_was(question):
    pictures = tuple(Image.new("RGB", (4, 4)) for _ in range(question.count("<image>")))
    body = json.dumps(chat_payload(Request(id="x", question=question, images=pictures), "m")).encode()
    (request,) = read_requests(parse_body(body))
    assert request.question == question
    assert len(request.images) == len(pictures)
