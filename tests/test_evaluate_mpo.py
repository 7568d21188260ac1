"""The evaluation program with an engine that answers from a table: what is asked, kept, resumed and scored."""

import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import pytest
from PIL import Image

import evaluate_mpo
from internvl_mpo.engines import Reply, Request
from internvl_mpo.errors import run_program


class TableEngine:
    """Answers by question text, counts what it was asked, and stops after `patience` replies like a killed process."""

    name = "table"
    model_id = "table"

    def __init__(self, answers: dict[str, str], patience: int = 10**9, revision: str = "r1"):
        self.answers = answers
        self.asked: list[str] = []
        self.patience = patience
        self.revision = revision

    def generate(self, requests: Iterable[Request], done: Collection[str] = ()) -> Iterator[Reply]:
        for request in requests:
            if request.id in done:
                continue
            if len(self.asked) == self.patience:
                raise KeyboardInterrupt
            self.asked.append(request.id)
            found = next((answer for text, answer in self.answers.items() if text in request.question), None)
            yield Reply(id=request.id, text=found or "", error=None if found else "no such question")


@pytest.fixture
def world(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    rows = [
        {"image": "images/a.png", "question": f"What is {n} plus {n}?", "answer_gt": str(2 * n)} for n in range(1, 5)
    ]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return tmp_path


ANSWERS = {"1 plus 1": "1 + 1 = 2.\nFinal answer: 2", "2 plus 2": "Final answer: 5 and", "3 plus 3": "Who knows?"}
ANSWERS["4 plus 4"] = "4 + 4 = 8.\nFinal answer: 8"


def run(monkeypatch: pytest.MonkeyPatch, engine: TableEngine, world: Path, *arguments: str) -> int:
    monkeypatch.setattr(evaluate_mpo, "make_engine", lambda settings: engine)
    argv = ["--model", "m", "--benchmarks", "mini", "--data", str(world), "--output", str(world / "out"), *arguments]
    return run_program(evaluate_mpo.main, argv)


def scores(world: Path) -> dict:
    return json.loads((world / "out" / "scores.json").read_text(encoding="utf-8"))["mini"]


def test_unparsable_answer_is_wrong_and_counted_apart(monkeypatch, world):
    assert run(monkeypatch, TableEngine(ANSWERS), world, "--mode", "cot") == 0
    result = scores(world)["cot"]
    assert (result["accuracy"], result["unparsable"], result["num_examples"]) == (50.0, 50.0, 4)
    assert result["interval"][0] <= 50.0 <= result["interval"][1]


def test_killed_run_asks_no_question_twice(monkeypatch, world):
    first = TableEngine(ANSWERS, patience=3)
    assert run(monkeypatch, first, world, "--mode", "direct,cot") == 130
    with open(world / "out" / "answers.jsonl", "a", encoding="utf-8") as file:
        file.write('{"key": "mini/cot/torn')
    second = TableEngine(ANSWERS)
    assert run(monkeypatch, second, world, "--mode", "direct,cot") == 0
    assert len(first.asked) == 3 and len(second.asked) == 5
    assert not set(first.asked) & set(second.asked)
    assert set(scores(world)) == {"direct", "cot"}


def test_question_without_answer_is_unscored_not_wrong(monkeypatch, world):
    some = {key: text for key, text in ANSWERS.items() if "1 plus" in key or "4 plus" in key}
    run(monkeypatch, TableEngine(some), world, "--mode", "cot")
    result = scores(world)["cot"]
    assert (result["accuracy"], result["num_unscored"], result["num_examples"]) == (100.0, 2, 4)
    again = TableEngine(ANSWERS)
    run(monkeypatch, again, world, "--mode", "cot")
    assert len(again.asked) == 2 and scores(world)["cot"]["num_unscored"] == 0


def test_score_only_loads_no_model(monkeypatch, world):
    run(monkeypatch, TableEngine(ANSWERS), world, "--mode", "cot")
    before = scores(world)
    (world / "out" / "scores.json").unlink()

    def refuse(settings):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(evaluate_mpo, "make_engine", refuse)
    argv = f"--benchmarks mini --data {world} --output {world / 'out'} --mode cot --score_only".split()
    assert run_program(evaluate_mpo.main, argv) == 0
    assert scores(world) == before


def test_answers_of_another_model_are_refused(monkeypatch, world, capsys):
    run(monkeypatch, TableEngine(ANSWERS), world)
    assert run(monkeypatch, TableEngine(ANSWERS, revision="r2"), world, "--mode", "cot") == 2
    assert "choose another --output" in capsys.readouterr().err


def test_limit_keeps_the_first_questions(monkeypatch, world):
    engine = TableEngine(ANSWERS)
    run(monkeypatch, engine, world, "--limit", "2", "--mode", "cot")
    assert len(engine.asked) == 2 and scores(world)["cot"]["num_examples"] == 2


@pytest.mark.parametrize(
    ("arguments", "offender"),
    [
        (["--benchmarks", "popes"], "popes"),
        (["--rule", "official"], "official"),
        (["--data", "/nowhere"], "/nowhere"),
        (["--limit", "0"], "limit"),
    ],
)
def test_bad_setting_is_one_sentence_that_names_it(monkeypatch, world, capsys, arguments, offender):
    assert run(monkeypatch, TableEngine(ANSWERS), world, *arguments) == 2
    error = capsys.readouterr().err
    assert offender in error and "Traceback" not in error
