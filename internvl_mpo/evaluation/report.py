"""One HTML file about a run, or about two runs side by side: bars beside the paper's, breakdowns, every question.

It needs no network and no server: pictures are embedded as small JPEGs, filters are a few lines of script.
"""

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_mpo.benchmarks import load_benchmark
from internvl_mpo.benchmarks.common import open_image
from internvl_mpo.errors import BadInputError
from internvl_mpo.evaluation.paper_table import COLUMNS, PROTOCOLS, column
from internvl_mpo.jsonl import iter_jsonl

MAX_QUESTIONS = 120  # per benchmark and mode; a file of some MB stays quick to open
THUMBNAIL_PIXELS = 320

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#1a1a1a}
table{border-collapse:collapse;margin:.5rem 0}
td,th{padding:.15rem .6rem;text-align:left;vertical-align:top}
.bars{width:100%;max-width:56rem}
.bars td:nth-child(2){width:45%}
.bar{height:.9rem;background:#b9c4d0}
.own .bar{background:#2a6fb0}
.own td{font-weight:600}
.question{border-top:1px solid #ddd;padding:.8rem 0;display:flex;gap:1rem}
.question img{max-width:200px;max-height:200px}
.answers{display:flex;flex-wrap:wrap;gap:1rem}
.answer{flex:1 1 12rem;min-width:0}
pre{white-space:pre-wrap;overflow-wrap:anywhere;margin:.3rem 0}
.right{color:#17753a}
.wrong{color:#b3261e}
.unanswered,.unscored{color:#8a6d00}
nav button{margin:0 .4rem .4rem 0}
nav button[aria-pressed=true]{background:#2a6fb0;color:#fff}
small{color:#555}
[hidden]{display:none!important}
@media(max-width:40rem){
body{margin:1rem auto}
.question{flex-direction:column}
td,th{padding:.15rem .3rem}
.bars tr{display:grid;grid-template-columns:1fr 1fr 3rem}
.bars td:nth-child(2){width:auto}
.bars td:nth-child(4),.bars td[colspan]{grid-column:1/-1}
details{overflow-x:auto}
}
"""
_HEAD = (
    "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'>"
    "<title>Evaluation</title>"
)
_SCRIPT = """
function show(button,state){document.querySelectorAll('nav button').forEach(b=>b.ariaPressed=b===button)
document.querySelectorAll('.question').forEach(q=>
 q.hidden=state!=='all'&&!q.dataset.states.split(' ').includes(state))}
"""


def report_html(runs: Sequence[Path]) -> str:
    """Return the report of run folders that hold scores.json and verdicts.jsonl.

    Raises:
        BadInputError: a folder holds no finished run.
    """
    scores = [_scores(run) for run in runs]
    parts = [_HEAD, f"<style>{_STYLE}</style>"]
    parts.append(f"<h1>Evaluation of {' and '.join(_escape(run.name) for run in runs)}</h1>")
    for name in dict.fromkeys(name for run_scores in scores for name in run_scores):
        parts.append(f"<h2>{_escape(load_benchmark(name).TITLE)}</h2>")
        summaries = [
            (f"{run.name} {mode}", summary)
            for run, run_scores in zip(runs, scores, strict=True)
            for mode, summary in run_scores.get(name, {}).items()
        ]
        parts += [_bars(name, summaries), *(_breakdowns(label, summary) for label, summary in summaries)]
    states = ("all", "right", "wrong", "unanswered", "unscored", *(("flipped",) if len(runs) > 1 else ()))
    buttons = "".join(f"<button onclick=\"show(this,'{state}')\">{state}</button>" for state in states)
    parts.append(f"<h2>Questions</h2><nav>{buttons}</nav>")
    parts += _questions(runs)
    parts.append(f"<script>{_SCRIPT}</script>")
    return "\n".join(parts)


def verdict_state(row: Mapping[str, Any]) -> str:
    """Return unscored, unanswered, right or wrong; half a point or a rating of 3 is right."""
    if row["value"] is None:
        return "unscored"
    if row["extracted"] is None:
        return "unanswered"
    return "right" if row["value"] >= (3 if row["benchmark"] == "mmhal_bench" else 0.5) else "wrong"


def _scores(run: Path) -> dict[str, Any]:
    path = run / "scores.json"
    if not path.exists():
        raise BadInputError(f"{run} holds no scores.json; evaluate into it first")
    return json.loads(path.read_text(encoding="utf-8"))


def _bars(name: str, summaries: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """The run's numbers above the paper's; a column of another kind is named, so that nobody compares across."""
    scale = PROTOCOLS[name].scale if name in PROTOCOLS else 100.0
    rows = []
    for label, summary in summaries:
        headline = summary["headline"]
        low_high = summary.get("interval")
        note = f"{headline}, rule {summary['rule']}" + (f", {low_high[0]:.1f} to {low_high[1]:.1f}" if low_high else "")
        rows.append(_bar(label, summary[headline], scale, note, "own"))
    if name in COLUMNS:
        paper = column(name)
        rows += [_bar(model, value, scale, "", "") for model, value in sorted(paper.items(), key=lambda item: -item[1])]
        protocol = PROTOCOLS[name]
        rows.append(
            f"<tr><td colspan=4><small>Paper: {_escape(protocol.number)}; {_escape(protocol.program)}; judge "
            f"{_escape(protocol.judge or 'none')}. {_escape(protocol.caution)}</small></td></tr>"
        )
    return f"<table class=bars>{''.join(rows)}</table>"


def _bar(label: str, value: float | None, scale: float, note: str, kind: str) -> str:
    width = 0 if value is None else max(0.0, min(1.0, value / scale)) * 100
    shown = "-" if value is None else f"{value:.1f}"
    return (
        f"<tr class='{kind}'><td>{_escape(label)}</td><td><div class=bar style='width:{width:.1f}%'></div></td>"
        f"<td>{shown}</td><td><small>{_escape(note)}</small></td></tr>"
    )


def _breakdowns(label: str, summary: Mapping[str, Any]) -> str:
    tables = []
    for group, parts in summary.get("breakdown", {}).items():
        cells = "".join(
            f"<tr><td>{_escape(value)}</td>"
            + "".join(f"<td>{_escape(key)} {_number(number)}</td>" for key, number in numbers.items())
            + "</tr>"
            for value, numbers in parts.items()
        )
        tables.append(
            f"<details><summary>{_escape(label)} by {_escape(group)}</summary><table>{cells}</table></details>"
        )
    return "".join(tables)


def _questions(runs: Sequence[Path]) -> list[str]:
    """Every question once, with what each run and mode answered."""
    questions: dict[tuple[str, str], list[tuple[str, dict[str, Any]]]] = {}
    for run in runs:
        counts: dict[tuple[str, str], int] = {}
        for _, row in iter_jsonl(run / "verdicts.jsonl"):
            task = (row["benchmark"], row["mode"])
            counts[task] = counts.get(task, 0) + 1
            if counts[task] <= MAX_QUESTIONS:
                label = f"{run.name} {row['mode']}"
                questions.setdefault((row["benchmark"], row["id"]), []).append((label, row))
    return [_question(name, rows) for (name, _), rows in questions.items()]


def _question(name: str, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    first = rows[0][1]
    states = {verdict_state(row) for _, row in rows}
    if len({verdict_state(row) == "right" for _, row in rows}) > 1:
        states.add("flipped")
    answers = "".join(
        f"<div class=answer><b>{_escape(label)}</b> <span class={verdict_state(row)}>{verdict_state(row)}</span> "
        f"<small>{_escape(row['extracted'] or '')} ({_escape(row['reason'])})</small>"
        f"<pre>{_escape(row['answer'] or '')}</pre></div>"
        for label, row in rows
    )
    choices = "".join(f"<br>{chr(65 + i)}. {_escape(choice)}" for i, choice in enumerate(first["choices"]))
    return (
        f"<div class=question data-states='{' '.join(sorted(states))}'>{_thumbnail(first['images'])}<div>"
        f"<small>{_escape(name)} {_escape(first['id'])}</small><p>{_escape(first['question'])}{choices}<br>"
        f"<small>gold: {_escape(first['gold'] or '-')}</small></p><div class=answers>{answers}</div></div></div>"
    )


def _thumbnail(images: Sequence[str]) -> str:
    if not images:
        return ""
    try:
        picture = open_image(Path(images[0]))
    except BadInputError:
        return "<div><small>picture not at hand</small></div>"
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return f"<div><img src='data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}' alt=''></div>"


def _number(value: Any) -> str:
    return f"{value:.1f}" if isinstance(value, float) else "-" if value is None else _escape(str(value))


def _escape(text: str) -> str:
    # A lone surrogate in an answer cannot be written as UTF-8.
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"))
