"""Locks that keep two programs from writing one place, also from two machines on a shared disk.

    with held(Path("runs/.mpo.lock"), "another training is writing runs/mpo"):
        ...

The operating system's lock comes first; it ends with the process, however that ends. Some shared file systems keep such
locks to one machine, or have none. So whoever holds a lock also counts up in its file, and a lock that another machine
wrote counts as left behind when nothing in it changes for `PATIENCE` seconds.
"""

import contextlib
import fcntl
import functools
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from internvl_mpo.errors import BadInputError

BEAT = 5.0  # seconds between two signs of life
PATIENCE = 60.0  # seconds without one after which another machine's lock was left behind by a program that is gone

_open: set[int] = set()  # of locks that this process holds


def lock_file(descriptor: int) -> bool | None:
    """Take the operating system's lock of an open file, which ends with the process.

    Returns:
        True; False if another process has it; None on a file system without locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def held(path: str | Path, refusal: str) -> Iterator[None]:
    """Hold a lock while the block runs; the file goes with it.

    Args:
        path: file of the lock, for nothing else; its folder is made if absent.
        refusal: start of the message.

    Raises:
        BadInputError: somebody else holds it; the message says who, and what to do.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _take(path, refusal)
    _open.add(descriptor)
    try:
        with beating(functools.partial(_write, descriptor)):
            yield
    finally:
        path.unlink(missing_ok=True)  # before the lock ends: whoever takes a file that is gone looks again
        _open.discard(descriptor)
        os.close(descriptor)


def _take(path: Path, refusal: str) -> int:
    """Return the open file of a lock that is ours now."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        locked = lock_file(descriptor)
        holder = _holder(path)
        is_elsewhere = bool(holder) and holder.get("machine") != _machine()
        if locked is False and not is_elsewhere:
            os.close(descriptor)
            raise BadInputError(f"{refusal}{_who(holder)}; wait for it, or give another place")
        if is_elsewhere or (holder and locked is None):
            if not _is_left_behind(path, holder):
                os.close(descriptor)
                raise BadInputError(f"{refusal}{_who(holder)}; wait for it, or give another place")
            if locked is False:  # the file server has not yet noticed that the machine is gone
                os.close(descriptor)
                raise BadInputError(
                    f"{refusal}{_who(holder)}, without a sign of life for {PATIENCE:.0f} seconds; if that machine is "
                    f"gone, its file server drops the lock within minutes, so try again, or delete {path}"
                )
        if not _is_same_file(path, descriptor):  # let go in between
            os.close(descriptor)
            continue
        _write(descriptor, 0)
        return descriptor


def _is_left_behind(path: Path, holder: dict[str, Any]) -> bool:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        time.sleep(min(1.0, PATIENCE / 10))
        now = _holder(path)  # opened anew each time: that makes a network disk look at the server
        if now != holder:
            return not now
    return True


@contextlib.contextmanager
def beating(show_life: Callable[[int], None]) -> Iterator[None]:
    """Call a function every `BEAT` seconds, with 1, 2, .., while the block runs; a disk that fails then is no harm."""
    stop = threading.Event()

    def beat() -> None:
        count = 0
        while not stop.wait(BEAT):
            count += 1
            with contextlib.suppress(OSError):
                show_life(count)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _write(descriptor: int, count: int) -> None:
    facts = {"machine": _machine(), "host": platform.node(), "process": os.getpid(), "signs_of_life": count}
    os.pwrite(descriptor, f"{json.dumps(facts):<400}\n".encode(), 0)  # one length, so that no old end is left


def _holder(path: Path) -> dict[str, Any]:
    """What the holder wrote; empty if there is none."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _who(holder: dict[str, Any]) -> str:
    return f" (process {holder.get('process')} on {holder.get('host')})" if holder else ""


def _machine() -> str:
    """What tells machines apart; containers on one machine share its locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return platform.node()


def _is_same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _let_go_in_child() -> None:
    """A forked worker must not keep the lock of a program that was killed."""
    for descriptor in _open:
        os.close(descriptor)
    _open.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
