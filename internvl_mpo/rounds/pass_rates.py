r"""How often a policy is right on each question, and how long its answers are.

    python -m internvl_mpo.rounds judge --responses responses.jsonl --output pass_rates.jsonl

One row per question: {"id", "pass_rate", "right", "wrong", "unparsable", "tokens"}; the last four are sums over its
responses.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from internvl_mpo.answers.comparing import Outcome
from internvl_mpo.errors import BadInputError
from internvl_mpo.jsonl import write_jsonl
from internvl_mpo.pairing import PairRules, judge_responses
from internvl_mpo.records import Response, read_rows
from internvl_mpo.settings import setting


@dataclass(kw_only=True)
class JudgeSettings:
    """Settings of `python -m internvl_mpo.rounds judge`."""

    responses: str = setting(help="JSONL file of Response rows with ground truths")
    output: str = setting(help="JSONL file to write")


def judge(settings: JudgeSettings) -> None:
    """Write the pass rate of every question.

    Raises:
        BadInputError: a response has no ground truth.
    """
    rows = list(pass_rates(read_rows(settings.responses, Response)))
    write_jsonl(rows, settings.output)
    total = {key: sum(row[key] for row in rows) for key in ("right", "wrong", "unparsable")}
    shares = ", ".join(f"{count / (sum(total.values()) or 1):.0%} {key}" for key, count in total.items())
    print(f"{len(rows)} questions: {shares} -> {settings.output}")


def pass_rates(responses: Iterable[Response]) -> Iterator[dict[str, Any]]:
    """Yield a row for each question, in the order in which they come; see the module's text."""
    groups: dict[str, list[Response]] = {}
    for response in responses:
        if response.answer is None:
            raise BadInputError(f"response {response.id} has no ground truth, so nothing says whether it is right")
        groups.setdefault(response.question_id, []).append(response)
    for id, group in groups.items():
        outcomes = [item.outcome for item in judge_responses(group, PairRules())]
        yield {
            "id": id,
            "pass_rate": round(outcomes.count(Outcome.RIGHT) / len(outcomes), 4),
            **{outcome.value: outcomes.count(outcome) for outcome in Outcome},
            "tokens": sum(response.provenance.get("num_tokens", 0) for response in group),
        }
