"""Commands that make files: nothing is done twice, nothing stale is kept, and a failure is not taken for an end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from internvl_mpo.errors import BadInputError, StoppedError
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


# --- signals ----------------------------------------------------------------------------------------------------------

# Two stages side by side and one after them, started as a user would; each command says that it runs, then waits.
PROGRAM = """
import sys
from pathlib import Path
from internvl_mpo.errors import run_program
from internvl_mpo.stages import Lane, Stage, Stages
folder, count = Path(sys.argv[1]), int(sys.argv[3])
stage = lambda name: Stage(name, "about", [sys.executable, "-c", sys.argv[2], str(folder / name)], folder / name)
lanes = [Lane([stage(f"{n}"), stage(f"after {n}")]) for n in range(count)]
sys.exit(run_program(lambda words: Stages(folder / "markers", count).run_all(lanes), []))
"""
TRAINING = """
import signal, sys, time
def stop(number, frame):
    time.sleep(0.3)
    open(sys.argv[1] + " checkpoint", "w").close()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
open(sys.argv[1] + " runs", "w").close()
time.sleep(60)
"""
OTHER = "import sys, time; open(sys.argv[1] + ' runs', 'w').close(); time.sleep(60)"


@pytest.mark.parametrize(
    ("number", "command", "num_lanes", "code"),
    [
        (signal.SIGTERM, TRAINING, 2, 75),
        (signal.SIGINT, TRAINING, 1, 75),
        (signal.SIGTERM, OTHER, 1, 128 + signal.SIGTERM),
        (signal.SIGINT, OTHER, 2, 128 + signal.SIGINT),
    ],
    ids=["SIGTERM, training", "SIGINT, training", "SIGTERM, another", "SIGINT, another"],
)
def test_a_signal_to_the_program_alone_stops_its_stages_and_waits_for_their_checkpoint(
    tmp_path, number, command, num_lanes, code
):
    words = [sys.executable, "-c", PROGRAM, str(tmp_path), command, str(num_lanes)]
    program = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("* runs"))) < num_lanes and time.monotonic() < deadline:
        time.sleep(0.02)
    program.send_signal(number)
    _, said = program.communicate(timeout=30)
    assert program.returncode == code, said
    assert "the same command goes on" in said if command == TRAINING else "Traceback" not in said.splitlines()[-1]
    assert len(list(tmp_path.glob("* checkpoint"))) == (num_lanes if command == TRAINING else 0)
    assert not list(tmp_path.glob("after*"))
    alive = [process.pid for process in psutil.process_iter(["cmdline"]) if str(tmp_path) in str(process.info)]
    assert not alive


def test_a_stage_that_was_stopped_itself_stops_the_program_with_the_code_to_come_again(tmp_path):
    stage = Stage("a", "about", [sys.executable, "-c", "import sys; sys.exit(75)"], tmp_path / "a")
    with pytest.raises(StoppedError, match="a stage was stopped") as stopped:
        Stages(tmp_path / "markers").run([Lane([stage])])
    assert stopped.value.code == 75
