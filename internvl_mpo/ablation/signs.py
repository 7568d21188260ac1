"""What the logs of training runs said, beside what was measured afterwards: which numbers warn, and which do not."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_mpo.ablation.figures import COLORS
from internvl_mpo.ablation.lanes import Lanes
from internvl_mpo.ablation.results import Row
from internvl_mpo.jsonl import read_whole_lines

# heading -> key of the last evaluation on held-out pairs
LOGGED = {
    "`chosen_change`": "eval_logps/chosen_change",
    "`rejected_change`": "eval_logps/rejected_change",
    "`rewards/accuracy`": "eval_rewards/accuracy",
    "`rewards/margin`": "eval_rewards/margin",
}
DASHES = ("-", "--", ":", "-.")


def signs_table(rows: Mapping[str, Row], lanes: Lanes) -> str:
    """Return a Markdown table: of each run's log the last held-out evaluation, and what was measured of its model.

    Args:
        rows: name -> trained cells; of several seeds the smallest and the largest value is shown.
        lanes: knows where the logs lie.
    """
    head = ["", *LOGGED, "chain of thought", "false calculations", "unparsable", "seeds"]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for name, row in rows.items():
        ends = [[line for line in _log(row, seed, lanes) if "eval_nll" in line][-1] for seed in row.seeds]
        cells = [
            *(
                _range([end[key] for end in ends], "{:+.2f}" if "change" in key else "{:.2f}")
                for key in LOGGED.values()
            ),
            _range([100 * sum(found["cot"]) / len(found["cot"]) for found in row.found], "{:.1f}"),
            _range([100 * (found["calculation_errors"] or 0) for found in row.found], "{:.1f}%"),
            _range([100 * found["unparsable"] for found in row.found], "{:.1f}%"),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(row.seeds)} |")
    return "\n".join(lines)


def draw_signs(rows: Mapping[str, Row], lanes: Lanes, path: Path) -> None:
    """Draw how likely chosen responses were over the steps of the usual length: of each cell the mean of its seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {name: row for name, row in rows.items() if "max_steps" not in dict(row.cell.varied)}
    figure, axis = pyplot.subplots(figsize=(8, 3.2), dpi=110, layout="constrained")
    for name, row in rows.items():
        logs = [[line for line in _log(row, seed, lanes) if "logps/chosen_change" in line] for seed in row.seeds]
        steps = [line["step"] for line in logs[0]]
        means = [sum(log[place]["logps/chosen_change"] for log in logs) / len(logs) for place in range(len(steps))]
        number = sum(other.cell.method == row.cell.method for other in list(rows.values())[: list(rows).index(name)])
        axis.plot(steps, _smooth(means), label=name, color=COLORS.get(row.cell.method, "#8a8f98"), linewidth=1.5,
                  linestyle=DASHES[number % len(DASHES)])  # fmt: skip
    axis.axhline(0, color="#888", linewidth=0.8)
    axis.set_xlabel("step")
    axis.set_ylabel("chosen_change, nats a token")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


def _log(row: Row, seed: int, lanes: Lanes) -> list[dict[str, Any]]:
    folder = lanes.measured(row.cell.with_seed(seed)).parent
    return list(read_whole_lines(folder / "model_run" / "log.jsonl"))


def _range(values: Sequence[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low} to {high}"


def _smooth(values: Sequence[float], width: int = 5) -> list[float]:
    """Running mean over the last `width` steps."""
    parts = [values[max(0, place - width + 1) : place + 1] for place in range(len(values))]
    return [sum(part) / len(part) for part in parts]
