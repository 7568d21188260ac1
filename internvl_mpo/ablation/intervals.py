"""Means and differences of cells with 95 % intervals over seeds and questions."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NUM_DRAWS = 4000


class Estimate(NamedTuple):
    """A mean in per cent with its 95 % interval; the interval is None for a single seed, whose spread nobody knows."""

    mean: float
    interval: tuple[float, float] | None

    def text(self, signed: bool = False) -> str:
        """Return "95.8 [94.1, 97.2]"."""
        shown = (lambda value: f"{value:+.1f}") if signed else (lambda value: f"{value:.1f}")
        if self.interval is None:
            return shown(self.mean)
        return f"{shown(self.mean)} [{', '.join(map(shown, self.interval))}]"


def estimate(seeds: Sequence[Sequence[float]], *, draw_seed: int = 0) -> Estimate:
    """Return the mean over seeds and questions with its interval.

    Bootstrap in two stages: seeds are drawn with replacement, then questions within each, since every seed has a world,
    a start model and questions of its own. With few seeds such an interval is rather too narrow than too wide.

    Args:
        seeds: of each seed, a value for each question: a verdict, or the difference of two.
        draw_seed: equal ones give equal intervals.
    """
    values = [np.asarray(one, dtype=float) for one in seeds]
    mean = 100 * float(np.mean([one.mean() for one in values]))
    if len(values) < 2:
        return Estimate(mean, None)
    rng = np.random.default_rng(draw_seed)
    # means of resampled questions, for each draw and seed; then seeds are drawn among them
    of_seeds = np.stack(
        [one[rng.integers(len(one), size=(NUM_DRAWS, len(one)))].mean(axis=1) for one in values], axis=1
    )
    picks = rng.integers(len(values), size=(NUM_DRAWS, len(values)))
    means = 100 * np.take_along_axis(of_seeds, picks, axis=1).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(mean, (float(low), float(high)))


def difference(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> Estimate:
    """Return how much more the first has, question by question and seed by seed; see `estimate`."""
    pairs = zip(first, second, strict=True)
    return estimate([np.asarray(one, dtype=float) - np.asarray(other, dtype=float) for one, other in pairs])
