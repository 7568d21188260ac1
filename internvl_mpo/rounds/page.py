"""report.html of a run in rounds: one self-contained page."""

import io
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internvl_mpo.evaluation.comparison import compare_runs
from internvl_mpo.files import atomic_writer
from internvl_mpo.html_page import embedded, render_page
from internvl_mpo.jsonl import iter_jsonl
from internvl_mpo.rounds.lanes import RoundLanes
from internvl_mpo.rounds.settings import ONE_ROUND

COLORS = ("#1a9850", "#4c78a8", "#e4a11b", "#7b5ea7", "#d6473c", "#17becf")
NUM_FOLLOWED = 3
PICTURE_KINDS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


def write_page(lanes: RoundLanes, found: dict[str, Any]) -> Path:
    """Write `report.html` and return it.

    Args:
        lanes: knows where answers and pictures lie.
        found: what `results` returned.
    """
    first = next(iter(found["arms"]))

    def shows(arm: str, rows: dict[str, Any]) -> bool:  # the first round is the same for every arm
        return len(rows["rounds"]) > (1 if arm == first else 2)

    text = render_page(
        "rounds/page.html",
        found=found,
        curves=_curves(found),
        histograms=[(arm, _histogram(rows["rounds"][1:])) for arm, rows in found["arms"].items() if shows(arm, rows)],
        comparisons=list(_comparisons(lanes, found)),
        followed=followed(lanes, first, len(found["arms"][first]["rounds"]) - 1),
        first=first,
        costs=list(costs(found)),
    )
    page = lanes.out / "report.html"
    with atomic_writer(page) as out:
        out.write(text)
    return page


def _comparisons(lanes: RoundLanes, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the first arm beside each of the others, both after their last round, paired by question."""
    (arm, own), *others = [(arm, len(rows["rounds"]) - 1) for arm, rows in found["arms"].items()]
    for other, last in others:
        (found_of,) = compare_runs(lanes.evaluation(other, last), lanes.evaluation(arm, own))
        yield {
            "arm": arm,
            "rounds": own,
            "other": other,
            "difference": found_of.mean_b - found_of.mean_a,
            "interval": found_of.interval or [float("nan")] * 2,
            "same_steps": other == arm + ONE_ROUND and own == lanes.settings.num_rounds,
        }


def followed(lanes: RoundLanes, arm: str, last: int) -> list[dict[str, Any]]:
    """Return some held-out questions with the answers of every round, those whose verdict changed most often first."""
    runs = [_answers(lanes.evaluation(arm, number)) for number in range(last + 1)]

    def order(id: str) -> tuple[int, bool, str]:
        values = [run[id]["value"] for run in runs]
        changes = sum(before != after for before, after in itertools.pairwise(values))
        return -changes, not (values[-1] or 0) > (values[0] or 0), id

    shared = [id for id in runs[0] if all(id in run for run in runs)]
    return [
        {
            "question": runs[0][id]["question"],
            "gold": runs[0][id]["gold"],
            "images": [embedded(path.read_bytes(), PICTURE_KINDS.get(path.suffix.lower(), "png"))
                       for path in map(Path, runs[0][id]["images"])],
            "answers": [(number, run[id]["answer"] or "", run[id]["value"]) for number, run in enumerate(runs)],
        }
        for id in sorted(shared, key=order)[:NUM_FOLLOWED]
    ]  # fmt: skip


def _answers(run: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for _, row in iter_jsonl(run / "verdicts.jsonl")}


def costs(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield for each round of each arm what it cost: samples, tokens, pairs, and seconds by stage.

    The data of the first round is made once for all arms, and stands in a row of its own.
    """
    arms = found["arms"]
    shared = next((rows["rounds"][1]["data"] for rows in arms.values() if len(rows["rounds"]) > 1), None)
    if shared:
        yield {"arm": "all", "number": 1, "data": shared, "seconds": _seconds(found["stages"], "round_1.")}
    for arm, rows in arms.items():
        for number, row in enumerate(rows["rounds"][1:], start=1):
            yield {"arm": arm, "number": number, "data": row["data"] if number > 1 else None,
                   "seconds": _seconds(found["stages"], f"{arm}.round_{number}.")}  # fmt: skip


def _seconds(stages: dict[str, Any], prefix: str) -> dict[str, float]:
    names = (name for name in stages if name.startswith(prefix))
    return {name.removeprefix(prefix): stages[name]["seconds"] for name in names}


def _curves(found: dict[str, Any]) -> str:
    """Held-out accuracy over the rounds with 95 % intervals over questions, a line for each arm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    for place, (arm, rows) in enumerate(found["arms"].items()):
        shift = 0.04 * (place - (len(found["arms"]) - 1) / 2)  # intervals beside each other
        means = [row["accuracy"] for row in rows["rounds"]]
        ends = [row["interval"] or (row["accuracy"],) * 2 for row in rows["rounds"]]
        errors = [[mean - low for mean, (low, _) in zip(means, ends, strict=True)],
                  [high - mean for mean, (_, high) in zip(means, ends, strict=True)]]  # fmt: skip
        axes.errorbar([number + shift for number in range(len(means))], means, errors, label=arm, capsize=3,
                      color=COLORS[place % len(COLORS)], marker="o", linewidth=1.6)  # fmt: skip
    axes.set_xticks(range(max(len(rows["rounds"]) for rows in found["arms"].values())))
    axes.set_xlabel("round; 0 is the start")
    axes.set_ylabel("right held-out answers, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return _picture(figure)


def _histogram(rounds: list[dict[str, Any]]) -> str:
    """Questions over their pass rate before each round, one panel a round."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 * len(rounds), 2.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(rounds), sharey=True, squeeze=False)[0]
    for number, (row, axes) in enumerate(zip(rounds, panels, strict=True), start=1):
        bins = row["data"]["pass_rates"]
        axes.bar(
            [(place + 0.5) / len(bins) for place in range(len(bins))], bins, width=0.9 / len(bins), color="#4c78a8"
        )
        axes.set_title(f"round {number}", fontsize=9)
        axes.set_xlabel("pass rate", fontsize=8)
        axes.tick_params(labelsize=7)
    panels[0].set_ylabel("questions", fontsize=8)
    return _picture(figure)


def _picture(figure: Any) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="png", metadata={"Software": None})
    return embedded(content.getvalue(), "png")
