"""How long rule-scored answers take: the trap cases of the tests, each with a number of its own.

    python bench/score_speed.py --num_answers 100000 --workers 2 --json score_speed.json

The numbers keep caches from answering. Wall time includes starting the processes.
"""

import json
import multiprocessing
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without installation

from internvl_mpo.benchmarks import load_benchmark
from internvl_mpo.benchmarks.common import Rule
from internvl_mpo.errors import run_program
from internvl_mpo.settings import parse_settings, setting, show_settings

CASES = Path(__file__).resolve().parents[1] / "tests" / "cases"
NAMES = ("pope", "m3cot", "mathvista", "mathvision", "crpe")


@dataclass
class Settings:
    """Settings of the benchmark."""

    num_answers: int = setting(100_000, help="answers scored in all")
    rule: Literal["ours", "official"] = setting("ours", help="rule of every benchmark")
    workers: int = setting(2, help="processes")
    json: str | None = setting(None, help="file for the figures")


def main(argv: list[str]) -> int:
    """Run the benchmark."""
    settings = parse_settings(Settings, argv, program="bench/score_speed.py", about=__doc__, config=False)
    print(show_settings(settings, "Speed of scoring"))
    start = time.monotonic()
    share = -(-settings.num_answers // settings.workers)
    with multiprocessing.get_context("spawn").Pool(settings.workers) as pool:
        scored = sum(pool.starmap(score_many, [(number, share, settings.rule) for number in range(settings.workers)]))
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    figures = {
        "num_answers": scored,
        "rule": settings.rule,
        "workers": settings.workers,
        "wall_s": round(time.monotonic() - start, 1),
        "cpu_s": round(used.ru_utime + used.ru_stime, 1),
    }
    print(json.dumps(figures))
    if settings.json:
        Path(settings.json).write_text(json.dumps(figures, indent=2) + "\n")
    return 0


def score_many(worker: int, count: int, rule: Rule) -> int:
    """Score `count` answers and return how many there were."""
    jobs = []
    for name in NAMES:
        cases = json.loads((CASES / f"{name}.json").read_text(encoding="utf-8"))
        benchmark = load_benchmark(name)
        examples = {example.id: example for example in benchmark.examples(cases["rows"])}
        jobs += [(benchmark, examples[case["id"]], case["answer"]) for case in cases["cases"]]
    for number in range(count):
        benchmark, example, answer = jobs[number % len(jobs)]
        benchmark.score(example, f"{answer} {worker}{number}", rule)
    return count


if __name__ == "__main__":
    sys.exit(run_program(main))
