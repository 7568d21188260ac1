"""M3CoT: multi-step multiple-choice questions from science, commonsense and mathematics, 2,318 in the test split.

Source: LightChen233/M3CoT, Hub LightChen2333/M3CoT (CC BY-SA 4.0). InternVL reads a ScienceQA-shaped copy, Hub
Weiyun1025/M3CoT-ScienceQA-Format.
Example: "What is the likely purpose of the troll statue under the bridge?" with four options -> C.
Number: accuracy in per cent. The train split, with human rationales, is part of MMPR: scores of models trained on
MMPR are in-domain.

Rules
- official (utils/metric.py): between the [Answer] mark and the next, the last "(x)" of any letter; else the last option
  whose text occurs; else the last option letter, then the last small one, standing between spaces. "Both (A) and (B)"
  is B, and the article "a" is A.
- internvl (scienceqa/evaluate_scienceqa.py): of a chain of thought the first marked answer; one character is the
  answer; else the first *character* if it is an option letter ("Cannot tell" is C); else the first option whose text
  occurs, case-sensitive; else "X." or "(X)". The original crashes on "(B"; here it is unanswered.
- ours: the option that `internvl_mpo.answers` reads; several options, none, or one that is denied are unanswered.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_mpo.benchmarks.common import (
    LETTERS,
    Example,
    Mode,
    Rule,
    Score,
    Source,
    first_marked_answer,
    reply_text,
    summarise_accuracy,
)
from internvl_mpo.benchmarks.extraction import choose_option
from internvl_mpo.benchmarks.sources import image_source, parse_list, read_rows, shared_picture
from internvl_mpo.prompts import ask

NAME = "m3cot"
TITLE = "M3CoT"
HUB_ID = "LightChen2333/M3CoT:test"
RULES: tuple[Rule, ...] = ("ours", "official", "internvl")
MAX_NEW_TOKENS: Mapping[Mode, int] = {"direct": 100, "cot": 4096}
CLUSTER = "pictures"


def examples(source: Source, image_root: str | Path | None = None) -> list[Example]:
    """Return the questions of Hub rows, of rows in their form, or of the ScienceQA-shaped copy."""
    rows, root = read_rows(source, "test*.jsonl", "*.jsonl", "*.json")
    root = Path(image_root) if image_root else root
    found: dict[str, Example] = {}
    for row in rows:
        answer = row["answer"]
        example = Example(
            id=str(row.get("id", row.get("image"))),
            question=row["question"],
            answer=LETTERS[answer] if isinstance(answer, int) else str(answer),
            images=(image_source(row["image"], root),) if row.get("image") else (),
            cluster=shared_picture(row, row.get("image")),
            choices=tuple(parse_list(row["choices"])),
            groups={key: (str(row[key]),) for key in ("domain", "topic") if row.get(key)},
            details={"hint": row.get("context") or row.get("hint") or ""},
        )
        found.setdefault(example.id, example)
    return list(found.values())


def prompt(example: Example, mode: Mode) -> str:
    """Return hint, question and options, with the instruction to answer by letter or in the chain-of-thought prompt."""
    options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, example.choices, strict=False)]
    return ask("\n".join(filter(None, [example.details.get("hint"), example.question, *options])), mode, "en")


def score(example: Example, answer: str | None, rule: Rule = "ours", mode: Mode = "cot") -> Score:
    """Return whether the answer names the gold option; see the rules above."""
    text = reply_text(answer)
    if rule == "ours":
        letter, reason = choose_option(text, example.choices, example.question)
    elif rule == "official":
        letter, reason = _official(text, example.choices)
    else:
        letter, reason = _internvl(first_marked_answer(text) if mode == "cot" else text, example.choices)
    return Score(
        id=example.id,
        value=float(letter == example.answer),
        extracted=letter,
        reason=reason,
        groups=example.groups,
        cluster=example.cluster,
    )


def summarise(scores: Sequence[Score], rule: Rule = "ours") -> dict[str, Any]:
    """Return accuracy, with breakdowns by domain and topic."""
    return summarise_accuracy(scores, CLUSTER)


def _official(text: str, choices: Sequence[str]) -> tuple[str | None, str]:
    if "[Answer]" in text:
        text = text.split("[Answer]")[-1].split("[Rationale]")[0].split("[Context]")[0]
    letters = re.findall(r"\(([A-Za-z])\)", text)
    if letters:
        return letters[-1].upper(), "last letter in parentheses"
    options = list(zip(LETTERS, choices, strict=False))
    lowered = text.lower()
    named = [letter for letter, choice in options if choice.lower() in lowered]
    if named:
        return named[-1], "last option whose text occurs"
    for separator in "\n.,!?":
        text = text.replace(separator, " ")
    text = f" {text} "
    for spell, how in ((str.upper, "letter on its own"), (str.lower, "small letter on its own")):
        standing = [letter for letter, _ in options if f" {spell(letter)} " in text]
        if standing:
            return standing[-1], how
    return None, "no option found"


def _internvl(text: str, choices: Sequence[str]) -> tuple[str | None, str]:
    text = text.strip()
    letters = LETTERS[: len(choices)]
    if len(text) <= 1:
        return (text, "one character") if text else (None, "empty")
    if text[0] in letters:
        return text[0], "first character"
    for letter, choice in zip(letters, choices, strict=False):
        if choice in text:
            return letter, "first option whose text occurs"
    if text[1] == ".":
        return text[0], "letter before a full stop"
    if text[0] == "(" and text[2:3] == ")":
        return text[1], "letter in parentheses"
    return None, "no option found"
