"""What this code does on a GPU, in one command: numbers against the CPU, speed, memory, kernels.

    python bench/gpu_proof.py --minutes 10                    everything that fits, most telling first
    python bench/gpu_proof.py --stages environment,parity     some stages
    python bench/gpu_proof.py --device cpu --size tiny        the same stages on tiny shapes, to test the program

Weights are random and made on the device from the real shapes; nothing is downloaded. Every stage is a process of its
own with a limit of its own, and writes each figure when it has it: a run that is cut off leaves what it measured. The
result is OUTPUT/gpu_proof.json and OUTPUT/gpu_proof.md, written anew after each stage. What did not fit is named there.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs from a checkout without installation

from internvl_mpo.errors import BadInputError, run_program  # noqa: E402
from internvl_mpo.files import atomic_writer  # noqa: E402
from internvl_mpo.settings import parse_settings, setting  # noqa: E402

NUM_LAST_LINES = 6


@dataclass(frozen=True)
class Stage:
    """What is measured in one process.

    Attributes:
        name: of a function in gpu_stages.py.
        title: heading of its table.
        limit: seconds after which it is stopped on a GPU; on a CPU, which may be busy, only the whole budget counts.
        least: seconds below which it is not begun.
    """

    name: str
    title: str
    limit: int
    least: int


# By value: what a stranger asks first comes first.
STAGES = (
    Stage("environment", "Machine and versions", 60, 5),
    Stage("parity", "The same numbers as on a CPU", 120, 20),
    Stage("step_large", "One training step, 8B", 200, 60),
    Stage("profile", "Where the time of a step goes, 8B, cached reference, 5 tiles", 90, 45),
    Stage("peers", "The same step in the original's form and in TRL, 1B", 150, 60),
    Stage("memory", "Memory against memory_estimate", 120, 45),
    Stage("step_small", "One training step, 1B", 100, 40),
    Stage("adapters", "Adapters, 8B", 100, 45),
    Stage("sampling", "Sampling with the engine of this process, 1B", 90, 40),
    Stage("resume", "Killed and started again, bfloat16", 120, 60),
)


@dataclass
class Settings:
    """Settings of the proof."""

    minutes: float = setting(10, help="budget of the whole run")
    output: str = setting("outputs/gpu_proof", help="folder of gpu_proof.json and gpu_proof.md")
    device: Literal["cuda", "cpu"] = setting("cuda", help="cuda; cpu only tests the program")
    size: Literal["full", "tiny"] = setting("full", help="shapes: full, or tiny to test the program")
    stages: list[str] = setting(["all"], help="all, or some of " + " ".join(stage.name for stage in STAGES))
    stage: str = setting("", help="used by the program itself")

    def __post_init__(self) -> None:
        unknown = {*self.stages, self.stage} - {"all", "", *(stage.name for stage in STAGES)}
        if unknown:
            raise BadInputError(f"no stage '{min(unknown)}'; known are {', '.join(stage.name for stage in STAGES)}")
        if self.minutes <= 0:
            raise BadInputError(f"minutes is {self.minutes}, expected more than 0")


def main(argv: list[str]) -> int:
    """Run the stages that fit; 1 if one of them failed."""
    settings = parse_settings(
        Settings, argv or ["--minutes", "10"], program="bench/gpu_proof.py", about=__doc__, config=False
    )
    out = Path(settings.output)
    if settings.stage:
        return run_one(settings, out)
    if settings.device == "cuda" and not _has_cuda():
        raise BadInputError(
            "torch finds no CUDA GPU here; --device cpu --size tiny runs the stages on tiny shapes, to test the program"
        )
    out.mkdir(parents=True, exist_ok=True)
    deadline, begin = time.monotonic() + 60 * settings.minutes, time.strftime("%Y-%m-%d %H:%M")
    command = " ".join(["python bench/gpu_proof.py", *argv])
    found: list[dict[str, Any]] = []
    for stage in STAGES:
        if "all" in settings.stages or stage.name in settings.stages:
            found.append(run_stage(stage, settings, out, deadline - time.monotonic(), argv))
            write_result(out, {"command": command, "date": begin, "device": settings.device, "size": settings.size,
                               "stages": found})  # fmt: skip
    print(f"{out / 'gpu_proof.md'} has the figures")
    return 1 if any(one["state"] == "failed" for one in found) else 0


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def run_one(settings: Settings, out: Path) -> int:
    """Run a stage in this process and write each row of its table when it is there."""
    if settings.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    import gpu_stages

    with open(out / f"{settings.stage}.jsonl", "w", encoding="utf-8") as file:
        for row in getattr(gpu_stages, settings.stage)(gpu_stages.Machine(settings.device, settings.size)):
            file.write(json.dumps(row) + "\n")
            file.flush()
    return 0


def run_stage(stage: Stage, settings: Settings, out: Path, left: float, argv: Sequence[str]) -> dict[str, Any]:
    """Run a stage in a process of its own.

    Returns:
        `state` is done, cut off, failed or not run; `rows` what it measured; `note` what went wrong.
    """
    result: dict[str, Any] = {"name": stage.name, "title": stage.title, "rows": []}
    if left < stage.least:
        return {**result, "state": "not run", "note": f"{max(left, 0):.0f} s were left, it takes {stage.least} or more"}
    print(f"{stage.name}: {stage.title}", flush=True)
    rows, log = out / f"{stage.name}.jsonl", out / f"{stage.name}.log"
    rows.unlink(missing_ok=True)
    begin = time.monotonic()
    words = [sys.executable, str(Path(__file__).resolve()), *argv, "--output", str(out), "--stage", stage.name]
    # threads that wait for each other take several times as long as tiny operations do
    env = {**os.environ, "OMP_NUM_THREADS": "1"} if settings.size == "tiny" else None
    with open(log, "wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=env)
    try:
        code: int | None = process.wait(timeout=left if settings.device == "cpu" else min(stage.limit, left))
    except subprocess.TimeoutExpired:
        code = None
    finally:
        if process.poll() is None:  # its children too: a stage starts programs of its own
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds = time.monotonic() - begin
    result |= {"seconds": round(seconds, 1), "rows": list(read_rows(rows))}
    if code == 0:
        return {**result, "state": "done"}
    if code is None:
        return {**result, "state": "cut off", "note": f"stopped after {seconds:.0f} s"}
    last = log.read_text(encoding="utf-8", errors="replace").splitlines()[-NUM_LAST_LINES:]
    print("\n".join(last), file=sys.stderr)
    return {**result, "state": "failed", "note": f"exit code {code}: {last[-1] if last else ''}"}


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield what a stage wrote; a last line cut in half is left out."""
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


def write_result(out: Path, result: dict[str, Any]) -> None:
    """Write the JSON file and the page."""
    with atomic_writer(out / "gpu_proof.json") as file:
        json.dump(result, file, indent=2)
    with atomic_writer(out / "gpu_proof.md") as file:
        file.write(page(result))


def page(result: dict[str, Any]) -> str:
    """Return the result as Markdown, ready for docs/performance.md."""
    about = "random weights" if result["size"] == "full" else "tiny random models: only the program is tested"
    lines = [f"`{result['command']}`, {result['date']}, {result['device']}, {about}.", ""]
    for stage in result["stages"]:
        lines += [f"### {stage['title']}", ""]
        if stage["rows"]:
            lines += [*table(stage["rows"]), ""]
        if stage["state"] != "done":
            lines += [f"{stage['state']}: {stage['note']}.", ""]
    return "\n".join(lines)


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return rows as a Markdown table; a column for each key that any row has."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row.get(key)) for key in keys) + " |")
    return lines


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value).replace("|", "/")


if __name__ == "__main__":
    sys.exit(run_program(main))
