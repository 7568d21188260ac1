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
DASHES = {"sft": (0, (4, 2)), "dpo": (0, (1, 1.5)), "bco": (0, (6, 2, 1, 2)), "mpo": "-"}  # curves may cover each other
MARKERS = {"sft": "s", "dpo": "^", "bco": "x", "mpo": "o"}
NUM_OF_KIND = 6  # questions shown of each of CHANGES
# title -> whether the start model was right, whether MPO was
CHANGES = {
    "became right": (False, True),
    "became wrong": (True, False),
    "stayed wrong": (False, False),
    "stayed right": (True, True),
}


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
        changes=_changes(folder),
        guess=lucky_guess(folder),
        pair=first_pair(folder),
        folder=folder.as_posix(),
    )
    with atomic_writer(page) as out:
        out.write(text)
    return page


def lucky_guess(folder: Path) -> dict[str, Any] | None:
    """Return a guess among the chosen answers, and how many of both sides guess; None in a world without guesses."""
    path = folder / "data" / "pairs_correctness.jsonl"
    pairs = [row for _, row in iter_jsonl(path)] if path.exists() else []
    lucky = [row for row in pairs if is_guess(row["chosen"])]
    if not lucky:
        return None
    pair = next((row for row in lucky if is_guess(row["rejected"])), lucky[0])
    return {
        "chosen_share": 100 * len(lucky) / len(pairs),
        "rejected_share": 100 * sum(is_guess(row["rejected"]) for row in pairs) / len(pairs),
        **_shown(folder, pair),
    }


def first_pair(folder: Path) -> dict[str, Any] | None:
    """Return the first pair by correctness whose chosen answer is worked out; None where there is none."""
    path = folder / "data" / "pairs_correctness.jsonl"
    rows = (row for _, row in iter_jsonl(path)) if path.exists() else ()
    return next((_shown(folder, row) for row in rows if not is_guess(row["chosen"])), None)


def _shown(folder: Path, pair: dict[str, Any]) -> dict[str, Any]:
    return {
        "image": embedded((folder / "world" / pair["image"]).read_bytes(), "png"),
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
        for number, (method, rows) in enumerate(reversed(logs.items())):  # mpo below the others, which are thinner
            if not has_curve(rows, key):
                continue
            axes.plot([row["step"] for row in rows], _smooth([row[key] for row in rows]), label=NAMES[method],
                      color=COLORS[method], linewidth=2.4 if method == "mpo" else 1.3, linestyle=DASHES[method],
                      marker=MARKERS[method], markersize=4, markevery=(5 * number, 20))  # fmt: skip
        axes.set_xlabel("step")
        axes.set_title(key)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
        image = io.BytesIO()
        figure.savefig(image, format="png")
        pyplot.close(figure)
        plots.append((key, caption, embedded(image.getvalue(), "png")))
    return plots


def has_curve(rows: list[dict[str, Any]], key: str) -> bool:
    """Say whether a run has the term, and its rewards a reference: SFT's are plain log-probs, on another scale."""
    return any(row[key] for row in rows) and (not key.startswith("rewards/") or "kl" in rows[0])


def _smooth(values: list[float], width: int = 5) -> list[float]:
    """Running mean over the last `width` steps: 24 pairs a step are noisy."""
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def _changes(folder: Path) -> list[dict[str, Any]]:
    """Questions whose chains of thought became right or wrong or stayed so: of each kind how many, and the first."""
    questions = {row.id: row for row in read_rows(folder / "world" / "test.jsonl", Question)}
    before, after = (_answers(folder / "eval" / method) for method in ("start", "mpo"))
    shared = sorted(key for key in before if key in after)
    kinds = {
        title: [key for key in shared if (before[key][1], after[key][1]) == verdicts]
        for title, verdicts in CHANGES.items()
    }
    return [
        {
            "title": title,
            "count": len(keys),
            "cards": [
                {
                    "image": embedded((folder / "world" / questions[key].images[0]).read_bytes(), "png"),
                    "question": questions[key].question,
                    "gold": questions[key].answer or "",
                    "answers": [("start model", *before[key]), ("MPO", *after[key])],
                }
                for key in keys[:NUM_OF_KIND]
            ],
        }
        for title, keys in kinds.items()
    ]


def _answers(run: Path) -> dict[str, tuple[str, bool]]:
    """Chain of thought and verdict of every question of an evaluation run."""
    rows = [row for _, row in iter_jsonl(run / "verdicts.jsonl")]
    return {row["id"]: (row["answer"] or "", row["value"] == 1) for row in rows if row["mode"] == "cot"}
