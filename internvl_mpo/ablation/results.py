"""What was measured of the cells, over all their seeds."""

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from internvl_mpo.ablation.intervals import Estimate, difference, estimate
from internvl_mpo.ablation.lanes import Lanes
from internvl_mpo.ablation.plan import Cell, Group

# heading -> the value of each question, between 0 and 1
PER_QUESTION: dict[str, Callable[[dict[str, Any]], Sequence[float]]] = {
    "direct": lambda found: found["direct"],
    "chain of thought": lambda found: found["cot"],
    "temperature 1": lambda found: [count / found["num_samples"] for count in found["right_samples"]],
    "pass@8": lambda found: [float(count > 0) for count in found["right_samples"]],
}
# heading -> one number of a model, and how it is written
PER_MODEL: dict[str, tuple[Callable[[dict[str, Any]], float | None], str]] = {
    "guesses": (lambda found: found["guesses"], "{:.1%}"),
    "unparsable": (lambda found: found["unparsable"], "{:.1%}"),
    "false calculations": (lambda found: found["calculation_errors"], "{:.1%}"),
    "tokens": (lambda found: found["tokens"], "{:.1f}"),
    "KL": (lambda found: found["divergence"], "{:.2f}"),
}


@dataclass(frozen=True)
class Row:
    """One cell over its seeds.

    Attributes:
        cell: of seed 0.
        seeds: those that were measured.
        found: what `mini measure` wrote for each of them.
    """

    cell: Cell
    seeds: tuple[int, ...]
    found: tuple[dict[str, Any], ...]

    def estimate(self, heading: str) -> Estimate:
        """Return one of `PER_QUESTION`."""
        return estimate([PER_QUESTION[heading](one) for one in self.found])

    def mean(self, heading: str) -> str:
        """Return one of `PER_MODEL` as text, "-" where no model has it."""
        read, form = PER_MODEL[heading]
        values = [value for value in map(read, self.found) if value is not None]
        return form.format(sum(values) / len(values)) if values else "-"

    def only(self, seeds: Collection[int]) -> "Row":
        """Return what is known of these seeds."""
        kept = [(seed, found) for seed, found in zip(self.seeds, self.found, strict=True) if seed in seeds]
        return Row(self.cell, tuple(seed for seed, _ in kept), tuple(found for _, found in kept))

    def minus(self, other: "Row", heading: str = "chain of thought") -> Estimate | None:
        """Return how much more this has than another on the seeds both have; None where there is none."""
        shared = shared_seeds([self, other])
        if not shared:
            return None
        read = PER_QUESTION[heading]
        mine, others = ([read(row.found[row.seeds.index(seed)]) for seed in shared] for row in (self, other))
        return difference(mine, others)


def shared_seeds(rows: Iterable[Row]) -> list[int]:
    """Return the seeds that all rows have. A table compares on these: one more, lucky seed moves a mean by points."""
    seeds = [set(row.seeds) for row in rows]
    return sorted(set.intersection(*seeds)) if seeds else []


class Results:
    """Reads the files of finished cells.

    Args:
        lanes: knows where they lie.
        max_seeds: seeds that are looked for.
    """

    def __init__(self, lanes: Lanes, max_seeds: int):
        self.lanes, self.max_seeds = lanes, max_seeds

    def row(self, cell: Cell) -> Row | None:
        """Return what is known of a cell, None for nothing."""
        paths = {seed: self.lanes.measured(cell.with_seed(seed)) for seed in range(self.max_seeds)}
        found = {seed: json.loads(path.read_text(encoding="utf-8")) for seed, path in paths.items() if path.exists()}
        return Row(cell, tuple(found), tuple(found.values())) if found else None

    def rows(self, group: Group) -> tuple[list[Row], list[Cell]]:
        """Return what is known of a group, its start models first, and the cells of which nothing is."""
        starts = dict.fromkeys(cell.start() for cell in group.cells)
        cells = [*starts, *group.cells]
        known = {cell: self.row(cell) for cell in cells}
        missing = [cell for cell, row in known.items() if row is None and cell.method != "start"]
        return [row for row in known.values() if row is not None], missing

    def baseline(self, cell: Cell) -> Row | None:
        """Return SFT on the chosen answers of the same world."""
        return self.row(Cell("sft", cell.start().varied))


def missing_text(cells: Iterable[Cell], group: str) -> str:
    """Return a sentence that names cells that were not run, and the command that runs them; "" for none."""
    names = [f"`{cell.name}`" for cell in cells]
    if not names:
        return ""
    return f"Not run yet: {', '.join(names)}. `python runs/ablation.py --groups {group}` runs them."
