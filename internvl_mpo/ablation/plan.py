"""configs/ablation.yaml -> cells: which method is trained with what, on which seed."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from internvl_mpo.errors import BadInputError
from internvl_mpo.settings import read_yaml

# keys of `vary` that are no settings of train_mpo.py, and what they are where nothing is said
OWN = {"guess_share": 0.8, "pairs_per_question": 4, "dropout_ntp_ratio": 0.5, "after": None, "rounds": 1}


@dataclass(frozen=True)
class Cell:
    """One model to train and to measure.

    Attributes:
        method: a name of `methods` in the file, or "start" for the model before training.
        varied: what differs from the method's own settings, in the order of the file.
        seed: of the world, the start model, the samples, the pairs and the data order.
    """

    method: str
    varied: tuple[tuple[str, Any], ...] = ()
    seed: int = 0

    @property
    def name(self) -> str:
        """The cell without its seed, as a folder name."""
        return ",".join([self.method, *(f"{key}={value}" for key, value in self.varied)])

    def own(self, key: str) -> Any:
        """Return the value of one of `OWN`."""
        return dict(self.varied).get(key, OWN[key])

    def with_seed(self, seed: int) -> "Cell":
        """Return the same on another seed."""
        return replace(self, seed=seed)

    def start(self) -> "Cell":
        """Return the model it is trained from, if nothing is trained before."""
        return Cell("start", tuple(item for item in self.varied if item[0] == "guess_share"), self.seed)


@dataclass(frozen=True)
class Figure:
    """What stands where in a group's figure; each names a varied setting, or "method".

    Attributes:
        x: on the axis.
        lines: has a line for each value.
        panels: has a panel for each value; None draws one.
    """

    x: str
    lines: str = "method"
    panels: str | None = None


@dataclass(frozen=True)
class Group:
    """Cells that are shown together.

    Attributes:
        name: of the group.
        title: what it asks.
        seeds: how many.
        cells: of seed 0.
        figure: how they are drawn; None draws nothing.
    """

    name: str
    title: str
    seeds: int
    cells: tuple[Cell, ...]
    figure: Figure | None = None

    def all_cells(self, most_seeds: int | None = None) -> Iterator[Cell]:
        """Yield the cells of every seed."""
        for seed in range(min(self.seeds, most_seeds or self.seeds)):
            yield from (cell.with_seed(seed) for cell in self.cells)


@dataclass(frozen=True)
class Plan:
    """The whole file.

    Attributes:
        train: path of the settings of every training run.
        num_test: held-out questions of a seed.
        methods: name -> what it changes in `train`.
        groups: in the order in which they run.
    """

    train: str
    num_test: int
    methods: Mapping[str, Mapping[str, Any]]
    groups: tuple[Group, ...]

    def value(self, cell: Cell, key: str | None) -> Any:
        """Return what a setting is in a cell, varied or not; the method for the key "method", None for no key."""
        if key is None or key == "method":
            return key and cell.method
        known = {**OWN, **read_yaml(self.train), **self.methods.get(cell.method, {}), **dict(cell.varied)}
        return known[key]


def read_plan(path: str) -> Plan:
    """Read the file.

    Raises:
        BadInputError: it is no mapping with these keys, or a group names a method that is not there.
    """
    content = read_yaml(path)
    missing = [key for key in ("train", "num_test", "methods", "groups") if key not in content]
    if missing:
        raise BadInputError(f"{path} has no '{missing[0]}'; configs/ablation.yaml shows what it needs")
    default = read_yaml(content["train"])
    groups = []
    for name, group in content["groups"].items():
        unknown = set(group["methods"]) - set(content["methods"])
        if unknown:
            raise BadInputError(f"group '{name}' of {path} names the method '{min(unknown)}', which is not in methods")
        cells = dict.fromkeys(_cells(group, content["methods"], default))
        figure = Figure(**group["figure"]) if "figure" in group else None
        groups.append(Group(name, group["title"], group["seeds"], tuple(cells), figure))
    return Plan(content["train"], content["num_test"], content["methods"], tuple(groups))


def _cells(group: Mapping[str, Any], methods: Mapping[str, Mapping[str, Any]], default: Mapping[str, Any]):
    """Yield the cells of seed 0, equal ones under one name: a value that is the default anyway is left out."""
    vary = group.get("vary", {})
    for method in group["methods"]:
        known = {**OWN, **default, **methods[method]}
        is_compared = known.get("preference") != "none" or known.get("quality") != "none"
        for values in itertools.product(*vary.values()):
            varied = zip(vary, values, strict=True)
            kept = [(key, value) for key, value in varied if known.get(key) != value and (key != "beta" or is_compared)]
            yield Cell(method, tuple(kept))
