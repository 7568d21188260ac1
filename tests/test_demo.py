"""The demo without a browser and without Gradio: conversations, pictures, backends, votes, links, the guard."""

import base64
import io
import re
import threading
import time
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from internvl_mpo.demo import show
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
from internvl_mpo.demo.markup import safe_markdown
from internvl_mpo.demo.pictures import Cutter, Limits, read_data_uri, read_picture, take_uploads
from internvl_mpo.demo.service import Service
from internvl_mpo.demo.takeaway import write_takeaway
from internvl_mpo.demo.votes import VoteBox
from internvl_mpo.errors import BadInputError
from internvl_mpo.mmpr.reading import iter_pairs
from modeling_internvl_mpo.image_processing_internvl_mpo import dynamic_preprocess
from tests.demo_world import ScriptedBackend
from tests.hostile_markup import hostile_answers

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
        ("```cpp\r\nvector<int> a;\r\n```", "```cpp\nvector<int> a;\n```"),
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
    assert (photo.width, photo.height) == (750, 450)
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
    with pytest.raises(BadInputError, match=r"too large: 4,000 x 4,000 pixels; at most 1.5 megapixels"):
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
