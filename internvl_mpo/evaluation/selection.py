"""Best of N: a judge chooses among the answers to a question without knowing the right one."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from internvl_mpo.answers.finding import without_thinking
from internvl_mpo.benchmarks.common import LETTERS, Example, Score
from internvl_mpo.benchmarks.judging import fill
from internvl_mpo.evaluation.judge import JudgeRequest, ask_all, tries
from internvl_mpo.evaluation.run_files import KeyedLog
from internvl_mpo.evaluation.settings import EvalTask, EvaluateSettings
from internvl_mpo.records import content_id

MAX_NEW_TOKENS = 16
PROMPT = """Here are a question about a picture, which you cannot see, and {count} answers to it. Choose the answer \
whose reasoning is soundest and whose result is most likely right.

Question: {question}

{answers}

Reply with the number of the best answer, 1 to {count}, and nothing else."""
_NUMBER = re.compile(r"[\s*_`(\[]*(?:answer\s*)?#?(\d{1,4})[\s*_`)\].]*", re.IGNORECASE)


def choose_best(
    task: EvalTask, scores: Sequence[Sequence[Score]], answers: KeyedLog, settings: EvaluateSettings
) -> dict[str, int]:
    """Return question id -> number of the answer the judge chose, from 0; its replies are kept with the judgements.

    Nothing is asked where all answers come to the same. A question without a reply that can be read is left out.
    """
    texts: dict[str, list[str]] = {}
    for key, example in task.keys(settings.num_samples):
        if key in answers.rows:
            texts.setdefault(example.id, []).append(answers.rows[key]["answer"])
    chosen: dict[str, int] = {}
    requests: dict[str, JudgeRequest] = {}
    for example, part in zip(task.examples, scores, strict=True):
        if len(texts.get(example.id, ())) < settings.num_samples:
            continue  # some answer is still missing
        if len({score.extracted for score in part}) == 1:
            chosen[example.id] = 0
        else:
            requests[example.id] = _request(task, example, texts[example.id], settings)
    with KeyedLog(Path(settings.output) / "judgements.jsonl") as judgements:
        if not settings.score_only:
            ask_all(list(requests.values()), judgements, settings)
        for id, request in requests.items():
            rows = tries(request, judgements)
            number = read_number(rows[-1]["reply"], settings.num_samples) if rows else None
            if number is not None:
                chosen[id] = number - 1
    return chosen


def read_number(reply: str, count: int) -> int | None:
    """Return the number from 1 to `count` that a reply consists of, None for anything else."""
    match = _NUMBER.fullmatch(without_thinking(reply) or "")
    return int(match[1]) if match and 1 <= int(match[1]) <= count else None


def _request(task: EvalTask, example: Example, texts: Sequence[str], settings: EvaluateSettings) -> JudgeRequest:
    options = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, example.choices, strict=False)]
    shown = [f"Answer {number}: {(without_thinking(text) or '').strip()}" for number, text in enumerate(texts, start=1)]
    places: Mapping[str, str] = {
        "count": str(len(texts)),
        "question": "\n".join([example.question, *(options if task.name != "crpe" else ())]),
        "answers": "\n\n".join(shown),
    }
    text = fill(PROMPT, places)
    return JudgeRequest(
        key=f"{task.label}/{example.id}/best/{content_id(settings.judge, settings.judge_temperature, text)}",
        text=text,
        seed=0,
        temperature=settings.judge_temperature,
        max_new_tokens=MAX_NEW_TOKENS,
        is_readable=lambda reply: read_number(reply, len(texts)) is not None,
    )
