"""The findings of `check` as a table for the terminal and as one self-contained page."""

import base64
import html
import io
import math
from collections import Counter
from pathlib import Path
from typing import Any

from internvl_mpo.mmpr.card import draw_lengths, length_row
from internvl_mpo.mmpr.findings import KINDS, Report
from internvl_mpo.mmpr.release import split_subset_name

_HOW = {"both": "found by picture and words", "picture": "by picture", "question": "by words"}
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #15803d; --bad: #c2362b; --warn: #b7791f; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { margin-bottom: .2rem; } .note { opacity: .75; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); }
th { text-align: right; vertical-align: bottom; } td { text-align: right; font-variant-numeric: tabular-nums; }
td:first-child, th:first-child, td.text, th.text, td.rule { text-align: left; } td.rule { white-space: nowrap; }
td.text { overflow-wrap: anywhere; }
.error { color: var(--bad); font-weight: 600; } .warning { color: var(--warn); font-weight: 600; }
.verdict { padding: .6rem 1rem; border-left: 6px solid var(--good); background: var(--soft); }
.verdict.error { border-color: var(--bad); } .verdict.warning { border-color: var(--warn); }
.bar { display: inline-block; height: .7rem; background: var(--good); vertical-align: middle; }
.bar.less { background: var(--bad); } figure { margin: 0; } img { max-width: 100%; }
figure.plot { background: #fff; border-radius: .5rem; max-width: 46rem; margin-top: 1rem; }
.cards { margin-top: 1rem; display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .7rem; font-size: .85rem;
  overflow-wrap: anywhere; }
code { overflow-wrap: anywhere; }
"""


def text_table(report: Report) -> str:
    """Return one line per subset with what was found in it, and below it the findings with their first examples."""
    kinds = [kind for kind in KINDS if any(found == kind for found, _ in report.kinds)]
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
    said = "No errors and no warnings." if verdict == "clean" else f"{errors:,} errors, {warnings:,} warnings."
    title = f"Check of {html.escape(Path(report.data).name)}"
    body = [
        f"<h1>{title}</h1><p class=note>{html.escape(report.data)}</p>",
        f"<p class='verdict {verdict}'>{said} {sum(report.counts.values()):,} rows in {len(report.counts)} subsets, "
        f"{sum(report.statistics.image_formats.values()):,} pictures looked at.</p>",
        "<h2>Subsets</h2>",
        _subset_table(report),
        "<h2>Length of responses</h2><p class=note>In words. The bar shows how much longer (green) or shorter (red) "
        "chosen responses are than rejected ones; a model learns such a habit before anything else.</p>",
        _length_table(report),
        _plot(report),
        "<h2>How the responses of a pair differ</h2><p class=note>In words. A loss that pushes a rejected response "
        "down takes along what it shares with the chosen one: pairs that differ in one word are the ones that unlearn. "
        f"{_asked(report)}</p>",
        _difference_table(report),
        "<h2>Findings</h2>",
        _findings(report),
    ]
    if report.index is not None:
        rows = "".join(f"<tr><td>{name}<td class=text>{found}</tr>" for name, found in contamination_rows(report))
        body += [
            "<h2>Benchmarks</h2><p class=note>Questions by eight words in a row, pictures by their look: see for "
            "yourself what was found before you believe it.</p>",
            f"<div class=scroll><table>{rows}</table></div>",
            f"<div class=cards>{''.join(_card(report, *shown) for shown in report.shown)}</div>",
        ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{title}</title><style>{_STYLE}</style><body>{''.join(body)}</body></html>",
        encoding="utf-8",
    )


def _subsets(report: Report) -> list[str]:
    return list(dict.fromkeys([*report.counts, *(name for _, name in report.kinds if name)]))


def _number(report: Report, kind: str, subset: str) -> int:
    if subset == "total":
        return sum(number for (found, _), number in report.kinds.items() if found == kind)
    return report.kinds[kind, subset]


def _subset_table(report: Report) -> str:
    kinds = [kind for kind in KINDS if any(found == kind for found, _ in report.kinds)]
    head = "".join(f"<th>{kind}" for kind in kinds)
    rows = []
    for name in _subsets(report):
        source, rule = split_subset_name(name)
        cells = "".join(_cell(report, kind, name) for kind in kinds)
        expected = report.expected.get(name)
        rows.append(
            f"<tr><td>{html.escape(source)}<td class=rule>{rule}<td>{report.counts[name]:,}"
            f"<td>{'' if expected is None else f'{expected:,}'}{cells}</tr>"
        )
    total = "".join(_cell(report, kind, "total") for kind in kinds)
    rows.append(f"<tr><td><b>all</b><td><td><b>{sum(report.counts.values()):,}</b><td>{total}</tr>")
    columns = f"<tr><th>source<th class=text>rule<th>rows<th>meta.json says{head}</tr>"
    return f"<div class=scroll><table>{columns}{''.join(rows)}</table></div>"


def _cell(report: Report, kind: str, subset: str) -> str:
    number = _number(report, kind, subset)
    return f"<td class={KINDS[kind][0]}>{number:,}" if number else "<td>"


def _length_table(report: Report) -> str:
    rows = []
    for name, (question, chosen, rejected, ratio, longer) in length_rows(report):
        size = 5 * abs(math.log2(float(ratio) or 1e-2))
        bar = f"<span class='bar{' less' if float(ratio) < 1 else ''}' style='width:{min(size, 15):.1f}rem'></span>"
        rows.append(f"<tr><td>{html.escape(name)}<td>{question}<td>{chosen}<td>{rejected}<td>{ratio}<td>{longer}"
                    f"<td class=text>{bar}</tr>")  # fmt: skip
    head = "<tr><th>source and rule<th>question<th>chosen<th>rejected<th>ratio<th>chosen longer<th></tr>"
    return f"<div class=scroll><table>{head}{''.join(rows)}</table></div>"


def _asked(report: Report) -> str:
    if not report.model:
        return "With --model the table also says how likely a model finds both."
    return (
        f"Log-probs are those of {html.escape(report.model)}, over a sample; a gap near 0 between responses that are "
        "nearly equal says that the model does not tell them apart."
    )


def _difference_table(report: Report) -> str:
    head = "".join(f"<th>{column}" for column in difference_columns(report))
    rows = "".join(
        f"<tr><td>{html.escape(name)}{''.join(f'<td>{cell}' for cell in cells)}</tr>"
        for name, cells in difference_rows(report)
    )
    return f"<div class=scroll><table><tr><th>source and rule{head}</tr>{rows}</table></div>"


def _plot(report: Report) -> str:
    if not report.statistics.lengths:
        return ""
    image = io.BytesIO()
    draw_lengths(report.statistics.lengths, "words", image)
    uri = _uri(image.getvalue(), "png")
    return f"<figure class=plot><img alt='lengths of questions and responses' src='{uri}'></figure>"


def _findings(report: Report) -> str:
    parts = []
    for kind, (severity, meaning) in KINDS.items():
        number = _number(report, kind, "total")
        if number:
            shown = report.examples[kind]
            cells = ((html.escape(finding.where), html.escape(finding.detail)) for finding in shown)
            rows = "".join(
                f"<tr><td class=text><code>{where}</code><td class=text>{text}</tr>" for where, text in cells
            )
            more = (
                f"<p class=note>and {number - len(shown):,} more in the rejects file</p>" if number > len(shown) else ""
            )
            parts.append(
                f"<h3><span class={severity}>{severity}</span>: {kind}, {number:,}</h3>"
                f"<p class=note>{html.escape(meaning)}</p><div class=scroll><table>{rows}</table></div>{more}"
            )
    return "".join(parts) or "<p>None.</p>"


def _card(report: Report, example: int, where: str, picture: bytes) -> str:
    name, id = map(html.escape, report.index.examples[example])
    question = html.escape(report.index.questions[example][:200])
    return (
        f"<div class=card><img alt='training picture' src='{_uri(picture, 'jpeg')}'>"
        f"<p><code>{html.escape(where)}</code></p>"
        f"<p>looks like the picture of <b>{name} {id}</b>: {question}</p></div>"
    )


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
