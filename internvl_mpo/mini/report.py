"""report.html of the quickstart: one self-contained page with pictures, answers before and after, and curves."""

import base64
import html
import io
from pathlib import Path
from typing import Any

from internvl_mpo.jsonl import iter_jsonl, read_whole_lines
from internvl_mpo.records import Question, read_rows

NAMES = {"start": "start model", "sft": "SFT on chosen", "dpo": "DPO", "bco": "BCO", "mpo": "MPO"}
COLORS = {"start": "#8a8f98", "sft": "#4c78a8", "dpo": "#e4a11b", "bco": "#7b5ea7", "mpo": "#1a9850"}
NUM_PICTURES = 24

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #1a9850; --bad: #d6473c; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } th, td { padding: .35rem .9rem; border-bottom: 1px solid var(--line); }
td { text-align: right; font-variant-numeric: tabular-nums; } td:first-child, th:first-child { text-align: left; }
tr.mpo { font-weight: 600; } .note { opacity: .75; } .table { overflow-x: auto; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .8rem; }
.card img { height: 64px; image-rendering: auto; border-radius: .25rem; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .6rem; }
.answer { background: var(--soft); border-left: 4px solid var(--bad); padding: .4rem .6rem; white-space: pre-wrap;
  font-size: .85rem; overflow-wrap: anywhere; } .answer.right { border-color: var(--good); }
.answer b { display: block; font-size: .75rem; } .plots { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); } .plots figure { margin: 0; background: #fff;
  border-radius: .5rem; } .plots img { width: 100%; }
figcaption { color: #333; padding: 0 .8rem .5rem; font-size: .85rem; }
"""


def write_report(folder: Path, found: dict[str, Any]) -> Path:
    """Write `report.html` into the folder of a quickstart.

    Args:
        folder: `--output` of the quickstart.
        found: the content of results.json.

    Returns:
        The page.
    """
    methods = found["methods"]
    start, mpo = methods["start"], methods.get("mpo", methods["start"])
    title = "MPO for InternVL: the whole path in small"
    body = [
        f"<h1>{title}</h1>",
        f"<p>A model of 1 M weights in the architecture of InternVL2 answers questions about handwritten digits. After "
        f"100 steps of Mixed Preference Optimization its chains of thought are right on "
        f"<b>{_percent(mpo['cot_accuracy'])}</b> of {found['num_test_questions']} questions about unseen digits, "
        f"before on {_percent(start['cot_accuracy'])}.</p>",
        _table(methods),
        f"<p class=note>Seed {found['seed']}, {found['total_seconds']:.0f} s on {found['machine']['cores']} cores "
        f"({html.escape(found['machine']['system'])}), {found['date']}. A tiny model in a tiny world: the numbers show "
        "that the programs work, not what MPO does to a large model.</p>",
        "<h2>Training</h2>",
        _plots(folder, [method for method in methods if method != "start"]),
        "<h2>Before and after</h2>",
        f"<p class=note>{NUM_PICTURES} of {found['num_test_questions']} questions; those whose verdict changed, for "
        "better or worse, come first.</p>",
        _cards(folder),
    ]
    page = folder / "report.html"
    page.write_text(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{title}</title><style>{_STYLE}</style><body>{''.join(body)}</body></html>",
        encoding="utf-8",
    )
    return page


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1f} %"


def _table(methods: dict[str, dict[str, Any]]) -> str:
    head = (
        "<tr><th>method<th>direct accuracy<th>chain-of-thought accuracy<th>unparsable answers<th>reward accuracy</tr>"
    )
    rows = [
        f"<tr class={name}><td>{NAMES[name]}<td>{_percent(row['direct_accuracy'])}<td>{_percent(row['cot_accuracy'])}"
        f"<td>{_percent(row['unparsable'])}<td>{_percent(row['reward_accuracy'])}</tr>"
        for name, row in methods.items()
    ]
    return f"<div class=table><table>{head}{''.join(rows)}</table></div>"


def _plots(folder: Path, methods: list[str]) -> str:
    """Curves of every training run: the loss terms, the rewards and the margin."""
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
        plots.append(
            f"<figure><img alt='{key} over the steps' src='{_data_uri(image.getvalue())}'>"
            f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        )
    return f"<div class=plots>{''.join(plots)}</div>"


def _smooth(values: list[float], width: int = 5) -> list[float]:
    """Running mean over the last `width` steps: 24 pairs a step are noisy."""
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def _cards(folder: Path) -> str:
    """Pictures with the chains of thought of the start model and of MPO; those that changed come first."""
    questions = {row.id: row for row in read_rows(folder / "world" / "test.jsonl", Question)}
    before, after = (_answers(folder / "eval" / method) for method in ("start", "mpo"))
    order = sorted(
        (key for key in before if key in after),
        key=lambda key: (before[key][1] == after[key][1], key),
    )
    cards = []
    for key in order[:NUM_PICTURES]:
        question = questions[key]
        image = _data_uri((folder / "world" / question.images[0]).read_bytes())
        cards.append(
            f"<div class=card><img alt='handwritten digits' src='{image}'><p>{html.escape(question.question)} "
            f"<span class=note>({html.escape(question.answer or '')})</span></p><div class=pair>"
            f"{_answer('start model', *before[key])}{_answer('MPO', *after[key])}</div></div>"
        )
    return f"<div class=cards>{''.join(cards)}</div>"


def _answers(run: Path) -> dict[str, tuple[str, bool]]:
    """Chain of thought and verdict of every question of an evaluation run."""
    rows = [row for _, row in iter_jsonl(run / "verdicts.jsonl")]
    return {row["id"]: (row["answer"] or "", row["value"] == 1) for row in rows if row["mode"] == "cot"}


def _answer(name: str, text: str, right: bool) -> str:
    verdict = "right" if right else "wrong"
    return f"<div class='answer {verdict}'><b>{name}: {verdict}</b>{html.escape(text)}</div>"


def _data_uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
