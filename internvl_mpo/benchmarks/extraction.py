"""Taking the final answer out of free text: the strict way (`ours`), and VLMEvalKit's.

Strict means: an answer that names no option, or several, or one that does not exist is unanswered; nothing is guessed.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from internvl_mpo.answers.choices import FROM_THE_START, MAX_LINE, Chosen, read_option
from internvl_mpo.answers.common import clean_answer
from internvl_mpo.answers.finding import without_thinking
from internvl_mpo.answers.numbers import parse_number, value_of
from internvl_mpo.benchmarks.common import LETTERS

# A reply beyond this length has run into a loop; what it says last is at its end.
MAX_CHARS = 20_000
# Of a final answer that long only the end is read.
MAX_SAID = 2_000

# Quantifiers are possessive or bounded: replies of one repeated character must not cost more than one pass.
_MARKER = re.compile(
    r"""(?:
        \b(?:final\s{1,3}|correct\s{1,3}|best\s{1,3}|right\s{1,3})?answers?+[*_\s]{0,4}+
            (?:[:：=]|\b(?:is|are|would\ be|should\ be|will\ be)\b(?:\s(?:most\s)?likely)?[*_\s]{0,4}+[:：]?+)
      | \bfinal\s{1,3}answer\b(?=[*_\s]{0,4}+(?:\n|\\boxed))
      | (?:最终|正确)?(?:答案|选项)(?:应该|应)?[*_\s]{0,4}+(?:[:：]|是|为|选)\s{0,3}+[:：]?
    )[*_\s]{0,8}+""",
    re.IGNORECASE | re.VERBOSE,
)
_END_TOKENS = re.compile(r"(?:</s>|<\|[a-z_]{1,20}\|>|\s)+$")
_BOXED = re.compile(r"\\?boxed\s{0,3}+\{")


class Segment(NamedTuple):
    """The part of a reply that states its final answer, and how it was found: "boxed", "marked" or "whole"."""

    text: str
    how: str
    rest: str = ""  # what follows the line of a marked answer


def final_segment(reply: str) -> Segment:
    r"""Return what stands in the last `\boxed{...}` or after the last "Final answer:" and its kin, whichever is later.

    A reply with neither is returned whole.
    """
    reply = _END_TOKENS.sub("", (without_thinking(reply) or "")[-MAX_CHARS:])
    marker = None
    for marker in _MARKER.finditer(reply):  # noqa: B007 - the last match is wanted
        pass
    box = _last_box(reply)
    if box is not None and (marker is None or box[0] >= marker.start()):
        return Segment(box[1].strip(), "boxed")
    if marker is not None:
        line, _, rest = reply[marker.end() :].lstrip().partition("\n")
        return Segment(line.strip().strip("*_").strip(), "marked", rest)
    return Segment(reply.strip(), "whole")


def _last_box(text: str) -> tuple[int, str] | None:
    """Where the last closed box begins, and its content with braces matched."""
    for opening in reversed(list(_BOXED.finditer(text))[-20:]):
        depth = 1
        for position in range(opening.end(), min(len(text), opening.end() + 2000)):
            depth += {"{": 1, "}": -1}.get(text[position], 0)
            if depth == 0:
                return opening.start(), text[opening.end() : position]
    return None


def choose_option(reply: str, choices: Sequence[str], question: str = "") -> Chosen:
    """Return the letter of the option a reply settles on, or None, and why: `read_option` of its final answer.

    Of a reply without a marked answer the last line counts, and in it what it concludes; then the first line, where it
    opens with the only letter that opens a line ("B. It is blue.", reasons below). A marked answer of several lines,
    each with a letter, names several options.
    """
    options = dict(zip(LETTERS, choices, strict=False))
    segment = final_segment(reply)
    if not segment.text:
        return Chosen(None, "empty")
    if segment.how != "whole" or "\n" not in segment.text or _LETTER_LINE.match(segment.text):
        chosen = read_option(segment.text[-MAX_SAID:], options, question)
        others = set(_LABELS.findall(segment.rest)) - {chosen.letter}
        return Chosen(None, "several options") if chosen.letter and others & options.keys() else chosen
    first, last = segment.text.split("\n", 1)[0], last_line(segment.text)
    concluded = _CONCLUSION.match(last)
    chosen = read_option(last[-MAX_SAID:], options, question)
    if chosen.letter is None and concluded:
        chosen = read_option(concluded[1][-MAX_SAID:], options, question)
    if chosen.letter is None and len(_LABELS.findall(segment.text)) <= 1 and len(first) <= MAX_LINE:
        opening = read_option(first, options, question)
        if opening.letter and opening.how in FROM_THE_START:
            return opening
    return chosen


_LETTER_LINE = re.compile(r"[\W_]*[A-Z][\W_]*\n")
_LABELS = re.compile(r"(?m)^[\s*_]*\(?([A-H])[).:]\s")
_CONCLUSION = re.compile(r"^.*\b(?:therefore|thus|hence|so|in conclusion),?\s+(.+)$", re.IGNORECASE)


def last_line(text: str) -> str:
    """Return the last line that is not empty, without the marks around it."""
    return text.strip().rsplit("\n", 1)[-1].strip(" \t\r*_`")


def short_answer(reply: str) -> str:
    """Return the final answer of a reply to an open question: the marked or boxed one, else the last line.

    A first line that is nothing but a number counts where the last line holds none.
    """
    segment = final_segment(reply)
    if segment.how != "whole" or "\n" not in segment.text:
        return clean_answer(segment.text)
    first, last = (clean_answer(line) for line in (segment.text.split("\n", 1)[0], last_line(segment.text)))
    return first if parse_number(first) is not None and value_of(last) is None else last


_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_NO_REPLY = "Failed to obtain answer via API"
_SPACES = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))


def vlmevalkit_option(text: str, choices: Mapping[str, str]) -> str | None:
    """Return the letter VLMEvalKit infers without a judge (`can_infer` of November 2024), "Z" for a refusal, or None.

    Exactly one option letter stands between spaces and punctuation; otherwise exactly one option's text occurs.
    """
    if _NO_REPLY not in text:
        if any(refusal in text for refusal in _REFUSALS):
            return "Z"
        words = set(text.translate(_SPACES).split())
        letters = [letter for letter in choices if letter in words]
        if len(letters) == 1:
            return letters[0]
        if not letters and "Z" in words:
            return "Z"
    lowered = text.lower()
    named = [letter for letter, choice in choices.items() if str(choice).lower() in lowered]
    return named[0] if len(named) == 1 else None
