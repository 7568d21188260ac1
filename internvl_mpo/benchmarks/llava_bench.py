"""LLaVA-Bench (in the wild): 60 questions about 24 pictures; a judge rates the answer beside a reference answer.

Source: Hub liuhaotian/llava-bench-in-the-wild (Apache-2.0): questions, a caption per picture, and reference answers
written by a text-only GPT-4 from the captions.
Example: "What is the name of this famous sight in the photo?" -> "The famous sight in the photo is Diamond Head."
Number: mean rating of the answers / mean rating of the references x 100; above 100 is possible. All and per category.

The original judge is gpt-4-0314, InternVL's gpt-4-0613, VLMEvalKit's gpt-4-1106-preview. `JUDGE_PROMPT` is worded by
us; give the original's text with `--judge_prompts`.

Rules for a judge's reply
- official (eval_gpt_review_bench.py, summarize_gpt_review.py): the first line, commas read as spaces, is two numbers
  with one space between; otherwise both ratings are -1 and **stay in the means**. Each mean is rounded to three
  decimals before the division, the result to one.
- vlmevalkit: the same without the rounding to three decimals.
- ours: the first line that is not empty is two ratings from 1 to 10, "8/10, 9/10" included; other replies leave the
  answer unscored.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_mpo.benchmarks.common import Example, Mode, Rule, Score, Source
from internvl_mpo.benchmarks.judging import by_run, fill, mean_of, settled_text, summarise_runs
from internvl_mpo.benchmarks.sources import find_file, image_source, read_rows, shared_picture

NAME = "llava_bench"
TITLE = "LLaVA-Bench (wild)"
HUB_ID = None
RULES: tuple[Rule, ...] = ("ours", "official", "vlmevalkit")
MAX_NEW_TOKENS: Mapping[Mode, int] = {"direct": 1000}
CLUSTER = "pictures"
JUDGE_MAX_NEW_TOKENS = 1024
JUDGE_PROMPT = """Two assistants answered a user's question about a picture. You cannot see the picture; this \
describes it:

{context}

Question: {question}

Answer of assistant 1: {reference}

Answer of assistant 2: {answer}

Rate each answer from 1 to 10 for helpfulness, relevance, accuracy and level of detail. The order of the answers must \
not matter. On the first line write only the two ratings, assistant 1 first, separated by a space. Explain the ratings \
on the lines after it."""

_INSTRUCTION = " Please give a detailed answer."
_FAILED = (-1.0, -1.0)
Pair = tuple[float, float]


def examples(source: Source, image_root: str | Path | None = None) -> list[Example]:
    """Return the questions of a folder with questions, captions and reference answers, or of a VLMEvalKit table."""
    if isinstance(source, (str, Path)) and Path(source).is_dir() and list(Path(source).glob("questions.jsonl")):
        rows, root = read_rows(source, "questions.jsonl")
        captions, _ = read_rows(find_file(source, "context.jsonl"))
        references, _ = read_rows(find_file(source, "answers_gpt4.jsonl"))
        context = {row["image"]: row["caption"] for row in captions}
        reference = {row["question_id"]: row["text"] for row in references}
        rows = [{**row, "caption": context[row["image"]], "gpt4_ans": reference[row["question_id"]]} for row in rows]
    else:
        rows, root = read_rows(source, "*.tsv")
    root = Path(image_root) if image_root else root
    if root is not None and image_root is None and (root / "images").is_dir():
        root = root / "images"
    return [
        Example(
            id=str(row.get("question_id", row.get("index"))),
            question=row.get("text") or row["question"],
            images=(image_source(row["image"], root),),
            cluster=shared_picture(row, row.get("image")),
            groups={"category": (row["category"].removeprefix("llava_bench_"),)},
            details={"context": row["caption"], "reference": row["gpt4_ans"]},
        )
        for row in rows
    ]


def prompt(example: Example, mode: Mode) -> str:
    """Return the question with InternVL's request for a detailed answer."""
    return example.question + _INSTRUCTION


def judge_request(example: Example, answer: str, template: str = JUDGE_PROMPT) -> str:
    """Return what a judge is asked."""
    return fill(
        template,
        {
            "context": example.details["context"],
            "question": example.question,
            "reference": example.details["reference"],
            "answer": answer,
            "category": example.groups["category"][0],
        },
    )


def parse_reply(reply: str, rule: Rule = "ours") -> Pair | None:
    """Return the ratings of reference and answer, None where the reply holds none."""
    if rule != "ours":
        words = reply.split("\n")[0].replace(",", " ").split(" ")
        try:
            return (float(words[0]), float(words[1])) if len(words) == 2 else _FAILED
        except ValueError:
            return _FAILED
    first_line = unicodedata.normalize("NFKC", settled_text(reply, rule)).strip().split("\n", 1)[0]
    match = _RATINGS.fullmatch(first_line) if len(first_line) < 80 else None
    if match is None:
        return None
    pair = float(match.group(1)), float(match.group(2))
    return pair if all(1 <= rating <= 10 for rating in pair) else None


_RATINGS = re.compile(
    r"[\s*_`\"'(\[]*(\d{1,2}(?:\.\d+)?)(?:\s?/\s?10)?[\s,;|*]+(\d{1,2}(?:\.\d+)?)(?:\s?/\s?10)?[\s*_`\"')\].,]*"
)


def score(
    example: Example, answer: str | None, rule: Rule = "ours", mode: Mode = "direct", replies: Sequence[str] = ()
) -> Score:
    """Return the mean rating of an answer, 0 to 1; unscored without replies."""
    runs = [parse_reply(reply, rule) for reply in replies]
    mean = mean_of([pair[1] for pair in runs if pair is not None])
    return Score(
        id=example.id,
        value=None if mean is None else mean / 10,
        extracted=settled_text(answer, rule).strip() or None,
        reason="no judge reply" if not runs else f"{sum(run is not None for run in runs)} of {len(runs)} runs scored",
        groups=example.groups,
        cluster=example.cluster,
        details={"runs": runs},
    )


def summarise(scores: Sequence[Score], rule: Rule = "ours") -> dict[str, Any]:
    """Return the relative score over runs, all and by category, with both mean ratings."""
    decimals = 3 if rule == "official" else None

    def relative(pairs: Sequence[Pair]) -> float | None:
        return _relative(pairs, decimals)

    scored = [score for score in scores if score.value is not None]
    summary = summarise_runs("relative", scores, relative, CLUSTER)
    parts = {
        category: [score for score in scored if score.groups["category"][0] == category]
        for category in sorted({score.groups["category"][0] for score in scored})
    }
    return {
        **summary,
        "model_rating": mean_of(by_run(scores, lambda pairs: mean_of([pair[1] for pair in pairs]))),
        "reference_rating": mean_of(by_run(scores, lambda pairs: mean_of([pair[0] for pair in pairs]))),
        "breakdown": {
            "category": {
                category: {"score": mean_of(by_run(part, relative)), "num_examples": len(part)}
                for category, part in parts.items()
            }
        },
    }


def _relative(pairs: Sequence[Pair], decimals: int | None) -> float | None:
    if not pairs:
        return None
    reference, model = (sum(pair[i] for pair in pairs) / len(pairs) for i in range(2))
    if decimals is not None:
        reference, model = round(reference, decimals), round(model, decimals)
    return 100 * model / reference if reference else None
