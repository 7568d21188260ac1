"""The lengths of the pairs of a run, shown before training."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np


def length_report(columns: Mapping[str, np.ndarray], num_bins: int = 12) -> dict[str, Any]:
    """Return quantiles and a histogram of token counts, JSON-able.

    Args:
        columns: `num_tokens` and fields of `PairSize` of the usable pairs, at least one. Shape of each: (N,)
        num_bins: most bars of the histogram; borders are round numbers.
    """
    totals = columns["num_tokens"]
    step = _round_step(int(totals.max()) / num_bins)
    names = {"pair": "num_tokens", "prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "tiles": "num_tiles"}
    return {
        "num_pairs": len(totals),
        "num_cut_responses": int(columns["num_cut"].sum()),
        **{name: _quantiles(columns[column]) for name, column in names.items()},
        "histogram": {"bin_width": step, "counts": np.bincount(totals // step).tolist()},
    }


def show_lengths(report: dict[str, Any], width: int = 40) -> str:
    """Return `length_report` as text for a terminal."""
    step, counts = report["histogram"]["bin_width"], report["histogram"]["counts"]
    digits = len(f"{step * len(counts):,}")
    lines = ["tokens of a pair (prompt and both responses)"]
    first = next(number for number, count in enumerate(counts) if count)
    for number, count in list(enumerate(counts))[first:]:
        bar = "#" * math.ceil(width * count / max(counts))
        lines.append(f"  {number * step:>{digits},} - {(number + 1) * step - 1:>{digits},}  {bar:<{width}}  {count:,}")
    lines.append(f"  {'':<8} {'mean':>9} {'median':>9} {'90 %':>9} {'99 %':>9} {'largest':>9}")
    for name in ("prompt", "chosen", "rejected", "pair", "tiles"):
        row = report[name]
        lines.append(
            f"  {name:<8} {row['mean']:>9,.1f} " + " ".join(f"{row[q]:>9,}" for q in ("p50", "p90", "p99", "max"))
        )
    if report["num_cut_responses"]:
        lines.append(f"  {report['num_cut_responses']:,} responses are cut at max_length; raise it to keep their ends")
    return "\n".join(lines)


def _quantiles(values: np.ndarray) -> dict[str, float]:
    ordered = np.sort(values)
    at = lambda share: int(ordered[min(len(ordered) - 1, int(share * len(ordered)))])  # noqa: E731 - used three times
    return {
        "mean": int(ordered.sum(dtype=np.int64)) / len(ordered),
        "min": int(ordered[0]),
        "p50": at(0.5),
        "p90": at(0.9),
        "p99": at(0.99),
        "max": int(ordered[-1]),
    }


def _round_step(step: float) -> int:
    """The next 1, 2 or 5 times a power of ten."""
    power = 10 ** math.floor(math.log10(max(step, 1)))
    return next(int(factor * power) for factor in (1, 2, 5, 10) if factor * power >= step)
