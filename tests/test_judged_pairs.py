"""Pairs of a judge: it sees the pictures, both orders count, nonsense costs only itself, nothing is paid for twice."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_world import make_pictures

from dataset_scripts import build_judged_pairs, verify_pairs
from internvl_mpo.engines import Reply
from internvl_mpo.errors import run_program
from internvl_mpo.judged_pairs import Rated, judge_request, judged_pairs, read_ratings, shown_responses
from internvl_mpo.records import PreferencePair, Response, read_rows, write_rows

WORDS = ("poor", "fair", "good", "best")


class Judge:
    """Rates responses by their words; `nonsense(request, times)` says when it talks nonsense instead."""

    name, model_id, revision = "judge", "judge", None

    def __init__(self, nonsense=lambda request, times: False, bias: float = 0.0):
        self.nonsense, self.bias = nonsense, bias
        self.asked: Counter[str] = Counter()
        self.requests = []

    def generate(self, requests, done=()):
        for request in requests:
            if request.id in done:
                continue
            self.asked[request.id] += 1
            self.requests.append(request)
            shown = re.findall(r"^Response (\d+):\n(?:\D*?)(\w+) answer", request.question, re.MULTILINE)
            ratings = [2 * WORDS.index(word) + 1 + self.bias * (number == "1") for number, word in shown]
            lines = "\n".join(f"Response {n}: {rating:g}/10" for n, rating in enumerate(ratings, start=1))
            text = "I cannot." if self.nonsense(request, len(self.requests)) else lines
            yield Reply(id=request.id, text=text, finish_reason="stop", num_tokens=1)


@pytest.fixture
def world(tmp_path) -> Path:
    make_pictures(tmp_path, 3)
    rows = [
        Response(question_id=f"q{number}", images=(f"{number}.png",), question=f"Describe picture {number}.",
                 response=f"A {word} answer.", source="s", provenance={"model": "m", "sample": place})
        for number in range(3) for place, word in enumerate(WORDS)
    ]  # fmt: skip
    write_rows(rows, tmp_path / "responses.jsonl")
    return tmp_path


def build(world: Path, judge: Judge, monkeypatch, **settings) -> int:
    monkeypatch.setattr(build_judged_pairs, "load_engine", lambda given: judge)
    values = {"model": "judge", "responses": world / "responses.jsonl", "output": world / "pairs.jsonl",
              "image_root": world, **settings}  # fmt: skip
    argv = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    return run_program(build_judged_pairs.main, argv)


def test_the_better_response_is_chosen_and_the_judge_sees_picture_and_both_orders(world, monkeypatch):
    judge = Judge()
    assert build(world, judge, monkeypatch) == 0
    pairs = read_rows(world / "pairs.jsonl", PreferencePair)
    assert len(pairs) == 6
    for pair in pairs:
        chosen, rejected = (next(word for word in WORDS if word in text) for text in (pair.chosen, pair.rejected))
        assert WORDS.index(chosen) > WORDS.index(rejected)
        assert pair.rule == "judged"
        for side, word in (("chosen", chosen), ("rejected", rejected)):  # its own rating in both orders
            assert pair.provenance[f"{side}_response"]["ratings"] == [2 * WORDS.index(word) + 1] * 2
    assert len(judge.requests) == 6
    assert all(len(request.images) == 1 and request.question.count("<image>") == 1 for request in judge.requests)
    orders = [re.findall(r"A (\w+) answer", request.question) for request in judge.requests]
    assert orders[0] == orders[1][::-1]


def test_a_policy_that_always_says_the_same_makes_no_pairs_and_costs_nothing(world, monkeypatch, capsys):
    judge = Judge()
    rows = read_rows(world / "responses.jsonl", Response)
    write_rows([replace(row, response="A bad answer.", id="") for row in rows], world / "responses.jsonl")
    assert build(world, judge, monkeypatch) == 0
    assert not judge.requests
    assert (world / "pairs.jsonl").read_text() == ""
    assert "left out: 3 questions without two different responses" in capsys.readouterr().out


def test_responses_sampled_once_are_refused_with_the_way_out(world, monkeypatch, capsys):
    rows = read_rows(world / "responses.jsonl", Response)
    write_rows(rows[:: len(WORDS)], world / "responses.jsonl")
    assert build(world, Judge(), monkeypatch) == 2
    assert "has two responses; sample with --num_samples 4" in capsys.readouterr().err


def test_a_judge_that_favours_a_place_contradicts_itself_instead_of_making_pairs(world, monkeypatch, capsys):
    assert build(world, Judge(bias=9.0), monkeypatch, num_rated=2, min_gap=0.5) == 0
    said = capsys.readouterr().out
    assert "0 pairs from 3 questions" in said


def test_a_judge_that_talks_nonsense_half_of_the_time_is_asked_again_and_never_twice_for_the_same(
    world, monkeypatch, capsys
):
    judge = Judge(nonsense=lambda request, times: times % 2)
    assert build(world, judge, monkeypatch) == 0
    first = Counter(judge.asked)
    assert set(first.values()) == {1}
    assert build(world, judge, monkeypatch) == 0
    assert judge.asked == first
    assert len(read_rows(world / "pairs.jsonl", PreferencePair)) >= 2


def test_a_judge_that_never_rates_is_counted_and_asked_so_often_only(world, monkeypatch, capsys):
    judge = Judge(nonsense=lambda request, times: True)
    assert build(world, judge, monkeypatch, max_replies=2) == 0
    assert "3 questions without ratings that can be read" in capsys.readouterr().out
    assert len(judge.requests) == 12
    assert {request.sampling.temperature for request in judge.requests} == {0.0, 0.7}


def test_another_rubric_is_another_question_and_does_not_overwrite(world, monkeypatch, capsys):
    assert build(world, Judge(), monkeypatch) == 0
    (world / "rubric.txt").write_text("Only spelling counts.", encoding="utf-8")
    before = (world / "pairs.jsonl").read_bytes()
    assert build(world, Judge(), monkeypatch, rubric=world / "rubric.txt") == 2
    assert "other questions or settings" in capsys.readouterr().err
    assert (world / "pairs.jsonl").read_bytes() == before
    other = Judge()
    assert build(world, other, monkeypatch, rubric=world / "rubric.txt", output=world / "other.jsonl") == 0
    assert all(request.question.startswith("Only spelling counts.") for request in other.requests)


def test_a_killed_run_ends_in_the_same_bytes(world, monkeypatch):
    assert build(world, Judge(), monkeypatch, output=world / "whole.jsonl") == 0

    def die(request, times):
        if times == 4:
            raise KeyboardInterrupt
        return False

    assert build(world, Judge(nonsense=die), monkeypatch) == 130
    judge = Judge()
    assert build(world, judge, monkeypatch) == 0
    assert len(judge.requests) == 3
    assert (world / "pairs.jsonl").read_bytes() == (world / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("text", "ratings"),
    [
        ("Response 1: 7\nResponse 2: 3", [7, 3]),
        ("**Response 2**: 3/10\n- Response 1 = 7.5", [7.5, 3]),
        ("Here is what I think.\nresponse 1: 10\nresponse 2: 0\nThank you.", [10, 0]),
        ("Response 1: 7", None),
        ("Response 1: 7\nResponse 2: 3\nResponse 1: 8", None),
        ("Response 1: 11\nResponse 2: 3", None),
        ("Response 1: 7\nResponse 2: 3\nResponse 3: 3", None),
        ("Response 1: good\nResponse 2: bad", None),
        ("", None),
    ],
)
def test_what_a_judge_may_write(text, ratings):
    assert read_ratings(text, 2) == ratings


def rated(text: str, *ratings: float, **provenance) -> Rated:
    return Rated(Response(question_id="q", question="?", response=text, provenance=provenance), ratings)


def test_ties_small_gaps_and_cut_responses_make_no_pair_and_are_counted():
    counts: Counter[str] = Counter()
    rows = [rated("a", 5, 5), rated("b", 5, 5), rated("c", 4.8, 4.8), rated("d", 9, 9, finish_reason="length")]
    assert list(judged_pairs(rows, min_gap=1, cap=9, counts=counts)) == []
    assert counts == {"ties": 1, "pairs with too small a gap": 2, "chosen cut at the token limit": 3}


def test_lengths_of_both_sides_stay_in_balance():
    short, long = "Seen.", " ".join(f"thing{number}" for number in range(100))
    rows = [rated(short + "1", 9, 9), rated(long + "1", 9, 8.9), rated(short + "2", 1, 1), rated(long + "2", 1, 1.1)]
    pairs = list(judged_pairs(rows, min_gap=1, cap=2, counts=Counter()))
    ratio = sum(better.log_length - worse.log_length for better, worse in pairs)
    assert abs(ratio) < 0.2


def test_equal_responses_are_shown_once_in_an_order_that_rows_do_not_decide():
    rows = [Response(question_id="q", question="?", response=text, id=str(n)) for n, text in enumerate("abbc ")]
    shown = shown_responses(rows, 4, seed=0)
    assert sorted(row.response for row in shown) == ["a", "b", "c"]
    assert shown_responses(rows[::-1], 4, seed=0) == shown


def test_pictures_keep_their_places_and_a_response_cannot_bring_one():
    row = Response(question_id="q", images=("a", "b"), question="Is <image> like <image>?", response="No <image>.",
                   history=(), provenance={})  # fmt: skip
    assert judge_request([row, row], "Rate.").count("<image>") == 2


# --- verify_pairs.py --------------------------------------------------------------------------------------------------


class Verifier(Judge):
    """Says yes to chosen answers."""

    def generate(self, requests, done=()):
        for request in requests:
            if request.id not in done:
                self.requests.append(request)
                text = "yes" if "Response:\nred" in request.question else "no"
                yield Reply(id=request.id, text=text, finish_reason="stop", num_tokens=1)


def verify(world: Path, judge: Judge, monkeypatch, **settings) -> int:
    monkeypatch.setattr(verify_pairs, "load_engine", lambda given: judge)
    pair = PreferencePair(images=("0.png",), question="Which colour?", chosen="red", rejected="blue", answer="red")
    write_rows([pair], world / "p.jsonl")
    values = {"model": "judge", "pairs": world / "p.jsonl", "output": world / "v.jsonl", **settings}
    return run_program(verify_pairs.main, [part for key, value in values.items() for part in (f"--{key}", str(value))])


def test_a_verifier_is_shown_the_pictures_when_asked_and_such_verdicts_are_others(world, monkeypatch):
    blind, seeing = Verifier(), Verifier()
    assert verify(world, blind, monkeypatch) == 0
    assert not any(request.images or "<image>" in request.question for request in blind.requests)
    assert verify(world, seeing, monkeypatch, with_image=True, image_root=world, output=world / "w.jsonl") == 0
    assert [request.images for request in seeing.requests] == [(str(world / "0.png"),)] * 2
    assert all(request.question.count("<image>") == 1 for request in seeing.requests)
    assert not {request.id for request in blind.requests} & {request.id for request in seeing.requests}
    assert len(json.loads((world / "w.jsonl").read_text())["provenance"]["judge_replies"]) == 2
