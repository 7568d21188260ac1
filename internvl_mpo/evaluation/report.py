"""One HTML file about a run, or about two runs side by side: bars beside the paper's, breakdowns, every question.

It needs no network and no server: pictures are embedded as small JPEGs, filters are a few lines of script.
"""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_mpo.benchmarks import load_benchmark
from internvl_mpo.benchmarks.common import open_image
from internvl_mpo.errors import BadInputError
from internvl_mpo.evaluation.paper_table import COLUMNS, PROTOCOLS, column
from internvl_mpo.evaluation.samples import is_right, numbers_of
from internvl_mpo.html_page import embedded, render_page
from internvl_mpo.jsonl import iter_jsonl

MAX_QUESTIONS = 120  # per benchmark and mode; a file of some MB stays quick to open
THUMBNAIL_PIXELS = 320


def report_html(runs: Sequence[Path]) -> str:
    """Return the report of run folders that hold scores.json and verdicts.jsonl.

    Raises:
        BadInputError: a folder holds no finished run.
    """
    scores = [_scores(run) for run in runs]
    benchmarks = []
    for name in dict.fromkeys(name for run_scores in scores for name in run_scores):
        summaries = [
            (f"{run.name} {mode}", summary)
            for run, run_scores in zip(runs, scores, strict=True)
            for mode, summary in run_scores.get(name, {}).items()
        ]
        benchmarks.append(
            {
                "title": load_benchmark(name).TITLE,
                "bars": _bars(name, summaries),
                "protocol": PROTOCOLS[name] if name in COLUMNS else None,
                "breakdowns": [table for label, summary in summaries for table in _breakdowns(label, summary)],
            }
        )
    return render_page(
        "evaluation/report.html",
        names=[run.name for run in runs],
        benchmarks=benchmarks,
        states=("all", "right", "wrong", "unanswered", "unscored", *(("flipped",) if len(runs) > 1 else ())),
        questions=_questions(runs),
    )


def verdict_state(row: Mapping[str, Any]) -> str:
    """Return unscored, unanswered, right or wrong; half a point or a rating of 3 is right."""
    if row["value"] is None:
        return "unscored"
    if row["extracted"] is None:
        return "unanswered"
    return "right" if is_right(row["benchmark"], row["value"]) else "wrong"


def _scores(run: Path) -> dict[str, Any]:
    path = run / "scores.json"
    if not path.exists():
        raise BadInputError(f"{run} holds no scores.json; evaluate into it first")
    return json.loads(path.read_text(encoding="utf-8"))


def _bars(name: str, summaries: Sequence[tuple[str, Mapping[str, Any]]]) -> list[dict[str, str]]:
    """The run's numbers above the paper's; a column of another kind is named, so that nobody compares across."""
    scale = PROTOCOLS[name].scale if name in PROTOCOLS else 100.0
    bars = [
        _bar(label, value, scale, f"{number}, rule {summary['rule']}{_spread(interval, summary)}", "own")
        for label, summary in summaries
        for number, value, interval in numbers_of(summary)
    ]
    paper = column(name) if name in COLUMNS else {}
    return bars + [_bar(model, paper[model], scale, "", "") for model in sorted(paper, key=paper.get, reverse=True)]


def _spread(interval: Sequence[float] | None, summary: Mapping[str, Any]) -> str:
    """The interval, and what was resampled for it."""
    if not interval:
        return ""
    drawn = summary.get("resampled")
    return f", {interval[0]:.1f} to {interval[1]:.1f}" + (
        f" ({drawn['num']} {drawn['unit']} resampled)" if drawn else ""
    )


def _bar(label: str, value: float | None, scale: float, note: str, kind: str) -> dict[str, str]:
    width = 0 if value is None else max(0.0, min(1.0, value / scale)) * 100
    shown = "-" if value is None else f"{value:.1f}"
    return {"label": label, "width": f"{width:.1f}", "shown": shown, "note": note, "kind": kind}


def _breakdowns(label: str, summary: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, list[tuple[str, str]]]]]]:
    """(title, rows of (value, numbers)) of every table."""
    return [
        (
            f"{label} by {group}",
            [(value, [(key, _number(number)) for key, number in numbers.items()]) for value, numbers in parts.items()],
        )
        for group, parts in summary.get("breakdown", {}).items()
    ]


def _questions(runs: Sequence[Path]) -> list[dict[str, Any]]:
    """Every question once, with what each run and mode answered."""
    questions: dict[tuple[str, str], list[tuple[str, dict[str, Any]]]] = {}
    for run in runs:
        counts: dict[tuple[str, str], int] = {}
        for _, row in iter_jsonl(run / "verdicts.jsonl"):
            task = (row["benchmark"], row["mode"])
            counts[task] = counts.get(task, 0) + 1
            if counts[task] <= MAX_QUESTIONS:
                label = f"{run.name} {row['mode']}" + (f" #{row['sample'] + 1}" if row.get("sample") else "")
                questions.setdefault((row["benchmark"], row["id"]), []).append((label, row))
    return [_question(name, rows) for (name, _), rows in questions.items()]


def _question(name: str, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    first = rows[0][1]
    states = {verdict_state(row) for _, row in rows}
    if len({verdict_state(row) == "right" for _, row in rows}) > 1:
        states.add("flipped")
    return {
        "states": sorted(states),
        "benchmark": name,
        "id": first["id"],
        "text": first["question"],
        "choices": [(chr(65 + number), choice) for number, choice in enumerate(first["choices"])],
        "gold": first["gold"] or "-",
        "has_picture": bool(first["images"]),
        "thumbnail": _thumbnail(first["images"][0]) if first["images"] else None,
        "answers": [
            {
                "label": label,
                "state": verdict_state(row),
                "extracted": row["extracted"] or "",
                "reason": row["reason"],
                "text": row["answer"] or "",
            }
            for label, row in rows
        ],
    }


def _thumbnail(image: str) -> str | None:
    """The picture as `src`; None where it is not at hand any more."""
    try:
        picture = open_image(Path(image))
    except BadInputError:
        return None
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return embedded(buffer.getvalue(), "jpeg")


def _number(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else "-" if value is None else str(value)
