"""Figures of groups in which something is varied: accuracy over one setting, a line for each method or value."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internvl_mpo.ablation.plan import Figure, Group, Plan
from internvl_mpo.ablation.results import Row

COLORS = {"start": "#8a8f98", "sft": "#4c78a8", "dpo": "#e4a11b", "bco": "#7b5ea7", "mpo": "#1a9850"}
MORE_COLORS = ("#1a9850", "#e4a11b", "#7b5ea7", "#d6473c", "#4c78a8")


def draw(group: Group, rows: Sequence[Row], images: Path, names: dict[str, str], plan: Plan) -> Path | None:
    """Draw a group's figure; None where fewer than two places of its axis were measured.

    Args:
        group: says what stands on the axis, and what a line is.
        rows: what was measured.
        images: folder of the picture.
        names: of methods, for the legend.
        plan: knows the values of what is not varied.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure_of: Figure = group.figure
    lines: dict[tuple[Any, Any], list[tuple[Any, Row]]] = {}
    for row in rows:
        x = plan.value(row.cell, figure_of.x)
        key = plan.value(row.cell, figure_of.panels), plan.value(row.cell, figure_of.lines)
        if row.cell.method != "start" or figure_of.x == "guess_share":
            lines.setdefault(key, []).append((x, row))
    places = sorted({x for points in lines.values() for x, _ in points})
    if len(places) < 2:
        return None
    panels = sorted({panel for panel, _ in lines}, key=str)
    figure, axes = pyplot.subplots(
        1,
        len(panels),
        figsize=(1.2 + 3.4 * len(panels), 3.1),
        dpi=110,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for panel, axis in zip(panels, axes[0], strict=True):
        own = [(line, points) for (of, line), points in lines.items() if of == panel]
        for number, (line, points) in enumerate(own):
            color = COLORS.get(line, MORE_COLORS[number % len(MORE_COLORS)])
            _line(axis, sorted(points, key=lambda point: point[0]), places, names.get(line, str(line)), color)
        axis.set_xticks(range(len(places)), [f"{place:g}" for place in places])
        axis.set_xlabel(figure_of.x.replace("_", " "))
        axis.grid(alpha=0.3)
        if panel is not None:
            axis.set_title(f"{figure_of.panels.replace('_', ' ')} {panel:g}", fontsize=9)
    axes[0][0].set_ylabel("right chains of thought, %")
    axes[0][0].legend(fontsize=7, title=None if figure_of.lines == "method" else figure_of.lines.replace("_", " "))
    images.mkdir(parents=True, exist_ok=True)
    path = images / f"ablation_{group.name}.png"
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)
    return path


def _line(axis: Any, points: Sequence[tuple[Any, Row]], places: Sequence[Any], label: str, color: str) -> None:
    """Draw means and their intervals at the numbers of their places, which are equally far apart."""
    xs = [places.index(x) for x, _ in points]
    estimates = [row.estimate("chain of thought") for _, row in points]
    means = [found.mean for found in estimates]
    axis.plot(xs, means, "o-", label=label, color=color, linewidth=1.6, markersize=3.5)
    bands = [found.interval or (found.mean, found.mean) for found in estimates]
    axis.fill_between(xs, [low for low, _ in bands], [high for _, high in bands], color=color, alpha=0.15, linewidth=0)
