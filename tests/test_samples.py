"""Several answers to each question: pass@k, votes, the choice of a judge, resume, one file; judges asked again."""

import itertools
import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from statistics import fmean

import pytest
from PIL import Image
from test_evaluate_mpo import serving, write_rows

import evaluate_mpo
from internvl_mpo.benchmarks import mmvet
from internvl_mpo.benchmarks.common import Score
from internvl_mpo.engines import Reply, Request
from internvl_mpo.errors import run_program
from internvl_mpo.evaluation.samples import majority_value, pass_at_k
from internvl_mpo.evaluation.selection import read_number


class Drawing:
    """Answers the k-th sample of a question with the k-th of its texts, and stops after `patience` replies."""

    name = "drawing"
    model_id = "drawing"
    revision = "r1"

    def __init__(self, texts: dict[str, list[str]], patience: int = 10**9):
        self.texts = texts
        self.patience = patience
        self.asked: list[Request] = []

    def generate(self, requests: Iterable[Request], done: Collection[str] = ()) -> Iterator[Reply]:
        for request in requests:
            if request.id in done:
                continue
            if len(self.asked) == self.patience:
                raise KeyboardInterrupt
            self.asked.append(request)
            texts = next(texts for part, texts in self.texts.items() if part in request.question)
            number = int(request.id.rpartition("#")[2]) if "#" in request.id else 0
            yield Reply(id=request.id, text=texts[number % len(texts)], finish_reason="stop")


class Judge:
    """Replies from a list, one after another, and keeps what it was asked."""

    name = "judge"
    model_id = "judge-1"
    revision = None

    def __init__(self, replies: list[str]):
        self.replies = iter(replies)
        self.asked: list[Request] = []

    def generate(self, requests: Iterable[Request], done: Collection[str] = ()) -> Iterator[Reply]:
        for request in requests:
            self.asked.append(request)
            yield Reply(id=request.id, text=next(self.replies), finish_reason="stop")


TEXTS = {"Q1": ["B", "A", "B", "B"], "Q2": ["A", "A", "B", "hm"], "Q3": ["", "A", "", ""]}


@pytest.fixture
def world(tmp_path: Path) -> Path:
    rows = [
        {"id": f"q{number}", "question": f"Q{number}?", "choices": ["a red car", "a blue car"], "answer": "B"}
        for number in (1, 2, 3)
    ]
    write_rows(tmp_path / "test.jsonl", rows)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, engine: Drawing, world: Path, *arguments: str) -> int:
    monkeypatch.setattr(evaluate_mpo, "make_engine", lambda settings: engine)
    argv = ["--model", "m", "--benchmarks", "m3cot", "--data", str(world / "test.jsonl")]
    return run_program(evaluate_mpo.main, [*argv, "--output", str(world / "out"), *arguments])


def summary(world: Path) -> dict:
    return json.loads((world / "out" / "scores.json").read_text(encoding="utf-8"))["m3cot"]["direct"]


FOUR = ("--num_samples", "4", "--temperature", "0.7")


@pytest.mark.parametrize(("n", "c"), [(1, 0), (1, 1), (4, 0), (4, 1), (4, 3), (4, 4), (7, 2)])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_answer(n, c):
    for k in range(1, n + 1):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == pytest.approx(fmean(any(draw) for draw in draws))


def score_of(extracted: str | None, value: float | None) -> Score:
    return Score(id="1", value=value, extracted=extracted, reason="")


@pytest.mark.parametrize(
    ("votes", "value"),
    [
        ([("6", 1.0), ("6.0", 1.0), ("7", 0.0)], 1.0),
        ([("6", 1.0), ("7", 0.0), ("7", 0.0)], 0.0),
        ([("6", 1.0), ("7", 0.0)], 0.5),  # a tie is no win
        ([(None, 0.0), (None, 0.0), ("6", 1.0)], 1.0),  # who says nothing does not vote
        ([(None, 0.0), (None, 0.0)], 0.0),
        ([("6", None), ("7", 0.0)], 0.0),
        ([("The red car", 1.0), ("red car.", 1.0), ("blue", 0.0)], 1.0),
    ],
)
def test_majority_counts_equal_answers_and_splits_ties(votes, value):
    assert majority_value([score_of(*vote) for vote in votes]) == value


def test_mean_pass_and_majority_of_four_answers(monkeypatch, world, capsys):
    engine = Drawing(TEXTS)
    assert run(monkeypatch, engine, world, *FOUR) == 0
    found = summary(world)
    assert found["mean_accuracy"] == pytest.approx(100 * (3 / 4 + 1 / 4 + 0) / 3)
    assert {k: passed["score"] for k, passed in found["pass_at_k"].items()} == {
        "1": pytest.approx(100 * (3 / 4 + 1 / 4) / 3),
        "2": pytest.approx(100 * (1 + 1 / 2) / 3),
        "4": pytest.approx(100 * 2 / 3),
    }
    assert found["majority_vote"]["score"] == pytest.approx(100 / 3)
    assert found["single"] == {
        "headline": "accuracy",
        "score": pytest.approx(100 / 3),
        "std": pytest.approx(23.57, 1e-3),
    }
    assert found["interval"] and "best_of_n" not in found and found["num_unscored"] == 0
    lines = (world / "out" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 12 and {json.loads(line)["temperature"] for line in lines} == {0.7}
    assert len({request.seed for request in engine.asked}) == 12
    assert {request.sampling.temperature for request in engine.asked} == {0.7}
    table = capsys.readouterr().out
    assert "mean_accuracy" in table and "pass@4" in table and "majority_vote" in table
    assert "pass@2" in (world / "out" / "report.html").read_text(encoding="utf-8")


def test_killed_run_draws_only_what_is_missing_and_more_samples_are_added(monkeypatch, world):
    first = Drawing(TEXTS, patience=5)
    assert run(monkeypatch, first, world, *FOUR) == 130
    second = Drawing(TEXTS)
    assert run(monkeypatch, second, world, *FOUR) == 0
    assert len(second.asked) == 7 and not {r.id for r in first.asked} & {r.id for r in second.asked}
    third = Drawing(TEXTS)
    assert run(monkeypatch, third, world, "--num_samples", "6", "--temperature", "0.7") == 0
    assert len(third.asked) == 6 and summary(world)["num_samples"] == 6


def test_answers_at_another_temperature_are_not_mixed_in(monkeypatch, world, capsys):
    assert run(monkeypatch, Drawing(TEXTS), world, *FOUR) == 0
    assert run(monkeypatch, Drawing(TEXTS), world, "--num_samples", "4", "--temperature", "1.0") == 2
    assert "temperature 0.7, not 1.0" in capsys.readouterr().err
    assert run(monkeypatch, Drawing(TEXTS), world) == 0  # the greedy answers stand beside them in the same file
    assert summary(world)["accuracy"] == pytest.approx(100 / 3)


@pytest.mark.parametrize("arguments", [("--num_samples", "4"), ("--num_samples", "0"), ("--temperature", "-1")])
def test_samples_without_a_temperature_are_refused(monkeypatch, world, capsys, arguments):
    assert run(monkeypatch, Drawing(TEXTS), world, *arguments) == 2
    assert "setting" in capsys.readouterr().err


def test_two_sampled_runs_are_compared_by_question(monkeypatch, world, capsys):
    better = {**TEXTS, "Q3": ["B", "B", "B", "B"]}
    for name, texts in (("a", TEXTS), ("b", better)):
        assert run(monkeypatch, Drawing(texts), world, *FOUR, "--output", str(world / name)) == 0
    capsys.readouterr()
    assert run_program(evaluate_mpo.main, ["compare", str(world / "a"), str(world / "b")]) == 0
    text = capsys.readouterr().out
    assert "33.33 -> 66.67" in text and "1 better: q3" in text and "3 questions" in text


def test_judge_chooses_without_the_right_answer_and_is_asked_once(monkeypatch, world):
    judge = Judge(["2", "I cannot say", "**3**"])
    with serving(judge, "judge-1") as server:
        for _ in range(2):
            arguments = (*FOUR, "--judge", "judge-1", "--judge_url", server.url)
            assert run(monkeypatch, Drawing(TEXTS), world, *arguments, "--judge_concurrency", "1") == 0
    assert len(judge.asked) == 3 and all("Answer 4:" in request.question for request in judge.asked)
    assert not any("gold" in request.question.lower() for request in judge.asked)
    best = summary(world)["best_of_n"]
    assert best["num_questions"] == 2 and best["score"] in (0.0, 50.0)
    kept = [json.loads(line) for line in (world / "out" / "judgements.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(row["reply"] for row in kept) == ["**3**", "2", "I cannot say"]


@pytest.mark.parametrize(
    ("reply", "number"),
    [("3", 3), ("**3**", 3), ("Answer 2", 2), ("(1)", 1), ("5", None), ("0", None), ("2 or 3", None), ("-1", None)],
)
def test_choice_is_one_number_of_those_there(reply, number):
    assert read_number(reply, 4) == number
    assert read_number(f"<think>1 or 4?</think>{reply}", 4) == number


# ------------------------------------------------------------------------------------------- a judge asked again


@pytest.fixture
def vet(tmp_path: Path) -> Path:
    row = {"imagename": "a.png", "question": "What is x?", "answer": "-1<AND>-5", "capability": ["ocr"]}
    (tmp_path / "mm-vet.json").write_text(json.dumps({"v1_0": row}), encoding="utf-8")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    return tmp_path


def judged_run(monkeypatch: pytest.MonkeyPatch, vet: Path, judge: Judge, *arguments: str) -> dict:
    monkeypatch.setattr(evaluate_mpo, "make_engine", lambda settings: Drawing({"x": ["<think>no</think>x = -1"]}))
    with serving(judge, "judge-1") as server:
        argv = ["--model", "m", "--benchmarks", "mmvet", "--data", str(vet), "--output", str(vet / "out")]
        argv += ["--judge", "judge-1", "--judge_url", server.url, *arguments]
        assert run_program(evaluate_mpo.main, argv) == 0
    return json.loads((vet / "out" / "scores.json").read_text(encoding="utf-8"))["mmvet"]["direct"]


def test_unreadable_grade_is_asked_again_hotter_counted_and_kept(monkeypatch, vet):
    judge = Judge(["It is half right.", "half", "0.5"])
    found = judged_run(monkeypatch, vet, judge)
    assert found["total"] == 50.0
    assert (found["judge"]["num_retries"], found["judge"]["num_unreadable"]) == (2, 0)
    assert [request.sampling.temperature for request in judge.asked] == [0.0, 0.0, 0.5]
    assert mmvet.JUDGE_REMINDER not in judge.asked[0].question and mmvet.JUDGE_REMINDER in judge.asked[1].question
    assert "no</think>" not in judge.asked[0].question and "x = -1" in judge.asked[0].question
    kept = [json.loads(line) for line in (vet / "out" / "judgements.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["reply"] for row in kept] == ["It is half right.", "half", "0.5"]
    again = Judge([])
    assert judged_run(monkeypatch, vet, again)["total"] == 50.0 and not again.asked


@pytest.mark.parametrize(("rule", "tries", "total"), [("ours", 6, None), ("official", 6, 0.0), ("vlmevalkit", 5, 0.0)])
def test_judge_is_asked_as_often_as_by_the_original_and_no_more(monkeypatch, vet, rule, tries, total):
    judge = Judge(["none"] * 9)
    found = judged_run(monkeypatch, vet, judge, "--rule", rule)
    assert len(judge.asked) == tries and found["total"] == total
    assert (found["judge"]["num_retries"], found["judge"]["num_unreadable"]) == (tries - 1, 1)


def test_killed_judging_goes_on_with_the_next_try(monkeypatch, vet):
    judged_run(monkeypatch, vet, Judge(["none"] * 6))
    path = vet / "out" / "judgements.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:2]), encoding="utf-8")
    judge = Judge(["0.5"])
    found = judged_run(monkeypatch, vet, judge)
    assert [request.sampling.temperature for request in judge.asked] == [0.5] and found["judge"]["num_retries"] == 2
