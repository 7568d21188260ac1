"""A run in rounds that is killed ends as the unbroken one; `bench/rounds_kills.py` does the same twenty times."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_world import make_model_folder, make_pictures

from internvl_mpo.records import Question, write_rows

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_killed_with_its_whole_group_a_run_ends_in_the_same_pairs_and_losses_and_asks_nothing_twice(tmp_path):
    world = tmp_path / "world"
    world.mkdir()
    make_pictures(world, 3)
    make_model_folder(tmp_path / "model")
    rows = [
        Question(images=(f"{n % 3}.png",), question=f"What is it, {n} or {n + 1}?", answer=str(n)) for n in range(12)
    ]
    write_rows(rows, world / "questions.jsonl")
    write_rows(
        [Question(images=(f"{n}.png",), question="Describe it.") for n in range(3)], world / "open_questions.jsonl"
    )
    command = [sys.executable, str(ROOT / "bench" / "rounds_kills.py"), "--model", str(tmp_path / "model")]
    command += ["--world", str(world), "--output", str(tmp_path / "out"), "--kills", "2", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kills" in done.stdout
