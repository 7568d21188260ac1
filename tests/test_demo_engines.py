"""Who answers in the demo: two checkpoints, one base with an adapter, servers."""

import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from internvl_mpo.demo.conversation import (
    SIDES,
    Controls,
    Conversation,
    Message,
)
from internvl_mpo.demo.local_models import LocalModels
from internvl_mpo.demo.servers import Servers
from internvl_mpo.demo.service import Service
from internvl_mpo.demo.streaming import VisitorQuestion
from internvl_mpo.engines import Sampling
from internvl_mpo.errors import BadInputError
from tests.demo_world import finish, wait_until
from tests.test_demo import LIMITS, ROOT, picture, service  # noqa: F401 - fixtures among them
from tests.tiny_world import WIDE_ENOUGH_FOR_4_BITS, make_model_folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return str(make_model_folder(tmp_path_factory.mktemp("demo_model")))


def ask_question(text: str = "What is this?", images=(), **changes) -> VisitorQuestion:
    message = Message("user", "<image>\n" * len(images) + text, tuple(images))
    sampling = Sampling(temperature=changes.pop("temperature", 0.0), max_new_tokens=changes.pop("length", 8))
    return VisitorQuestion({side: [message] for side in SIDES}, sampling, **changes)


def test_streamed_answers_equal_those_of_the_engine(model_folder):
    from internvl_mpo.engines import Request
    from internvl_mpo.engines.internvl_engine import InternVLEngine

    image = picture(width=90, height=40)
    for temperature in (0.0, 1.0):
        streamed = finish(
            LocalModels(model_folder, model_folder).stream(
                ask_question(images=[image], temperature=temperature, seed=5)
            )
        )
        request = Request(
            id="1",
            question="What is this?",
            images=(image.open(),),
            seed=5,
            sampling=Sampling(temperature=temperature, max_new_tokens=8),
        )
        (reply,) = InternVLEngine(model_folder).generate([request])
        assert streamed["base"].text == streamed["mpo"].text == reply.text
        assert streamed["base"].num_tokens == reply.num_tokens


def make_adapter(model_folder: str, folder: Path, target: str = "language_model", seed: int = 0) -> str:
    import torch
    from peft import LoraConfig, get_peft_model

    from modeling_internvl_mpo import InternVLChatModel
    from modeling_internvl_mpo.configuration_internvl_mpo import LORA_TARGETS

    model = InternVLChatModel.from_pretrained(model_folder)
    names = LORA_TARGETS[model.config.llm_config.model_type] if target == "language_model" else ["qkv"]
    config = LoraConfig(r=4, target_modules=rf".*{target}.*\.({'|'.join(names)})", task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, config)
    torch.manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    wrapped.save_pretrained(folder)
    return str(folder)


def test_one_mixed_batch_answers_as_base_and_as_merged_model(model_folder, tmp_path):
    from peft import PeftModel

    from modeling_internvl_mpo import InternVLChatModel, InternVLChatProcessor

    adapter = make_adapter(model_folder, tmp_path / "adapter")
    merged = PeftModel.from_pretrained(InternVLChatModel.from_pretrained(model_folder), adapter).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    InternVLChatProcessor.from_pretrained(model_folder).save_pretrained(tmp_path / "merged")

    image = picture(width=90, height=40)
    mixed, apart = LocalModels(model_folder, adapter=adapter), LocalModels(model_folder, str(tmp_path / "merged"))
    question = ask_question(images=[image], length=10)
    one, two = finish(mixed.stream(question)), finish(apart.stream(question))
    assert {side: one[side].text for side in SIDES} == {side: two[side].text for side in SIDES}
    assert one["base"].text != one["mpo"].text
    # follow-ups: rows of unequal length, each with its own history
    chats = {
        side: [
            *question.chats[side],
            Message("assistant", one[side].text),
            Message("user", "And " + "then " * (side == "mpo")),
        ]
        for side in SIDES
    }
    again = VisitorQuestion(chats, Sampling(max_new_tokens=10))
    one, two = finish(mixed.stream(again)), finish(apart.stream(again))
    assert {side: one[side].text for side in SIDES} == {side: two[side].text for side in SIDES}


def test_an_adapter_on_the_vision_tower_cannot_share_a_batch(model_folder, tmp_path):
    adapter = make_adapter(model_folder, tmp_path / "adapter", target="vision_model")
    with pytest.raises(BadInputError, match="merge it"):
        LocalModels(model_folder, adapter=adapter).load()


def test_models_are_loaded_once_however_many_ask(model_folder, monkeypatch):
    from internvl_mpo.demo import family_model

    loaded = []
    monkeypatch.setattr(
        family_model, "load_chat_model", lambda path, **options: loaded.append(path) or time.sleep(0.05)
    )
    backend = LocalModels("a", "b")
    threads = [threading.Thread(target=backend.load) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loaded == ["a", "b"]


def test_closing_the_stream_stops_the_real_engine(model_folder):
    backend = LocalModels(model_folder, model_folder)
    stream = backend.stream(ask_question(length=1024, temperature=1.0))
    next(pair for pair in stream if pair[0].num_tokens)
    stream.close()
    assert backend.activity.as_dict()["running"] == 0
    assert backend.activity.num_tokens < 2048
    assert not any(thread.name == "answer" for thread in threading.enumerate())


def test_a_model_that_is_nowhere_is_an_error_on_the_page_not_a_crash(tmp_path):
    backend = LocalModels(str(tmp_path / "nothing"), str(tmp_path / "nothing"))
    service, conversation = Service(backend, LIMITS, tmp_path), Conversation()
    service.begin("page", conversation, "What is it?", [], Controls("plain"))
    list(service.answer("page", conversation))
    assert "nothing' does not exist" in conversation.turns[0].answers["base"].error


def test_no_absolute_path_is_told_to_visitors(tmp_path):
    names = LocalModels(str(tmp_path / "start"), adapter=str(tmp_path / "lora")).names()
    assert (names["base"].model, names["mpo"].model) == ("start", "start + lora")
    assert LocalModels("org/base", "outputs/mpo").names()["mpo"].model == "outputs/mpo"


@pytest.mark.slow
def test_uploads_go_with_a_terminated_process(model_folder, tmp_path):
    """Containers end with SIGTERM; whatever visitors sent must not outlive the process."""
    command = [sys.executable, str(ROOT / "app.py"), "--base", model_folder, "--mpo", model_folder, "--port", "0"]
    process = subprocess.Popen(
        [*command, "--votes", str(tmp_path / "votes")],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert any("the demo is at" in line for line in iter(process.stdout.readline, ""))
        (folder,) = tmp_path.glob("internvl-mpo-demo-*")
        process.terminate()
        assert process.wait(30) == 0
        assert not folder.exists()
    finally:
        process.kill()


@pytest.mark.slow
def test_four_bit_weights_are_those_of_the_language_model(tmp_path):
    pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")
    model_folder = str(make_model_folder(tmp_path, **WIDE_ENOUGH_FOR_4_BITS))
    backend = LocalModels(model_folder, model_folder, four_bit=True)
    assert finish(backend.stream(ask_question(images=[picture()])))["mpo"].num_tokens > 0
    model = backend._models.get()[0].model

    def kinds(part):
        return {type(module).__name__ for module in part.modules() if "Linear" in type(module).__name__}

    assert "Linear4bit" in kinds(model.language_model.model)
    assert kinds(model.vision_model) == {"Linear"}


def test_a_device_that_is_not_there_is_named(model_folder):
    with pytest.raises(BadInputError, match="device 'cuda:7'"):
        LocalModels(model_folder, model_folder, device="cuda:7").load()


class _OpenAI(BaseHTTPRequestHandler):
    """A server that streams: `words` pieces, slowly if asked to."""

    protocol_version = "HTTP/1.1"
    mode, pause, bodies = "stream", 0.0, []
    cut_off = threading.Event()

    def do_GET(self):
        self._whole(200, {"data": [{"id": "served"}, {"id": "named"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.bodies.append(body)
        if self.mode == "refuse":
            self._whole(500, {"error": "overloaded"})
            return
        if not body.get("stream"):
            self._whole(
                200,
                {
                    "choices": [{"message": {"content": "all at once"}, "finish_reason": "stop"}],
                    "usage": {"completion_tokens": 4},
                },
            )
            return
        if self.mode == "plain":
            self._whole(400, {"error": "no stream here"})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.close_connection = True
        try:
            for word in ["one ", "two ", "three"] * (200 if self.pause else 1):
                self._event({"choices": [{"delta": {"content": word}}]})
                time.sleep(self.pause)
            if self.mode != "break":
                self._event({"choices": [{"delta": {}, "finish_reason": "length"}], "usage": {"completion_tokens": 9}})
                self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.cut_off.set()

    def _event(self, event):
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.flush()

    def _whole(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def openai():
    class Handler(_OpenAI):
        bodies, cut_off = [], threading.Event()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield Handler, Servers({"base": url, "mpo": url}, {"base": None, "mpo": "named"})
    server.shutdown()
    server.server_close()


def test_servers_stream_and_get_history_pictures_and_names(openai):
    handler, backend = openai
    question = ask_question("What?", images=[picture()], seed=3)
    answers = finish(backend.stream(question))
    assert answers["base"].text == "one two three"
    assert (answers["base"].finish_reason, answers["base"].num_tokens) == ("length", 9)
    assert {body["model"] for body in handler.bodies} == {"served", "named"}
    (content,) = {json.dumps(body["messages"][0]["content"]) for body in handler.bodies}
    assert [part["type"] for part in json.loads(content)] == ["image_url", "text"]
    assert "<image>" not in content


def test_a_server_that_cannot_stream_is_asked_for_all_at_once(openai):
    handler, backend = openai
    handler.mode = "plain"
    answers = finish(backend.stream(ask_question()))
    assert (answers["mpo"].text, answers["mpo"].num_tokens) == ("all at once", 4)


@pytest.mark.parametrize(("mode", "words"), [("refuse", "500"), ("break", "broke off")])
def test_a_server_that_fails_is_a_sentence_with_what_came(openai, mode, words):
    handler, backend = openai
    handler.mode = mode
    answers = finish(backend.stream(ask_question()))
    assert answers["base"].finish_reason == "error"
    assert words in answers["base"].error


def test_stopping_hangs_up_on_the_server(openai):
    handler, backend = openai
    handler.pause = 0.02
    stream = backend.stream(ask_question())
    next(pair for pair in stream if pair[0].num_tokens > 2)
    stream.close()
    assert backend.activity.as_dict()["running"] == 0
    assert wait_until(handler.cut_off.is_set, 5)


def test_our_own_server_streams_and_remembers_the_first_question(model_folder, monkeypatch):
    from internvl_mpo.engines.internvl_engine import InternVLEngine
    from internvl_mpo.engines.serve import BatchServer

    monkeypatch.setattr("internvl_mpo.engines.DRAFT_SECONDS", 0.0)
    server = BatchServer(InternVLEngine(model_folder), "mini")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        backend = Servers({"base": server.url, "mpo": server.url}, {"base": None, "mpo": None})
        local = LocalModels(model_folder, model_folder)
        first = ask_question(images=[picture(width=90, height=40)], length=48)
        here = finish(local.stream(first))
        frames = list(backend.stream(first))
        assert frames[-1][1].text == here["mpo"].text
        assert any(0 < len(mpo.text) < len(here["mpo"].text) for _, mpo in frames)
        chats = {
            side: [*first.chats[side], Message("assistant", here[side].text), Message("user", "Sure?")]
            for side in SIDES
        }
        second = VisitorQuestion(chats, first.sampling)
        served, here = finish(backend.stream(second)), finish(local.stream(second))
        assert {answer.error for answer in served.values()} == {""}
        assert served["mpo"].text == here["mpo"].text
        assert here["mpo"].text != finish(local.stream(ask_question("Sure?", length=48)))["mpo"].text
        assert backend.names()["base"].model == "mini"
    finally:
        server.shutdown()
        server.server_close()
