"""Whether two formulas are equal, decided by math-verify in a child process that can be stopped.

Symbolic algebra on text from a model may run for hours or ask for all memory (`9^{9^{9}}`), and inside C code no signal
reaches it. So it lives in a process of its own with a memory limit; one that is late is killed and replaced.
"""

import json
import os
import select
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from internvl_mpo.errors import BadInputError

SECONDS = 3.0
START_SECONDS = 60.0  # importing sympy on a busy machine
MEMORY_BYTES = 2 << 30


class Comparison(NamedTuple):
    """What algebra says of two formulas: whether they are equal, and what each comes to if it is a number."""

    equal: bool
    prediction_value: float | None
    gold_value: float | None


class MathProcess:
    """A child process that compares formulas, started on first use.

    Args:
        seconds: time limit of one comparison.
    """

    def __init__(self, seconds: float = SECONDS):
        self.seconds = seconds
        self._child: subprocess.Popen | None = None

    def compare(self, prediction: str, gold: str) -> Comparison | None:
        """Compare two LaTeX formulas; None when time or memory did not suffice.

        Raises:
            BadInputError: math-verify is not installed.
        """
        child = self._child or self._start()
        try:
            child.stdin.write(json.dumps([prediction, gold]).encode() + b"\n")
            child.stdin.flush()
            answer = self._read(child, self.seconds)
        except BrokenPipeError:
            answer = None
        if answer is None:
            self.close()
            return None
        return Comparison(*answer)

    def close(self) -> None:
        """Kill the child, if any; the next comparison starts another."""
        if self._child is not None:
            self._child.kill()
            self._child.communicate()
            self._child = None

    def _start(self) -> subprocess.Popen:
        package_root = str(Path(__file__).resolve().parents[2])
        paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._child = subprocess.Popen(
            [sys.executable, "-m", "internvl_mpo.answers.math_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        )
        if self._read(self._child, START_SECONDS) is None:
            self.close()
            raise BadInputError("formulas are compared with math-verify, which does not start; pip install math-verify")
        return self._child

    @staticmethod
    def _read(child: subprocess.Popen, seconds: float) -> list | None:
        ready, _, _ = select.select([child.stdout], [], [], seconds)
        line = child.stdout.readline() if ready else b""
        return json.loads(line) if line.endswith(b"\n") else None


_process = MathProcess()


@lru_cache(maxsize=65536)
def compare_formulas(prediction: str, gold: str) -> Comparison | None:
    """Compare two formulas in the child process of this process; see `MathProcess.compare`."""
    return _process.compare(prediction, gold)


def _serve() -> None:
    """Read [prediction, gold] lines, write the fields of a `Comparison` as lines; the child's side."""
    import logging
    import resource

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print("[]", flush=True)
    for line in sys.stdin:
        try:
            prediction, gold = (parse(f"${text}$", parsing_timeout=None) for text in json.loads(line))
            equal = bool(gold) and bool(prediction) and bool(verify(gold, prediction, timeout_seconds=None))
            answer = [equal, _value(prediction), _value(gold)]
        except Exception:  # sympy raises anything at all on odd input; unequal is the safe answer
            answer = [False, None, None]
        print(json.dumps(answer), flush=True)


def _value(parsed: list) -> float | None:
    """The first reading of a formula as a real number, or None."""
    try:
        return float(parsed[0].evalf())
    except (AttributeError, TypeError, ValueError, IndexError):
        return None


if __name__ == "__main__":
    _serve()
