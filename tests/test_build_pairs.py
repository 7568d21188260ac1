"""The correctness program: the same bytes on any order, memory limit and number of workers."""

import gc
import json
import random
from pathlib import Path

import pytest

from dataset_scripts import build_correctness_pairs, convert_mmpr, verify_pairs
from internvl_mpo.engines import Reply
from internvl_mpo.errors import run_program
from internvl_mpo.mmpr.reading import iter_pairs
from internvl_mpo.prompts import ask
from internvl_mpo.records import PreferencePair, Question, Response, read_rows, write_rows


def make_responses(path: Path, num_questions: int = 60) -> list[Response]:
    rng = random.Random(0)
    rows = []
    for number in range(num_questions):
        question = Question(question=f"What is {number} and one?", answer=str(number + 1), source=f"set{number % 2}")
        for sample in range(6):
            answer = number + 1 + (0 if rng.random() < 0.4 else rng.randint(1, 9))
            text = f"I look at it in way {rng.randint(0, 9)}.\n" + (f"Final answer: {answer}" if sample else "Hm.")
            rows.append(
                Response(
                    question_id=question.id,
                    question=ask(question.question, "cot"),
                    answer=question.answer,
                    source=question.source,
                    response=text,
                    provenance={"style": "cot", "seed": sample, "original_question": question.question},
                )
            )
    write_rows(rows, path)
    return rows


def build(responses: str, output: Path, **settings) -> int:
    values = {"responses": responses, "output": output, "pairs_per_question": 3, **settings}
    argv = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    return run_program(build_correctness_pairs.main, argv)


def test_order_buckets_and_workers_decide_nothing(tmp_path, monkeypatch, capsys):
    rows = make_responses(tmp_path / "a.jsonl")
    assert build(tmp_path / "a.jsonl", tmp_path / "one.jsonl") == 0
    table = capsys.readouterr().out
    assert "set0" in table and "set1" in table and "total" in table
    random.Random(1).shuffle(rows)
    write_rows(rows[:100], tmp_path / "b.jsonl")
    write_rows(rows[100:], tmp_path / "c.jsonl")
    assert build(f"{tmp_path / 'b.jsonl'},{tmp_path / 'c.jsonl'}", tmp_path / "two.jsonl") == 0
    monkeypatch.setattr(build_correctness_pairs, "MEGABYTE", 1 << 14)  # several buckets from a small file
    assert build(tmp_path / "b.jsonl", tmp_path / "half.jsonl") == 0
    assert (
        build(f"{tmp_path / 'c.jsonl'},{tmp_path / 'b.jsonl'}", tmp_path / "three.jsonl", bucket_mb=1, workers=2) == 0
    )
    pairs = read_rows(tmp_path / "one.jsonl", PreferencePair)
    assert len(pairs) > 100
    for other in ("two", "three"):
        assert (tmp_path / f"{other}.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
        wrong = tmp_path / f"{other}.all_wrong.jsonl"
        assert wrong.read_bytes() == (tmp_path / "one.all_wrong.jsonl").read_bytes()


def test_right_is_always_on_the_chosen_side(tmp_path):
    make_responses(tmp_path / "a.jsonl")
    build(tmp_path / "a.jsonl", tmp_path / "pairs.jsonl")
    for pair in read_rows(tmp_path / "pairs.jsonl", PreferencePair):
        assert pair.chosen.endswith(f"Final answer: {pair.answer}")
        assert not pair.rejected.endswith(f"Final answer: {pair.answer}")
        assert ("Final answer" in pair.rejected) == (pair.rule == "correctness")


def test_all_wrong_questions_can_be_asked_again(tmp_path):
    make_responses(tmp_path / "a.jsonl", num_questions=200)
    build(tmp_path / "a.jsonl", tmp_path / "pairs.jsonl")
    questions = read_rows(tmp_path / "pairs.all_wrong.jsonl", Question)
    assert questions
    assert all(row.question.startswith("What is") and row.answer for row in questions)


def test_a_folder_gets_the_mmpr_layout(tmp_path):
    make_responses(tmp_path / "a.jsonl")
    build(tmp_path / "a.jsonl", tmp_path / "one.jsonl")
    (tmp_path / "images").mkdir()
    assert build(tmp_path / "a.jsonl", tmp_path / "mmpr", image_root=tmp_path / "images") == 0
    meta = json.loads((tmp_path / "mmpr" / "meta.json").read_text())
    assert sorted(meta) == [f"set{i}_pairs_vqa_{rule}_rules" for i in (0, 1) for rule in ("correctness", "format")]
    rows = []
    for subset in meta.values():
        found = read_rows(tmp_path / "mmpr" / subset["annotation"], PreferencePair)
        assert len(found) == subset["length"]
        assert (tmp_path / "mmpr" / subset["root"]).resolve() == tmp_path / "images"
        rows += found
    expected = read_rows(tmp_path / "one.jsonl", PreferencePair)
    assert sorted(row.id for row in rows) == sorted(row.id for row in expected)


def test_training_and_conversion_read_the_folder(tmp_path):
    make_responses(tmp_path / "a.jsonl", num_questions=20)
    assert build(tmp_path / "a.jsonl", tmp_path / "mmpr") == 0
    assert run_program(convert_mmpr.main, [str(tmp_path / "mmpr"), "--output", str(tmp_path / "parquet")]) == 0
    raw, converted = ([row.pair for row in iter_pairs(tmp_path / name)] for name in ("mmpr", "parquet"))
    assert len(raw) > 20
    assert sorted(pair.id for pair in converted) == sorted(pair.id for pair in raw)
    assert {(pair.rule, pair.source) for pair in converted} == {(pair.rule, pair.source) for pair in raw}


class Judge:
    """Answers as told by the last line of the response it is asked about."""

    name = model_id = "judge"
    revision = None

    def __init__(self, verdicts: dict[str, str]):
        self.verdicts = verdicts
        self.num_asked = 0

    def generate(self, requests, done=()):
        for request in requests:
            if request.id in done:
                continue
            self.num_asked += 1
            response = request.question.split("Response:\n")[1].split("\n\nIs the final")[0]
            text = self.verdicts.get(response, "yes" if response.endswith(" 3") else "No.")
            error = None if text else "no server"
            yield Reply(id=request.id, text=text, finish_reason="stop", num_tokens=1, error=error)


def test_a_judge_refuses_pairs_and_a_missing_verdict_is_asked_again(tmp_path, monkeypatch, capsys):
    rejected = ["Hm.\nFinal answer: 4", "So.\nFinal answer: three", "Oh.\nFinal answer: 5", "Ah.\nFinal answer: 6"]
    pairs = [
        PreferencePair(question="1+2?", answer="3", chosen="Sum.\nFinal answer: 3", rejected=text, rule="correctness")
        for text in rejected
    ]
    write_rows(pairs, tmp_path / "pairs.jsonl")
    verdicts = {rejected[1]: "yes", rejected[2]: "perhaps", rejected[3]: ""}
    judge = Judge(verdicts)
    monkeypatch.setattr(verify_pairs, "load_engine", lambda settings: judge)
    argv = ["--pairs", str(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "kept.jsonl"), "--model", "judge"]
    assert run_program(verify_pairs.main, argv) == 1
    assert [row.id for row in read_rows(tmp_path / "kept.jsonl", PreferencePair)] == [pairs[0].id]
    assert "1 rejected judged right, 1 unclear verdict" in capsys.readouterr().out
    assert run_program(verify_pairs.main, [*argv, "--max_new_tokens", "64"]) == 2  # verdicts of two kinds in one output
    assert "other questions or settings" in capsys.readouterr().err
    verdicts[rejected[3]] = "no"
    assert run_program(verify_pairs.main, argv) == 0
    assert [row.id for row in read_rows(tmp_path / "kept.jsonl", PreferencePair)] == [pairs[0].id, pairs[3].id]
    refused = read_rows(tmp_path / "kept.refused.jsonl", PreferencePair)
    assert [row.provenance["judge_replies"] for row in refused] == [["yes", "yes"], ["yes", "perhaps"]]
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert judge.num_asked == 6  # one chosen and four rejected, of which one twice
    assert run_program(verify_pairs.main, argv) == 0
    assert judge.num_asked == 6
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_responses_without_truth_are_counted_and_make_no_question(tmp_path, capsys):
    rows = [
        Response(question_id="q", question="How many?", answer=truth, response=f"{n} things. Final answer: {n}")
        for truth in (None, "", " \t", "3")
        for n in (3, 4)
    ]
    write_rows(rows, tmp_path / "a.jsonl")
    assert build(tmp_path / "a.jsonl", tmp_path / "pairs.jsonl") == 0
    assert "left out: 6 responses without ground truth" in capsys.readouterr().out
    assert len(read_rows(tmp_path / "pairs.jsonl", PreferencePair)) == 1
    assert (tmp_path / "pairs.all_wrong.jsonl").read_text() == ""
    assert gc.isenabled()  # it is off while rows are in memory


def test_verdicts_of_responses_that_stand_in_many_pairs_are_paid_once(tmp_path, monkeypatch):
    pairs = [
        PreferencePair(
            question="1+2?", answer="3", chosen=f"{way}\nFinal answer: 3", rejected=f"{way}\nFinal answer: {n}"
        )
        for way in "AB"
        for n in (4, 5, 6)
    ] + [PreferencePair(question="1+2?", answer="3", chosen="A\nFinal answer: 3", rejected="B\nFinal answer: 4")] * 3
    write_rows(pairs, tmp_path / "pairs.jsonl")
    judge = Judge({})
    monkeypatch.setattr(verify_pairs, "load_engine", lambda settings: judge)
    argv = ["--pairs", str(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "kept.jsonl"), "--model", "judge"]
    assert run_program(verify_pairs.main, argv) == 0
    assert len(read_rows(tmp_path / "kept.jsonl", PreferencePair)) == 9  # more rows than verdicts
    assert judge.num_asked == 8
    assert run_program(verify_pairs.main, argv) == 0
    assert judge.num_asked == 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"responses": "none.jsonl"}, "cannot read none.jsonl"),
        ({"min_pass_rate": 0.9, "max_pass_rate": 0.1}, "are no band"),
        ({"answer_format": "xml"}, "answer_format is 'xml'"),
    ],
)
def test_bad_input_ends_with_one_sentence(tmp_path, capsys, settings, message):
    make_responses(tmp_path / "a.jsonl", num_questions=1)
    values = {"responses": tmp_path / "a.jsonl", **settings}
    assert build(values.pop("responses"), tmp_path / "pairs.jsonl", **values) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not list(tmp_path.glob("*pairs.jsonl*"))


def test_a_bad_line_is_named(tmp_path, capsys):  # in the user's file, not in a temporary one
    make_responses(tmp_path / "a.jsonl", num_questions=1)
    with open(tmp_path / "a.jsonl", "a") as out:
        out.write('{"question": "q", "question_id": "x"}\n')
    assert build(tmp_path / "a.jsonl", tmp_path / "pairs.jsonl") == 2
    assert "a.jsonl:7: key 'response' is missing" in capsys.readouterr().err
    assert not list(tmp_path.glob("*pairs.jsonl*"))


def test_ground_truth_that_is_an_object_is_refused_by_name_and_a_list_is_accepted(tmp_path, capsys):
    text = "I read the label.\nFinal answer: nokia"
    row = {"id": "1", "question": "Which brand?", "response": text, "question_id": "q", "answer": ["Nokia n8", "nokia"]}
    other = {**row, "id": "2", "response": "I read the label.\nFinal answer: sony"}
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, (row, other))) + "\n", encoding="utf-8")
    assert build(path, tmp_path / "pairs.jsonl", answer_format="marker") == 0
    (pair,) = read_rows(tmp_path / "pairs.jsonl", PreferencePair)
    assert "nokia" in pair.chosen and "sony" in pair.rejected
    path.write_text(json.dumps({**row, "answer": {"value": "nokia"}}) + "\n", encoding="utf-8")
    capsys.readouterr()
    assert build(path, tmp_path / "none.jsonl", answer_format="marker") == 2
    assert "a.jsonl:1" in (said := capsys.readouterr().err) and "ground truth" in said
