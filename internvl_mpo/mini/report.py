"""report.html of the quickstart: one self-contained page with pictures, answers before and after, and curves."""

import io
from pathlib import Path
from typing import Any

from internvl_mpo.files import atomic_writer
from internvl_mpo.html_page import embedded, render_page
from internvl_mpo.jsonl import iter_jsonl, read_whole_lines
from internvl_mpo.mini.choices import is_guess
from internvl_mpo.records import Question, read_rows

NAMES = {"start": "start model", "sft": "SFT on chosen", "dpo": "DPO", "bco": "BCO", "mpo": "MPO"}
COLORS = {"start": "#8a8f98", "sft": "#4c78a8", "dpo": "#e4a11b", "bco": "#7b5ea7", "mpo": "#1a9850"}
NUM_PICTURES = 24


def write_report(folder: Path, found: dict[str, Any]) -> Path:
    """Write `report.html` into the folder of a quickstart.

    Args:
        folder: `--output` of the quickstart.
        found: the content of results.json.

    Returns:
        The page.
    """
    methods = found["methods"]
    page = folder / "report.html"
    text = render_page(
        "mini/report.html",
        found=found,
        names=NAMES,
        start=methods["start"],
        mpo=methods.get("mpo", methods["start"]),
        plots=_plots(folder, [method for method in methods if method != "start"]),
        cards=_cards(folder),
        guess=_lucky_guess(folder),
    )
    with atomic_writer(page) as out:
        out.write(text)
    return page


def _lucky_guess(folder: Path) -> dict[str, Any] | None:
    """A guess among the chosen answers, and how many of both sides guess; None in a world without guesses."""
    path = folder / "data" / "pairs_correctness.jsonl"
    pairs = [row for _, row in iter_jsonl(path)] if path.exists() else []
    lucky = [row for row in pairs if is_guess(row["chosen"])]
    if not lucky:
        return None
    pair = next((row for row in lucky if is_guess(row["rejected"])), lucky[0])
    return {
        "chosen_share": 100 * len(lucky) / len(pairs),
        "rejected_share": 100 * sum(is_guess(row["rejected"]) for row in pairs) / len(pairs),
        "image": data_uri((folder / "world" / pair["image"]).read_bytes(), "png"),
        "question": pair["question"].rpartition("Question:")[2].strip(),
        "chosen": pair["chosen"],
        "rejected": pair["rejected"],
    }


def _plots(folder: Path, methods: list[str]) -> list[tuple[str, str, str]]:
    """(metric, caption, picture) of the loss terms, the rewards and the margin, curves of every training run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logs = {}
    for method in methods:
        rows = read_whole_lines(folder / "train" / method / "log.jsonl")
        logs[method] = [row for row in rows if "loss_generation" in row]
    plots = []
    for key, caption in (
        ("loss_preference", "preference term: 0.69 = no preference yet; lower is better"),
        ("loss_quality", "quality term: 1.39 at the start"),
        ("loss_generation", "generation term: NLL per token of the chosen response"),
        ("rewards/chosen", "reward of chosen responses: below 0 they became less likely than at the start"),
        ("rewards/rejected", "reward of rejected responses"),
        ("rewards/margin", "margin: chosen minus rejected reward"),
    ):
        figure, axes = pyplot.subplots(figsize=(4.6, 2.9), dpi=110, layout="constrained")
        for method, rows in logs.items():
            if not any(row[key] for row in rows):
                continue  # the method has no such term
            axes.plot([row["step"] for row in rows], _smooth([row[key] for row in rows]), label=NAMES[method],
                      color=COLORS[method], linewidth=2.2 if method == "mpo" else 1.2)  # fmt: skip
        axes.set_xlabel("step")
        axes.set_title(key)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
        image = io.BytesIO()
        figure.savefig(image, format="png")
        pyplot.close(figure)
        plots.append((key, caption, embedded(image.getvalue(), "png")))
    return plots


def _smooth(values: list[float], width: int = 5) -> list[float]:
    """Running mean over the last `width` steps: 24 pairs a step are noisy."""
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def _cards(folder: Path) -> list[dict[str, Any]]:
    """Pictures with the chains of thought of the start model and of MPO; those that changed come first."""
    questions = {row.id: row for row in read_rows(folder / "world" / "test.jsonl", Question)}
    before, after = (_answers(folder / "eval" / method) for method in ("start", "mpo"))
    order = sorted((key for key in before if key in after), key=lambda key: (before[key][1] == after[key][1], key))
    return [
        {
            "image": embedded((folder / "world" / questions[key].images[0]).read_bytes(), "png"),
            "question": questions[key].question,
            "gold": questions[key].answer or "",
            "answers": [("start model", *before[key]), ("MPO", *after[key])],
        }
        for key in order[:NUM_PICTURES]
    ]


def _answers(run: Path) -> dict[str, tuple[str, bool]]:
    """Chain of thought and verdict of every question of an evaluation run."""
    rows = [row for _, row in iter_jsonl(run / "verdicts.jsonl")]
    return {row["id"]: (row["answer"] or "", row["value"] == 1) for row in rows if row["mode"] == "cot"}
