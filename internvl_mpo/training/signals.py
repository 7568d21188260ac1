"""SIGTERM and Ctrl-C in a training run.

    signal                       before and after the steps        during the steps
    SIGTERM, first SIGINT        at once, finished work is kept    the step is finished and a whole checkpoint written
    SIGINT a second time         at once                           at once; the last checkpoint is the one to go on from

A run that stops so ends with exit code 75 (`EXIT_STOPPED`), which a launcher can tell from an error. What happens after
a step is in `stopping`; nothing here imports torch, so that signals are caught before it is loaded.
"""

import os
import signal
import threading
import time
from types import TracebackType
from typing import Any, Self

from internvl_mpo.errors import StoppedError

_ECHO = 1.0  # seconds in which a second SIGINT is the first one by another way: terminal and launcher both send it


class StopSignals:
    """Catches SIGTERM and SIGINT inside its block, in this process and not in its workers."""

    def __init__(self) -> None:
        """Catch nothing yet."""
        self.process, self.launcher = os.getpid(), os.getppid()
        self.is_launched = "LOCAL_RANK" in os.environ
        self.deferred = False  # whether a signal waits for the end of a step
        self.received: str | None = None
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # Python hands signals to no other
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if os.getpid() != self.process:  # a worker: the process that started it decides
            return
        now, is_second = time.monotonic(), self.received is not None
        if not is_second:
            self.received, self._first = signal.Signals(number).name, now
        if is_second and (number == signal.SIGTERM or now - self._first < _ECHO):
            return
        if is_second or not self.deferred:
            raise StoppedError(f"stopped by {self.received}; finished work is kept, the same command goes on from it")

    def wants_to_stop(self) -> bool:
        """Say whether a signal has come, or the launcher that would send one is gone."""
        if self.is_launched and os.getppid() != self.launcher:
            self.received = self.received or "the end of its launcher"
        return self.received is not None


def keep_from_signals(worker: int) -> None:
    """Let a worker of a DataLoader outlive signals to the whole group, so that the step can be finished."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
