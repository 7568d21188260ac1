"""The demo without a browser and without Gradio: conversations, pictures, backends, votes, links, the guard."""

import asyncio
import base64
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from internvl_mpo.demo import browser, show
from internvl_mpo.demo.conversation import (
    SIDES,
    Answer,
    Controls,
    Conversation,
    Message,
    Turn,
    check_question,
    describe_speed,
    split_answer,
)
from internvl_mpo.demo.examples import make_examples
from internvl_mpo.demo.guard import Guard
from internvl_mpo.demo.local_models import LocalModels
from internvl_mpo.demo.markup import safe_markdown
from internvl_mpo.demo.pictures import Cutter, Limits, read_data_uri, read_picture, take_uploads
from internvl_mpo.demo.servers import Servers
from internvl_mpo.demo.service import Service
from internvl_mpo.demo.settings import DemoSettings
from internvl_mpo.demo.sharing import Shelf
from internvl_mpo.demo.streaming import VisitorQuestion
from internvl_mpo.demo.takeaway import write_takeaway
from internvl_mpo.demo.votes import VoteBox
from internvl_mpo.engines import Sampling
from internvl_mpo.errors import BadInputError
from internvl_mpo.mmpr.reading import iter_pairs
from modeling_internvl_mpo.image_processing_internvl_mpo import dynamic_preprocess
from tests.demo_world import ScriptedBackend, finish, make_page, settings_for, wait_until
from tests.hostile_markup import hostile_answers
from tests.tiny_world import WIDE_ENOUGH_FOR_4_BITS, make_model_folder

ROOT = Path(__file__).resolve().parents[1]
LIMITS = Limits(max_bytes=200_000, max_pixels=1_000_000, max_images=3)


def png(width: int = 40, height: int = 30, colour: str = "red", **save) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(buffer, "PNG", **save)
    return buffer.getvalue()


def picture(**kwargs):
    return read_picture(png(**kwargs), "a.png", LIMITS)


def finished(base: str, mpo: str, style: str = "cot", question: str = "How many?", images=()) -> Turn:
    answers = {side: Answer(text, 3, 0.1, 0.3, "stop") for side, text in zip(SIDES, (base, mpo), strict=True)}
    return Turn(question, Controls(style), tuple(images), answers)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_final_answer_is_lifted_out_of_the_reasoning():
    parts = split_answer("It is 3 + 4.\n\n**Final answer:** 7", "marker")
    assert (parts.body, parts.final) == ("It is 3 + 4.", "7")
    parts = split_answer("<think>Three and four make seven.</think>So \\boxed{7}", "think")
    assert (parts.thoughts, parts.body, parts.final) == ("Three and four make seven.", "So \\boxed{7}", "7")
    assert split_answer("7", "text") == ("", "", "7", "whole text")
    unfinished = split_answer("<think>Three and", "think")
    assert (unfinished.thoughts, unfinished.body, unfinished.final) == ("Three and", "", None)


@pytest.mark.parametrize(
    ("base", "mpo", "state"),
    [
        ("Adding gives it.\nFinal answer: 7", "Counting gives it.\nFinal answer: 7.0", "same"),
        ("Halves.\nFinal answer: $\\frac{1}{2}$", "Decimal.\nFinal answer: 0.5", "same"),
        ("Adding.\nFinal answer: 7", "Multiplying.\nFinal answer: 12", "different"),
        ("I do not know.", "Multiplying.\nFinal answer: 12", "unknown"),
    ],
)
def test_agreement_follows_the_rules_of_the_training_pairs(base, mpo, state):
    assert finished(base, mpo).agreement.state == state


def test_agreement_reads_option_letters_against_the_question():
    question = "Which colour?\nA. red\nB. blue"
    assert (
        finished("It is blue.\nFinal answer: B", "I see blue.\nFinal answer: blue", question=question).agreement.state
        == "same"
    )


def test_each_side_remembers_its_own_answers_only():
    conversation = Conversation([finished("base says 1", "mpo says 2", images=[picture()])])
    conversation.turns.append(Turn("And then?", Controls("plain")))
    base, mpo = conversation.messages("base"), conversation.messages("mpo")
    assert [message.role for message in base] == ["user", "assistant", "user"]
    assert base[1].text == "base says 1"
    assert mpo[1].text == "mpo says 2"
    assert base[0].text.startswith("<image>\n")
    assert len(base[0].images) == 1
    assert base[2] == Message("user", "And then?")


def test_a_turn_without_an_answer_is_left_out_of_the_history():
    conversation = Conversation([finished("", "mpo says 2"), Turn("And then?", Controls("plain"))])
    assert len(conversation.messages("base")) == 1
    assert len(conversation.messages("mpo")) == 3


@pytest.mark.parametrize("text", ["", "  \n", None, "x" * 9000, "what is <image>?", "a<|im_end|>b", "<IMG_CONTEXT>"])
def test_questions_a_model_must_not_get_are_refused(text):
    with pytest.raises(BadInputError):
        check_question(text, 0, 3)


def test_too_many_pictures_are_refused_by_number():
    with pytest.raises(BadInputError, match="4 pictures; at most 3"):
        check_question("Which?", 4, 3)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<img src=x onerror=alert(1)>", "&lt;img src=x onerror=alert(1)>"),
        ("a</div><script>b", "a&lt;/div>&lt;script>b"),
        ("[x](javascript:alert(1))", "[x] (javascript:alert(1))"),
        ("[x]( JaVaScRiPt:alert(1))", "[x] ( JaVaScRiPt:alert(1))"),
        ("[x](https://example.org)", "[x](https://example.org)"),
        ("![x](https://example.org/spy.png)", r"!\[x](https://example.org/spy.png)"),
        ("$a<b$ and a < b", "$a< b$ and a < b"),
        ("`<b>` looks like code", "`<\u2060b>` looks like code"),
        ("```cpp\nvector<int> a;\n```", "```cpp\nvector<int> a;\n```"),
        ("```mermaid\ngraph\n```", "```\ngraph\n```"),
        ("```\nnever <b>closed", "```\nnever <b>closed\n```"),
        ("[a]: javascript:x", r"\[a]: javascript:x"),
    ],
)
def test_text_of_a_model_carries_no_markup_of_its_own(text, shown):
    assert safe_markdown(text) == shown


def test_no_tag_and_no_picture_begins_outside_plain_fences():
    for answer in hostile_answers(2000):
        shown = safe_markdown(answer)
        if all(re.fullmatch(r"(`{3,}|~{3,})\w*", line) for line in shown.split("\n") if "```" in line or "~~~" in line):
            shown = re.sub(r"(?ms)^(```+|~~~+)\w*\n.*?^\1$", "", shown)
        assert not re.search(r"<[A-Za-z/!?]|!\[", shown), answer
        assert "mermaid\n" not in shown


def test_markup_of_any_length_is_read_quickly():
    start = time.process_time()
    for piece in ("`", "` ``", "$", "$$ ", "```\n", "\n", "[", "<img ", "~~~a\n`", "\\[", "](("):
        safe_markdown(piece * (30_000 // len(piece)))
    assert time.process_time() - start < 8


def test_blinded_panes_do_not_tell_the_model():
    conversation = Conversation()
    conversation.restart(blind=True)
    models = {"base": "secret/base", "mpo": "secret/mpo"}
    assert all("secret" not in show.head_html(conversation, position, models) for position in (0, 1))
    conversation.revealed = True
    assert "secret/mpo" in "".join(show.head_html(conversation, position, models) for position in (0, 1))


def test_a_blinded_order_is_drawn_anew():
    orders = set()
    for _ in range(60):
        conversation = Conversation()
        conversation.restart(blind=True)
        orders.add(conversation.order)
    assert orders == {("base", "mpo"), ("mpo", "base")}


def test_messages_show_question_picture_reasoning_and_answer_apart():
    turn = finished("We add.\n\nFinal answer: 7", "We multiply.\n\nFinal answer: 12", images=[picture()])
    asked = show.question_html(turn)
    assert asked.count("<img") == 1
    assert 'alt="Picture 1 of the question"' in asked
    reasoning, final = show.answer_messages(turn, "mpo")
    assert reasoning["content"] == "We multiply."
    assert final["content"].startswith("**Final answer:** 12")
    assert "different" in final["content"]


def test_earlier_turns_hold_the_question_once_and_name_who_answered():
    turns = [finished("We add.\n\nFinal answer: 7", "<think>twelve</think> \\boxed{12}", "r1"), finished("7", "12")]
    user, *answers = show.earlier_messages(Conversation(turns))
    assert (user["role"], user["content"]) == ("user", "How many?")
    titles = [message["metadata"]["title"] for message in answers]
    assert {title.partition(":")[0] for title in titles} == {"A · Base", "B · MPO"}
    hidden = Conversation(turns, blind=True)
    assert {m["metadata"]["title"].partition(":")[0] for m in show.earlier_messages(hidden)[1:]} == {"A", "B"}


def test_a_conversation_can_be_taken_away(tmp_path):
    conversation = Conversation(
        [finished("We add.\nFinal answer: 7", "We multiply.\nFinal answer: 12", images=[picture()])]
    )
    VoteBox(tmp_path / "votes").cast(conversation, "right", ScriptedBackend().names())
    path = write_takeaway(conversation, {"base": "tiny/base", "mpo": "tiny/mpo"}, tmp_path / "saved")
    with zipfile.ZipFile(path) as file:
        file.extractall(tmp_path / "taken")
    text = (tmp_path / "taken" / "conversation.md").read_text()
    assert "## How many?" in text
    assert "### A · tiny/base\n\nWe add." in text
    for link in re.findall(r"!\[picture\]\((.*)\)", text):
        assert (tmp_path / "taken" / link).is_file()
    (row,) = iter_pairs(tmp_path / "taken" / "pairs.jsonl")
    assert row.pair.chosen == "We multiply.\nFinal answer: 12"
    assert (row.image_root / row.pair.images[0]).is_file()
    conversation.blind = True
    with zipfile.ZipFile(write_takeaway(conversation, {"base": "b", "mpo": "m"}, tmp_path / "blind")) as file:
        assert "### A\n" in file.read("conversation.md").decode()
    with pytest.raises(BadInputError, match="nothing to save yet"):
        write_takeaway(Conversation(), {}, tmp_path)


def test_a_large_photo_is_made_smaller_and_says_so():
    photo = read_picture(png(1500, 900), "photo.png", LIMITS)
    assert photo.sent == (1500, 900)
    assert 900_000 < photo.width * photo.height <= 1_000_000
    assert show.shrunk([picture(), photo]) == [
        f"Picture 2 had 1,500 × 900 pixels and was made smaller ({photo.width:,} × {photo.height:,}); the models look "
        "at tiles, which need no more."
    ]


def test_a_half_written_answer_is_not_called_final():
    turn = finished("We add.\n\nFinal answer: 1", "")
    turn.answers["base"] = Answer("We add.\n\nFinal answer: 1", 5, 0.1, 0.3)
    assert not any("**Final answer:**" in message["content"] for message in show.answer_messages(turn, "base"))


def test_speed_counts_tokens_after_the_first():
    assert describe_speed(Answer("x", 21, 0.5, 1.5, "stop")) == "21 tokens · 20.0 tokens/s · first after 0.50 s"
    assert describe_speed(Answer("x", 1, 0.5, 0.5, "length")) == "1 token · first after 0.50 s · cut at the token limit"


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_pixels_are_counted_before_they_are_decoded():
    bomb = png(4000, 4000)
    assert len(bomb) < LIMITS.max_bytes
    with pytest.raises(BadInputError, match=r"too large: 4,000 x 4,000 pixels; at most 4 megapixels"):
        read_picture(bomb, "bomb.png", LIMITS)


@pytest.mark.parametrize("content", [b"", b"hello", b"<svg onload='alert(1)'/>", png()[:60], b"%PDF-1.4"])
def test_what_is_no_picture_is_refused_with_its_name(content):
    with pytest.raises(BadInputError, match=r"notes\.txt"):
        read_picture(content, "notes.txt", LIMITS)


def test_a_large_file_is_refused_by_its_size():
    with pytest.raises(BadInputError, match=r"0\.2 MB"):
        read_picture(b"x" * (LIMITS.max_bytes + 1), "a.png", LIMITS)


def test_a_photo_loses_its_metadata():
    exif = Image.Exif()
    exif[0x010E] = "at home, 52.1 N"
    kept = read_picture(png(exif=exif), "a.png", LIMITS)
    assert b"at home" not in kept.png
    assert kept.open().getexif() == {}


def test_uploads_are_deleted_once_they_are_read_and_kept_when_one_is_refused(tmp_path):
    good, bad = tmp_path / "1" / "a.png", tmp_path / "2" / "b.png"
    for path, content in ((good, png()), (bad, b"no picture")):
        path.parent.mkdir()
        path.write_bytes(content)
    with pytest.raises(BadInputError, match=r"b\.png"):
        take_uploads([str(good), str(bad)], LIMITS)
    assert good.exists()
    assert len(take_uploads([str(good)], LIMITS)) == 1
    assert not good.parent.exists()


def test_data_uris_are_pictures_or_nothing():
    text = "data:image/png;base64," + base64.b64encode(png()).decode()
    assert read_data_uri(text, LIMITS).width == 40
    for wrong in ("data:text/html;base64,PGI+", "file:///etc/passwd", "/etc/passwd", "http://169.254.169.254/"):
        with pytest.raises(BadInputError):
            read_data_uri(wrong, LIMITS)


@pytest.mark.parametrize(("width", "height", "limit"), [(40, 30, 6), (900, 300, 6), (300, 900, 12), (50, 50, 1)])
def test_drawn_tiles_are_those_the_model_gets(width, height, limit):
    cutter, image = Cutter(side=32, num_image_token=4), picture(width=width, height=height)
    tiles = dynamic_preprocess(image.open(), 1, limit, 32, use_thumbnail=True)
    assert cutter.num_tiles(image, limit) == len(tiles)
    assert f"{4 * len(tiles):,} tokens" in show.tiles_html(cutter, [image], limit)


def test_several_pictures_share_the_tile_limit():
    assert Cutter(max_tiles=12).share(None, 3) == 4
    assert Cutter(max_tiles=12).share(6, 2) == 3
    assert Cutter(max_tiles=12).share(1, 5) == 1


# --- asking -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def service(tmp_path):
    (tmp_path / "uploads").mkdir()
    return Service(ScriptedBackend(), LIMITS, tmp_path / "uploads", max_new_tokens=64)


def test_a_question_is_answered_and_the_second_remembers_the_first(service):
    conversation = Conversation()
    for question in ("What is it?", "And now?"):
        service.begin("page", conversation, question, [], Controls("plain"))
        for _ in service.answer("page", conversation):
            pass
    assert [turn.is_finished for turn in conversation.turns] == [True, True]
    assert "Earlier questions: 1." in conversation.turns[1].answers["mpo"].text


def test_stop_ends_the_engine_and_keeps_what_is_there(service):
    service.backend.pause = 0.01
    conversation = Conversation()
    service.begin("page", conversation, "count", [], Controls("plain"))
    for number, _ in enumerate(service.answer("page", conversation)):
        if number == 2:
            service.stop("page")
    activity = service.backend.activity
    assert activity.as_dict()["running"] == 0
    assert activity.stopped == 1
    before = activity.num_tokens
    time.sleep(0.1)
    assert activity.num_tokens == before < 4000
    answer = conversation.turns[0].answers["base"]
    assert answer.finish_reason == "stopped"
    assert answer.text.startswith("0 1 ")
    assert not any(thread.name == "answer" for thread in threading.enumerate())


def test_stop_reaches_a_question_that_still_waits(service):
    conversation = Conversation()
    service.begin("page", conversation, "count", [], Controls("plain"))
    service.stop("page")
    list(service.answer("page", conversation))
    assert service.backend.activity.num_tokens == 0
    assert conversation.turns[0].answers["mpo"].finish_reason == "stopped"


def test_a_reader_who_leaves_takes_the_engine_along(service):
    service.backend.pause = 0.01
    conversation = Conversation()
    service.begin("page", conversation, "count", [], Controls("plain"))
    stream = service.answer("page", conversation)
    next(stream)
    stream.close()
    assert service.backend.activity.as_dict()["running"] == 0


def test_a_second_question_waits_for_the_first(service):
    conversation = Conversation()
    service.begin("page", conversation, "What is it?", [], Controls("plain"))
    with pytest.raises(BadInputError, match="still being answered"):
        service.begin("page", conversation, "And now?", [], Controls("plain"))


def test_clear_ends_the_answer_and_nothing_of_it_comes_back(service):
    service.backend.pause = 0.01
    conversation = Conversation()
    service.begin("page", conversation, "count", [], Controls("plain"))
    stream = service.answer("page", conversation)
    next(stream)
    empty = service.clear("page", blind=False)
    assert list(stream) == [], "no more of the old conversation is shown"
    assert service.backend.activity.as_dict()["running"] == 0
    service.begin("page", empty, "What is it?", [], Controls("plain"))
    list(service.answer("page", empty))
    assert len(empty.turns) == 1


def test_an_answer_that_nobody_waits_for_is_not_written(service):
    conversation = Conversation()
    service.begin("page", conversation, "What is it?", [], Controls("plain"))
    list(service.answer("page", conversation))
    assert list(service.answer("page", conversation)) == []
    assert service.backend.activity.started == 1


def test_retry_asks_again_with_the_next_seed_where_tokens_are_drawn(service):
    conversation = Conversation()
    service.begin("page", conversation, "What is it?", [], Controls("plain", 0.7, seed=3))
    list(service.answer("page", conversation))
    assert service.retry("page", conversation, Controls("plain", 0.7, seed=3)).seed == 4
    list(service.answer("page", conversation))
    assert len(conversation.turns) == 1
    assert service.retry("page", conversation, Controls("plain", 0.0, seed=4)).seed == 4


def test_leaving_forgets_the_conversation(service):
    conversation = Conversation()
    service.begin("page", conversation, "What is it?", [], Controls("plain"))
    list(service.answer("page", conversation))
    service.leave("page")
    assert conversation.turns == []


@pytest.mark.parametrize("path", ["/etc/passwd", "uploads/../../secret.png", "http://169.254.169.254/a.png"])
def test_no_file_beside_the_uploads_is_read(service, path, tmp_path):
    (tmp_path / "secret.png").write_bytes(png())
    with pytest.raises(BadInputError):
        service.begin("page", Conversation(), "What is it?", [path], Controls("plain"))
    with pytest.raises(BadInputError):
        list(service.compare("What is it?", [{"path": path}], Controls("plain")))


def test_compare_returns_both_answers_and_their_agreement(service):
    *_, result = service.compare(
        "What is it?", ["data:image/png;base64," + base64.b64encode(png()).decode()], Controls()
    )
    assert result["base"]["final_answer"] == "7"
    assert result["mpo"]["final_answer"] == "12"
    assert result["agreement"] == "different"
    assert result["mpo"]["model"] == "tiny/mpo"


# --- who answers ------------------------------------------------------------------------------------------------------


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
    from internvl_mpo.demo import generation

    loaded = []
    monkeypatch.setattr(generation, "ChatModel", lambda path, **options: loaded.append(path) or time.sleep(0.05))
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
    assert "cannot load a model" in conversation.turns[0].answers["base"].error


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


# --- votes and links --------------------------------------------------------------------------------------------------


def test_a_vote_is_a_row_the_trainer_reads(tmp_path):
    box, backend = VoteBox(tmp_path / "votes"), ScriptedBackend()
    conversation = Conversation(
        [finished("We add.\nFinal answer: 7", "We multiply.\nFinal answer: 12", images=[picture(), picture()])]
    )
    box.cast(conversation, "right", backend.names())
    (row,) = iter_pairs(tmp_path / "votes" / "votes.jsonl")
    assert row.pair.chosen == "We multiply.\nFinal answer: 12"
    assert row.pair.rejected == "We add.\nFinal answer: 7"
    assert row.pair.rule == "vote"
    assert row.pair.question == conversation.turns[0].asked
    assert row.pair.question.count("<image>") == len(row.pair.images) == 2
    assert all((row.image_root / image).is_file() for image in row.pair.images)
    assert row.pair.provenance["chosen_by"] == "mpo"
    assert row.pair.provenance["models"]["mpo"] == {"model": "tiny/mpo", "revision": "r2"}


def test_a_vote_for_the_left_pane_follows_the_shuffled_order(tmp_path):
    box = VoteBox(tmp_path)
    conversation = Conversation([finished("base text", "mpo text", "plain")], order=("mpo", "base"), blind=True)
    box.cast(conversation, "left", ScriptedBackend().names())
    (row,) = iter_pairs(tmp_path / "votes.jsonl")
    assert row.pair.chosen == "mpo text"
    assert row.pair.provenance["blind"] is True


@pytest.mark.parametrize(
    ("turns", "verdict", "why"),
    [
        ([("a b", "c d")], "tie", "tie"),
        ([("a b", "c d")], "both_bad", "both_bad"),
        ([("same", "same")], "left", "same_text"),
        ([("a b", "c d"), ("e f", "g h")], "left", "follow_up"),
    ],
)
def test_what_is_no_preference_is_kept_apart_from_the_pairs(tmp_path, turns, verdict, why):
    conversation = Conversation([finished(*texts, "plain") for texts in turns])
    VoteBox(tmp_path).cast(conversation, verdict, ScriptedBackend().names())
    assert not (tmp_path / "votes.jsonl").exists()
    (row,) = [json.loads(line) for line in (tmp_path / "other.jsonl").read_text().splitlines()]
    assert row["why_no_pair"] == why
    assert row["conversations"]["mpo"][-1]["content"] == turns[-1][1]
    assert "chosen" not in row  # no reader may take it for a preference


def test_there_is_no_vote_without_answers(tmp_path):
    for conversation in (Conversation(), Conversation([Turn("What?", Controls())]), Conversation([finished("", "b")])):
        with pytest.raises(BadInputError):
            VoteBox(tmp_path).cast(conversation, "left", ScriptedBackend().names())


def test_one_turn_takes_one_vote(tmp_path):
    box, backend = VoteBox(tmp_path / "votes"), ScriptedBackend()
    conversation = Conversation([finished("We add.\nFinal answer: 7", "We multiply.\nFinal answer: 12")])
    box.cast(conversation, "right", backend.names())
    for verdict in ("right", "left", "tie"):
        with pytest.raises(BadInputError, match="is stored already"):
            box.cast(conversation, verdict, backend.names())
    assert len((tmp_path / "votes" / "votes.jsonl").read_text().splitlines()) == 1
    conversation.turns[-1] = finished("We add.\nFinal answer: 7", "We multiply.\nFinal answer: 12")  # asked again
    box.cast(conversation, "left", backend.names())


@pytest.mark.parametrize(
    ("base", "mpo", "style", "state"),
    [
        ("Final answer: 16", "Final answer: 36", "cot", "different"),
        ("16", "16.0", "cot", "same"),
        ("**Final answer: 16**", "We add.\n\nFinal answer: 16", "cot", "same"),
        (r"\boxed{3}", "Final answer: 3", "cot", "same"),
        ("Final answer: 3", r"<think>ab</think> \boxed{4}", "r1", "different"),
        ("Yes", "No", "direct", "different"),
        ("There are many digits in this picture, and I would rather not choose one of them.", "7", "cot", "unknown"),
    ],
)
def test_the_banner_says_what_a_reader_sees(base, mpo, style, state):
    turn = finished(base, mpo, style=style)
    assert turn.agreement.state == state, turn.agreement.text
    assert ("gave a final answer" in turn.agreement.text) == (state == "unknown")


def anything(draw: random.Random, depth: int = 0) -> object:
    """A JSON value, of a kind a program may well send by mistake."""
    numbers = [-1, 0, 1, 3, 10**400, 1e308, float("inf"), float("nan"), 0.5]
    simple = [None, True, "", "1", "cot", "\ud800", "x" * 9000, *numbers]
    if depth < 3 and draw.random() < 0.3:
        inner = [anything(draw, depth + 1) for _ in range(draw.randrange(4))]
        return inner if draw.random() < 0.5 else {"path": inner[0] if inner else "/etc/passwd", "a": inner}
    return draw.choice(simple)


def test_whatever_a_program_sends_to_compare_is_answered_or_refused_in_a_sentence(tmp_path):
    gradio = pytest.importorskip("gradio", reason="the demo needs gradio")
    page, draw = make_page(tmp_path, ScriptedBackend()), random.Random(0)
    honest = {"question": "What is it?", "images": None, "style": "cot", "temperature": 0, "seed": 0}
    honest |= {"max_new_tokens": 8, "max_tiles": None}
    answered = 0
    for _ in range(3000):
        wrong = draw.sample(sorted(honest), draw.randrange(1, 3))
        call = {**honest, **{name: anything(draw) for name in wrong}}
        try:
            for _ in page.compare(**call):
                answered += 1
        except gradio.Error as error:
            assert re.fullmatch(r"[^\n]{5,300}", str(error.message)), call
    assert answered


def test_votes_go_to_the_named_repository_in_files_of_this_process(tmp_path, monkeypatch):
    import huggingface_hub

    made = []

    class Scheduler:
        def __init__(self, **options):
            made.append(options)
            self.lock = threading.Lock()

    monkeypatch.setattr(huggingface_hub, "CommitScheduler", Scheduler)
    one, two = (VoteBox(tmp_path, repo="org/votes", every=3) for _ in range(2))
    assert made[0] == {
        "repo_id": "org/votes",
        "folder_path": tmp_path,
        "every": 3,
        "repo_type": "dataset",
        "private": True,
    }
    assert one.path != two.path
    one.cast(Conversation([finished("a", "b", "plain")]), "left", ScriptedBackend().names())
    assert len(list(iter_pairs(one.path))) == 1


def test_a_shared_conversation_comes_back_whole_and_ends(tmp_path):
    shelf = Shelf(tmp_path, 7, LIMITS)
    conversation = Conversation(
        [finished("a", "b", images=[picture()]), finished("c", "d")], ("mpo", "base"), True, True
    )
    name = shelf.store(conversation)
    opened = shelf.open(name)
    assert opened == conversation
    assert len(name) >= 22
    os.utime(tmp_path / name, (time.time() - 8 * 86400,) * 2)
    with pytest.raises(BadInputError, match="7 days"):
        shelf.open(name)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["..", "../secret", "", "a" * 22, "/etc/passwd", "%2e%2e"])
def test_a_link_opens_nothing_but_shared_conversations(tmp_path, name):
    (tmp_path / "conversation.json").write_text("{}")
    with pytest.raises(BadInputError, match="does not exist"):
        Shelf(tmp_path / "shared", 7, LIMITS).open(name)


def test_nothing_is_stored_without_a_question(tmp_path):
    with pytest.raises(BadInputError):
        Shelf(tmp_path, 7, LIMITS).store(Conversation())
    assert list(tmp_path.iterdir()) == []


# --- benchmark browser, gallery, settings -----------------------------------------------------------------------------


def write_run(folder: Path, answers: dict[str, tuple[float | None, str]]) -> Path:
    folder.mkdir(parents=True)
    rows = [
        {
            "benchmark": "mini",
            "mode": "cot",
            "id": id,
            "value": value,
            "extracted": text,
            "reason": "number",
            "groups": {},
            "details": {},
            "question": f"VisitorQuestion {id} <b>?",
            "choices": [],
            "gold": "7",
            "images": [],
            "answer": f"So it is {text}",
        }
        for id, (value, text) in answers.items()
    ]
    (folder / "verdicts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_browser_finds_runs_and_the_questions_on_which_they_differ(tmp_path):
    write_run(tmp_path / "start", {"1": (1.0, "7"), "2": (0.0, "6"), "3": (0.0, "5"), "4": (0.0, "1")})
    write_run(tmp_path / "mpo", {"1": (1.0, "7"), "2": (1.0, "7"), "3": (0.0, "4"), "4": (0.0, "1")})
    runs = browser.find_runs([tmp_path])
    assert set(runs) == {"start", "mpo"}
    assert browser.tasks(runs["start"], runs["mpo"]) == ["mini/cot"]
    found = {
        which: [entry.id for entry in browser.select(runs["start"], runs["mpo"], "mini/cot", which).entries]
        for which in browser.FILTERS
    }
    assert found == {
        "differ": ["2", "3"],
        "gained": ["2"],
        "lost": [],
        "both_wrong": ["3", "4"],
        "all": ["1", "2", "3", "4"],
    }
    entry = browser.select(runs["start"], runs["mpo"], "mini/cot", "gained").entries[0]
    assert "&lt;b&gt;" in browser.question_html(entry)
    assert "right" in browser.verdict_html(entry, 1, "mpo")


def test_gallery_is_drawn_the_same_every_time(tmp_path):
    one, two = make_examples(tmp_path / "1"), make_examples(tmp_path / "2")
    assert [example.question for example in one] == [example.question for example in two]
    for first, second in zip(one, two, strict=True):
        assert [Path(path).read_bytes() for path in first.images] == [Path(path).read_bytes() for path in second.images]
    assert any(len(example.images) > 1 for example in one)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"base_url": "http://localhost:8000/v1"}, "mpo_url"),
        ({"base": "a", "mpo": "b", "adapter": "c"}, "adapter"),
        ({"adapter": "c"}, "--base"),
        ({"base": "a", "mpo": "b", "max_images": 0}, "max_images"),
        ({"base": "a", "mpo": "b", "temperature": 3.0}, "temperature"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(values, words):
    with pytest.raises(BadInputError, match=words):
        DemoSettings(**values)


@pytest.mark.slow
def test_without_the_mini_models_the_program_says_how_to_make_them(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "app.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    assert done.returncode == 2
    assert "make quickstart" in done.stderr
    assert "Traceback" not in done.stderr


def test_dashes_and_app_yaml(tmp_path, monkeypatch):
    import app

    urls = ["--base-url", "http://a/v1", "--mpo-url=http://b/v1"]
    assert app.read_settings(urls).mpo_url == "http://b/v1"
    (tmp_path / "app.yaml").write_text("base: org/base\nmpo: org/mpo\nport: 1234\n")
    monkeypatch.setattr(app, "DEFAULTS", tmp_path / "app.yaml")
    assert app.read_settings([]).base == "org/base"
    assert app.read_settings(["--port", "99"]).port == 99


# --- the guard --------------------------------------------------------------------------------------------------------


def send(guard: Guard, path: str, method: str = "GET", body: bytes = b"") -> tuple[int, bytes]:
    """Return the guard's answer to a request; 200 "passed" where it lets it through."""
    sent: list[dict] = []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def reply(message):
        sent.append(message)

    asyncio.run(guard({"type": "http", "path": path, "method": method}, receive, reply))
    return sent[0]["status"], sent[1]["body"]


@pytest.fixture
def guard(tmp_path):
    async def behind(scope, receive, reply):
        body = (await receive())["body"] if scope["method"] == "POST" else b""
        await reply({"type": "http.response.start", "status": 200, "headers": []})
        await reply({"type": "http.response.body", "body": b"passed" + body})

    return Guard(behind, tmp_path / "uploads", max_body_bytes=10_000, health=lambda: {"running": 0})


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=http://169.254.169.254/latest/meta-data",
        "/gradio_api/file=HTTPS://example.org/a.png",
        "/gradio_api/file=file:///etc/passwd",
        "/gradio_api/file=%2568ttp://localhost/",
        "/gradio_api/file=../../etc/passwd",
        "/gradio_api/file=%2e%2e/%2e%2e/etc/passwd",
        "/gradio_api/file=a/..%5c..%5csecret",
        "/gradio_api/proxy=https://x.hf.space/a",
        "/file=http://localhost:1/",
    ],
)
def test_addresses_and_parent_folders_are_not_served(guard, path):
    assert send(guard, path)[0] == 403


@pytest.mark.parametrize(
    "named",
    [
        {"path": "/etc/passwd"},
        {"path": "http://169.254.169.254/latest", "meta": {"_type": "gradio.FileData"}},
        {"path": "//localhost/a.png"},
        {"path": "uploads/../../etc/passwd"},
        {"files": [{"path": "file:///etc/passwd"}]},
    ],
)
def test_a_call_names_uploaded_files_only(guard, named):
    body = json.dumps({"data": ["question", [named]]}).encode()
    assert send(guard, "/gradio_api/queue/join", "POST", body)[0] == 403


def test_honest_calls_pass_unchanged(guard, tmp_path):
    body = json.dumps({"data": [{"text": "what?", "files": [{"path": str(tmp_path / "uploads/ab/a.png")}]}]}).encode()
    assert send(guard, "/gradio_api/queue/join", "POST", body) == (200, b"passed" + body)
    assert send(guard, "/gradio_api/file=/somewhere/a.png") == (200, b"passed")
    assert send(guard, "/health") == (200, b'{"running": 0}')


def test_bodies_that_are_too_large_or_too_deep_are_refused(guard):
    assert send(guard, "/gradio_api/queue/join", "POST", b"x" * 10_001)[0] == 413
    assert send(guard, "/gradio_api/queue/join", "POST", b"[" * 60 + b"{}" + b"]" * 60)[0] == 403


def test_only_the_page_and_its_parts_import_gradio():
    for path in (ROOT / "internvl_mpo" / "demo").glob("*.py"):
        imported = [
            line
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.startswith(("import gradio", "from gradio"))
        ]
        assert bool(imported) == (path.name in ("page.py", "widgets.py")), path.name


def test_settings_for_tests_are_settings(tmp_path):
    assert settings_for(tmp_path).limits.max_pixels == 1_000_000
