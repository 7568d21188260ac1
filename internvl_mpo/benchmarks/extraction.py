"""Taking the final answer out of free text: the strict way (`ours`), and VLMEvalKit's.

Strict means: an answer that names no option, or several, or one that does not exist is unanswered; nothing is guessed.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from internvl_mpo.benchmarks.common import LETTERS
from internvl_mpo.benchmarks.latex_value import latex_value

# A reply beyond this length has run into a loop; what it says last is at its end.
MAX_CHARS = 20_000
# A line beyond this length argues; an option it mentions need not be the one it settles on.
MAX_LINE = 240
_EDGES = " \t\r\n$*_`\"'“”"

# Quantifiers are possessive or bounded: replies of one repeated character must not cost more than one pass.
_MARKER = re.compile(
    r"""(?:
        \b(?:final\s{1,3}|correct\s{1,3}|best\s{1,3}|right\s{1,3})?answers?+[*_\s]{0,4}+
            (?:[:：=]|\b(?:is|are|would\ be|should\ be|will\ be)\b[*_\s]{0,4}+[:：]?+)
      | \bfinal\s{1,3}answer\b(?=[*_\s]{0,4}+(?:\n|\\boxed))
      | (?:最终|正确)?(?:答案|选项)(?:应该|应)?[*_\s]{0,4}+(?:[:：]|是|为|选)[:：]?
    )[*_\s]{0,8}+""",
    re.IGNORECASE | re.VERBOSE,
)
_BOXED = re.compile(r"\\?boxed\s{0,3}+\{")
_DRESSING = re.compile(r"\\(?:text|mathrm|mathbf|mbox|rm)\s{0,3}+\{([^{}]{0,200})\}")
_PARENTHESISED = re.compile(r"[(（\[]\s?([A-Za-z])\s?[)）\]]")
_LONE = re.compile(r"(?:the\s)?(?:option|choice|letter)?\W{0,8}([A-Za-z])\W{0,8}", re.IGNORECASE)
_LEADING = re.compile(r"(?:option\s)?[(\[]?([A-Z])[)\].:：]{1,2}\s*", re.IGNORECASE)
_STANDING = re.compile(r"(?<![A-Za-z0-9'’])([A-Z])(?![A-Za-z0-9'’])(\s?[.):：,、;]|\s(?!or\b|and\b)[a-z])?")


class Segment(NamedTuple):
    """The part of a reply that states its final answer, and how it was found: "boxed", "marked" or "whole"."""

    text: str
    how: str


def final_segment(reply: str) -> Segment:
    r"""Return what stands in the last `\boxed{...}` or after the last "Final answer:" and its kin, whichever is later.

    A reply with neither is returned whole.
    """
    reply = reply[-MAX_CHARS:]
    marker = None
    for marker in _MARKER.finditer(reply):  # noqa: B007 - the last match is wanted
        pass
    box = _last_box(reply)
    if box is not None and (marker is None or box[0] >= marker.start()):
        return Segment(box[1].strip(), "boxed")
    if marker is not None:
        line = reply[marker.end() :].lstrip().split("\n", 1)[0]
        return Segment(line.strip().strip("*_").strip(), "marked")
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


def choose_option(text: str, choices: Sequence[str]) -> tuple[str | None, str]:
    """Return the letter of the option a reply settles on, or None, and why.

    In order: a lone letter, a letter before its option's text, "(B)", the text of exactly one option, a letter standing
    on its own, a line that names exactly one option. Of a reply without a marked answer the last line counts; "A"
    before a small letter is not one.
    """
    segment = final_segment(text)
    said = _DRESSING.sub(r"\1", segment.text).strip(_EDGES)
    if segment.how == "whole":
        said = said.rsplit("\n", 1)[-1].strip(_EDGES)
    valid = LETTERS[: len(choices)]

    def settle(letters: set[str], how: str) -> tuple[str | None, str]:
        if len(letters) > 1:
            return None, f"several options: {', '.join(sorted(letters))}"
        letter = letters.pop()
        return (letter, how) if letter in valid else (None, f"no option {letter}")

    lone = _LONE.fullmatch(said)
    if lone:
        return settle({lone.group(1).upper()}, "letter")
    leading = _LEADING.match(said)
    if leading and leading.group(1) in valid:  # "C: sample A" is C, whatever letters its text holds
        words = _plain(choices[valid.index(leading.group(1))])
        if words and f"{_plain(said[leading.end() :])} ".startswith(f"{words} "):
            return leading.group(1), "letter and text of the option"
    parenthesised = {letter.upper() for letter in _PARENTHESISED.findall(said)}
    if parenthesised:
        return settle(parenthesised, "letter in parentheses")
    words = _plain(said)
    whole = [letter for letter, choice in zip(valid, choices, strict=False) if words and _plain(choice) == words]
    if len(whole) == 1:
        return whole[0], "text of the option"
    if len(said) > MAX_LINE:
        return None, "no option in the answer"
    standing = {
        letter
        for letter, after in _STANDING.findall(said)
        if letter in valid and not (letter in "AI" and after[:1].isspace() and after[1:].islower())
    }
    if standing:
        return settle(standing, "letter on its own")
    named = _options_named(said, choices)
    if len(named) == 1:
        return named[0], "text of one option in the answer"
    return None, "several options in the answer" if named else "no option in the answer"


def _options_named(text: str, choices: Sequence[str]) -> list[str]:
    """Letters of the options whose text occurs in whole words; one inside another named option does not count."""
    padded = f" {_plain(text)} "
    found = [(letter, _plain(choice)) for letter, choice in zip(LETTERS, choices, strict=False)]
    found = [(letter, choice) for letter, choice in found if len(choice) > 1 and f" {choice} " in padded]
    return [
        letter
        for letter, choice in found
        if not any(choice != other and f" {choice} " in f" {other} " for _, other in found)
    ]


_WORD_OR_SYMBOL = re.compile(r"\w+(?:[.%/]\w+)*%?|[^\w\s.,;:!?\"'()\[\]{}$\\`*_]")


def _plain(text: str) -> str:
    """Lower-case words, numbers and symbols with single spaces between; punctuation and LaTeX dressing left out."""
    return " ".join(_WORD_OR_SYMBOL.findall(str(text).casefold()))


_UNITS = re.compile(
    r"""(?:\\(?:text|mathrm|mbox|rm)\s?\{[^{}]{0,40}\}(?:\s?\^\s?\{?[23]\}?)?|\^\s?\{?\s?\\circ\s?\}?|\\degree|°
        |(?:square\s)?(?:(?:milli|centi|deci|kilo)?met(?:er|re)s?|[cdkm]?m|inch(?:es)?|grams?|k?g|litres?|degrees?
        |minutes?|hours?|seconds?|units?|digits?|times|ways)(?:\s?(?:\^\s?\{?[23]\}?|[²³]))?)\s*$""",
    re.VERBOSE | re.IGNORECASE,
)


def quantity(text: str) -> int | float | None:
    """Return the number of "x = 5 cm", "$1,250", "50%" (50) or a formula; None where the text holds more or less."""
    text = text.split("=")[-1].strip(" \t$()")
    text = _UNITS.sub("", text).rstrip(" \\,~%")
    return latex_value(text, whole=True)


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
