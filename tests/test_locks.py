"""Locks: who holds one, who may take it over and when, and what is left of it afterwards.

pytest tests/test_locks.py
"""

import json
import os
import platform
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from internvl_mpo import locks
from internvl_mpo.errors import BadInputError
from internvl_mpo.locks import beating, held

HELD = "it is written"


def own(**changes) -> dict:
    """What a lock of this process says."""
    facts = {"machine": locks._machine(), "host": platform.node(), "process": os.getpid(), "signs_of_life": 0}
    return {**facts, **changes}


@pytest.fixture
def lock(tmp_path) -> Path:
    return tmp_path / "a" / "folder" / ".lock"


@pytest.fixture
def clock(monkeypatch):
    """A clock that only sleeping moves; `happens` is called after each sleep."""
    now = SimpleNamespace(seconds=100.0, happens=lambda: None)

    def sleep(seconds):
        assert 0 < seconds <= 1
        now.seconds += seconds
        now.happens()

    fake = SimpleNamespace(monotonic=lambda: now.seconds, sleep=sleep)
    monkeypatch.setattr(locks, "time", fake)
    return now


def write(lock: Path, **changes) -> None:
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.write_text(json.dumps({"machine": "another", "host": "node7", "process": 1, "signs_of_life": 0, **changes}))


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_lock_says_who_holds_it_refuses_others_and_goes_with_its_block(lock):
    before, umask = open_files(), os.umask(0o22)
    os.umask(umask)
    for _ in range(2):
        with held(lock, HELD):
            assert json.loads(lock.read_text()) == own()
            assert lock.read_text().endswith(" \n") and len(lock.read_text()) == 401
            assert lock.stat().st_mode & 0o777 == 0o666 & ~umask, "a holder of another name must be able to look"
            words = rf"^{HELD} \(process {os.getpid()} on {platform.node()}\); wait for it, or give another place$"
            with pytest.raises(BadInputError, match=words), held(lock, HELD):
                pass
            assert lock.exists()
        assert not lock.exists()
    with pytest.raises(RuntimeError), held(lock, HELD):
        raise RuntimeError
    assert (lock.exists(), locks._open, open_files()) == (False, set(), before)


def test_a_holder_that_has_not_yet_said_who_it_is_refuses_as_well(lock, monkeypatch):
    lock.parent.mkdir(parents=True)
    monkeypatch.setattr(locks, "lock_file", lambda descriptor: False)
    for text in ("", "no json", "[1]"):
        lock.write_text(text)
        with pytest.raises(BadInputError, match=f"^{HELD}; wait for it"):
            locks._take(lock, HELD)


def test_signs_of_life_count_up_and_a_disk_that_fails_for_a_while_is_no_harm(monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.001)
    counts, enough = [], threading.Event()

    def show(count):
        counts.append(count)
        if count == 2:
            raise OSError("stale file handle")
        if count == 4:
            enough.set()

    with beating(show):
        assert enough.wait(10)
    seen = len(counts)
    time.sleep(0.01)
    assert counts == list(range(1, seen + 1)), "nothing is shown after the block"


def test_a_held_lock_shows_life(lock, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.001)
    deadline = time.monotonic() + 10
    with held(lock, HELD):
        while json.loads(lock.read_text())["signs_of_life"] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert {**json.loads(lock.read_text()), "signs_of_life": 0} == own()
    assert locks.BEAT * 10 < locks.PATIENCE


def test_a_lock_of_another_machine_is_taken_over_after_a_minute_without_a_sign_of_life(lock, clock):
    write(lock)
    with held(lock, HELD):
        assert json.loads(lock.read_text()) == own()
        assert clock.seconds == pytest.approx(160, abs=1.01)


@pytest.mark.parametrize("looks", [1, 30, 59])
def test_one_that_shows_life_within_that_minute_is_not(lock, clock, looks):
    write(lock)
    num_looks = []

    def happens():
        num_looks.append(1)
        if len(num_looks) == looks:
            write(lock, signs_of_life=1)

    clock.happens = happens
    before = open_files()
    words = rf"^{HELD} \(process 1 on node7\); wait for it, or give another place$"
    with pytest.raises(BadInputError, match=words):
        locks._take(lock, HELD)
    assert len(num_looks) == looks
    assert (lock.exists(), open_files()) == (True, before)


def test_one_that_is_let_go_in_the_meantime_is_taken_at_once(lock, clock):
    write(lock)
    clock.happens = lambda: lock.unlink(missing_ok=True)
    with held(lock, HELD):
        assert clock.seconds < 102
        assert json.loads(lock.read_text()) == own()


@pytest.mark.parametrize("machine", ["another", pytest.param(locks._machine(), id="this")])
def test_where_the_disk_has_no_locks_signs_of_life_decide_on_one_machine_too(lock, clock, monkeypatch, machine):
    monkeypatch.setattr(locks, "lock_file", lambda descriptor: None)
    with held(lock, HELD):  # nobody else
        assert clock.seconds == 100
    write(lock, machine=machine)
    with held(lock, HELD):
        assert clock.seconds > 159
    write(lock, machine=machine)
    clock.happens = lambda: write(lock, machine=machine, signs_of_life=int(clock.seconds))
    with pytest.raises(BadInputError, match="node7"):
        locks._take(lock, HELD)


def test_a_lock_that_its_file_server_still_holds_is_waited_for_and_then_explained(lock, clock, monkeypatch):
    monkeypatch.setattr(locks, "lock_file", lambda descriptor: False)
    write(lock)
    before = open_files()
    words = rf"process 1 on node7\), without a sign of life for 60 seconds; .* or delete {lock}"
    with pytest.raises(BadInputError, match=words):
        locks._take(lock, HELD)
    assert (clock.seconds > 159, open_files()) == (True, before)


def test_a_file_that_its_holder_deletes_as_it_is_opened_is_made_again(lock, monkeypatch):
    lock.parent.mkdir(parents=True)
    real, turns = locks.lock_file, []

    def lock_file(descriptor):
        turns.append(descriptor)
        if len(turns) < 3:
            lock.unlink()  # the one before lets go
        return real(descriptor)

    monkeypatch.setattr(locks, "lock_file", lock_file)
    before = open_files()
    with held(lock, HELD):
        assert len(turns) == 3
        assert json.loads(lock.read_text()) == own()
    assert open_files() == before


def test_a_system_without_locks_is_told_from_a_lock_that_is_held(lock, monkeypatch):
    errors = {BlockingIOError(): False, OSError("no locks available"): None}
    for error, answer in errors.items():

        def flock(descriptor, mode, error=error):
            assert mode == locks.fcntl.LOCK_EX | locks.fcntl.LOCK_NB
            raise error

        monkeypatch.setattr(locks.fcntl, "flock", flock)
        assert locks.lock_file(0) is answer
    monkeypatch.setattr(locks.fcntl, "flock", lambda *given: None)
    assert locks.lock_file(0) is True


def test_a_forked_worker_lets_go_of_what_its_parent_holds(lock):
    with held(lock, HELD):
        (descriptor,) = locks._open
        if not (child := os.fork()):
            try:
                os.fstat(descriptor)
                os._exit(1)
            except OSError:
                os._exit(2 if not locks._open else 3)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
        os.fstat(descriptor)


def test_a_machine_is_known_by_its_start_and_where_that_is_hidden_by_its_name(monkeypatch):
    assert len(locks._machine()) == 36 and locks._machine() == locks._machine()

    def refuse(self, **more):
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert locks._machine() == platform.node()
