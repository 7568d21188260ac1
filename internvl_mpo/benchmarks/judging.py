"""What the judged benchmarks share: prompts with named places, scores per run, and their mean and deviation.

A judge is never part of scoring: its replies are text, stored by the program that asked for them, and parsed here.
A reply that gives no score leaves its run without one; `official` rules make it a number, as their originals do.
"""

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from internvl_mpo.answers.finding import without_thinking
from internvl_mpo.benchmarks.common import Rule, Score, bootstrap_interval, count_outcomes, reply_text, resampled


def fill(template: str, values: Mapping[str, str]) -> str:
    """Return the template with each `{name}` replaced; braces inside values and unknown names are left alone."""
    return re.sub(r"\{(\w+)\}", lambda place: values.get(place.group(1), place.group()), template)


def settled_text(text: str | None, rule: Rule) -> str:
    """Return an answer, or a judge's reply, as a rule reads it: `ours` without thoughts, originals as it is."""
    text = reply_text(text)
    return (without_thinking(text) or "").strip() if rule == "ours" else text


def mean_of(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are there; None without any."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def by_run(scores: Sequence[Score], statistic: Callable[[Sequence[Any]], float | None]) -> list[float]:
    """Return the statistic of each judge run, over the items that have a score in that run."""
    num_runs = max((len(score.details["runs"]) for score in scores if score.details), default=0)
    numbers = []
    for run in range(num_runs):
        items = [score.details["runs"][run] for score in scores if len(score.details.get("runs", ())) > run]
        number = statistic([item for item in items if item is not None])
        if number is not None:
            numbers.append(number)
    return numbers


def summarise_runs(
    name: str,
    scores: Sequence[Score],
    statistic: Callable[[Sequence[Any]], float | None],
    unit: str,
) -> dict[str, Any]:
    """Return headline, runs, their mean and population deviation, the interval and what it draws, and the counts.

    Args:
        name: key of the headline number.
        scores: verdicts whose `details["runs"]` holds one item per judge run, None where a reply gave no score.
        statistic: number of a list of items.
        unit: what questions may share, in the plural.
    """
    runs = by_run(scores, statistic)
    scored = [score for score in scores if score.value is not None]
    clusters = [score.cluster for score in scored]
    items = [[item for item in score.details["runs"] if item is not None] for score in scored]
    return {
        "headline": name,
        name: statistics.fmean(runs) if runs else None,
        "std": statistics.pstdev(runs) if runs else None,
        "runs": runs,
        "interval": bootstrap_interval(
            items, lambda drawn: statistic([item for part in drawn for item in part]), clusters
        ),
        "resampled": resampled(clusters, unit),
        "num_failed_replies": sum(item is None for score in scores for item in score.details.get("runs", ())),
        **count_outcomes(scores),
    }


def finite(text: str) -> float | None:
    """Return the number a text is, None for anything else, infinities and nan included."""
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
