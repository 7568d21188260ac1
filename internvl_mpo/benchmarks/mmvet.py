"""MM-Vet: 218 open questions that need several capabilities at once; a judge gives each answer 0 to 1.

Source: yuweihao/MM-Vet, Hub whyu/mm-vet. Code Apache-2.0, **data CC BY-NC 4.0**: load it, never bundle it.
Example: "What is x in the equation?", gold "-1<AND>-5" (both needed; <OR> separates alternatives).
Number: mean score x 100, mean and deviation over judge runs; by capability and by their combination.

The original judge is gpt-4-0613, five runs; VLMEvalKit asks gpt-4-1106-preview once. The two are not comparable, nor
is any other judge: compare models under one judge. `JUDGE_PROMPT` is worded by us; give the original's text with
`--judge_prompts` where its license allows.

Rules for a judge's reply
- official: its first word, up to a space, is a number from 0 to 1; anything else is asked for five times more, then 0.
- vlmevalkit: the whole reply is a number from 0 to 1; anything else is asked for four times more, then 0.
- ours: a number from 0 to 1, with or without "score:", bold and a full stop; anything else is asked for as
  officially, then leaves the answer unscored.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_mpo.benchmarks.common import Example, Mode, Rule, Score, Source, breakdown
from internvl_mpo.benchmarks.judging import fill, finite, mean_of, settled_text, summarise_runs
from internvl_mpo.benchmarks.sources import image_source, parse_list, read_rows, shared_picture

NAME = "mmvet"
TITLE = "MM-Vet"
HUB_ID = "whyu/mm-vet:test"
RULES: tuple[Rule, ...] = ("ours", "official", "vlmevalkit")
MAX_NEW_TOKENS: Mapping[Mode, int] = {"direct": 1000, "cot": 4096}
CLUSTER = "pictures"
JUDGE_MAX_NEW_TOKENS = 16
JUDGE_PROMPT = """Grade an answer against the ground truth. Elements joined by <AND> are all required; of elements \
joined by <OR> one is enough. An answer with everything required is 1.0, one with nothing required is 0.0, and partly \
right answers lie between in steps of 0.1: for the ground truth "-1 <AND> -5", "x = 3" is 0.0, "x = -1" is 0.5, and \
"x = -1 or x = -5" is 1.0. Extra detail does no harm unless it contradicts the ground truth.

Question: {question}
Ground truth: {gold}
Answer: {answer}

Reply with the grade alone, a number from 0.0 to 1.0."""

# A reply that is no grade is asked again: by the original five times, by VLMEvalKit four, each time hotter.
JUDGE_RETRIES: Mapping[Rule, tuple[float, ...]] = {
    "ours": (0.0, 0.5, 1.0, 1.5, 2.0),
    "official": (0.0, 0.5, 1.0, 1.5, 2.0),
    "vlmevalkit": (0.5, 1.0, 1.5, 2.0),
}
JUDGE_REMINDER = "\n\nYour last reply was no grade. Reply with a number from 0.0 to 1.0 and nothing else."

# The chain-of-thought prompt without its final-answer clause, as released MPO checkpoints were evaluated here.
_COT = "Your task is to answer the question below. Give step by step reasoning. \n\nQuestion:\n\n"


def examples(source: Source, image_root: str | Path | None = None) -> list[Example]:
    """Return the questions of `mm-vet.json`, a VLMEvalKit table, or Hub rows."""
    rows, root = read_rows(source, "mm-vet.json", "*.tsv", "*.json*")
    root = Path(image_root) if image_root else root
    if root is not None and image_root is None and (root / "images").is_dir():
        root = root / "images"
    found = []
    for row in rows:
        capabilities = row.get("capability") or row.get("category") or []
        if isinstance(capabilities, str):
            capabilities = (
                parse_list(capabilities) if capabilities.startswith("[") else re.findall(r"[a-z]+", capabilities)
            )
        capabilities = sorted(set(capabilities))
        picture = row.get("imagename") or row.get("image")
        found.append(
            Example(
                id=str(next(row[key] for key in ("id", "question_id", "index") if key in row)),
                question=row["question"],
                answer=str(row["answer"]),
                images=(image_source(picture, root),) if picture else (),
                cluster=shared_picture(row, picture),
                groups={"capability": tuple(capabilities), "combination": ("_".join(capabilities),)},
            )
        )
    return found


def prompt(example: Example, mode: Mode) -> str:
    """Return the question alone, or after the request to reason step by step."""
    return example.question if mode == "direct" else _COT + example.question


def judge_request(example: Example, answer: str, template: str = JUDGE_PROMPT) -> str:
    """Return what a judge is asked."""
    gold = (example.answer or "").replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    return fill(template, {"question": example.question, "gold": gold, "answer": answer})


def parse_reply(reply: str, rule: Rule = "ours") -> float | None:
    """Return the score in a judge's reply, None where there is none."""
    if rule == "ours":
        match = _GRADE.fullmatch(unicodedata.normalize("NFKC", settled_text(reply, rule)))
        return float(match.group(1)) if match else None
    return _number(reply, rule) or 0.0


def is_readable(reply: str, rule: Rule = "ours") -> bool:
    """Return whether a judge's reply is a grade; a reply that is none is asked for again."""
    return (parse_reply(reply) if rule == "ours" else _number(reply, rule)) is not None


def _number(reply: str, rule: Rule) -> float | None:
    number = finite(reply.split(" ")[0] if rule == "official" else reply)
    return number if number is not None and 0 <= number <= 1 else None


# No sign before the number but a plus: "-0.1" and ">0.5" are no grades.
_GRADE = re.compile(
    r"[\s*_`\"'(\[]{0,8}(?:(?:correctness|score|grade)[\s*_:=]{1,8}){0,2}\+?(0(?:\.\d+)?|1(?:\.0+)?|\.\d+)[\s*_`\"')\].]{0,8}",
    re.I,
)


def score(
    example: Example, answer: str | None, rule: Rule = "ours", mode: Mode = "cot", replies: Sequence[str] = ()
) -> Score:
    """Return the mean of the judge's scores of an answer; unscored without replies."""
    runs = [parse_reply(reply, rule) for reply in replies]
    return Score(
        id=example.id,
        value=mean_of(runs),
        extracted=settled_text(answer, rule).strip() or None,
        reason="no judge reply" if not runs else f"{sum(run is not None for run in runs)} of {len(runs)} runs scored",
        groups=example.groups,
        cluster=example.cluster,
        details={"runs": runs},
    )


def summarise(scores: Sequence[Score], rule: Rule = "ours") -> dict[str, Any]:
    """Return the mean score x 100 over runs, with breakdowns by capability and combination."""
    scored = [score for score in scores if score.value is not None]
    return {
        **summarise_runs("total", scores, _percent, CLUSTER),
        "breakdown": breakdown(scored, lambda part: _percent([score.value for score in part])),
    }


def _percent(values: Sequence[float]) -> float | None:
    mean = mean_of(values)
    return None if mean is None else 100 * mean
