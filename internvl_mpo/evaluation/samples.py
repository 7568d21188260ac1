"""Several answers to each question: mean accuracy, pass@k, majority vote, and the best of N by a judge.

At greedy decoding a model that knows more and one that only varies less look the same. Here they part: pass@k says what
the model can do, mean accuracy how often it does, the majority vote what it settles on.
"""

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from internvl_mpo.answers.common import plain_words
from internvl_mpo.answers.numbers import parse_number
from internvl_mpo.benchmarks.common import Rule, Score, bootstrap_interval, percent, resampled
from internvl_mpo.evaluation.settings import EvalTask


def is_right(benchmark: str, value: float) -> bool:
    """Return whether a verdict counts as right: half a point, or a rating of 3."""
    return value >= (3 if benchmark == "mmhal_bench" else 0.5)


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Return the chance that one of k answers drawn from `num_samples` is right, unbiased (Chen et al. 2021, eq. 1).

    1 - C(n - c, k) / C(n, k); k is at most `num_samples`.
    """
    return 1 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def majority_value(scores: Sequence[Score]) -> float:
    """Return the verdict on the answer given most often; the mean of the verdicts where several are.

    Unanswered samples do not vote; where all are, the verdict is 0. "6" and "6.0" are one answer.
    """
    votes: dict[str, list[float]] = {}
    for score in scores:
        if score.extracted is not None and score.value is not None:
            votes.setdefault(_ballot(score.extracted), []).append(score.value)
    most = max(map(len, votes.values()), default=0)
    return statistics.fmean(statistics.fmean(part) for part in votes.values() if len(part) == most) if votes else 0.0


def _ballot(extracted: str) -> str:
    number = parse_number(extracted)
    return f"{number.value} {number.unit}" if number else plain_words(extracted)


def summarise_samples(
    task: EvalTask, scores: Sequence[Sequence[Score]], rule: Rule, chosen: Mapping[str, int] | None = None
) -> dict[str, Any]:
    """Return the numbers of a task with several answers to each question, each with its interval.

    Args:
        task: a benchmark in one mode.
        scores: verdicts on the answers to each question, in the order of the questions; unscored ones are left out.
        rule: for the benchmark's own headline number, which is averaged over the samples.
        chosen: question id -> number of the answer a judge chose; None without a judge.
    """
    scale = 1.0 if task.name == "mmhal_bench" else 100.0  # its verdicts are ratings 0 to 6, the others' shares
    scored = [part for of_question in scores if (part := [score for score in of_question if score.value is not None])]
    mean = _mean_over_questions([(scale * statistics.fmean(score.value for score in part), part[0]) for part in scored])
    summary = {
        "headline": "mean_accuracy",
        "mean_accuracy": mean["score"],
        "interval": mean["interval"],
        "resampled": resampled([part[0].cluster for part in scored], task.benchmark.CLUSTER),
        "num_samples": max(map(len, scores), default=0),
        "pass_at_k": _pass_at_all(task.name, scored),
        "single": _single(task, scores, rule),
        "num_examples": len(scores),
        "num_unscored": len(scores) - len(scored),
        "num_unscored_samples": sum(score.value is None for part in scores for score in part),
        "unanswered": percent([score.extracted is None for part in scored for score in part]),
        "breakdown": {},
    }
    if not hasattr(task.benchmark, "parse_reply"):  # graded answers are texts, of which no two are the same
        votes = [(scale * majority_value(part), part[0]) for part in scored]
        summary["majority_vote"] = _mean_over_questions(votes)
    if chosen is not None:
        best = [part[chosen[part[0].id]] for part in scores if part[0].id in chosen]
        summary["best_of_n"] = _mean_over_questions(
            [(scale * score.value, score) for score in best if score.value is not None]
        )
    return summary


def _mean_over_questions(values: Sequence[tuple[float, Score]]) -> dict[str, Any]:
    """The mean of a number per question, and its interval over what the questions share."""
    numbers = [value for value, _ in values]
    return {
        "score": statistics.fmean(numbers) if numbers else None,
        "interval": bootstrap_interval(numbers, statistics.fmean, [score.cluster for _, score in values]),
        "num_questions": len(numbers),
    }


def _pass_at_all(benchmark: str, scored: Sequence[Sequence[Score]]) -> dict[str, dict[str, Any]]:
    """pass@k for 1, 2, 4, ... and all samples; a question with fewer scored ones than k is left out of it."""
    num_samples = max(map(len, scored), default=0)
    powers = [2**power for power in range(num_samples.bit_length()) if 2**power < num_samples]
    found = {}
    for k in (*powers, num_samples) if scored else ():
        enough = [part for part in scored if len(part) >= k]
        rights = [sum(is_right(benchmark, score.value) for score in part) for part in enough]
        chances = [pass_at_k(len(part), right, k) for part, right in zip(enough, rights, strict=True)]
        found[str(k)] = _mean_over_questions(
            [(100 * chance, part[0]) for chance, part in zip(chances, enough, strict=True)]
        )
    return found


def _single(task: EvalTask, scores: Sequence[Sequence[Score]], rule: Rule) -> dict[str, Any]:
    """The benchmark's own headline number, of every sample by itself: its mean and deviation."""
    summaries = [task.benchmark.summarise(list(sample), rule) for sample in zip(*scores, strict=True)]
    numbers = [value for summary in summaries if (value := summary[summary["headline"]]) is not None]
    return {
        "headline": summaries[0]["headline"] if summaries else None,
        "score": statistics.fmean(numbers) if numbers else None,
        "std": statistics.pstdev(numbers) if numbers else None,
    }


def numbers_of(summary: Mapping[str, Any]) -> Iterator[tuple[str, float | None, list[float] | None]]:
    """Yield name, number and interval of what a summary shows: the headline, and what several answers give besides."""
    yield summary["headline"], summary[summary["headline"]], summary.get("interval")
    for k, passed in summary.get("pass_at_k", {}).items():
        yield f"pass@{k}", passed["score"], passed["interval"]
    for name in ("majority_vote", "best_of_n"):
        if name in summary:
            yield name, summary[name]["score"], summary[name]["interval"]
