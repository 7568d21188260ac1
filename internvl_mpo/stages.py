"""Commands that make files: what is finished is skipped, and what needs nothing of each other runs side by side.

A lane is a list of stages, one after the other, and of the stages it needs, which have been run before. A stage is
finished when its marker holds the digest of its command, of the user's files it reads, and of all that it follows. So
the same lanes given again go on where they were killed, and a changed command runs again with all that comes after it.
SIGTERM and SIGINT are passed on to the commands that run; when they have ended the program does.
"""

import contextlib
import functools
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from internvl_mpo.errors import EXIT_STOPPED, BadInputError, StoppedError
from internvl_mpo.files import atomic_writer
from internvl_mpo.programs import HOME, spelled
from internvl_mpo.records import content_id

NUM_LAST_LINES = 15  # of a failed stage, shown when its output went to a file
ECHO = 0.5  # seconds after which a command that Ctrl-C at the terminal has reached as well has had time to end


@dataclass(frozen=True)
class Stage:
    """One command and the file that tells it is finished.

    Attributes:
        name: of its marker and in messages.
        about: what it makes, for who watches.
        command: the words that start it.
        makes: there when it is finished.
        reads: files of the user's; other content in them makes another command of it.
    """

    name: str
    about: str
    command: list[str]
    makes: Path
    reads: tuple[Path, ...] = ()

    @property
    def identity(self) -> list[str]:
        """What its result depends on, apart from the stages before it."""
        return [*self.command, *(hashlib.sha256(path.read_bytes()).hexdigest() for path in self.reads)]


@dataclass(frozen=True)
class Lane:
    """Stages that run one after the other, and the finished ones that they need."""

    stages: Sequence[Stage]
    needs: Sequence[Stage] = ()


@dataclass(frozen=True)
class Usage:
    """What a command took; None where the system does not tell.

    Attributes:
        peak_mib: largest resident memory of one of its processes, MiB.
        cpu_seconds: of all its threads and processes.
    """

    peak_mib: float | None = None
    cpu_seconds: float | None = None


Run = Callable[[Stage, Path | None], Usage]


class Commands:
    """The commands that run; a signal to this program reaches them, too, and no other is started after it."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._running: set[int] = set()  # process ids, until somebody has waited for them
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def passing_on(self) -> Iterator[None]:
        """Catch SIGTERM and SIGINT inside the block, where Python lets this thread do it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def start(self, command: list[str], **options: Any) -> subprocess.Popen:
        """Start a command.

        Raises:
            StoppedError: a signal has come.
        """
        with self._lock:
            self.check()
            process = subprocess.Popen(command, **options)
            self._running.add(process.pid)
            return process

    def wait(self, process: subprocess.Popen) -> Usage:
        """Wait for a command; return what it and those it waited for took."""
        if not hasattr(os, "wait4"):
            process.wait()
            return Usage()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its id stays taken
        with self._lock:
            self._running.discard(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        peak_mib = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
        return Usage(peak_mib, usage.ru_utime + usage.ru_stime)

    def check(self, code: int | None = None) -> None:
        """Do nothing unless a signal has come.

        Args:
            code: that of a command that has ended, if it was not 0.

        Raises:
            StoppedError: with `EXIT_STOPPED` if the command has ended with that, else with 128 and the signal's number.
        """
        if self.received is None and code != EXIT_STOPPED:
            return
        why = "a stage was stopped" if self.received is None else f"stopped by {self.received.name}"
        raise StoppedError(
            f"{why}; finished work is kept, the same command goes on from it",
            EXIT_STOPPED if code == EXIT_STOPPED or self.received is None else 128 + self.received,
        )

    def _pass_on(self, number: int, frame: object) -> None:
        self.received = self.received or signal.Signals(number)
        if number == signal.SIGINT:  # at a terminal it reaches the commands by itself
            threading.Timer(ECHO, self._send, [number]).start()
        else:
            self._send(number)

    def _send(self, number: int) -> None:
        with self._lock:
            for pid in self._running:
                os.kill(pid, number)


class Stages:
    """Runs lanes and remembers what is finished.

    Args:
        folder: of the markers, and of the output of stages that run beside others.
        jobs: lanes that run at the same time.
        run: runs a stage with its output in a file, or shown, and returns what it took.
    """

    def __init__(self, folder: Path, jobs: int = 1, run: Run | None = None):
        self.folder, self.jobs, self.commands = folder, jobs, Commands()
        self._command = run or functools.partial(run_command, commands=self.commands)
        self.finished: dict[str, dict] = {}
        self.seconds = 0.0  # as long as the lanes took, or would have taken at once
        self.peak_mib = 0.0  # of the stages that ran side by side together

    def run(self, lanes: Sequence[Lane]) -> list[BadInputError]:
        """Run what is not finished yet of some lanes side by side; return what went wrong in each that failed.

        Raises:
            StoppedError: a signal came; the commands it was passed on to have ended.
        """
        with self.commands.passing_on(), ThreadPoolExecutor(max_workers=self.jobs) as pool:
            running = [pool.submit(self._run_lane, lane, len(lanes) > 1 and self.jobs > 1) for lane in lanes]
            found = [lane.result() for lane in running]
        done = [lane for lane in found if isinstance(lane, list)]
        seconds = [sum(stage["seconds"] for stage in lane) for lane in done]
        self.seconds += max([sum(seconds) / self.jobs, *seconds])
        peaks = sorted((max((stage["peak_mib"] or 0 for stage in lane), default=0) for lane in done), reverse=True)
        self.peak_mib = max(self.peak_mib, sum(peaks[: self.jobs]))
        return [error for error in found if isinstance(error, BadInputError)]

    def run_all(self, *steps: Sequence[Lane]) -> None:
        """Run the lanes of each step; see `run`.

        Raises:
            BadInputError: a stage failed.
        """
        for lanes in steps:
            for error in self.run(lanes):
                raise error

    def _run_lane(self, lane: Lane, is_beside_others: bool) -> list[dict] | BadInputError:
        digest, done = content_id(*(stage.identity for stage in lane.needs)), []
        for stage in lane.stages:
            digest = content_id(digest, stage.identity)
            try:
                done.append(self._run_stage(stage, digest, is_beside_others))
            except BadInputError as error:
                return error
        return done

    def _run_stage(self, stage: Stage, digest: str, is_beside_others: bool) -> dict:
        marker = self.folder / f"{stage.name}.json"
        done = json.loads(marker.read_text(encoding="utf-8")) if marker.exists() else {}
        title = f"{stage.name}: {stage.about}"
        if done.get("digest") == digest and stage.makes.exists():
            print(f"{title} - done before, {done['seconds']:.0f} s", flush=True)
        else:
            log = marker.with_suffix(".log") if is_beside_others else None
            print(f"\n{title}\n$ {_short(stage.command)}", flush=True)
            begin = time.perf_counter()
            usage = self._command(stage, log)
            done = {"digest": digest, "seconds": time.perf_counter() - begin, **asdict(usage)}
            with atomic_writer(marker) as out:
                json.dump(done, out)
            if log:
                print(f"{stage.name}: finished after {done['seconds']:.0f} s", flush=True)
        self.finished[stage.name] = done
        return done


def run_command(stage: Stage, log: Path | None, commands: Commands) -> Usage:
    """Run the command of a stage; see `Stages`.

    Raises:
        BadInputError: it failed, or did not make its file.
        StoppedError: a signal has stopped it, or this program.
    """
    # One thread unless the user says otherwise: the number of threads decides how sums are rounded, and with it, after
    # 700 steps, the figures of the table. The models are too small to gain from a second one.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    if log is None:
        process = commands.start(stage.command, env=environment)
    else:
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "wb") as out:
            process = commands.start(stage.command, env=environment, stdout=out, stderr=subprocess.STDOUT)
    usage = commands.wait(process)
    if process.returncode == 130:
        raise KeyboardInterrupt
    if process.returncode != 0:
        commands.check(process.returncode)
        if log is not None:
            lines = log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines()
            print("\n".join(lines[-NUM_LAST_LINES:]), file=sys.stderr)
        raise BadInputError(f"stage '{stage.name}' ended with exit code {process.returncode}; its message stands above")
    if not stage.makes.exists():
        raise BadInputError(f"stage '{stage.name}' ended without making {stage.makes}")
    return usage


def _short(command: list[str]) -> str:
    """The command as a user would type it."""
    words = ["python" if word == sys.executable else word.removeprefix(f"{HOME}/") for word in command]
    return spelled(shlex.join(words))
