"""CRPE, relation part: which statement about subject, predicate or object is true? Each question is asked four times.

Source: OpenGVLab/all-seeing, Hub OpenGVLab/CRPE (Apache-2.0): 7,576 rows are 1,894 questions, each with its right
option at A, B, C and D in consecutive rows. Pictures are COCO val2017 and the Hub's abnormal_images.zip.
Example: "What is the relationship between the man and the horse?" with options A-D -> B.
Numbers, in per cent: `circular` counts a question only if all four rows are right, and is the mean of the three
categories (all-seeing's published number); `circular_pooled` is the same over all questions; `per_row` is the accuracy
of single rows (VLMEvalKit before September 2025). The paper's InternVL rows are `per_row`, its LLaVA row `circular`.

Rules
- official (eval_crpe.py): the reply is exactly the one right letter.
- vlmevalkit (utils/crpe.py, also internvl's protocol): of a chain of thought the first marked answer; the first
  character if it is A-D; any other reply longer than a character is **right**, because the gold answer has no text to
  look for. The original crashes on an empty reply; here it is wrong.
- ours: the option that `internvl_mpo.answers` reads.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_mpo.benchmarks.common import (
    Example,
    Mode,
    Rule,
    Score,
    Source,
    bootstrap_interval,
    count_outcomes,
    first_marked_answer,
    percent,
    reply_text,
    resampled,
)
from internvl_mpo.benchmarks.extraction import choose_option
from internvl_mpo.benchmarks.sources import image_source, read_rows
from internvl_mpo.prompts import ask

NAME = "crpe"
TITLE = "CRPE (relation)"
HUB_ID = "OpenGVLab/CRPE:test"
RULES: tuple[Rule, ...] = ("ours", "official", "vlmevalkit")
MAX_NEW_TOKENS: Mapping[Mode, int] = {"direct": 100, "cot": 4096}
CLUSTER = "question groups"
NUM_ROTATIONS = 4
_OPTION = re.compile(r"(?m)^\s*([A-D])[.):]\s*(.+?)\s*$")
_LETTER_ONLY = re.compile(r"\s*Answer with the option's letter from the given choices directly\.?\s*$")


def examples(source: Source, image_root: str | Path | None = None) -> list[Example]:
    """Return the rows of `crpe_relation.jsonl`, a VLMEvalKit table, or the Hub."""
    rows, root = read_rows(source, "crpe_relation.jsonl", "*.jsonl", "*.tsv")
    root = Path(image_root) if image_root else root
    seen: dict[str, int] = {}
    found = []
    for row in rows:
        category = row["category"]
        position = seen.get(category, 0)
        seen[category] = position + 1
        text = row.get("text") or row["question"]
        found.append(
            Example(
                id=str(row.get("question_id", row.get("index"))),
                question=_LETTER_ONLY.sub("", text),
                answer=str(row.get("correct_option", row.get("answer"))),
                images=(image_source(row["image"], root),) if row.get("image") else (),
                choices=tuple(choice for _, choice in _OPTION.findall(text)),
                groups={"category": (category,)},
                cluster=f"{category}-{position // NUM_ROTATIONS}",
            )
        )
    return found


def prompt(example: Example, mode: Mode) -> str:
    """Return question and options, with the instruction to answer by letter or in the chain-of-thought prompt."""
    return ask(example.question, mode, "en")


def score(example: Example, answer: str | None, rule: Rule = "ours", mode: Mode = "cot") -> Score:
    """Return whether this row names the right option; see the rules above."""
    text = reply_text(answer)
    gold = example.answer or ""
    if rule == "ours":
        letter, reason = choose_option(text, example.choices or "ABCD", example.question)
    elif rule == "official":
        letter, reason = (text, "one character") if len(text) == 1 else (None, "not exactly one character")
        gold = gold if len(gold) == 1 else ""
    else:
        letter, reason = _vlmevalkit(first_marked_answer(text).strip() if mode == "cot" else text, gold)
    return Score(
        id=example.id,
        value=float(bool(gold) and letter == gold),
        extracted=letter,
        reason=reason,
        groups=example.groups,
        cluster=example.cluster,
    )


def summarise(scores: Sequence[Score], rule: Rule = "ours") -> dict[str, Any]:
    """Return the circular and the per-row accuracy; questions with fewer than four scored rows are counted apart."""
    scored = [score for score in scores if score.value is not None]
    rows: dict[str, list[Score]] = {}
    for score in scored:
        rows.setdefault(score.cluster, []).append(score)
    whole = [part for part in rows.values() if len(part) == NUM_ROTATIONS]
    circular = [(part[0].groups["category"][0], all(score.value for score in part)) for part in whole]
    per_row = [score.value for score in scored]
    headline = "per_row" if rule == "vlmevalkit" else "circular"
    return {
        "headline": headline,
        "circular": _macro(circular),
        "circular_pooled": percent([right for _, right in circular]),
        "per_row": percent(per_row),
        "interval": bootstrap_interval(per_row, percent, [score.cluster for score in scored])
        if headline == "per_row"
        else bootstrap_interval(circular, _macro),
        "resampled": resampled([score.cluster for score in scored], CLUSTER),
        "num_questions": len(rows),
        "num_incomplete": len(rows) - len(whole),
        **count_outcomes(scores),
        "breakdown": {
            "category": {
                category: {
                    "circular": percent([right for name, right in circular if name == category]),
                    "per_row": percent([s.value for s in scored if s.groups["category"][0] == category]),
                    "num_examples": sum(s.groups["category"][0] == category for s in scored),
                }
                for category in sorted({score.groups["category"][0] for score in scored})
            }
        },
    }


def _vlmevalkit(text: str, gold: str) -> tuple[str | None, str]:
    if not text:
        return None, "empty"
    if len(text) == 1 or text[0] in "ABCD":
        return text[0], "first character"
    return gold[:1], "no letter first: counted as right upstream"


def _macro(circular: Sequence[tuple[str, bool]]) -> float | None:
    """Mean of the categories' accuracies."""
    by_category: dict[str, list[bool]] = {}
    for category, right in circular:
        by_category.setdefault(category, []).append(right)
    return percent([percent(part) / 100 for part in by_category.values()])
