"""Where in a response its final answer stands: marker, box, after the thinking, or the whole text."""

import re
from typing import NamedTuple

FORMATS = ("marker", "boxed", "think", "text")


MIN_REASONING_CHARS = 20


MAX_ANSWER_CHARS = 300  # longer texts explain, they do not answer


MAX_OPEN_BOXES = 20  # a loop of unclosed boxes must not cost a pass each


class ParsedAnswer(NamedTuple):
    """The final answer of a response, or None and why there is none."""

    answer: str | None
    reason: str


# ---------------------------------------------------------------------------------------------- finding the answer

_THINKING = re.compile(r"<(/?)think(?:ing)?>", re.IGNORECASE)
_MARKER = re.compile(r"(?:final\s+answer|答案)\s*(?:is\s*|是\s*|为\s*)?[*_]*\s*[:：]", re.IGNORECASE)


_ANSWER_LINE = re.compile(r"(?im)^[ \t*_#]*(?:the\s+)?answer\s*[*_]*\s*[:：]\s*(.+)$")


def without_thinking(reply: str) -> str | None:
    """Return what follows the last closed think block: None where one never closes, the reply itself without any."""
    last = None
    for last in _THINKING.finditer(reply) if "think" in reply.lower() else ():  # noqa: B007 - the last one is wanted
        pass
    if last is None:
        return reply
    return reply[last.end() :].strip() if last[1] else None


def parse_answer(response: str, answer_format: str) -> ParsedAnswer:
    r"""Return the final answer of a response.

    Args:
        response: the model's whole text.
        answer_format: where the answer stands. "marker": on one line after the last `Final answer:` or `答案:`, with
            reasoning before it; "boxed": in the last `\boxed{}`; "think": boxed, after exactly one think block;
            "text": the response itself, or what follows `Answer:`. Only what follows the last `</think>` counts,
            and the thoughts before it are reasoning; a block that never closes holds no answer.

    Raises:
        ValueError: unknown format.
    """
    if answer_format == "think":
        if response.count("<think>") != 1 or response.count("</think>") != 1:
            return ParsedAnswer(None, "not exactly one think block")
        thoughts, _, solution = response.partition("<think>")[2].partition("</think>")
        if len(thoughts.strip()) < MIN_REASONING_CHARS:
            return ParsedAnswer(None, "the think block is empty")
        return _parse_boxed(solution, thoughts)
    settled = without_thinking(response)
    if settled is None:
        return ParsedAnswer(None, "the think block never closes")
    if answer_format == "marker":
        return _parse_marker(settled, has_thought=settled is not response)
    if answer_format == "boxed":
        return _parse_boxed(settled, response)
    if answer_format == "text":
        text = settled.strip()
        lines = _ANSWER_LINE.findall(text)
        text = lines[-1].strip() if lines else text
        if not text:
            return ParsedAnswer(None, "empty response")
        if "\n" in text:
            return ParsedAnswer(None, "several lines and no answer line")
        return ParsedAnswer(text, "whole text")
    raise ValueError(f"answer_format is '{answer_format}', expected one of {', '.join(FORMATS)}")


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last `\boxed{}` with balanced braces, or None."""
    start = text.rfind("\\boxed{")
    for _ in range(MAX_OPEN_BOXES):
        if start < 0:
            break
        depth = 0
        for position in range(start + 6, min(len(text), start + 6 + MAX_ANSWER_CHARS)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return text[start + 7 : position].strip()
        start = text.rfind("\\boxed{", 0, start)
    return None


def _parse_marker(response: str, has_thought: bool) -> ParsedAnswer:
    lower = response.lower()  # most of a response is reasoning: the pattern is slow there
    start, chinese = lower.find("final"), lower.find("答案")
    if start < 0 or 0 <= chinese < start:
        start = chinese
    if len(lower) != len(response):
        start = 0  # a few letters grow in lower case, and move what stands behind them
    before, *after = _MARKER.split(response[start:]) if start >= 0 else [response]
    if not after:
        return ParsedAnswer(None, "no 'Final answer:'")
    if len(after) > 2:
        return ParsedAnswer(None, f"'Final answer:' occurs {len(after)} times")
    if not has_thought and not response[:start].strip(" \t\r\n*#_") and not before.strip(" \t\r\n*#_"):
        return ParsedAnswer(None, "no reasoning before the final answer")
    answer = after[-1].strip().strip("*_").strip()
    if not answer:
        return ParsedAnswer(None, "nothing follows 'Final answer:'")
    if "\n" in answer:
        return ParsedAnswer(None, "the final answer is not on one line")
    return ParsedAnswer(answer, "after the marker")


def _parse_boxed(tail: str, reasoning: str) -> ParsedAnswer:
    answer = last_boxed(tail)
    if answer is None:
        return ParsedAnswer(None, "no \\boxed{}")
    if not answer:
        return ParsedAnswer(None, "empty \\boxed{}")
    if len(reasoning.strip()) <= MIN_REASONING_CHARS:
        return ParsedAnswer(None, "no reasoning before the box")
    return ParsedAnswer(answer, "in the last box")
