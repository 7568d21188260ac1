"""Votes, links, files to take away, /compare, the benchmark browser and the settings of the demo."""

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from internvl_mpo.demo import browser
from internvl_mpo.demo.conversation import (
    Controls,
    Conversation,
    Turn,
)
from internvl_mpo.demo.examples import make_examples
from internvl_mpo.demo.settings import DemoSettings
from internvl_mpo.demo.sharing import Shelf
from internvl_mpo.demo.votes import VoteBox
from internvl_mpo.errors import BadInputError
from internvl_mpo.mmpr.reading import iter_pairs
from tests.demo_world import ScriptedBackend, make_page
from tests.test_demo import LIMITS, ROOT, finished, picture


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
