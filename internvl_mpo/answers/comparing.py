r"""When is an answer right: find the final answer in a response and compare it with the ground truth.

    verdict = judge_response("3 + 9 = 12.\nFinal answer: 12", "12", answer_format="marker", source="geometry3k")
    verdict.outcome, verdict.rule      # Outcome.RIGHT, "number"

Outcomes: right, wrong, unparsable (no final answer could be found, which is not a wrong answer), and undecided
(two formulas too large to compare: such a response belongs on neither side of a pair). A wrong answer taken for right
poisons the chosen side of the training data, so every rule is exact unless a source is known to need more:
`RULES_OF_SOURCE` is the whole policy. Nothing from the data is ever evaluated as code.
"""

import enum
import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

from internvl_mpo.answers.choices import decide_choice, parse_options
from internvl_mpo.answers.common import NOTHING_ASKED, Asked, Decision, clean_answer
from internvl_mpo.answers.dates import decide_date
from internvl_mpo.answers.finding import MAX_ANSWER_CHARS, parse_answer, without_thinking
from internvl_mpo.answers.formulas import decide_math
from internvl_mpo.answers.numbers import decide_number, decide_relaxed, parse_number
from internvl_mpo.answers.texts import decide_anls, decide_list, decide_text
from internvl_mpo.answers.wording import reword, same_ratio, same_saying
from internvl_mpo.answers.yes_no import decide_yes_no, is_yes_no_question
from internvl_mpo.errors import BadInputError

MAX_QUESTION_CHARS = 8000


class Outcome(enum.StrEnum):
    """What comparing a response with the ground truth can come to."""

    RIGHT = "right"
    WRONG = "wrong"
    UNPARSABLE = "unparsable"
    UNDECIDED = "undecided"


_OUTCOMES = {True: Outcome.RIGHT, False: Outcome.WRONG, None: Outcome.UNDECIDED}


class Verdict(NamedTuple):
    """The outcome, the answer that was found, the rule that decided, and why in a few words."""

    outcome: Outcome
    answer: str | None
    rule: str
    reason: str


# First match wins. `relaxed` (5 %) is for charts alone, where values are read off an axis; counts in charts that are
# synthetic or integer-only stay exact. `anls` is for transcribed text. Everything else is exact.
EXACT_RULES = ("choice", "yes_no", "number", "date", "text", "list", "math")
RULES_OF_SOURCE: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"chartqa|plotqa", ("choice", "yes_no", "relaxed", "number", "date", "text", "list")),
    (r"docvqa|infographic|infovqa|sroie|ocrvqa|textvqa|stvqa", (*EXACT_RULES, "anls")),
    (r"", EXACT_RULES),
)
_RULES: dict[str, Callable[[str, str, Asked], Decision]] = {
    "choice": decide_choice,
    "yes_no": decide_yes_no,
    "number": decide_number,
    "relaxed": decide_relaxed,
    "date": decide_date,
    "text": decide_text,
    "list": decide_list,
    "math": decide_math,
    "anls": decide_anls,
}


def judge_response(
    response: str, gold: str | Sequence[str], *, answer_format: str = "marker", source: str = "", question: str = ""
) -> Verdict:
    """Parse a response and compare its final answer with the ground truth; see `parse_answer`, `compare_answers`."""
    parsed = parse_answer(response, answer_format)
    if parsed.answer is None:
        return Verdict(Outcome.UNPARSABLE, None, "parse", parsed.reason)
    return compare_answers(parsed.answer, gold, source=source, question=question)


def compare_answers(prediction: str, gold: str | Sequence[str], *, source: str = "", question: str = "") -> Verdict:
    """Compare a final answer with the ground truth.

    Args:
        prediction: the answer alone, as `parse_answer` finds it.
        gold: the ground truth, or several of which one is enough; see `accepted_answers`.
        source: data set name; `rules_of_source` says which rules it gets.
        question: what was asked, with its options A, B, ... if any.

    Returns:
        RIGHT or WRONG; UNPARSABLE when nothing is left of the prediction after clean-up.

    Raises:
        BadInputError: the ground truth is neither text, number nor a list of them.
    """
    if type(gold) is not str or gold[:1] in ("[", "{"):
        accepted = accepted_answers(gold)
        if len(accepted) > 1:
            verdicts = [compare_answers(prediction, one, source=source, question=question) for one in accepted]
            return next((verdict for verdict in verdicts if verdict.outcome is Outcome.RIGHT), verdicts[0])
        gold = accepted[0]
    if "think>" in prediction.lower():
        settled = without_thinking(prediction)
        if settled is None:
            return Verdict(Outcome.UNPARSABLE, None, "parse", "the think block never closes")
        prediction = settled
    if len(prediction) > max(MAX_ANSWER_CHARS, 2 * len(gold)):
        return Verdict(Outcome.UNPARSABLE, None, "parse", f"{len(prediction)} characters are no final answer")
    clean, wanted = clean_answer(prediction), clean_answer(gold)
    if not clean:
        return Verdict(Outcome.UNPARSABLE, prediction, "parse", "the answer is empty")
    if clean == wanted:
        return Verdict(Outcome.RIGHT, clean, "same", "same text")
    if not question:
        return _compare_open(clean, wanted, rules_of_source(source))
    asked = Asked(asked_yes_or_no(question), parse_options(question))
    if not asked.options and wanted.lower() not in ("yes", "no"):
        return _compare_open(clean, wanted, rules_of_source(source))
    return _compare(clean if not asked.options else prediction, wanted, rules_of_source(source), asked)


def accepted_answers(gold: object) -> tuple[str, ...]:
    """Return the texts of which one makes an answer right: a text or number alone, or a list of texts.

    A list of texts may be JSON, as rows keep it on disk; "[1, 2]" is one answer, a list of numbers.

    Raises:
        BadInputError: anything else, or an empty list.
    """
    found = gold
    if isinstance(gold, str):
        if not re.match(r'\s*(?:\[\s*"|\{\s*")', gold):
            return (gold,)
        try:
            found = json.loads(gold)
        except ValueError:
            return (gold,)
    if isinstance(found, (int, float)) and not isinstance(found, bool):
        return (str(found),)
    if isinstance(found, Sequence) and found and all(isinstance(one, (str, int, float)) for one in found):
        return tuple(dict.fromkeys(map(str, found)))
    raise BadInputError(
        f"the ground truth {str(gold)[:60]} is {type(found).__name__}; give a text, a number or a list of texts"
    )


@lru_cache(maxsize=1024)
def asked_yes_or_no(question: str) -> str:
    """Return the question that yes or no answers, out of a prompt with its instructions and options; "" for none."""
    sentences = re.split(r"(?<=[.!?])\s+|\n", question[:MAX_QUESTION_CHARS])
    found = [text for text in sentences if text.endswith("?") and is_yes_no_question(text)]
    return found[-1] if found else ""


def _compare(clean: str, wanted: str, rules: Sequence[str], asked: Asked) -> Verdict:
    verdict = _apply_rules(clean, wanted, rules, asked)
    if verdict.outcome is Outcome.WRONG and verdict.rule != "choice" and not (clean.isdecimal() and wanted.isdecimal()):
        return _second_look(verdict, wanted, rules, asked)
    return verdict


@lru_cache(maxsize=65536)
def _compare_open(clean: str, wanted: str, rules: Sequence[str]) -> Verdict:
    """`_compare` without options, where the same short answers meet again and again."""
    return _compare(clean, wanted, rules, NOTHING_ASKED)


def _apply_rules(clean: str, wanted: str, rules: Sequence[str], asked: Asked) -> Verdict:
    for rule in rules:
        decided = _RULES[rule](clean, wanted, asked)
        if decided is not None:
            right, reason = decided
            return Verdict(_OUTCOMES[right], clean, rule, reason)
    return Verdict(Outcome.WRONG, clean, "none", f"no rule finds '{clean[:40]}' equal to '{wanted[:40]}'")


def _second_look(verdict: Verdict, wanted: str, rules: Sequence[str], asked: Asked) -> Verdict:
    """What two answers found different come to when both are put into one wording; only right changes the verdict."""
    clean = verdict.answer or ""
    given, gold = reword(clean), reword(wanted)
    if not given or not gold:
        return verdict
    if (given, gold) != (clean, wanted):
        second = _apply_rules(given, gold, [rule for rule in rules if rule != "choice"], asked)
        is_whole = second.rule != "number" or parse_number(given) is not None  # "1/2 of 12" only holds a number
        if second.outcome is Outcome.RIGHT and is_whole:
            return second._replace(answer=clean, reason=f"in other words: {second.reason}")
    if same_saying(given, gold) or same_ratio(clean, wanted):
        return Verdict(Outcome.RIGHT, clean, "wording", f"says '{gold[:40]}' in other words")
    return verdict


@lru_cache(maxsize=4096)
def rules_of_source(source: str) -> tuple[str, ...]:
    """Return the rules for a data set by its name: the first row of `RULES_OF_SOURCE` that matches."""
    return next(rules for pattern, rules in RULES_OF_SOURCE if re.search(pattern, source.lower()))
