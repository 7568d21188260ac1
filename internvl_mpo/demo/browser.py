"""Questions of two runs of `evaluate_mpo.py` side by side: which runs there are, and where the two differ."""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from internvl_mpo.benchmarks.common import open_image
from internvl_mpo.demo.pictures import data_uri
from internvl_mpo.errors import BadInputError
from internvl_mpo.evaluation.report import verdict_state
from internvl_mpo.records import iter_jsonl

FILTERS = {
    "differ": "Where the two differ",
    "gained": "Only the second is right",
    "lost": "Only the first is right",
    "both_wrong": "Both wrong",
    "all": "All questions",
}


class Entry(NamedTuple):
    """One question of a benchmark with the rows of both runs."""

    benchmark: str
    mode: str
    id: str
    rows: tuple[dict[str, Any], dict[str, Any]]

    @property
    def states(self) -> tuple[str, str]:
        """right, wrong, unanswered or unscored, per run."""
        return verdict_state(self.rows[0]), verdict_state(self.rows[1])


@dataclass(frozen=True)
class Selection:
    """What the page is looking at.

    Attributes:
        entries: the questions that pass the filter.
        total: questions both runs have in this benchmark and mode.
    """

    entries: tuple[Entry, ...]
    total: int


def find_runs(folders: Sequence[str | Path]) -> dict[str, Path]:
    """Return name -> folder of every finished run in the folders or one level below."""
    found: dict[str, Path] = {}
    for folder in map(Path, folders):
        candidates = [folder, *sorted(folder.iterdir())] if folder.is_dir() else []
        for candidate in candidates:
            if (candidate / "verdicts.jsonl").is_file():
                name = candidate.name if candidate.name not in found else str(candidate)
                found[name] = candidate
    return found


def tasks(run_a: Path, run_b: Path) -> list[str]:
    """Return the "benchmark/mode" names that both runs have, in the first one's order."""
    names_a, names_b = (dict.fromkeys(f"{b}/{m}" for b, m, _ in _rows(run)) for run in (run_a, run_b))
    return [name for name in names_a if name in names_b]


def select(run_a: Path, run_b: Path, task: str, which: str) -> Selection:
    """Return the questions of a task that pass a filter.

    Raises:
        BadInputError: unknown filter, or a folder is no run.
    """
    if which not in FILTERS:
        raise BadInputError(f"unknown filter '{which}'; expected one of {', '.join(FILTERS)}")
    rows_a, rows_b = _rows(run_a), _rows(run_b)
    benchmark, _, mode = task.rpartition("/")
    entries = [
        Entry(*key, (row, rows_b[key])) for key, row in rows_a.items() if key[:2] == (benchmark, mode) and key in rows_b
    ]
    return Selection(tuple(entry for entry in entries if _passes(entry, which)), len(entries))


def question_html(entry: Entry) -> str:
    """Return one question as HTML, everything in it escaped: picture, text, gold answer, verdicts."""
    row = entry.rows[0]
    choices = "".join(f"<li>{html.escape(str(choice))}</li>" for choice in row["choices"])
    pictures = "".join(_picture(path, number) for number, path in enumerate(row["images"], start=1))
    gold = f"<p class='gold'>Right answer: <b>{_escape(row['gold'])}</b></p>" if row["gold"] else ""
    return (
        f"<article class='bench'><div class='bench-pictures'>{pictures}</div><div><p class='muted'>"
        f"{_escape(entry.benchmark)} · {_escape(entry.mode)} · {_escape(entry.id)}</p>"
        f"<p class='bench-question'>{_escape(row['question'])}</p>"
        f"{f'<ol type=A>{choices}</ol>' if choices else ''}{gold}</div></article>"
    )


def verdict_html(entry: Entry, side: int, run: str) -> str:
    """Return how a run did on a question as HTML: mark, extracted answer, the rule's reason; `side` is 0 or 1."""
    row, state = entry.rows[side], entry.states[side]
    mark = {"right": "✓", "wrong": "✗"}.get(state, "?")
    extracted = f" · read as <b>{_escape(row['extracted'])}</b>" if row["extracted"] is not None else ""
    return (
        f"<h3>{_escape(run)}</h3><p class='verdict-line {state}'>{mark} {state}{extracted} "
        f"<span class='muted'>({_escape(row['reason'])})</span></p>"
    )


def _passes(entry: Entry, which: str) -> bool:
    first, second = entry.states
    if which == "differ":
        return (first == "right") != (second == "right") or entry.rows[0]["extracted"] != entry.rows[1]["extracted"]
    if which == "gained":
        return first != "right" and second == "right"
    if which == "lost":
        return first == "right" and second != "right"
    return which == "all" or (first != "right" and second != "right")


@lru_cache(maxsize=16)
def _read(path: Path, changed: float) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(row["benchmark"], row["mode"], row["id"]): row for _, row in iter_jsonl(path)}


def _rows(run: Path) -> dict[tuple[str, str, str], dict[str, Any]]:
    path = run / "verdicts.jsonl"
    if not path.is_file():
        raise BadInputError(f"{run} holds no verdicts.jsonl; evaluate into it first")
    return _read(path, path.stat().st_mtime)


def _picture(path: str, number: int) -> str:
    try:
        image = open_image(Path(path)).convert("RGB")
    except (BadInputError, OSError, ValueError):
        return "<p class='muted'>picture not at hand</p>"
    image.thumbnail((480, 480))
    if max(image.size) < 160:
        times = 160 // max(image.size) + 1
        image = image.resize((image.width * times, image.height * times))
    return f"<img src='{data_uri(image)}' alt='Picture {number} of the question'>"


def _escape(text: Any) -> str:
    return html.escape(str(text).encode("utf-8", "replace").decode("utf-8"))
