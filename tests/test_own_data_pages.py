"""docs/train_your_own.md and docs/evaluate_your_own.md: every block is run as it stands, on a tiny model.

pytest tests/test_own_data_pages.py
"""

import json
import re
import shlex
import shutil
from importlib import import_module
from pathlib import Path

import pytest
from tiny_world import make_model_folder, make_pictures

from internvl_mpo.benchmarks import own
from internvl_mpo.errors import BadInputError, run_program

ROOT = Path(__file__).resolve().parents[1]


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The words of every command of a page, after `python`; variables are filled in."""
    found, values = [], {}
    for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(re.sub(r"\$(\w+)", lambda name: values[name[1]], line), comments=True)
        if len(words) == 1 and "=" in words[0]:
            values.update([words[0].split("=", 1)])
        elif words:
            assert words[0] == "python", line
            found.append(words[1:])
    return found


def run(words: list[str]) -> int:
    """Run a command in this process, which has its packages loaded."""
    module, arguments = (words[1], words[2:]) if words[0] == "-m" else (words[0], words[1:])
    return run_program(import_module(module.removesuffix(".py").replace("/", ".")).main, arguments)


def own_folder(folder: Path, page: str, name: str, copies: int) -> None:
    """What a reader has who follows a page: a model, pictures, and the page's rows, asked about in `copies` ways."""
    make_model_folder(folder / "outputs" / "mini" / "start")
    (folder / "my").mkdir()
    make_pictures(folder / "my")
    shutil.copytree(ROOT / "configs", folder / "configs")
    rows = [json.loads(line) for line in blocks(page, "json")[0].splitlines()]
    rows = [{**row, "question": row["question"] + " " * number} for number in range(copies) for row in rows]
    (folder / "my" / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.slow
def test_the_page_on_training_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    own_folder(tmp_path, "train_your_own.md", "pairs.jsonl", 10)
    monkeypatch.chdir(tmp_path)
    for words in commands("train_your_own.md"):
        assert run(words) == 0, words
    assert capsys.readouterr().out.count("held-out") >= 2
    logs = [Path("outputs/mine", arm, "log.jsonl").read_text() for arm in ("mpo", "sft")]
    first = [json.loads(log.splitlines()[0]) for log in logs]
    assert [round(row["loss_preference"], 2) for row in first] == [0.69, 0]
    assert round(first[0]["loss_quality"], 2) == 1.39
    assert Path("outputs/mine/mpo/model/config.json").exists() and Path("outputs/mine/check/report.html").exists()


@pytest.mark.slow
def test_the_page_on_evaluating_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    own_folder(tmp_path, "evaluate_your_own.md", "questions.jsonl", 1)
    shutil.copytree(tmp_path / "outputs/mini/start", tmp_path / "outputs/mine/mpo/model")
    monkeypatch.chdir(tmp_path)
    for words in commands("evaluate_your_own.md"):
        assert run(words) == 0, words
    for arm in ("start", "mpo"):
        scores = json.loads(Path(f"outputs/mine/eval/{arm}/scores.json").read_text())["own"]
        assert set(scores["cot"]["breakdown"]["source"]) == {"kitchen", "house"}
        assert Path(f"outputs/mine/eval/{arm}/report.html").exists()


def test_options_lists_and_numbers_of_the_page_are_read_as_it_says(tmp_path):
    own_folder(tmp_path, "evaluate_your_own.md", "questions.jsonl", 1)
    apples, door, both, capital = own.examples(tmp_path / "my" / "questions.jsonl")
    for example, right, wrong in (
        (apples, "One, two, three.\nFinal answer: three apples", "Final answer: 4"),
        (door, "Final answer: green", "Final answer: A"),
        (both, "Final answer: No.", "Final answer: yes"),
        (capital, "Final answer: City of Paris", "Final answer: Lyon"),
    ):
        assert [own.score(example, text).value for text in (right, wrong)] == [1, 0], example.question
    assert own.score(door, "Final answer: A or B").value == 0
    assert own.score(apples, "").extracted is None
    assert own.score(door, "B", mode="direct").value == 1
    assert "letter" in own.prompt(door, "direct") and own.prompt(capital, "cot").startswith("Your task")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "What?"}, "row 2: no answer"),
        ({"question": "What?", "answer": "1", "image": "none.png"}, "row 2: there is no picture .*none.png"),
        ({"question": "What?", "answer": "1", "history": [["Who?", "I"]]}, "row 2: .*earlier turns"),
        ({"question": "What?", "answer": {"a": 1}}, "row 2: "),
        ({"question": " ", "answer": "1"}, "row 2: the question is empty"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named_by_its_number(tmp_path, row, words):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, [{"question": "What is 1 plus 1?", "answer": 2}, row])), encoding="utf-8")
    with pytest.raises(BadInputError, match=f"questions.jsonl {words}"):
        own.examples(path)


def test_questions_about_one_picture_are_resampled_together(tmp_path):
    make_pictures(tmp_path)
    rows = [{"image": "0.png", "question": f"What is {n}?", "answer": str(n)} for n in range(4)]
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    examples = own.examples(tmp_path)
    summary = own.summarise([own.score(example, f"Final answer: {n}") for n, example in enumerate(examples)])
    assert summary["accuracy"] == 100 and summary["resampled"] == {"unit": "pictures", "num": 1}
