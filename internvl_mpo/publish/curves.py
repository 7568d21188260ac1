"""One picture of a training run: the terms of the loss, the rewards, how often the chosen answer is preferred."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CURVES = "training_curves.png"
_PANELS = (
    ("loss terms", (("loss_preference", "preference"), ("loss_quality", "quality"), ("loss_generation", "generation"))),
    ("rewards", (("rewards/chosen", "chosen"), ("rewards/rejected", "rejected"), ("rewards/margin", "margin"))),
    ("reward accuracy", (("rewards/accuracy", "pairs of the step"), ("eval_rewards/accuracy", "held-out pairs"))),
)


def draw_curves(log: Sequence[Mapping[str, Any]], path: Path, smoothing: int = 10) -> None:
    """Draw the lines of a log.jsonl; values of the training steps are running means.

    Args:
        log: rows with `step`.
        path: PNG to write.
        smoothing: steps of a running mean, fewer for a short run.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    num_steps = sum("loss" in row for row in log)
    width = max(1, min(smoothing, num_steps // 10))
    figure, axes = pyplot.subplots(1, len(_PANELS), figsize=(12, 3.4), dpi=110, layout="constrained")
    for panel, (title, lines) in zip(axes, _PANELS, strict=True):
        for key, label in lines:
            points = [(row["step"], row[key]) for row in log if row.get(key) is not None]
            if not points or not any(value for _, value in points):
                continue  # the objective has no such term
            steps, values = zip(*points, strict=True)
            if key.startswith("eval_"):
                panel.plot(steps, values, "o-", label=label)
            else:
                panel.plot(steps, _running_mean(values, width), label=label)
        panel.set_title(title)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        if panel.lines:
            panel.legend(fontsize=8)
    figure.savefig(path, metadata={"Software": None})
    pyplot.close(figure)


def _running_mean(values: Sequence[float], width: int) -> list[float]:
    windows = [values[max(0, end - width) : end] for end in range(1, len(values) + 1)]
    return [sum(window) / len(window) for window in windows]
