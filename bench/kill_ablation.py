"""Kill the ablation with SIGKILL, all its processes at once; what is measured must be that of a run nobody touched.

    python bench/kill_ablation.py --kills 6

The reduced ablation (three methods, one seed, small worlds) is run once as it is, and put aside. Then the same is
started in the same place (the folder is part of the ids of answers, which order the pairs), killed a random moment
after its first to fourth stage has begun, and started again, until all kills are spent; then it runs to its end. Every
`measured.json` of both is compared byte by byte: start model, SFT, DPO and MPO.
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs from a checkout without installation

from internvl_mpo.errors import BadInputError, run_program  # noqa: E402
from internvl_mpo.settings import parse_settings, setting, show_settings  # noqa: E402

COMMAND = ("runs/ablation.py", "--config", "configs/ablation_reduced.yaml", "--reduced", "true", "--page", "none")
RUN = "run"  # folder that is killed in


@dataclass
class Settings:
    """Settings of the benchmark."""

    kills: int = setting(6, help="times the run is killed before it may end")
    output: str = setting("outputs/kill_ablation", help="folder of both runs; an unbroken one that is there is used")
    jobs: int = setting(2, help="stages that run at the same time")
    seed: int = setting(0, help="decides the moments")

    def __post_init__(self) -> None:
        if self.kills < 1 or self.jobs < 1:
            raise BadInputError(f"kills is {self.kills} and jobs {self.jobs}, expected 1 or more")


def main(argv: list[str]) -> int:
    """Run the benchmark; 1 where a file differs."""
    settings = parse_settings(
        Settings, argv or ["--kills", "6"], program="bench/kill_ablation.py", about=__doc__, config=False
    )
    print(show_settings(settings, "kill_ablation: settings"), flush=True)
    rng = random.Random(settings.seed)
    output, unbroken = Path(settings.output).resolve() / RUN, Path(settings.output).resolve() / "unbroken_run"
    output.parent.mkdir(parents=True, exist_ok=True)
    if not unbroken.exists():
        run(output, settings.jobs)
        output.rename(unbroken)
    shutil.rmtree(output, ignore_errors=True)
    for number in range(settings.kills):
        if run(output, settings.jobs, (rng.randint(1, 4), rng.uniform(0, 5))):
            break  # it was quicker than the killer
        print(f"kill {number + 1}: while {', '.join(unfinished(output)) or 'between stages'}", flush=True)
    run(output, settings.jobs)
    files = sorted(path.relative_to(unbroken) for path in unbroken.rglob("measured.json"))
    same = [path for path in files if (output / path).read_bytes() == (unbroken / path).read_bytes()]
    print(f"{len(same)} of {len(files)} measured.json are byte-equal to those of the unbroken run")
    return 0 if len(same) == len(files) > 0 else 1


def run(output: Path, jobs: int, kill: tuple[int, float] | None = None) -> bool:
    """Run the ablation into a folder, and return whether it came to its end.

    Args:
        output: its folder.
        jobs: stages side by side.
        kill: (n, seconds): all its processes are killed so long after the n-th stage of this start has begun.

    Raises:
        BadInputError: it failed by itself.
    """
    command = [sys.executable, *COMMAND, "--output", str(output), "--jobs", str(jobs)]
    with open(output.with_suffix(".log"), "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        while kill and process.poll() is None and len(begun(output)) < kill[0]:
            time.sleep(0.2)
        code = process.wait(kill and kill[1])
    except subprocess.TimeoutExpired:
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself, and so have its programs
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if code != 0:
        raise BadInputError(f"the ablation ended with exit code {code}; {output.with_suffix('.log')} says why")
    return True


def begun(output: Path) -> list[str]:
    """Names of the stages that the last start has begun."""
    lines = output.with_suffix(".log").read_text().splitlines()
    return [lines[number - 1].partition(":")[0] for number, line in enumerate(lines) if line.startswith("$ ")]


def unfinished(output: Path) -> list[str]:
    """Names of the stages that were begun and have no marker."""
    return [name for name in begun(output) if not (output / "stages" / f"{name}.json").exists()]


if __name__ == "__main__":
    sys.exit(run_program(main))
