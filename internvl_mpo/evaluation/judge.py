"""Asking a judge model about stored answers, each question once, and again where its reply cannot be read."""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from internvl_mpo.answers.finding import without_thinking
from internvl_mpo.benchmarks.common import Example
from internvl_mpo.engines import Request, Sampling
from internvl_mpo.evaluation.run_files import KeyedLog
from internvl_mpo.evaluation.settings import EvalTask, EvaluateSettings
from internvl_mpo.records import IMAGE_PLACEHOLDER, content_id


class JudgeReplies(NamedTuple):
    """A judge's last replies by answer, one per run; who gave them; and by task how often it was asked again."""

    replies: dict[str, list[str]]
    identity: dict[str, Any]
    retries: dict[str, dict[str, int]]


class JudgeRequest(NamedTuple):
    """One thing a judge is asked.

    Attributes:
        key: name of the reply in the run's file; replies to repeated requests are kept under `key/again1`, ...
        text: what is asked.
        seed: seed of the reply.
        temperature: of the first try.
        max_new_tokens: longest reply.
        is_readable: whether a reply says what was asked for.
        retries: temperatures of further tries after replies that cannot be read.
        reminder: what is added to `text` then.
    """

    key: str
    text: str
    seed: int
    temperature: float
    max_new_tokens: int
    is_readable: Callable[[str], bool]
    retries: tuple[float, ...] = ()
    reminder: str = ""


def judge_tasks(tasks: Sequence[EvalTask], answers: KeyedLog, settings: EvaluateSettings) -> JudgeReplies:
    """Ask the judge for every reply that is missing or cannot be read, keep it, and return the replies of all runs.

    A reply is kept under the judge's model, the whole prompt (which holds the answer) and the run, so that a new judge,
    prompt or answer is asked anew and nothing is paid twice. What cannot be read is asked again as often, and at the
    temperatures, that the benchmark's original does (`JUDGE_RETRIES`).
    """
    if settings.judge is None:
        return JudgeReplies({}, {}, {})
    requests = {
        task.label: {
            key: list(_requests(task, key, example, answers.rows[key]["answer"], settings))
            for key, example in task.keys(settings.num_samples)
            if key in answers.rows
        }
        for task in tasks
    }
    replies: dict[str, list[str]] = {}
    retries: dict[str, dict[str, int]] = {}
    served: set[str] = set()
    with KeyedLog(Path(settings.output) / "judgements.jsonl") as judgements:
        if not settings.score_only:
            every = [request for of_task in requests.values() for about in of_task.values() for request in about]
            ask_all(every, judgements, settings)
        for label, of_task in requests.items():
            tried = [(key, request, tries(request, judgements)) for key, about in of_task.items() for request in about]
            tried = [(key, request, rows) for key, request, rows in tried if rows]
            for key, _, rows in tried:
                replies.setdefault(key, []).append(rows[-1]["reply"])
                served |= {row["served"] for row in rows}
            retries[label] = {
                "num_retries": sum(len(rows) - 1 for _, _, rows in tried),
                "num_unreadable": sum(not request.is_readable(rows[-1]["reply"]) for _, request, rows in tried),
            }
    prompts = {task.name: content_id(template) for task in tasks if (template := judge_template(task, settings))}
    identity = {
        "asked": settings.judge,
        "temperature": settings.judge_temperature,
        "runs": settings.judge_runs,
        "prompts": prompts,
        "served": sorted(served),
    }
    return JudgeReplies(replies, identity, retries)


def _requests(
    task: EvalTask, key: str, example: Example, answer: str, settings: EvaluateSettings
) -> Iterator[JudgeRequest]:
    """What a judge is asked about one answer, once per run; under `ours` thoughts are no part of the answer."""
    template, benchmark = judge_template(task, settings), task.benchmark
    settled = (without_thinking(answer) or "") if settings.rule == "ours" else answer
    text = benchmark.judge_request(example, settled, template) if template else None
    is_readable = getattr(benchmark, "is_readable", None)
    for run in range(settings.judge_runs if text else 0):
        yield JudgeRequest(
            key=f"{key}/{content_id(settings.judge, settings.judge_temperature, text)}/{run}",
            text=text,
            seed=run,
            temperature=settings.judge_temperature,
            max_new_tokens=benchmark.JUDGE_MAX_NEW_TOKENS,
            is_readable=(lambda reply: is_readable(reply, settings.rule)) if is_readable else lambda reply: True,
            retries=getattr(benchmark, "JUDGE_RETRIES", {}).get(settings.rule, ()),
            reminder=getattr(benchmark, "JUDGE_REMINDER", ""),
        )


def tries(request: JudgeRequest, judgements: KeyedLog) -> list[dict[str, Any]]:
    """Return the kept replies to a request, in the order in which they came."""
    keys = [request.key, *(f"{request.key}/again{number}" for number in range(1, len(request.retries) + 1))]
    return [judgements.rows[key] for key in takewhile(judgements.rows.__contains__, keys)]


def ask_all(requests: Sequence[JudgeRequest], judgements: KeyedLog, settings: EvaluateSettings) -> None:
    """Send what is missing, then what has to be asked again, until nothing is left; what fails is sent once."""
    sent: set[str] = set()
    while True:
        upcoming = [_next_try(request, judgements) for request in requests]
        missing = [request for request in upcoming if request and request.key not in sent]
        if not missing:
            return
        ask_judge(missing, judgements, settings)
        sent |= {request.key for request in missing}


def _next_try(request: JudgeRequest, judgements: KeyedLog) -> JudgeRequest | None:
    """The request as it is to be sent next; None where its reply can be read, or no try is left."""
    rows = tries(request, judgements)
    if not rows:
        return request
    if len(rows) > len(request.retries) or request.is_readable(rows[-1]["reply"]):
        return None
    return request._replace(
        key=f"{request.key}/again{len(rows)}",
        text=request.text + request.reminder,
        temperature=request.retries[len(rows) - 1],
    )


def judge_template(task: EvalTask, settings: EvaluateSettings) -> str | None:
    """Return the prompt of a task's judge, None for a benchmark without one."""
    template = getattr(task.benchmark, "JUDGE_PROMPT", None)
    if template is None or settings.judge_prompts is None:
        return template
    path = Path(settings.judge_prompts) / f"{task.name}.txt"
    return path.read_text(encoding="utf-8") if path.exists() else template


def ask_judge(missing: Sequence[JudgeRequest], judgements: KeyedLog, settings: EvaluateSettings) -> None:
    """Ask for replies through the judge's server and append each as it comes; failures are named and counted."""
    from internvl_mpo.engines.http_engine import HttpEngine

    num_words = sum(len(request.text.split()) for request in missing)
    print(f"{len(missing)} judge requests, about {num_words * 4 // 3:,} tokens to read", file=sys.stderr)
    engine = HttpEngine(
        settings.judge_url,
        settings.judge,
        concurrency=settings.judge_concurrency,
        api_key=os.environ.get("JUDGE_API_KEY"),
    )
    requests = (
        Request(
            id=request.key,
            question=request.text.replace(IMAGE_PLACEHOLDER, "(image)"),  # an engine would look for the picture
            seed=request.seed,
            sampling=Sampling(temperature=request.temperature, max_new_tokens=request.max_new_tokens),
        )
        for request in missing
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
