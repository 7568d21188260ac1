"""Commands that make files: nothing is done twice, nothing stale is kept, and a failure is not taken for an end."""

import json
import os
import sys
import threading
from pathlib import Path

import pytest

from internvl_mpo.errors import BadInputError
from internvl_mpo.stages import Lane, Stage, Stages, Usage


def make_stage(folder: Path, name: str, *words: str) -> Stage:
    return Stage(name, "about", ["make", name, *words], folder / name)


class Recorder:
    """Makes the files of stages and remembers which ran."""

    def __init__(self, failing: str = ""):
        self.ran: list[str] = []
        self.failing = failing

    def __call__(self, stage: Stage, log: Path | None) -> Usage:
        if stage.name == self.failing:
            raise BadInputError(f"no {stage.name}")
        self.ran.append(stage.name)
        stage.makes.touch()
        return Usage(peak_mib=100.0)


def test_finished_stages_are_skipped_and_a_changed_one_runs_with_all_after_it(tmp_path):
    run = Recorder()
    names = [make_stage(tmp_path, name) for name in "abc"]
    Stages(tmp_path / "markers", run=run).run_all([Lane(names)])
    Stages(tmp_path / "markers", run=run).run_all([Lane(names)])
    assert run.ran == ["a", "b", "c"]
    names[1] = make_stage(tmp_path, "b", "--harder")
    Stages(tmp_path / "markers", run=run).run_all([Lane(names)])
    assert run.ran == ["a", "b", "c", "b", "c"]


def test_a_lane_runs_again_when_what_it_needs_has_changed_but_not_when_its_neighbour_has(tmp_path):
    run = Recorder()
    shared = [make_stage(tmp_path, "shared")]
    left, right = [make_stage(tmp_path, "left")], [make_stage(tmp_path, "right")]
    Stages(tmp_path / "markers", run=run).run_all([Lane(shared)], [Lane(left, shared), Lane(right, shared)])
    run.ran.clear()
    other = [make_stage(tmp_path, "left", "--harder")]
    Stages(tmp_path / "markers", run=run).run_all([Lane(shared)], [Lane(other, shared), Lane(right, shared)])
    assert run.ran == ["left"]
    run.ran.clear()
    shared = [make_stage(tmp_path, "shared", "--harder")]
    Stages(tmp_path / "markers", run=run).run_all([Lane(shared)], [Lane(other, shared), Lane(right, shared)])
    assert sorted(run.ran) == ["left", "right", "shared"]


def test_a_file_that_was_deleted_is_made_again(tmp_path):
    run = Recorder()
    lane = Lane([make_stage(tmp_path, "a")])
    Stages(tmp_path / "markers", run=run).run_all([lane])
    (tmp_path / "a").unlink()
    Stages(tmp_path / "markers", run=run).run_all([lane])
    assert run.ran == ["a", "a"]


def test_a_failed_stage_is_not_finished_ends_its_lane_and_leaves_its_neighbour_alone(tmp_path):
    run = Recorder(failing="a")
    lanes = [Lane([make_stage(tmp_path, name) for name in "ab"]), Lane([make_stage(tmp_path, "c")])]
    errors = Stages(tmp_path / "markers", run=run).run(lanes)
    assert [str(error) for error in errors] == ["no a"]
    assert run.ran == ["c"]
    assert [path.name for path in (tmp_path / "markers").iterdir()] == ["c.json"]
    with pytest.raises(BadInputError, match="no a"):
        Stages(tmp_path / "markers", run=run).run_all(lanes)


def test_two_lanes_run_at_the_same_time_and_their_memory_adds_up(tmp_path):
    both = threading.Barrier(2, timeout=20)

    def run(stage: Stage, log: Path | None) -> Usage:
        both.wait()  # breaks where one lane waits for the other
        stage.makes.touch()
        return Usage(peak_mib=100.0)

    stages = Stages(tmp_path / "markers", jobs=2, run=run)
    stages.run_all([Lane([make_stage(tmp_path, name)]) for name in "ab"])
    assert stages.peak_mib == 200


def test_a_command_that_fails_beside_others_shows_the_end_of_its_output(tmp_path, capsys):
    failing = [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"]
    lanes = [Lane([Stage(name, "about", failing, tmp_path / name)]) for name in "ab"]
    errors = Stages(tmp_path / "markers", jobs=2).run(lanes)
    assert "stage 'a' ended with exit code 3" in str(errors[0])
    assert "the reason" in capsys.readouterr().err


def test_a_command_that_makes_nothing_is_refused(tmp_path):
    stage = Stage("a", "about", [sys.executable, "-c", "pass"], tmp_path / "a")
    with pytest.raises(BadInputError, match="ended without making"):
        Stages(tmp_path / "markers").run_all([Lane([stage])])


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="the system does not tell what a process took")
def test_the_marker_holds_the_processor_time_of_a_stage_not_the_time_it_waited(tmp_path):
    code = f"import time; time.sleep(0.5); sum(range(3_000_000)); open({str(tmp_path / 'a')!r}, 'w')"
    Stages(tmp_path / "markers").run_all([Lane([Stage("a", "about", [sys.executable, "-c", code], tmp_path / "a")])])
    marker = json.loads((tmp_path / "markers" / "a.json").read_text())
    assert 0 < marker["cpu_seconds"] < marker["seconds"] - 0.4
    assert marker["peak_mib"] > 1
