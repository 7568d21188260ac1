"""Two runs on the same questions: the paired difference of each benchmark, and the questions whose verdict flipped."""

from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from internvl_mpo.benchmarks import load_benchmark
from internvl_mpo.benchmarks.common import bootstrap_interval, resampled
from internvl_mpo.errors import BadInputError
from internvl_mpo.jsonl import iter_jsonl

MAX_SHOWN = 10


class Difference(NamedTuple):
    """What changed from run A to run B on one benchmark in one mode.

    Attributes:
        name: "benchmark/mode".
        num_questions: questions scored in both runs.
        mean_a, mean_b: mean verdicts over these questions, x 100 (a rating 0 to 6 for MMHal-Bench likewise).
        interval: 95 % bootstrap interval of B - A, paired; None for fewer than two draws.
        resampled: what was drawn for it, questions or what they share, and how many there are.
        better, worse: ids of the questions with a higher, a lower verdict in B.
    """

    name: str
    num_questions: int
    mean_a: float
    mean_b: float
    interval: list[float] | None
    resampled: str
    better: list[str]
    worse: list[str]

    def text(self) -> str:
        """Return the difference as lines for a terminal."""
        low, high = self.interval or (float("nan"), float("nan"))
        lines = [
            f"{self.name}: {self.mean_a:.2f} -> {self.mean_b:.2f}, difference {self.mean_b - self.mean_a:+.2f} "
            f"(95 % interval {low:+.2f} to {high:+.2f}, {self.resampled} resampled), {self.num_questions} questions"
        ]
        for word, ids in (("better", self.better), ("worse", self.worse)):
            more = f" and {len(ids) - MAX_SHOWN} more" if len(ids) > MAX_SHOWN else ""
            lines.append(f"  {len(ids)} {word}: {', '.join(ids[:MAX_SHOWN]) or '-'}{more}")
        return "\n".join(lines)


def compare_runs(run_a: Path, run_b: Path) -> list[Difference]:
    """Return the differences between the verdicts of two run folders, benchmark by benchmark.

    Raises:
        BadInputError: a folder holds no verdicts, or the two share no scored question.
    """
    verdicts_a, verdicts_b = _verdicts(run_a), _verdicts(run_b)
    differences = []
    for name in sorted(verdicts_a.keys() & verdicts_b.keys()):
        a, b = verdicts_a[name], verdicts_b[name]
        shared = [id for id in a if id in b]
        if not shared:
            continue
        deltas = [100 * (b[id].value - a[id].value) for id in shared]
        clusters = [b[id].cluster for id in shared]
        drawn = resampled(clusters, load_benchmark(name.partition("/")[0]).CLUSTER)
        differences.append(
            Difference(
                name=name,
                num_questions=len(shared),
                mean_a=100 * sum(a[id].value for id in shared) / len(shared),
                mean_b=100 * sum(b[id].value for id in shared) / len(shared),
                interval=bootstrap_interval(deltas, lambda sample: sum(sample) / len(sample), clusters),
                resampled=f"{drawn['num']} {drawn['unit']}",
                better=[id for id, delta in zip(shared, deltas, strict=True) if delta > 0],
                worse=[id for id, delta in zip(shared, deltas, strict=True) if delta < 0],
            )
        )
    if not differences:
        raise BadInputError(
            f"{run_a} and {run_b} share no scored question; evaluate both on the same benchmark and mode"
        )
    return differences


class _Verdict(NamedTuple):
    value: float
    cluster: str


def _verdicts(run: Path) -> dict[str, dict[str, _Verdict]]:
    """benchmark/mode -> question id -> verdict, the mean of several answers; unscored ones are left out."""
    path = run / "verdicts.jsonl"
    if not path.exists():
        raise BadInputError(f"{run} holds no verdicts.jsonl; evaluate into it first")
    found: dict[str, dict[str, list[_Verdict]]] = {}
    for _, row in iter_jsonl(path):
        if row["value"] is not None:
            verdict = _Verdict(row["value"], row.get("cluster", ""))
            found.setdefault(f"{row['benchmark']}/{row['mode']}", {}).setdefault(row["id"], []).append(verdict)
    return {
        name: {id: _Verdict(fmean(one.value for one in part), part[0].cluster) for id, part in questions.items()}
        for name, questions in found.items()
    }
