"""MMHal-Bench: 96 questions made to provoke hallucination; a judge rates each answer 0 to 6.

Source: Hub Shengcao1006/MMHal-Bench (Apache-2.0); pictures from OpenImages by URL or in a zip. InternVL reads
`mmhal-bench_with_image.jsonl` with the pictures inside. Eight question types follow each other in a fixed order.
Example: "What color is the fire hydrant cap in the picture?" -> "... is yellow."
Numbers: mean rating 0 to 6 (the table), and the hallucination rate in per cent: ratings below 3.

The judge reads picture labels, question, gold answer and reply, and sees no picture. The original is gpt-4-0314,
InternVL's gpt-4o. `JUDGE_PROMPT` is worded by us; give the original's text with `--judge_prompts`.

Rules for a judge's reply
- official (eval_gpt_mmhal.py): exactly one of "rating: 0" ... "rating: 6" occurs in the lower-cased reply, otherwise 0,
  which also counts as a hallucination. "Rating: 10" is 1, "Rating: 4.5" is 4, "**Rating:** 5" and "Rating:5" are 0.
- ours: one rating line, bold or not, with a whole number from 0 to 6; other replies, and two ratings that differ, leave
  the answer unscored.
"""

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_mpo.benchmarks.common import Example, Mode, Rule, Score, Source, breakdown, percent
from internvl_mpo.benchmarks.judging import fill, mean_of, settled_text, summarise_runs
from internvl_mpo.benchmarks.sources import image_source, parse_list, read_rows, shared_picture

NAME = "mmhal_bench"
TITLE = "MMHal-Bench"
HUB_ID = "Shengcao1006/MMHal-Bench:test"
RULES: tuple[Rule, ...] = ("ours", "official", "internvl")
MAX_NEW_TOKENS: Mapping[Mode, int] = {"direct": 1024, "cot": 1024}
CLUSTER = "pictures"
JUDGE_MAX_NEW_TOKENS = 1024
JUDGE_PROMPT = """Judge a model's answer to a question about a picture: is it informative, and does it claim anything \
that the picture does not show? You cannot see the picture. You are given labels of what it contains and an answer \
written by a person, which is true but may be incomplete. A true statement beyond that answer, sound reasoning, \
or an admission of not knowing is no hallucination; a false claim about an object, number, attribute or place is.

Picture contents: {contents}
Question: {question}
Answer written by a person: {gold}
Answer to judge: {answer}

Explain your judgement in a few sentences. Then end with one line "Rating: N", where N is
6: very informative, with good analysis, no hallucination
5: very informative, no hallucination
4: somewhat informative, no hallucination
3: not informative, no hallucination
2: very informative, with hallucination
1: somewhat informative, with hallucination
0: not informative, with hallucination"""
TYPES = ("attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other")

# InternVL's own template for this benchmark; released MPO checkpoints were evaluated with it.
_COT = (
    "Please think step by step and output in the following format:\n\nRationale:\n{rationale}\nAnswer: {answer}\n\n"
    "where rationale is the reasoning process of the given question."
)


def examples(source: Source, image_root: str | Path | None = None) -> list[Example]:
    """Return the questions of the official JSON, InternVL's JSONL with pictures inside, or Hub rows."""
    rows, root = read_rows(source, "mmhal-bench_with_image.jsonl", "*.jsonl", "*.json")
    root = Path(image_root) if image_root else root
    if root is not None and image_root is None and (root / "images").is_dir():
        root = root / "images"
    found = []
    for position, row in enumerate(rows):
        contents = row.get("image_content") or []
        picture = row.get("image") or row.get("image_path") or row.get("image_src", "").rsplit("/", 1)[-1]
        found.append(
            Example(
                id=str(row.get("question_id", position)),
                question=row["question"],
                answer=row["gt_answer"],
                images=(image_source(picture, root),) if picture else (),
                cluster=shared_picture(row, picture),
                groups={"type": (row.get("question_type") or TYPES[position % len(TYPES)],)},
                details={"contents": ", ".join(parse_list(contents) if isinstance(contents, str) else contents)},
            )
        )
    return found


def prompt(example: Example, mode: Mode) -> str:
    """Return the question alone, or with InternVL's rationale-and-answer template."""
    return example.question if mode == "direct" else f"{example.question}\n{_COT}"


def judge_request(example: Example, answer: str, template: str = JUDGE_PROMPT) -> str:
    """Return what a judge is asked; of a rationale only what follows the last "Answer:" is judged."""
    return fill(
        template,
        {
            "contents": example.details["contents"],
            "question": example.question,
            "gold": example.answer or "",
            "answer": answer.split("Answer:")[-1].strip(),
        },
    )


def parse_reply(reply: str, rule: Rule = "ours") -> int | None:
    """Return the rating in a judge's reply, None where there is none."""
    if rule == "ours":
        ratings = {
            rating.strip()
            for rating in _RATING.findall(unicodedata.normalize("NFKC", settled_text(reply, rule)[-20_000:]))
        }
        match = _ON_THE_SCALE.fullmatch(ratings.pop()) if len(ratings) == 1 else None
        return int(match[1]) if match else None
    found = [rating for rating in range(7) if f"rating: {rating}" in reply.lower()]
    return found[0] if len(found) == 1 else 0


_RATING = re.compile(r"\brating[\s*_]{0,4}:[\s*_]{0,4}([^\n]{0,40})", re.IGNORECASE)
_ON_THE_SCALE = re.compile(r"([0-6])(?:\s?(?:/|out of)\s?6)?[\s*_.`\"')]*(?:[,;(–—-](?!\s?\d)\s?[^\d]*)?")


def score(
    example: Example, answer: str | None, rule: Rule = "ours", mode: Mode = "cot", replies: Sequence[str] = ()
) -> Score:
    """Return the mean rating of an answer, 0 to 6; unscored without replies."""
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
    """Return the mean rating over runs, the hallucination rate, and both by question type."""
    scored = [score for score in scores if score.value is not None]
    ratings = [rating for score in scored for rating in score.details["runs"] if rating is not None]
    return {
        **summarise_runs("rating", scores, mean_of, CLUSTER),
        "hallucination_rate": percent([rating < 3 for rating in ratings]),
        "breakdown": breakdown(scored, lambda part: mean_of([score.value for score in part])),
    }
