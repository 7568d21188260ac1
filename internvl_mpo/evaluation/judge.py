"""Asking a judge model about stored answers, each question once."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from internvl_mpo.engines import Request, Sampling
from internvl_mpo.evaluation.run_files import KeyedLog
from internvl_mpo.evaluation.settings import EvalTask, EvaluateSettings, answer_key
from internvl_mpo.records import IMAGE_PLACEHOLDER, content_id


class JudgeReplies(NamedTuple):
    """A judge's replies by answer, one per run, and who gave them."""

    replies: dict[str, list[str]]
    identity: dict[str, Any]


def judge_tasks(tasks: Sequence[EvalTask], answers: KeyedLog, settings: EvaluateSettings) -> JudgeReplies:
    """Ask the judge for every reply that is missing, keep it, and return the replies of all runs.

    A reply is kept under the judge's model, the whole prompt (which holds the answer) and the run, so that a new judge,
    prompt or answer is asked anew and nothing is paid twice.
    """
    if settings.judge is None:
        return JudgeReplies({}, {})
    questions: dict[str, list[tuple[str, str, int]]] = {}
    for task in tasks:
        template = judge_template(task, settings)
        for example in task.examples if template else ():
            row = answers.rows.get(answer_key(task, example))
            asked = row and task.benchmark.judge_request(example, row["answer"], template)
            for run in range(settings.judge_runs if asked else 0):
                about = (settings.judge, settings.judge_temperature, asked)
                key = f"{answer_key(task, example)}/{content_id(*about)}/{run}"
                text = asked.replace(IMAGE_PLACEHOLDER, "(image)")  # an engine would look for the picture
                limit = task.benchmark.JUDGE_MAX_NEW_TOKENS
                questions.setdefault(answer_key(task, example), []).append((key, text, limit))
    identity = {
        "asked": settings.judge,
        "temperature": settings.judge_temperature,
        "runs": settings.judge_runs,
        "prompts": {
            task.name: content_id(judge_template(task, settings)) for task in tasks if judge_template(task, settings)
        },
    }
    with KeyedLog(Path(settings.output) / "judgements.jsonl") as judgements:
        missing = [entry for entries in questions.values() for entry in entries if entry[0] not in judgements.rows]
        if missing and not settings.score_only:
            ask_judge(missing, judgements, settings)
        replies = {
            answer: [judgements.rows[key]["reply"] for key, _, _ in entries if key in judgements.rows]
            for answer, entries in questions.items()
        }
        kept = [
            judgements.rows[key] for entries in questions.values() for key, _, _ in entries if key in judgements.rows
        ]
    return JudgeReplies(replies, {**identity, "served": sorted({row["served"] for row in kept})})


def judge_template(task: EvalTask, settings: EvaluateSettings) -> str | None:
    """Return the prompt of a task's judge, None for a benchmark without one."""
    template = getattr(task.benchmark, "JUDGE_PROMPT", None)
    if template is None or settings.judge_prompts is None:
        return template
    path = Path(settings.judge_prompts) / f"{task.name}.txt"
    return path.read_text(encoding="utf-8") if path.exists() else template


def ask_judge(missing: Sequence[tuple[str, str, int]], judgements: KeyedLog, settings: EvaluateSettings) -> None:
    """Ask for replies through the judge's server and append each as it comes; failures are named and counted."""
    from internvl_mpo.engines.http_engine import HttpEngine

    num_words = sum(len(text.split()) for _, text, _ in missing)
    print(f"{len(missing)} judge requests, about {num_words * 4 // 3:,} tokens to read", file=sys.stderr)
    engine = HttpEngine(
        settings.judge_url,
        settings.judge,
        concurrency=settings.judge_concurrency,
        api_key=os.environ.get("JUDGE_API_KEY"),
    )
    requests = (
        Request(
            id=key,
            question=text,
            seed=int(key.rsplit("/", 1)[-1]),
            sampling=Sampling(temperature=settings.judge_temperature, max_new_tokens=limit),
        )
        for key, text, limit in missing
    )
    num_failed = 0
    for reply in tqdm(engine.generate(requests), total=len(missing), desc="judge", unit="reply"):
        if reply.error:
            num_failed += 1
            tqdm.write(f"no judgement of {reply.id}: {reply.error}", file=sys.stderr)
        else:
            judgements.append(reply.id, {"asked": settings.judge, "served": reply.served_model, "reply": reply.text})
    if num_failed:
        print(f"{num_failed} judgements are missing; the same command asks only for these again", file=sys.stderr)
