"""Signals, locks and full disks: a run stops whole, is alone in its folder, and says in a sentence what is in its way.

pytest tests/test_stopping.py
"""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_reference_cache import SETTINGS, digests, pair
from test_train_mpo import ROOT, arguments, losses, train, unbroken, world  # noqa: F401 - fixtures among them
from tiny import tiny_processor

from internvl_mpo import files, locks
from internvl_mpo.errors import EXIT_STOPPED, BadInputError, StoppedError, full_disk, run_program
from internvl_mpo.files import atomic_writer, remove_leftovers, replaced_folder
from internvl_mpo.locks import held
from internvl_mpo.training.callbacks import ConsoleCallback
from internvl_mpo.training.checkpoint import whole_checkpoints
from internvl_mpo.training.pair_table import PairTable
from internvl_mpo.training.preflight import Preflight
from internvl_mpo.training.reference_cache import ReferenceCache
from internvl_mpo.training.signals import StopSignals
from internvl_mpo.training.trainer import MPOTrainer

LAUNCH = ["-m", "internvl_mpo.launch", "--standalone", "--nproc_per_node", "2"]


def start(words: list[str], log: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with open(log, "w") as out:
        return subprocess.Popen([sys.executable, *words], env=environment, stdout=out, stderr=out, cwd=ROOT)


def wait_for_step(output: Path, step: int, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if (output / "log.jsonl").exists() and (output / "log.jsonl").read_text().count("\n") >= step:
            return
        time.sleep(0.05)
    raise AssertionError(f"no step {step}")


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_the_same_command_goes_on(
    world, unbroken, tmp_path, monkeypatch, capsys, number
):
    def send(self, args, state, control, **kwargs):  # in the middle of step 2, and again at once as launchers do
        if state.global_step == 0:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)

    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(ConsoleCallback, "on_optimizer_step", send, raising=False)
        assert train(world, output) == EXIT_STOPPED
    assert f"stopped by {number.name} after step 1; {output}/checkpoint-1 is whole" in capsys.readouterr().err
    assert [folder.name for folder in whole_checkpoints(output)] == ["checkpoint-1"]
    assert not (output / "model").exists()
    assert train(world, output) == 0
    assert losses(output) == losses(unbroken)


def test_a_second_ctrl_c_stops_at_once_but_not_one_that_comes_twice(monkeypatch):
    with StopSignals() as signals:
        signals.deferred = True
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # terminal and launcher
        assert signals.wants_to_stop()
        signals._first -= 5
        os.kill(os.getpid(), signal.SIGTERM)  # a launcher that insists
        with pytest.raises(StoppedError, match="stopped by SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)


def test_before_the_steps_a_signal_stops_at_once_and_says_so(capsys):
    before = signal.getsignal(signal.SIGTERM)

    def main(argv):
        with StopSignals():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    assert run_program(main, []) == 75
    assert capsys.readouterr().err.startswith("stopped by SIGTERM; finished work is kept")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_in_the_last_step_still_leaves_the_results_to_the_next_start(world, unbroken, tmp_path, monkeypatch):
    def send(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(ConsoleCallback, "on_optimizer_step", send, raising=False)
        assert train(world, output) == EXIT_STOPPED
    assert train(world, output) == 0
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (output, unbroken))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_workers_that_load_data_outlive_a_signal_to_the_whole_group(world, unbroken, tmp_path, monkeypatch):
    import psutil

    def send(self, args, state, control, **kwargs):
        for child in psutil.Process().children():
            child.send_signal(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    output = tmp_path / "run"
    more = ("--dataloader_num_workers", "1")
    with monkeypatch.context() as patch:
        patch.setattr(ConsoleCallback, "on_optimizer_step", send, raising=False)
        assert train(world, output, *more) == EXIT_STOPPED
    assert train(world, output, *more) == 0
    assert losses(output) == losses(unbroken)


def test_save_minutes_saves_by_the_clock(world, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(world, output, "--save_steps", "100", "--save_minutes", "1e-9", "--save_total_limit", "9") == 0
    assert [folder.name for folder in whole_checkpoints(output)] == [f"checkpoint-{n}" for n in (1, 2, 3, 4)]
    assert train(world, output, "--save_minutes", "0") == 2
    assert "save_minutes is 0.0, expected more than 0" in capsys.readouterr().err


def test_a_save_in_the_middle_of_a_step_is_refused_with_the_way_out(world, tmp_path, capsys):
    assert train(world, tmp_path / "run", "--enable_jit_checkpoint", "true") == 2
    assert "leave it out: SIGTERM finishes the step, writes a whole checkpoint" in capsys.readouterr().err


@pytest.mark.slow
def test_two_ranks_stop_at_one_step_without_a_traceback(world, tmp_path):
    import psutil

    more = ("--max_steps", "30", "--save_steps", "100", "--lr_scheduler_type", "constant", "--num_train_epochs", "9")
    assert train(world, tmp_path / "whole", *more) == 0
    output, log = tmp_path / "run", tmp_path / "log"
    words = [*LAUNCH, str(ROOT / "train_mpo.py"), *arguments(world, output, *more)]
    for turn, whom in enumerate(("the launcher", "one rank")):
        process = start(words, log)
        wait_for_step(output, 2 + 10 * turn, process)
        ranks = [child for child in psutil.Process(process.pid).children() if "LOCAL_RANK" in child.environ()]
        os.kill(process.pid if whom == "the launcher" else max(rank.pid for rank in ranks), signal.SIGTERM)
        assert process.wait(timeout=120) == EXIT_STOPPED, log.read_text()[-3000:]
        assert "Traceback" not in log.read_text()
        assert whole_checkpoints(output)[-1].name in log.read_text()
    assert start(words, log).wait(timeout=200) == 0, log.read_text()[-3000:]
    found, expected = losses(output), losses(tmp_path / "whole")
    assert [found[step] for step in expected] == pytest.approx(list(expected.values()), rel=1e-4)


# --- one run in a folder ----------------------------------------------------------------------------------------------


@pytest.fixture
def other_machine(monkeypatch) -> Iterator[None]:
    """The lock of another machine is looked at for half a second."""
    monkeypatch.setattr(locks, "PATIENCE", 0.5)
    monkeypatch.setattr(locks, "BEAT", 0.05)
    return


def test_a_second_training_in_one_folder_is_refused_by_name(world, unbroken, capsys):
    with held(unbroken.parent / ".run.lock", "x"):
        assert train(world, unbroken) == 2
    error = capsys.readouterr().err
    assert f"another training is writing {unbroken} (process {os.getpid()} on" in error
    assert not (unbroken.parent / ".run.lock").exists()
    assert train(world, unbroken) == 0


def test_a_lock_ends_with_its_process_even_if_a_worker_of_it_lives_on(tmp_path):
    code = (
        "import os, sys, time\n"
        "from internvl_mpo.locks import held\n"
        f"with held({str(tmp_path / 'lock')!r}, 'x'):\n"
        "    if not os.fork(): print(os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    result = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    child = int(result.stdout.readline())
    result.kill()
    result.wait()
    with held(tmp_path / "lock", "x"):
        os.kill(child, signal.SIGKILL)


def test_a_lock_of_another_machine_holds_as_long_as_it_shows_life(tmp_path, other_machine):
    def show(count: int) -> None:
        holder = {"machine": "another", "host": "node7", "process": 1, "signs_of_life": count}
        (tmp_path / "lock").write_text(json.dumps(holder))

    show(0)
    message = r"another training is writing it \(process 1 on node7\); wait for it"
    with locks.beating(show), pytest.raises(BadInputError, match=message):  # no lock of the system tells
        locks._take(tmp_path / "lock", "another training is writing it")


def test_a_lock_that_another_machine_left_behind_is_taken_over(tmp_path, other_machine, monkeypatch):
    (tmp_path / "lock").write_text(json.dumps({"machine": "gone", "host": "node7", "process": 1, "signs_of_life": 3}))
    with held(tmp_path / "lock", "x"):
        pass
    (tmp_path / "lock").write_text(json.dumps({"machine": "gone", "host": "node7", "process": 1, "signs_of_life": 3}))
    monkeypatch.setattr(locks, "lock_file", lambda descriptor: False)  # its file server has not yet noticed
    with pytest.raises(BadInputError, match=r"process 1 on node7.*without a sign of life .*or delete"):
        locks._take(tmp_path / "lock", "x")


def test_two_programs_never_build_one_folder(tmp_path):
    with replaced_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("mine")
        with pytest.raises(BadInputError, match="another program is writing"), replaced_folder(tmp_path / "out"):
            pass
    assert (tmp_path / "out" / "a").read_text() == "mine"


def test_a_second_conversion_is_one_sentence(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"question": "q", "chosen": "a", "rejected": "b"}\n')
    words = ["dataset_scripts/convert_mmpr.py", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out")]
    with held(tmp_path / ".out.lock", "x"):
        result = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("error: another conversion is writing")


# --- what killed programs leave ---------------------------------------------------------------------------------------


def test_leftovers_of_killed_programs_go_and_those_of_living_ones_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = files._HOST
    for name in (f".a.{host}.{dead.pid}.part", f".b.{host}.{os.getppid()}.part", ".c.node7.1.part", ".notes.part"):
        (tmp_path / name).write_text("half")
    os.utime(tmp_path / ".c.node7.1.part", (1, 1))
    (tmp_path / ".d.node7.1.part").write_text("another machine writes it now")
    with atomic_writer(tmp_path / "a") as out:
        out.write("whole")
    assert sorted(path.name[:3] for path in tmp_path.iterdir()) == [".b.", ".c.", ".d.", ".no", "a"]
    remove_leftovers(tmp_path)
    assert sorted(path.name[:3] for path in tmp_path.iterdir()) == [".b.", ".d.", ".no", "a"]


def test_pair_building_killed_again_and_again_leaves_no_folder_that_a_rerun_does_not_remove(tmp_path):
    row = {"id": "1", "question": "1+1?", "answer": "2", "images": [], "response": "Answer: 2", "source": "s"}
    (tmp_path / "responses.jsonl").write_text(json.dumps(row) + "\n")
    output = tmp_path / "pairs.jsonl"
    code = (
        "import os, sys\n"
        "sys.path.insert(0, 'dataset_scripts')\n"
        "import build_correctness_pairs as program\n"
        "program.partition = lambda rows, folder, *rest: ((folder / 'b').write_text('x'), os.kill(os.getpid(), 9))\n"
        f"program.main(['--responses', {str(tmp_path / 'responses.jsonl')!r}, '--output', {str(output)!r}])\n"
    )
    for _ in range(3):
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == -9
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
    words = ["dataset_scripts/build_correctness_pairs.py", "--responses", str(tmp_path / "responses.jsonl"),
             "--output", str(output)]  # fmt: skip
    subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("a small disk cannot be mounted here (not root)")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_one_sentence_and_what_is_there_stays(small_disk, capsys):
    with replaced_folder(small_disk / "out") as folder:
        (folder / "a").write_text("old")

    def fill(argv):
        with replaced_folder(small_disk / "out") as folder:
            torch.save(torch.zeros(10**6), folder / "a")

    assert run_program(fill, []) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"cannot write {small_disk}/out: No space left on device; what stood there before is whole" in error
    assert (small_disk / "out" / "a").read_text() == "old"
    assert [path.name for path in small_disk.iterdir() if path.name.endswith(".part")] == []


def test_errors_of_every_writer_are_known_as_a_full_disk(small_disk):
    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet
    from safetensors.torch import save_file

    writers = {
        "torch": lambda path: torch.save(torch.zeros(10**6), path),
        "safetensors": lambda path: save_file({"a": torch.zeros(10**6)}, path),
        "parquet": lambda path: pyarrow.parquet.write_table(
            pyarrow.table({"a": torch.rand(10**6).numpy()}), path, compression="none"
        ),
        "arrow": lambda path: pyarrow.feather.write_feather(pyarrow.table({"a": torch.rand(10**6).numpy()}), path),
        "python": lambda path: path.write_bytes(bytes(4 << 20)),
    }
    for name, write in writers.items():
        with pytest.raises(Exception) as error:
            write(small_disk / "file")
        assert full_disk(error.value), (name, error.value)
        (small_disk / "file").unlink(missing_ok=True)
    assert full_disk(RuntimeError("shapes do not fit")) is None


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before_and_the_rerun_finishes(world, unbroken, tmp_path, capsys):
    output = tmp_path / "run"
    plain = MPOTrainer._write_checkpoint
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)

    def with_limit(self, folder, model, trial):
        if self.state.global_step == 4:  # a file may not grow beyond 20 kB, as on a disk that is full
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
        try:
            plain(self, folder, model, trial)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MPOTrainer, "_write_checkpoint", with_limit)
        assert train(world, output) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: cannot write {output}/checkpoint-4: File too large; " in error
    assert "checkpoint-2 before it is whole; make room" in error
    assert [folder.name for folder in sorted(output.glob("checkpoint-*"))] == ["checkpoint-2"]
    assert train(world, output) == 0
    assert losses(output) == losses(unbroken)


def fill_up(folder: Path) -> Path:
    """Write until nothing more fits; return the file that is in the way."""
    filler = folder / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as out:
        while out.write(bytes(4096)):
            pass
    return filler


def test_a_cache_shard_that_does_not_fit_leaves_those_before_and_the_rerun_finishes(small_disk, capsys):
    folder = small_disk / "cache"
    rows = [pair(f"number {number}") for number in range(4)]
    ids = [row.id for row in rows]

    def compute(argv: list[str]) -> None:
        with ReferenceCache(folder, SETTINGS, digests(*rows)) as cache:
            missing = cache.missing()[:2]
            cache.add(missing, torch.zeros(len(missing)), torch.ones(len(missing)))

    assert run_program(compute, []) == 0
    filler = fill_up(small_disk)
    assert run_program(compute, []) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"error: cannot write {folder}/")
    assert error.endswith("No space left on device; make room and give the same command again\n")
    assert ReferenceCache(folder, SETTINGS, digests(*rows)).missing() == ids[2:]
    filler.unlink()
    assert run_program(compute, []) == 0
    assert ReferenceCache(folder, SETTINGS, digests(*rows)).missing() == []
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_table_of_pairs_that_does_not_fit_leaves_the_one_before_and_the_rerun_finishes(
    small_disk, tmp_path, monkeypatch, capsys, num_workers
):
    monkeypatch.setattr("internvl_mpo.mmpr.sources.BLOCK_ROWS", 50)  # several parts
    lines = [json.dumps({"question": f"{n}?", "chosen": f"yes {n}" * 20, "rejected": "no"}) + "\n" for n in range(200)]
    data = tmp_path / "pairs.jsonl"

    def preflight() -> Preflight:
        limits = {"max_tiles": 4, "max_length": 2000, "num_workers": num_workers}
        return Preflight(tiny_processor(), small_disk / "cache", [data], **limits)

    data.write_text("".join(lines[:100]))
    first = preflight()
    first.reopen()
    assert len(first.run()) == 100
    parts = {path: path.stat().st_mtime_ns for path in first.folder.glob("*.arrow") if "columns" not in path.name}
    data.write_text("".join(lines))
    filler = fill_up(small_disk)
    assert run_program(lambda argv: preflight().run() and None, []) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"cannot write {first.folder}/" in error
    assert error.endswith("No space left on device; make room and give the same command again")
    assert len(PairTable(first.folder, first.sources)) == 100, "the table of before is whole"
    filler.unlink()
    table = preflight().run()
    assert [table.row(index).pair.question for index in range(len(table))] == [f"{n}?" for n in range(200)]
    assert {path: path.stat().st_mtime_ns for path in parts} == parts, "what was found was found again"


def test_the_half_checkpoint_that_fills_the_disk_goes_before_anything_is_written(world, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    assert train(world, output, "--max_steps", "2") == 0
    (output / "checkpoint-3").mkdir()
    monkeypatch.setattr("train_mpo.load_processor", lambda settings: (_ for _ in ()).throw(BadInputError("stop here")))
    assert train(world, output, "--max_steps", "4", "--lr_scheduler_type", "constant") == 2
    assert not (output / "checkpoint-3").exists()
