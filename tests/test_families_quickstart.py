"""The quickstart's path with a tiny Qwen2.5-VL: sample, pair, train, evaluate, publish, load in a clean process, ask.

pytest tests/test_families_quickstart.py
"""

import base64
import json
from pathlib import Path

import pytest
from tiny_families import FAMILIES

import evaluate_mpo
import train_mpo
from dataset_scripts import sample_responses
from internvl_mpo.demo.backends import make_backend
from internvl_mpo.mini.world import WorldSettings, make_world
from internvl_mpo.publish.__main__ import main as publish
from internvl_mpo.records import PreferencePair, Question, Response, read_rows, write_rows
from tests.demo_world import make_page, settings_for


def words(**settings) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))]


@pytest.mark.slow
def test_from_questions_to_an_answer_on_the_page(tmp_path: Path, monkeypatch, capsys) -> None:
    pytest.importorskip("gradio", reason="the page needs gradio")
    world, start, run = tmp_path / "world", FAMILIES["qwen2_5_vl"](tmp_path / "start"), tmp_path / "run"
    make_world(WorldSettings(str(world), num_annotated=2, num_drills=1, num_questions=6, num_open=1, num_test=3))

    # sample: what this model says of the questions is random, so it makes the rejected side
    sampling = {"num_samples": 1, "max_new_tokens": 12, "max_tiles": 3}
    asked = words(model=start, questions=world / "questions.jsonl", image_root=world, output=world / "said.jsonl")
    assert sample_responses.main([*asked, *words(**sampling)]) == 0
    answers = {question.id: question.answer for question in read_rows(world / "questions.jsonl", Question)}
    pairs = [
        PreferencePair(
            images=said.images,
            question=said.question,
            chosen=f"The digits say so.\n\nFinal answer: {answers[said.question_id]}",
            rejected=said.response or "nothing",
        )
        for said in read_rows(world / "said.jsonl", Response)
    ]
    assert len(pairs) == 6 and all(pair.images for pair in pairs)
    write_rows(pairs, world / "pairs.jsonl")

    # train and evaluate
    data = words(model=start, data=world / "pairs.jsonl", image_root=world, output_dir=run)
    steps = words(max_steps=3, pairs_per_step=4, max_length=1500, max_tiles=3, learning_rate=1e-3, use_cpu="true")
    assert train_mpo.main([*data, *steps]) == 0
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == 3 and losses[-1] < losses[0]
    exam = words(model=run / "model", benchmarks="mini", data=world, mode="direct", max_new_tokens=6)
    assert evaluate_mpo.main([*exam, *words(output=tmp_path / "exam")]) == 0
    scores = json.loads((tmp_path / "exam" / "scores.json").read_text())["mini"]["direct"]
    assert scores["num_examples"] == 3

    # publish: the proof loads the folder with the Auto classes in a process that knows nothing of this project
    told = words(run=run, evaluation=tmp_path / "exam", base_model="ada/start", license="mit")
    assert publish(["model", str(run / "model"), *words(output=tmp_path / "hub"), *told]) == 0
    assert "loaded in a clean process" in capsys.readouterr().out
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "AutoModelForImageTextToText" in card and "| Mini world | direct | accuracy |" in card

    # ask both on the page
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    sides = {"base": str(start), "mpo": str(tmp_path / "hub")}
    page = make_page(tmp_path, make_backend(settings_for(tmp_path, **sides)), **sides)
    picture = base64.b64encode((world / pairs[0].images[0]).read_bytes()).decode()
    question = {"question": "Which digits are shown?", "images": [f"data:image/png;base64,{picture}"]}
    *_, result = page.compare(**question, style="plain", max_new_tokens=6, max_tiles=3)
    assert result["base"]["num_tokens"] and result["mpo"]["num_tokens"]
    assert result["mpo"]["model"] == "hub"
