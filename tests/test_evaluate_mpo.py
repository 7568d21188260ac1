"""The evaluation program with an engine that answers from a table: what is asked, kept, resumed and scored."""

import base64
import io
import json
import threading
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pytest
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from tiny import tiny_model, tiny_processor

import evaluate_mpo
from internvl_mpo.benchmarks import load_benchmark
from internvl_mpo.benchmarks.common import open_image
from internvl_mpo.engines import Reply, Request
from internvl_mpo.engines.serve import BatchServer
from internvl_mpo.errors import run_program
from internvl_mpo.evaluation.comparison import compare_runs


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
            reason = "stop" if found else ""
            yield Reply(id=request.id, text=found or "", finish_reason=reason, error=None if found else "not known")


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


def test_an_unknown_mode_is_answered_with_those_there_are(world, capsys):
    argv = f"--model m --benchmarks mini --data {world} --output {world / 'out'} --mode plain".split()
    assert run_program(evaluate_mpo.main, argv) == 2
    message = capsys.readouterr().err
    assert "'mode' is 'plain'" in message
    assert "one of direct, cot, or several with commas between them" in message


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


# ------------------------------------------------------------------------- all eight, a judge, two runs side by side

PICTURE = {"image": "a.png"}
FIRST_ROWS = {
    "m3cot": ("m3cot", "test.jsonl"),
    "mathvista": ("mathvista", "testmini.jsonl"),
    "mathvision": ("mathvision", "testmini.jsonl"),
    "crpe": ("crpe", "crpe_relation.jsonl"),
}


class Judge(TableEngine):
    """Knows the four judge prompts by a word of each."""

    def __init__(self):
        super().__init__(
            {
                "Grade an answer": "0.5",
                "assistants answered": "8 6\nThe first is better.",
                "Judge a model's answer": "It is true.\nRating: 4",
                "Read the final answer": "3",
            }
        )


@pytest.fixture
def eight(tmp_path: Path) -> Path:
    """A folder with one entry per benchmark, a few rows each."""
    data = tmp_path / "data"
    for name, (folder, file) in FIRST_ROWS.items():
        rows = json.loads((Path(__file__).parent / "cases" / f"{name}.json").read_text(encoding="utf-8"))["rows"]
        write_rows(data / folder / file, [{**row, **PICTURE} for row in rows])
    pope = [{"question_id": n, **PICTURE, "text": "Is there a dog in the image?", "label": "yes"} for n in range(2)]
    for category in ("random", "popular", "adversarial"):
        write_rows(data / "pope" / f"coco_pope_{category}.json", pope)
    mmvet = {"v1_0": {"imagename": "a.png", "question": "What is x?", "answer": "-1<AND>-5", "capability": ["ocr"]}}
    (data / "mmvet").mkdir()
    (data / "mmvet" / "mm-vet.json").write_text(json.dumps(mmvet), encoding="utf-8")
    write_rows(
        data / "llava_bench" / "questions.jsonl", [{**PICTURE, "text": "What?", "category": "conv", "question_id": 0}]
    )
    write_rows(data / "llava_bench" / "context.jsonl", [{**PICTURE, "caption": "A hat."}])
    write_rows(data / "llava_bench" / "answers_gpt4.jsonl", [{"question_id": 0, "text": "A hat."}])
    hat = {"question": "What is it?", "gt_answer": "A hat.", "image_content": ["Hat"], **PICTURE}
    write_rows(data / "mmhal_bench" / "mmhal.jsonl", [hat])
    for folder in data.iterdir():
        Image.new("RGB", (40, 28), "red").save(folder / "a.png")
    return data


def write_rows(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


@contextmanager
def serving(engine: TableEngine, name: str) -> Iterator[BatchServer]:
    server = BatchServer(engine, name)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def judge() -> Iterator[BatchServer]:
    with serving(Judge(), "judge-1") as server:
        yield server


EIGHT = "m3cot,mathvista,mathvision,mmvet,llava_bench,pope,crpe,mmhal_bench"


def test_all_eight_through_a_tiny_model_and_a_judge(eight, judge, tmp_path, capsys):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tiny_processor(model.config).save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    command = ["--benchmarks", EIGHT, "--data", str(eight), "--output", str(out), "--mode", "direct,cot"]
    command += ["--judge", "judge-1", "--judge_url", judge.url, "--judge_runs", "2"]
    command += ["--model", str(tmp_path / "model"), "--max_new_tokens", "4", "--device", "cpu"]
    assert run_program(evaluate_mpo.main, command) == 0
    result = json.loads((out / "scores.json").read_text(encoding="utf-8"))
    assert set(result) == set(EIGHT.split(","))
    assert result["mmvet"]["cot"]["total"] == 50.0 and result["mmvet"]["cot"]["std"] == 0.0
    assert result["llava_bench"]["direct"]["relative"] == 75.0
    assert result["mmhal_bench"]["direct"]["rating"] == 4.0
    assert result["mmvet"]["direct"]["judge"]["served"] == ["judge-1"]
    assert all(s["num_unscored"] == 0 for modes in result.values() for s in modes.values())
    table = capsys.readouterr().out
    assert "MathVision MINI" in table and "LLaVA-Bench (wild)  direct" in table

    num_asked = len(judge.engine.asked)
    assert run_program(evaluate_mpo.main, command) == 0
    assert len(judge.engine.asked) == num_asked > 0, "a judge reply was paid twice"
    html = (out / "report.html").read_text(encoding="utf-8")
    assert "InternVL2-8B-MPO" in html and "data:image/jpeg;base64," in html and "<script>alert" not in html


def test_without_a_judge_judged_benchmarks_are_unscored(monkeypatch, eight, tmp_path, capsys):
    monkeypatch.setattr(evaluate_mpo, "make_engine", lambda settings: TableEngine({"": "A hat."}))
    command = f"--model m --benchmarks mmvet --data {eight} --output {tmp_path / 'out'}".split()
    assert run_program(evaluate_mpo.main, command) == 0
    summary = json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))["mmvet"]["direct"]
    assert summary["total"] is None and summary["num_unscored"] == 1
    assert "too few scored" in capsys.readouterr().out


def test_changed_answer_is_judged_anew(monkeypatch, eight, judge, tmp_path):
    for text in ("first", "second"):
        monkeypatch.setattr(evaluate_mpo, "make_engine", lambda settings, text=text: TableEngine({"": text}))
        command = f"--model m --benchmarks mmvet --data {eight} --output {tmp_path / 'out'} --judge judge-1".split()
        assert run_program(evaluate_mpo.main, [*command, "--judge_url", judge.url]) == 0
        (tmp_path / "out" / "answers.jsonl").unlink()
    assert len(judge.engine.asked) == 2


def test_compare_pairs_questions_and_names_what_flipped(monkeypatch, world, capsys):
    worse = {**ANSWERS, "1 plus 1": "1 + 1 = 3.\nFinal answer: 3"}
    better = {**ANSWERS, "2 plus 2": "2 + 2 = 4.\nFinal answer: 4"}
    for name, answers in (("a", worse), ("b", better)):
        run(monkeypatch, TableEngine(answers), world, "--mode", "cot", "--output", str(world / name))
    capsys.readouterr()
    assert run_program(evaluate_mpo.main, ["compare", str(world / "a"), str(world / "b")]) == 0
    text = capsys.readouterr().out
    assert "mini/cot: 25.00 -> 75.00, difference +50.00" in text
    assert "2 better" in text and "0 worse" in text
    html = (world / "b" / "compare.html").read_text(encoding="utf-8")
    assert "flipped" in html and "1 + 1 = 3." in html and "2 + 2 = 4." in html


def test_compare_draws_pictures_and_says_so(tmp_path):
    """All questions of a picture flip together: five times as many questions make no narrower interval."""
    for run_name, value in (("a", 0), ("b", 1)):
        for copies in (1, 5):
            folder = tmp_path / f"{run_name}{copies}"
            folder.mkdir()
            rows = [
                {"benchmark": "pope", "mode": "direct", "id": f"{picture}-{copy}", "cluster": f"{picture}.jpg"}
                | {"value": float(value and picture % 2)}
                for picture in range(40)
                for copy in range(copies)
            ]
            (folder / "verdicts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (one,), (five,) = (compare_runs(tmp_path / f"a{copies}", tmp_path / f"b{copies}") for copies in (1, 5))
    assert one.interval == five.interval and one.interval[1] - one.interval[0] > 20
    assert five.resampled == "40 pictures" and "40 pictures resampled" in five.text() and "200 questions" in five.text()


def test_compare_of_an_empty_folder_is_refused(tmp_path, capsys):
    assert run_program(evaluate_mpo.main, ["compare", str(tmp_path), str(tmp_path)]) == 2
    assert "verdicts.jsonl" in capsys.readouterr().err


def test_answer_that_looks_like_html_is_shown_as_text(monkeypatch, world):
    run(monkeypatch, TableEngine({"": "<script>alert(1)</script>\nFinal answer: 2"}), world, "--mode", "cot")
    html = (world / "out" / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html


def test_processes_share_the_work_and_rank_0_scores_all(monkeypatch, world):
    monkeypatch.setattr(evaluate_mpo, "wait_for_other_processes", lambda world_size: None)
    engines = []
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", "2")
        engines.append(TableEngine(ANSWERS))
        assert run(monkeypatch, engines[-1], world, "--mode", "cot") == 0
    assert [len(engine.asked) for engine in engines] == [2, 2]
    assert scores(world)["cot"]["num_unscored"] == 0


def test_embedded_pictures_reach_model_and_report(monkeypatch, tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "blue").save(buffer, "PNG")
    table = "index\timage\tquestion\tanswer\tcategory\n"
    table += (
        f"0\t{base64.b64encode(buffer.getvalue() + bytes(200)).decode()}\tIs there a dog in the image?\tNo\trandom\n"
    )
    (tmp_path / "POPE.tsv").write_text(table + "1\t0\tIs there a cat in the image?\tYes\trandom\n", encoding="utf-8")
    engine = TableEngine({"dog": "No", "cat": "Yes"})
    monkeypatch.setattr(evaluate_mpo, "make_engine", lambda settings: engine)
    command = f"--model m --benchmarks pope --data {tmp_path / 'POPE.tsv'} --output {tmp_path / 'out'}".split()
    assert run_program(evaluate_mpo.main, command) == 0
    summary = json.loads((tmp_path / "out" / "scores.json").read_text(encoding="utf-8"))["pope"]["direct"]
    assert (summary["f1"], summary["accuracy"]) == (100.0, 100.0)
    assert "data:image/jpeg" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_card_replaces_its_own_numbers_and_keeps_the_rest(monkeypatch, eight, tmp_path):
    monkeypatch.setattr(evaluate_mpo, "make_engine", lambda settings: TableEngine({"": "Yes"}))
    out, model = tmp_path / "out", tmp_path / "model"
    model.mkdir()
    (model / "README.md").write_text("---\nlicense: mit\n---\n\n# A model\n", encoding="utf-8")
    command = f"--model m --benchmarks pope --data {eight} --output {out}".split()
    assert run_program(evaluate_mpo.main, command) == 0
    for _ in range(2):
        assert run_program(evaluate_mpo.main, ["card", str(out), str(model)]) == 0
    loaded = ModelCard.load(model / "README.md")
    assert loaded.data.license == "mit" and "# A model" in loaded.text
    (result,) = loaded.data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("lmms-lab/POPE", "f1", 100.0)
    (entry,) = yaml.safe_load((model / ".eval_results" / "pope.yaml").read_text(encoding="utf-8"))
    assert entry["dataset"]["id"] == "lmms-lab/POPE" and entry["value"] == 100.0
    assert "rule ours" in entry["notes"]


def test_hub_pictures_are_read_only_when_needed(monkeypatch):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "blue").save(buffer, "PNG")
    row = {"question_id": "1", "question": "Is there a dog?", "answer": "yes", "category": "random"}
    table = datasets.Dataset.from_list([{**row, "image": {"bytes": buffer.getvalue(), "path": None}}])
    table = table.cast_column("image", datasets.Image())
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or table)
    (example,) = load_benchmark("pope").examples("hub:lmms-lab/POPE@abc:test")
    assert asked == [(("lmms-lab/POPE",), {"split": "test", "revision": "abc"})]
    assert callable(example.images[0]) and open_image(example.images[0]).size == (32, 32)


@pytest.mark.parametrize(
    ("rows", "offender"),
    [
        ([{"id": "1", "choices": ["a", "b"], "answer": "A"}], "no field 'question'"),
        ([{"id": "1", "question": "?", "choices": ["a", "b"], "answer": "A", "image": 5}], "a picture must be"),
        ([{"id": "1", "question": "?", "choices": "a or b", "answer": "A"}], "a list was expected"),
        ([{"id": "1", "question": "?", "choices": "__import__('os').listdir()", "answer": "A"}], "a list was expected"),
        ([], "must hold rows"),
    ],
)
def test_bad_row_is_one_sentence_that_names_it(tmp_path, capsys, rows, offender):
    write_rows(tmp_path / "test.jsonl", rows)
    command = f"--model m --benchmarks m3cot --data {tmp_path} --output {tmp_path / 'out'}".split()
    assert run_program(evaluate_mpo.main, command) == 2
    assert offender in capsys.readouterr().err


def test_model_behind_a_server_is_evaluated_like_any_other(eight, tmp_path):
    with serving(TableEngine({"": "Yes"}), "closed-model") as server:
        command = f"--engine http --base_url {server.url} --model closed-model --benchmarks pope --data {eight}".split()
        assert run_program(evaluate_mpo.main, [*command, "--output", str(tmp_path / "out")]) == 0
    answers = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert {(row["model"], row["answer"]) for row in answers} == {("closed-model", "Yes")} and len(answers) == 6
