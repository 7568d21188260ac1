"""The commands of a cell, and of the world it stands on; where their results lie.

OUT/worlds/guess_share=0.8/seed_0/     world, start, data, reference
OUT/cells/mpo,beta=1.0/seed_0/         model, measured.json
OUT/pairs/mpo+rounds=2/seed_0/         pairs of a cell that trains on others than its world's
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from internvl_mpo.ablation.plan import OWN, Cell, Plan
from internvl_mpo.programs import program
from internvl_mpo.quickstart import first_stages, pair_stages, training_command
from internvl_mpo.stages import Lane, Stage


class Lanes:
    """Knows the commands of every cell.

    Args:
        plan: methods and sizes.
        out: folder of everything.
        sizes: further options of `mini world` and of `mini start`, for reduced runs.
        steps: optimizer steps of every training run that does not vary them; None keeps those of the plan.
    """

    def __init__(self, plan: Plan, out: Path, sizes: tuple[list[str], list[str]] = ([], []), steps: int | None = None):
        self.plan, self.out, self.sizes, self.steps = plan, out, sizes, steps

    def measured(self, cell: Cell) -> Path:
        """Return the file that a finished cell has."""
        if cell.method == "start":
            return self._world(cell) / "measured.json"
        return self._folder(cell) / "measured.json"

    def world(self, cell: Cell) -> Lane:
        """Return what the cells of a world and seed share: all up to the pairs, and the start model measured."""
        out = self._world(cell)
        options = ["--guess_share", str(cell.own("guess_share")), "--num_test", str(self.plan.num_test)]
        first = first_stages(out, cell.seed, [*options, *self.sizes[0]], self.sizes[1])
        by_correctness, by_dropout = pair_stages(out, out / "start", out / "data", cell.seed)
        stages = [*first, *by_correctness, *by_dropout, self._measure(cell.start(), out / "start")]
        return Lane(_renamed(f"{out.parent.name}.{out.name}", stages))

    def cell(self, cell: Cell) -> Lane:
        """Return what one cell adds to its world."""
        out, folder = self._world(cell), self._folder(cell)
        stages: list[Stage] = []
        start, data = out / "start", out / "data"
        if cell.own("after"):
            start = self._folder(Cell(cell.own("after"), cell.start().varied, cell.seed)) / "model"
        if {"pairs_per_question", "dropout_ntp_ratio"} & {key for key, _ in cell.varied}:
            data = self._pairs(cell) / "data"
            stages += self._other_pairs(cell, data)
        for number in range(1, cell.own("rounds") + 1):
            if number > 1:
                data = self._pairs(cell) / f"data_{number}"
                stages += _renamed(f"round_{number}", self._sampled(cell, start, data))
            is_last = number == cell.own("rounds")
            model = folder / ("model" if is_last else f"model_{number}")
            stages.append(self._train(cell, start, data, model, f"train_{number}"))
            start = model
        stages.append(self._measure(cell, folder / "model"))
        return Lane(_renamed(f"{cell.name}.seed_{cell.seed}", stages), self.world(cell).stages)

    def _world(self, cell: Cell) -> Path:
        return self.out / "worlds" / f"guess_share={cell.own('guess_share')}" / f"seed_{cell.seed}"

    def _folder(self, cell: Cell) -> Path:
        return self.out / "cells" / cell.name / f"seed_{cell.seed}"

    def _pairs(self, cell: Cell) -> Path:
        """Folder of a cell's own pairs; `--data` takes files with commas between them, so its name has none."""
        return self.out / "pairs" / cell.name.replace(",", "+") / f"seed_{cell.seed}"

    def _sampled(self, cell: Cell, model: Path, data: Path) -> list[Stage]:
        by_correctness, by_dropout = pair_stages(self._world(cell), model, data, cell.seed)
        return [*by_correctness, *by_dropout]

    def _other_pairs(self, cell: Cell, data: Path) -> Iterator[Stage]:
        """Yield the stages that make other pairs of the same responses."""
        out = self._world(cell)
        again = pair_stages(
            out, out / "start", out / "data", cell.seed,
            pairs_per_question=cell.own("pairs_per_question"), ratio=cell.own("dropout_ntp_ratio"),
        )  # fmt: skip
        for stage in (stages[-1] for stages in again):
            moved = data / stage.makes.name
            yield replace(stage, command=[str(moved) if word == str(stage.makes) else word for word in stage.command],
                          makes=moved)  # fmt: skip

    def _train(self, cell: Cell, start: Path, data: Path, model: Path, name: str) -> Stage:
        settings = {**self.plan.methods[cell.method], **dict(cell.varied)}
        if self.steps is not None:
            settings.setdefault("max_steps", self.steps)
        options = [word for key, value in settings.items() if key not in OWN for word in (f"--{key}", str(value))]
        command = [
            *training_command(self._world(cell), self.plan.train, start, data, cell.seed),
            "--output_dir", str(model.with_name(f"{model.name}_run")), "--model_dir", str(model),
            "--reference_cache", str(self._world(cell) / "reference"), "--save_strategy", "no", *options,
        ]  # fmt: skip
        return Stage(name, f"training {cell.name}", command, model / "config.json")

    def _measure(self, cell: Cell, model: Path) -> Stage:
        out = self._world(cell)
        command = [
            *program("-m internvl_mpo.mini"), "measure", "--model", str(model), "--start", str(out / "start"),
            "--world", str(out / "world"), "--output", str(self.measured(cell)),
        ]  # fmt: skip
        return Stage("measure", f"answers of {cell.name}", command, self.measured(cell))


def _renamed(prefix: str, stages: list[Stage]) -> list[Stage]:
    """The stages under names of their own, which markers need."""
    return [replace(stage, name=f"{prefix}.{stage.name}") for stage in stages]
