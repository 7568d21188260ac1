"""A run in rounds that is killed ends as the unbroken one; `bench/rounds_kills.py` does the same twenty times."""

import subprocess
import sys
from pathlib import Path

import pytest
from tiny_world import make_model_folder, make_pictures

from bench.rounds_kills import draw_moments
from internvl_mpo.records import Question, write_rows

ROOT = Path(__file__).resolve().parents[1]


def test_every_stage_is_killed_once_before_any_is_killed_twice_and_in_the_order_of_the_run():
    stages = [{"name": name, "cpu_seconds": 10.0} for name in "abcd"]
    for count in (3, 4, 6):
        names = [moment.stage for moment in draw_moments(stages, count, seed=1)]
        assert names == sorted(names)
        assert len(names) == count
        assert len(set(names)) == min(count, 4)
    assert all(0 <= moment.seconds < 10 for moment in draw_moments(stages, 8, seed=1))


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
