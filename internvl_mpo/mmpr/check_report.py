"""The findings of `check` as a table for the terminal and as one self-contained page."""

import io
import math
from collections import Counter
from pathlib import Path
from typing import Any

from internvl_mpo.files import atomic_writer
from internvl_mpo.html_page import embedded, render_page
from internvl_mpo.mmpr.card import draw_lengths, length_row
from internvl_mpo.mmpr.findings import KINDS, Report
from internvl_mpo.mmpr.release import split_subset_name

_HOW = {"both": "found by picture and words", "picture": "by picture", "question": "by words"}


def text_table(report: Report) -> str:
    """Return one line per subset with what was found in it, and below it the findings with their first examples."""
    kinds = _kinds(report)
    names = _subsets(report)
    width = max([len("subset"), *map(len, names)])
    lines = ["  ".join([f"{'subset':<{width}}", f"{'rows':>9}", *(f"{kind:>{max(7, len(kind))}}" for kind in kinds)])]
    for name in [*names, "total"]:
        cells = [_number(report, kind, name) for kind in kinds]
        rows = sum(report.counts.values()) if name == "total" else report.counts[name]
        numbers = (f"{cell or '-':>{max(7, len(kind))}}" for cell, kind in zip(cells, kinds, strict=True))
        lines.append("  ".join([f"{name:<{width}}", f"{rows:>9,}", *numbers]))
    lines += ["", "words of chosen and rejected, mean ratio, how often chosen is longer:"]
    for rule, words in length_rows(report):
        lines.append(f"  {rule:<{width}}  {words[1]:>8} {words[2]:>8} {words[3]:>6} {words[4]:>5}")
    lines += ["", f"how the responses of a pair differ: {', '.join(difference_columns(report))}:"]
    lines += [
        f"  {rule:<{width}}  " + " ".join(f"{cell:>8}" for cell in cells) for rule, cells in difference_rows(report)
    ]
    for kind in kinds:
        severity, meaning = KINDS[kind]
        lines += ["", f"{severity}: {kind}, {_number(report, kind, 'total'):,} ({meaning})"]
        lines += [f"  {finding.where}: {finding.detail}" for finding in report.examples[kind]]
    if report.index is not None:
        lines += ["", *(f"{name}: {found}" for name, found in contamination_rows(report))]
    return "\n".join(lines)


def length_rows(report: Report) -> list[tuple[str, list[str]]]:
    """Return (source and rule, words of question, chosen, rejected, ratio, share longer) of every source and rule."""
    return [
        (f"{source}, {rule}", length_row(report.statistics, source=source, rule=rule))
        for source, rule in sorted(report.statistics.rows)
    ]


def difference_columns(report: Report) -> list[str]:
    """Return the headings of `difference_rows`."""
    columns = ["chosen words before the first that differs", "words in common", "pairs that differ in one word"]
    likelihood = ["chosen", "rejected", "gap", "chosen likelier", "pairs scored"]
    return columns + [f"{likelihood[0]} (nats a token)", *likelihood[1:]] if report.model else columns


def difference_rows(report: Report) -> list[tuple[str, list[str]]]:
    """Return (source and rule, one cell for each of `difference_columns`) of every source and rule."""
    rows = []
    for key in sorted(report.differences.sums):
        mean, gap = report.differences.mean(key), report.gaps.get(key)
        cells = [f"{mean.place:.0%}", f"{mean.common:.0%}", f"{mean.one_word:.1%}"]
        if gap is not None:
            cells += [f"{gap.chosen:.2f}", f"{gap.rejected:.2f}", f"{gap.gap:+.2f}"]
            cells += [f"{gap.chosen_likelier:.0%}", f"{gap.pairs:,}"]
        elif report.model:
            cells += ["-"] * 4 + ["0"]
        rows.append((", ".join(key), cells))
    return rows


def report_json(report: Report) -> dict[str, Any]:
    """Return the numbers of the report, for programs."""
    differences = []
    for source, rule in sorted(report.differences.sums):
        gap = report.gaps.get((source, rule))
        row = {"source": source, "rule": rule, **report.differences.mean((source, rule))._asdict()}
        differences.append({**row, "likelihood": gap and {**gap._asdict(), "gap": gap.gap}})
    return {
        "data": report.data,
        "rows": dict(report.counts),
        "errors": report.num("error"),
        "warnings": report.num("warning"),
        "findings": [
            {"kind": kind, "subset": subset, "number": number} for (kind, subset), number in report.kinds.items()
        ],
        "model": report.model or None,
        "differences": differences,
    }


def contamination_rows(report: Report) -> list[tuple[str, str]]:
    """Return (benchmark, how many of its questions were found and by what)."""
    rows = []
    totals = Counter(name for name, _ in report.index.examples)
    for name, total in totals.items():
        found = {
            kind: sum(report.index.examples[example][0] == name for example in report.matched[kind]) for kind in _HOW
        }
        unread = report.index.num_unreadable[name]
        note = f"; {unread:,} of its pictures could not be read" if unread else ""
        said = ", ".join(f"{found[kind]:,} {how}" for kind, how in _HOW.items())
        rows.append((name, f"of {total:,} questions {said}{note}"))
    return rows


def write_report(report: Report, path: Path) -> None:
    """Write the page."""
    errors, warnings = report.num("error"), report.num("warning")
    verdict = "error" if errors else "warning" if warnings else "clean"
    page = render_page(
        "mmpr/check_report.html",
        report=report,
        name=Path(report.data).name,
        verdict=verdict,
        said="No errors and no warnings." if verdict == "clean" else f"{errors:,} errors, {warnings:,} warnings.",
        num_rows=sum(report.counts.values()),
        num_pictures=sum(report.statistics.image_formats.values()),
        kinds=_kinds(report),
        subsets=_subset_rows(report),
        lengths=_length_bars(report),
        plot=_plot(report),
        asked=_asked(report),
        difference_columns=difference_columns(report),
        difference_rows=difference_rows(report),
        findings=_findings(report),
        contamination=contamination_rows(report) if report.index is not None else None,
        cards=[_card(report, *shown) for shown in report.shown],
    )
    with atomic_writer(path) as out:
        out.write(page)


def _asked(report: Report) -> str:
    if not report.model:
        return "With --model the table also says how likely a model finds both."
    return (
        f"Log-probs are those of {report.model}, over a sample; a gap near 0 between responses that are "
        "nearly equal says that the model does not tell them apart."
    )


def _kinds(report: Report) -> list[str]:
    """The kinds of findings that were found at all, in the order of `KINDS`."""
    return [kind for kind in KINDS if any(found == kind for found, _ in report.kinds)]


def _subsets(report: Report) -> list[str]:
    return list(dict.fromkeys([*report.counts, *(name for _, name in report.kinds if name)]))


def _number(report: Report, kind: str, subset: str) -> int:
    if subset == "total":
        return sum(number for (found, _), number in report.kinds.items() if found == kind)
    return report.kinds[kind, subset]


def _subset_rows(report: Report) -> list[dict[str, Any]]:
    """A row of the table for each subset, and one for all."""
    kinds = _kinds(report)
    rows = []
    for name in _subsets(report):
        source, rule = split_subset_name(name)
        expected = report.expected.get(name)
        numbers = {"num_rows": f"{report.counts[name]:,}", "expected": "" if expected is None else f"{expected:,}"}
        rows.append({"source": source, "rule": rule, **numbers, "cells": [_cell(report, k, name) for k in kinds]})
    numbers = {"num_rows": f"{sum(report.counts.values()):,}", "expected": ""}
    rows.append({"source": "all", "rule": "", **numbers, "cells": [_cell(report, k, "total") for k in kinds]})
    return rows


def _cell(report: Report, kind: str, subset: str) -> tuple[str, str]:
    """Severity and number of a kind of finding; empty where there is none."""
    number = _number(report, kind, subset)
    return (KINDS[kind][0], f"{number:,}") if number else ("", "")


def _length_bars(report: Report) -> list[tuple[str, list[str], str, bool]]:
    """(source and rule, its numbers, width of the bar in rem, whether chosen responses are the shorter ones)."""
    rows = []
    for name, words in length_rows(report):
        ratio = float(words[3])
        width = min(5 * abs(math.log2(ratio or 1e-2)), 15)
        rows.append((name, words, f"{width:.1f}", ratio < 1))
    return rows


def _plot(report: Report) -> str:
    if not report.statistics.lengths:
        return ""
    image = io.BytesIO()
    draw_lengths(report.statistics.lengths, "words", image)
    return embedded(image.getvalue(), "png")


def _findings(report: Report) -> list[dict[str, Any]]:
    parts = []
    for kind, (severity, meaning) in KINDS.items():
        number, examples = _number(report, kind, "total"), report.examples[kind]
        if number:
            more = f"{number - len(examples):,}" if number > len(examples) else ""
            part = {"kind": kind, "severity": severity, "meaning": meaning, "number": f"{number:,}", "more": more}
            parts.append({**part, "examples": examples})
    return parts


def _card(report: Report, example: int, where: str, picture: bytes) -> dict[str, str]:
    benchmark, id = report.index.examples[example]
    question = report.index.questions[example][:200]
    return {
        "picture": embedded(picture, "jpeg"), "where": where, "benchmark": benchmark, "id": id, "question": question,
    }  # fmt: skip
