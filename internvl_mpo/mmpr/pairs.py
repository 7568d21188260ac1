"""One pair with its pictures at hand, and how often a pass repeats it."""

import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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
    repeat_time: float = 1.0

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
        pair, folder = self.pair, os.path.basename(os.path.abspath(str(self.image_root)))
        texts = (pair.question, pair.chosen, pair.rejected)
        return content_id(pair.id, folder, pair.images, *texts, self.max_tiles, *pair.context)


def repeats(rows: Sequence[PairRow], seed: int, resample: Resample = "none") -> list[int]:
    """Return how often each row is seen in an epoch.

    Args:
        rows: usable rows.
        seed: decides which rows of a subset are seen once more than the others.
        resample: "none" sees each subset `repeat_time` times, so that its counts add up to round(rows * repeat_time).
            "sqrt" keeps the total of that and shares it out in proportion to the square root of each subset's part, as
            the original's `use_data_resampling` does on average by drawing; here the counts are exact.
    """
    members: dict[tuple[str, float], list[int]] = {}
    for index, row in enumerate(rows):
        members.setdefault((row.subset, row.repeat_time), []).append(index)
    totals = {key: round(len(indices) * key[1]) for key, indices in members.items()}
    if resample == "sqrt":
        totals = _share_out(sum(totals.values()), {key: math.sqrt(total) for key, total in totals.items()})
    counts = [0] * len(rows)
    for key, indices in members.items():
        whole, extra = divmod(totals[key], len(indices))
        once_more = set(random.Random(f"{seed} {key[0]}").sample(indices, extra))
        for index in indices:
            counts[index] = whole + (index in once_more)
    return counts


def _share_out(total: int, weights: dict[Any, float]) -> dict[Any, int]:
    """Whole numbers in proportion to `weights` that add up to `total` (largest remainders)."""
    scale = total / (sum(weights.values()) or 1)
    shares = {key: int(weight * scale) for key, weight in weights.items()}
    by_remainder = sorted(weights, key=lambda key: shares[key] - weights[key] * scale)
    for key in by_remainder[: total - sum(shares.values())]:
        shares[key] += 1
    return shares


def mixture_table(rows: Sequence[PairRow], counts: Sequence[int], costs: Sequence[int]) -> str:
    """Return a table of what each subset adds to an epoch, for a terminal.

    Args:
        rows: usable rows.
        counts: how often each of them is seen, from `repeats`.
        costs: tokens of each of them.
    """
    subsets: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        subsets.setdefault(row.subset, []).append(index)
    total = sum(counts) or 1
    tokens = [count * cost for count, cost in zip(counts, costs, strict=True)]
    width = min(60, max(len("subset"), *map(len, subsets)))
    lines = [f"{'subset':<{width}}  {'rows':>10}  {'repeat':>7}  {'seen':>10}  {'share':>7}  {'tokens each':>11}"]
    for name, indices in subsets.items():
        seen = sum(counts[index] for index in indices)
        each = sum(tokens[index] for index in indices) / seen if seen else 0
        repeat_times = {rows[index].repeat_time for index in indices}
        repeat = f"{repeat_times.pop():g}" if len(repeat_times) == 1 else "mixed"
        lines.append(
            f"{name:<{width}}  {len(indices):>10,}  {repeat:>7}  {seen:>10,}  {seen / total:>7.1%}  {each:>11,.0f}"
        )
    each = sum(tokens) / total
    lines.append(f"{'all':<{width}}  {len(rows):>10,}  {'':>7}  {sum(counts):>10,}  {1:>7.1%}  {each:>11,.0f}")
    return "\n".join(lines)
