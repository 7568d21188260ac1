"""What the cells took, from the markers of their stages; see `internvl_mpo.stages`."""

import json
from collections.abc import Mapping
from statistics import mean

from internvl_mpo.ablation.lanes import Lanes
from internvl_mpo.ablation.plan import Cell, Plan
from internvl_mpo.stages import Lane


def cpu_seconds(lane: Lane, lanes: Lanes) -> float | None:
    """Return the processor time of all stages of a lane; None where one is not finished or has none on record."""
    total = 0.0
    for stage in lane.stages:
        marker = lanes.out / "stages" / f"{stage.name}.json"
        seconds = json.loads(marker.read_text(encoding="utf-8")).get("cpu_seconds") if marker.exists() else None
        if seconds is None:
            return None
        total += seconds
    return total


def cost_text(plan: Plan, lanes: Lanes) -> str:
    """Return sentences that say what cells and worlds took, and what the whole plan takes at that rate."""
    cells = {cell for group in plan.groups for cell in group.all_cells()}
    worlds = {cell.start(): lanes.world(cell.start()) for cell in cells}
    parts = [
        _cost("worlds with their start models", worlds, lanes),
        _cost("models, trained and measured", {cell: lanes.cell(cell) for cell in cells}, lanes),
    ]
    text = f"Processor time on record: {'; '.join(part for part, _ in parts)}."
    if all(hours is not None for _, hours in parts):
        text += (
            f" The whole plan takes {sum(hours for _, hours in parts):.1f} hours of one core, if what has no time on "
            "record takes as long as its other seeds, or else as the mean of all."
        )
    return text


def _cost(what: str, of: Mapping[Cell, Lane], lanes: Lanes) -> tuple[str, float | None]:
    """How many have a time on record, their mean and sum; and the hours of all of them, None where none has."""
    known = {cell: seconds for cell, lane in of.items() if (seconds := cpu_seconds(lane, lanes)) is not None}
    if not known:
        return f"none of {len(of)} {what}", None
    by_name: dict[str, list[float]] = {}
    for cell, seconds in known.items():
        by_name.setdefault(cell.name, []).append(seconds)
    of_all = mean(known.values())
    hours = sum(known.get(cell, mean(by_name.get(cell.name, [of_all]))) for cell in of) / 3600
    text = f"{len(known)} of {len(of)} {what}, {of_all:.0f} s each, {sum(known.values()) / 3600:.2f} h together"
    return text, hours
