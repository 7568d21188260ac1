"""The mini world's test: arithmetic on handwritten digits that no training picture shows.

Source: `python -m internvl_mpo.mini world` composes it from scikit-learn's digits (UCI, CC BY 4.0). `test.jsonl` holds
Question rows with their answers; picture paths are relative to its folder.
Example: "What is the product of the two digits, 18 or 12?" -> 18.
Numbers: accuracy in per cent, and the share of unparsable answers.
Rule: `internvl_mpo.answers` finds the final answer (after "Final answer:" in a chain of thought, the whole text of a
direct answer) and compares it with the ground truth.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_mpo.answers.comparing import Outcome, judge_response
from internvl_mpo.benchmarks.common import Example, Mode, Rule, Score, Source, reply_text, summarise_accuracy
from internvl_mpo.benchmarks.sources import image_source, read_rows
from internvl_mpo.errors import BadInputError
from internvl_mpo.prompts import ask
from internvl_mpo.records import Question

NAME = "mini"
TITLE = "Mini world"
HUB_ID = None
RULES: tuple[Rule, ...] = ("ours",)
MAX_NEW_TOKENS: Mapping[Mode, int] = {"direct": 32, "cot": 64}
CLUSTER = "pictures"  # every question has its own


def examples(source: Source, image_root: str | Path | None = None) -> list[Example]:
    """Return the questions of `test.jsonl`."""
    rows, folder = read_rows(source, "test.jsonl")
    root = Path(image_root) if image_root else folder
    found = []
    for row in rows:
        question = Question.from_json(row)
        if question.answer is None:
            raise BadInputError(f"question {question.id} of the mini world has no answer; give its test.jsonl")
        found.append(
            Example(
                id=question.id,
                question=question.question,
                answer=question.answer,
                images=tuple(image_source(image, root) for image in question.images),
            )
        )
    return found


def prompt(example: Example, mode: Mode) -> str:
    """Return the question with the one-word instruction, or in the chain-of-thought prompt."""
    return ask(example.question, mode, "en")


def score(example: Example, answer: str | None, rule: Rule = "ours", mode: Mode = "cot") -> Score:
    """Return whether the final answer equals the ground truth."""
    verdict = judge_response(
        reply_text(answer), example.answer or "", answer_format="marker" if mode == "cot" else "text"
    )
    return Score(
        id=example.id,
        value=float(verdict.outcome is Outcome.RIGHT),
        extracted=None if verdict.outcome is Outcome.UNPARSABLE else verdict.answer,
        reason=f"{verdict.rule}: {verdict.reason}",
    )


def summarise(scores: Sequence[Score], rule: Rule = "ours") -> dict[str, Any]:
    """Return accuracy with its interval and the unparsable share."""
    summary = summarise_accuracy(scores, CLUSTER)
    return {**summary, "unparsable": summary["unanswered"]}
