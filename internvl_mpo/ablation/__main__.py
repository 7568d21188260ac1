"""Train and measure methods on the mini world over seeds and settings, and write docs/ablation.md.

    python runs/ablation.py                                       everything of configs/ablation.yaml
    python runs/ablation.py --groups main                         one table
    python runs/ablation.py --config configs/ablation_reduced.yaml --reduced true    a test of the system, some minutes
    python runs/ablation.py --groups none                         only the page, from what was measured

A run that was killed goes on with the same command: every world and every cell is finished once.
"""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from internvl_mpo.ablation.lanes import Lanes
from internvl_mpo.ablation.page import write_page
from internvl_mpo.ablation.plan import Cell, Plan, read_plan
from internvl_mpo.ablation.results import Results
from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.settings import parse_settings, setting
from internvl_mpo.stages import Run, Stages

# smaller worlds and shorter training, for a test of the system: its numbers mean nothing
REDUCED = (
    ["--num_annotated", "1500", "--num_drills", "600", "--num_questions", "200", "--num_open", "40"],
    ["--steps", "150", "--vision_steps", "100"],
)
REDUCED_STEPS = 20


@dataclass
class AblationSettings:
    """Settings of `runs/ablation.py`."""

    config: str = setting("configs/ablation.yaml", help="methods, and what is varied")
    output: str = setting("outputs/ablation", help="folder of worlds, models and what was measured")
    groups: list[str] = setting(["all"], help="groups of the file to run, in its order; all, or none")
    seeds: int | None = setting(None, help="most seeds of a group; without it, as the file says")
    jobs: int = setting(max(1, os.cpu_count() or 1), help="cells at the same time, one thread each")
    page: str | None = setting("docs/ablation.md", help="page whose tables and figures are made; none leaves it")
    reduced: bool = setting(False, help="small worlds and few steps, to test the system; the page is left as it is")


def main(argv: list[str]) -> int:
    """Run the groups, then write the page; 1 if a cell failed."""
    settings = parse_settings(
        AblationSettings, argv or ["--groups", "all"], program="runs/ablation.py", about=__doc__, config=False
    )
    plan = read_plan(settings.config)
    lanes = Lanes(plan, Path(settings.output), *((REDUCED, REDUCED_STEPS) if settings.reduced else ()))
    failed = run_groups(settings, plan, lanes)
    if settings.page and not settings.reduced:
        most = max(group.seeds for group in plan.groups)
        page = Path(settings.page)
        shown = write_page(page, page.parent / "images", plan, Results(lanes, most))
        print(f"{page} shows {', '.join(shown)}")
    for error in failed:
        print(f"not finished: {error}", file=sys.stderr)
    return 1 if failed else 0


def run_groups(settings: AblationSettings, plan: Plan, lanes: Lanes, run: Run | None = None) -> list[BadInputError]:
    """Run what is not finished yet of the groups, in the order of the file; return what failed.

    Args:
        settings: which groups and seeds.
        plan: has the groups.
        lanes: knows their commands.
        run: runs a command, see `Stages`.

    Raises:
        BadInputError: the file has no such group, or a world could not be made.
    """
    known = [group.name for group in plan.groups]
    unknown = set(settings.groups) - {*known, "all", "none"}
    if unknown:
        raise BadInputError(f"no group '{min(unknown)}' in {settings.config}, expected all, none or {', '.join(known)}")
    wanted = known if "all" in settings.groups else settings.groups
    stages = Stages(Path(settings.output) / "stages", settings.jobs, run)
    failed = []
    for group in plan.groups:
        if group.name not in wanted:
            continue
        cells = list(group.all_cells(settings.seeds))
        begin = time.monotonic()
        stages.run_all([lanes.world(start) for start in dict.fromkeys(cell.start() for cell in cells)])
        befores = {Cell(cell.own("after"), cell.start().varied, cell.seed) for cell in cells if cell.own("after")}
        for part in (sorted(befores, key=str), [cell for cell in cells if cell not in befores]):
            failed += stages.run([lanes.cell(cell) for cell in part])
        print(f"group {group.name}: {len(cells)} cells, {(time.monotonic() - begin) / 60:.1f} min", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(run_program(main))
