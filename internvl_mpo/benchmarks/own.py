"""Your own questions with known answers: `--benchmarks own --data FILE.jsonl`.

Source: JSONL of Question rows, one object a line; docs/evaluate_your_own.md. Picture paths are relative to the file's
folder. Options stand in the question, one a line; several accepted answers are a JSON list.
Example: {"image": "a.png", "question": "What is 3 times 6?", "answer": "18", "source": "tables"}
Numbers: accuracy in per cent, the unanswered share, and a breakdown by `source`.
Rule: the last marked or boxed answer counts, else the last line, as in the published benchmarks;
`internvl_mpo.answers`, which judges training answers too, compares it with the ground truth.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_mpo.answers.comparing import Outcome, accepted_answers, compare_answers
from internvl_mpo.benchmarks.common import Example, Mode, Rule, Score, Source, reply_text, summarise_accuracy
from internvl_mpo.benchmarks.extraction import short_answer
from internvl_mpo.benchmarks.sources import image_source, read_rows
from internvl_mpo.errors import BadInputError, RowError
from internvl_mpo.prompts import ask
from internvl_mpo.records import Question

NAME = "own"
TITLE = "Own questions"
HUB_ID = None
RULES: tuple[Rule, ...] = ("ours",)
MAX_NEW_TOKENS: Mapping[Mode, int] = {"direct": 100, "cot": 4096}
CLUSTER = "pictures"


def examples(source: Source, image_root: str | Path | None = None) -> list[Example]:
    """Return the questions of a file, or of `test.jsonl` in a folder.

    Raises:
        BadInputError: a row has no answer, earlier turns, which are not asked, or a picture that is not there.
    """
    rows, folder = read_rows(source, "test.jsonl")
    root = Path(image_root) if image_root else folder
    return [_example(row, f"{source} row {number}", root) for number, row in enumerate(rows, start=1)]


def _example(row: Mapping[str, Any], where: str, root: Path | None) -> Example:
    question = Question.from_json(row, where=where)
    if question.answer is None:
        raise RowError("no answer to compare with; give each row an `answer`", where)
    try:
        accepted_answers(question.answer)
    except BadInputError as error:
        raise RowError(str(error), where) from error
    if question.context:
        raise RowError(
            "it has a system message or earlier turns, and questions are asked without; leave them out", where
        )
    images = tuple(image_source(image, root) for image in question.images)
    for image in images:
        if isinstance(image, Path) and not image.is_file():
            raise RowError(f"there is no picture {image}; --image_root names the folder of pictures", where)
    return Example(
        id=question.id,
        question=question.question,
        answer=question.answer,
        images=images,
        groups={"source": (question.source,)} if question.source else {},
        cluster="\n".join(question.images),
    )


def prompt(example: Example, mode: Mode) -> str:
    """Return the question with the one-word or letter instruction, or in the chain-of-thought prompt."""
    return ask(example.question, mode)


def score(example: Example, answer: str | None, rule: Rule = "ours", mode: Mode = "cot") -> Score:
    """Return whether the final answer equals the ground truth."""
    said = short_answer(reply_text(answer))
    source = "".join(example.groups.get("source", ()))
    verdict = compare_answers(said, example.answer or "", source=source, question=example.question)
    return Score(
        id=example.id,
        value=float(verdict.outcome is Outcome.RIGHT),
        extracted=None if verdict.outcome is Outcome.UNPARSABLE else verdict.answer,
        reason=f"{verdict.rule}: {verdict.reason}",
        groups=example.groups,
        cluster=example.cluster,
    )


def summarise(scores: Sequence[Score], rule: Rule = "ours") -> dict[str, Any]:
    """Return accuracy with its interval, the unanswered share, and the accuracy of each source."""
    return summarise_accuracy(scores, CLUSTER)
