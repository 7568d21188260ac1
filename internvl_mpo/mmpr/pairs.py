"""One pair with its pictures at hand, and how often a pass repeats it."""

import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from internvl_mpo.records import PreferencePair, content_id

Resample = Literal["none", "sqrt"]


@dataclass(frozen=True)
class PairRow:
    """A preference pair as a trainer needs it.

    Attributes:
        pair: the row.
        image_root: what its image paths are relative to: a folder, or an object with `read(name) -> bytes`.
        max_tiles: cap on the tiles per image, or None for that of the run.
        where: `file:line`, for messages.
        subset: name of the subset it belongs to.
        repeat_time: that of the subset.
    """

    pair: PreferencePair
    image_root: Path | Any
    max_tiles: int | None
    where: str
    subset: str
    repeat_time: float

    @property
    def key(self) -> tuple[str, str, int | None]:
        """Rows with the same key share pictures, prompt and tiling."""
        return self.pair.group_key, str(self.image_root), self.max_tiles

    @property
    def digest(self) -> str:
        """A digest of what the log-probs depend on: it goes with the data to another place, so no bytes of pictures.

        Two folders may both hold a `1.png`. Of the folder only the name counts, since all above it changes when the
        data moves; folders of one name are told apart by the ids, which no two pairs of a run share.
        """
        pair, folder = self.pair, _last_part(str(self.image_root))
        texts = (pair.question, pair.chosen, pair.rejected)
        return content_id(pair.id, folder, pair.images, *texts, self.max_tiles, *pair.context)


@lru_cache(maxsize=4096)
def _last_part(path: str) -> str:
    return os.path.basename(os.path.abspath(path))


def repeats(
    subsets: Sequence[tuple[str, float]], members: np.ndarray, seed: int, resample: Resample = "none"
) -> np.ndarray:
    """Return how often each row is seen in an epoch.

    Args:
        subsets: name and `repeat_time` of each subset.
        members: of the usable rows, the number of each one's subset. Shape: (N,)
        seed: decides which rows of a subset are seen once more than the others.
        resample: "none" sees each subset `repeat_time` times, so that its counts add up to round(rows * repeat_time).
            "sqrt" keeps the total of that and shares it out in proportion to the square root of each subset's part, as
            the original's `use_data_resampling` does on average by drawing; here the counts are exact.

    Returns:
        The counts. Shape: (N,)
    """
    found, firsts, sizes = np.unique(members, return_index=True, return_counts=True)
    order = np.argsort(firsts)  # as the rows come
    rows = {int(number): int(size) for number, size in zip(found[order], sizes[order], strict=True)}
    totals = {number: round(size * subsets[number][1]) for number, size in rows.items()}
    if resample == "sqrt":
        totals = _share_out(sum(totals.values()), {number: math.sqrt(total) for number, total in totals.items()})
    counts = np.zeros(len(members), np.int32)
    for number, size in rows.items():
        whole, extra = divmod(totals[number], size)
        indices = np.flatnonzero(members == number)
        counts[indices] = whole
        counts[indices[random.Random(f"{seed} {subsets[number][0]}").sample(range(size), extra)]] += 1
    return counts


def _share_out(total: int, weights: dict[Any, float]) -> dict[Any, int]:
    """Whole numbers in proportion to `weights` that add up to `total` (largest remainders)."""
    scale = total / (sum(weights.values()) or 1)
    shares = {key: int(weight * scale) for key, weight in weights.items()}
    by_remainder = sorted(weights, key=lambda key: shares[key] - weights[key] * scale)
    for key in by_remainder[: total - sum(shares.values())]:
        shares[key] += 1
    return shares


def mixture_table(
    subsets: Sequence[tuple[str, float]], members: np.ndarray, counts: np.ndarray, costs: np.ndarray
) -> str:
    """Return a table of what each subset adds to an epoch, for a terminal.

    Args:
        subsets: name and `repeat_time` of each subset.
        members: of the usable rows, the number of each one's subset. Shape: (N,)
        counts: how often each of them is seen, from `repeats`. Shape: (N,)
        costs: tokens of each of them. Shape: (N,)
    """
    rows = np.bincount(members).tolist()  # as far as subsets have rows
    seen = np.bincount(members, counts).astype(int).tolist()
    tokens = np.bincount(members, counts * costs.astype(np.int64)).tolist()
    present = [number for number, count in enumerate(rows) if count]
    names = dict.fromkeys(subsets[number][0] for number in present)
    width = min(60, max(len("subset"), *map(len, names)))
    lines = [f"{'subset':<{width}}  {'rows':>10}  {'repeat':>7}  {'seen':>10}  {'share':>7}  {'tokens each':>11}"]
    for name in names:
        own = [number for number in present if subsets[number][0] == name]
        num_rows, num_seen, num_tokens = (sum(column[number] for number in own) for column in (rows, seen, tokens))
        repeat_times = {subsets[number][1] for number in own}
        repeat = f"{repeat_times.pop():g}" if len(repeat_times) == 1 else "mixed"
        each = num_tokens / num_seen if num_seen else 0
        lines.append(
            f"{name:<{width}}  {num_rows:>10,}  {repeat:>7}  {num_seen:>10,}  {num_seen / (sum(seen) or 1):>7.1%}"
            f"  {each:>11,.0f}"
        )
    each = sum(tokens) / (sum(seen) or 1)
    lines.append(f"{'all':<{width}}  {sum(rows):>10,}  {'':>7}  {sum(seen):>10,}  {1:>7.1%}  {each:>11,.0f}")
    return "\n".join(lines)
