"""POPE: is a named object in the picture? Yes or no, over random, popular and adversarial absent objects.

Source: AoiDragon/POPE (MIT); pictures are COCO val2014. Two versions are in use: commit e3e39262 with 2,910 + 3,000 +
3,000 questions, which InternVL, LLaVA and the paper's table use, and today's head with 3 x 3,000 (also on the Hub).
Example: "Is there a snowboard in the image?" -> yes.
Numbers: F1 with yes as the positive class, in per cent. `f1` is the mean of the three categories' F1 (the table);
`f1_pooled` is one F1 over all questions (VLMEvalKit, lmms-eval). They differ in the second decimal.

Rules
- official (the repository's evaluate.py, the same in LLaVA and InternVL): the text before the first full stop, without
  commas, split at single spaces; a word No, no or not means no, **everything else means yes**: an empty answer, "NO",
  a refusal, Chinese.
- internvl: official, on a chain of thought's first marked answer.
- vlmevalkit: of a chain of thought the first marked answer; then the words yes and no after removal of punctuation.
  Both or neither is Unknown: not yes for F1, wrong for accuracy.
- ours: the last marked answer; yes or no as a word, at the beginning, or said in a plain sentence about what was asked
  ("There is no dog."). Both, neither, a hedge or a question is unanswered and wrong whatever the label: a false
  negative or a false positive.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_mpo.answers.choices import MAX_LINE
from internvl_mpo.answers.yes_no import yes_or_no
from internvl_mpo.benchmarks.common import (
    MAX_REPLY,
    SLOW_REPLY,
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
from internvl_mpo.benchmarks.extraction import final_segment
from internvl_mpo.benchmarks.sources import image_source, read_rows, shared_picture
from internvl_mpo.errors import BadInputError
from internvl_mpo.prompts import ask, strip_answer_instruction

NAME = "pope"
TITLE = "POPE"
HUB_ID = "lmms-lab/POPE:test"
RULES: tuple[Rule, ...] = ("ours", "official", "internvl", "vlmevalkit")
MAX_NEW_TOKENS: Mapping[Mode, int] = {"direct": 100, "cot": 4096}
CLUSTER = "pictures"
CATEGORIES = ("random", "popular", "adversarial")


def examples(source: Source, image_root: str | Path | None = None) -> list[Example]:
    """Return the questions of a folder with the three label files, a VLMEvalKit table, or Hub rows."""
    if isinstance(source, (str, Path)) and Path(source).is_dir() and list(Path(source).glob("coco_pope_*.json")):
        rows = []
        for category in CATEGORIES:
            labelled, root = read_rows(Path(source) / f"coco_pope_{category}.json")
            rows += [{**row, "category": category} for row in labelled]
    else:
        rows, root = read_rows(source, "*.tsv", "*.jsonl")
    root = Path(image_root) if image_root else root
    found = []
    for row in rows:
        label = str(row.get("label", row.get("answer", ""))).lower()
        if label not in ("yes", "no"):
            raise BadInputError(f"POPE question {row.get('question_id')} has label {label!r}; expected yes or no")
        category = row["category"]
        found.append(
            Example(
                id=f"{category}-{row.get('question_id', row.get('index'))}",
                question=strip_answer_instruction(row.get("text") or row["question"]),
                answer=label,
                images=(image_source(row["image"], root),) if row.get("image") else (),
                cluster=shared_picture(row, row.get("image")),
                groups={"category": (category,)},
            )
        )
    return found


def prompt(example: Example, mode: Mode) -> str:
    """Return the question with the one-word instruction, or in the chain-of-thought prompt."""
    return ask(example.question, mode, "en")


def score(example: Example, answer: str | None, rule: Rule = "ours", mode: Mode = "cot") -> Score:
    """Return whether the answer says what the label says; see the rules above."""
    text = reply_text(answer, SLOW_REPLY if rule == "vlmevalkit" else MAX_REPLY)
    if mode == "cot" and rule in ("internvl", "vlmevalkit"):
        text = first_marked_answer(text).strip()
    said, reason = _ours(text, example.question) if rule == "ours" else _READERS[rule](text)
    return Score(
        id=example.id,
        value=float(said == example.answer),
        extracted=said,
        reason=reason,
        groups=example.groups,
        cluster=example.cluster,
        details={"label": example.answer},
    )


def summarise(scores: Sequence[Score], rule: Rule = "ours") -> dict[str, Any]:
    """Return F1, accuracy, precision, recall and yes ratio, by category, pooled, and as the mean of categories."""
    scored = [score for score in scores if score.value is not None]
    outcomes = [(score.groups["category"][0], *_outcome(score, rule)) for score in scored]
    categories = {
        category: {
            **_rates(Counter(outcome[1:] for outcome in outcomes if outcome[0] == category)),
            "accuracy": percent([s.value for s in scored if s.groups["category"][0] == category]),
            "yes_ratio": percent([s.extracted == "yes" for s in scored if s.groups["category"][0] == category]),
            "num_examples": num,
        }
        for category, num in sorted(Counter(outcome[0] for outcome in outcomes).items())
    }
    clusters = [score.cluster for score in scored]
    statistic = _pooled_f1 if rule == "vlmevalkit" else _mean_f1
    return {
        "headline": "f1_pooled" if rule == "vlmevalkit" else "f1",
        "f1": _mean_f1(outcomes),
        "f1_pooled": _pooled_f1(outcomes),
        "accuracy": percent([score.value for score in scored]),
        "interval": bootstrap_interval(outcomes, statistic, clusters),
        "resampled": resampled(clusters, CLUSTER),
        **count_outcomes(scores),
        "breakdown": {"category": categories},
    }


_NEGATION = re.compile(r"(?<![^ ])(No|not|no)(?![^ ])")  # between single spaces: upstream splits at these alone


def _official(text: str) -> tuple[str, str]:
    negation = _NEGATION.search(text.split(".", 1)[0].replace(",", ""))
    return ("no", f"word {negation.group(1)}") if negation else ("yes", "no negation in the first sentence")


def _ours(text: str, question: str) -> tuple[str | None, str]:
    segment = final_segment(text)
    lines = segment.text.split("\n") if segment.how == "whole" else [segment.text]
    said = {yes_or_no(line[:MAX_LINE], question or "Is it there?") for line in (lines[0], lines[-1])} - {None}
    return (said.pop(), "says so") if len(said) == 1 else (None, "both yes and no" if said else "neither yes nor no")


_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")
_MAX_STOPS = 32  # upstream passes re.UNICODE (32) where re.sub expects a count


def _vlmevalkit(text: str) -> tuple[str | None, str]:
    text = text.lower()
    always = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        glued = always or mark + " " in text or " " + mark in text
        cleaned = cleaned.replace(mark, "" if glued else " ")
    words = _FULL_STOP.sub("", cleaned, count=_MAX_STOPS).split()
    if ("yes" in words) != ("no" in words):
        return ("yes" if "yes" in words else "no"), "the only one of yes and no"
    return None, "both yes and no" if "yes" in words else "neither yes nor no"


_READERS = {"official": _official, "internvl": _official, "vlmevalkit": _vlmevalkit}


def _outcome(score: Score, rule: Rule) -> tuple[bool, bool]:
    """(label is yes, answer counts as yes)."""
    label = score.details["label"] == "yes"
    if score.extracted is None:
        return label, (rule == "ours" and not label)
    return label, score.extracted == "yes"


def _rates(counts: Mapping[tuple[bool, bool], int]) -> dict[str, float | None]:
    true_yes, false_yes = counts.get((True, True), 0), counts.get((False, True), 0)
    false_no = counts.get((True, False), 0)

    def ratio(part: int, whole: int) -> float | None:
        return 100 * part / whole if whole else None

    return {
        "f1": ratio(2 * true_yes, 2 * true_yes + false_yes + false_no),
        "precision": ratio(true_yes, true_yes + false_yes),
        "recall": ratio(true_yes, true_yes + false_no),
    }


def _pooled_f1(outcomes: Sequence[tuple[str, bool, bool]]) -> float | None:
    return _rates(Counter((label, said) for _, label, said in outcomes))["f1"]


def _mean_f1(outcomes: Sequence[tuple[str, bool, bool]]) -> float | None:
    counts: dict[str, dict[tuple[bool, bool], int]] = {}
    for (category, label, said), num in Counter(outcomes).items():
        counts.setdefault(category, {})[label, said] = num
    values = [_rates(part)["f1"] for part in counts.values()]
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
