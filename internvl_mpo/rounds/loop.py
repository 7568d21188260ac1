"""The rounds of every arm, one after the other, until its held-out accuracy no longer rises."""

import json
import shutil
from pathlib import Path
from typing import Any

from internvl_mpo.errors import BadInputError
from internvl_mpo.files import atomic_writer
from internvl_mpo.rounds.lanes import RoundLanes
from internvl_mpo.rounds.page import write_page
from internvl_mpo.rounds.results import best_round, held_out, results
from internvl_mpo.rounds.settings import RoundsSettings
from internvl_mpo.stages import Lane, Run, Stages


class Loop:
    """Runs what is not finished yet; results and page are written anew after every round.

    Args:
        settings: of the run.
        run: runs a command, see `Stages`.

    Attributes:
        rounds: how many rounds every arm has finished.
    """

    def __init__(self, settings: RoundsSettings, run: Run | None = None):
        self.settings, self.lanes = settings, RoundLanes(settings)
        self.out = Path(settings.output)
        self.stages = Stages(self.out / "stages", settings.jobs, run)
        self.rounds = dict.fromkeys(settings.arms, 0)

    def run(self) -> dict[str, BadInputError]:
        """Run all rounds; return what ended an arm early, by arm.

        Raises:
            BadInputError: the first policy could not be evaluated, or its answers made no pairs.
        """
        failed: dict[str, BadInputError] = {}
        self.stages.run_all([Lane(self.lanes.start())], [Lane(self.lanes.first_data())])
        going = list(self.settings.arms)
        for number in range(1, self.settings.num_rounds + 1):
            going = [arm for arm in going if arm not in failed and self._goes_on(arm, number)]
            failed |= self._run_round(going, number)
            if going:
                write_results(self)
        return failed

    def _goes_on(self, arm: str, number: int) -> bool:
        """Whether an arm has this round: it is not over, and got better within the last `patience` rounds."""
        patience = self.settings.patience
        if number > self.settings.rounds_of(arm):
            return False
        accuracies = [held_out(self.lanes, arm, earlier)["accuracy"] for earlier in range(number)]
        if patience and number - 1 - best_round(accuracies) >= patience:
            print(f"\n{arm} stops after round {number - 1}: no better than round {best_round(accuracies)}", flush=True)
            return False
        return True

    def _run_round(self, arms: list[str], number: int) -> dict[str, BadInputError]:
        """Run a round of some arms side by side; return what went wrong, by arm."""
        errors = iter(
            self.stages.run([Lane(self.lanes.all_of(arm, number), self.lanes.before(arm, number)) for arm in arms])
        )
        failed = {}
        for arm in arms:
            if f"{arm}.round_{number}.evaluate" not in self.stages.finished:
                failed[arm] = next(errors)
                continue
            self.rounds[arm] = number
            if self.settings.remove_policies:
                self._remove_policies(arm)
        return failed

    def _remove_policies(self, arm: str) -> None:
        """Remove the weights and checkpoints that are neither those of the best round nor of the last.

        What tells that a stage is finished stays, so that nothing is trained again.
        """
        last = self.rounds[arm]
        best = best_round([held_out(self.lanes, arm, number)["accuracy"] for number in range(last + 1)])
        for number in range(1, last + 1):
            folder = self.lanes.folder(arm, number)
            for checkpoint in folder.glob("train/checkpoint-*"):
                shutil.rmtree(checkpoint)
            if number not in (best, last):
                for weights in self.lanes.weights(arm, number):
                    weights.unlink()


def write_results(loop: Loop) -> dict[str, Any]:
    """Write `results.json` and `report.html` of what is finished, and return the former's content."""
    found = results(loop.lanes, loop.stages.finished, loop.rounds)
    with atomic_writer(loop.out / "results.json") as file:
        json.dump(found, file, indent=2)
    write_page(loop.lanes, found)
    return found


def table(found: dict[str, Any]) -> str:
    """Return the held-out accuracy of every arm and round."""
    most = max(len(arm["rounds"]) for arm in found["arms"].values())
    width = max(map(len, found["arms"]))
    lines = [f"{'':<{width}}      start" + "".join(f"    round {number}" for number in range(1, most))]
    for name, arm in found["arms"].items():
        cells = [f"{row['accuracy']:9.1f} %" for row in arm["rounds"]]
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)
