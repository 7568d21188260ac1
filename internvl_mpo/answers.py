r"""Find the final answer in a response and compare it with the ground truth. Text in, verdict out.

    verdict = judge_response("3 + 9 = 12.\nFinal answer: 12", "12", answer_format="marker", source="geometry3k")
    verdict.outcome, verdict.rule      # Outcome.RIGHT, "number"

Outcomes: right, wrong, unparsable (no final answer could be found, which is not a wrong answer), and undecided
(algebra ran out of time or memory: such a response belongs on neither side of a pair). A wrong answer taken for right
poisons the chosen side of the training data, so every rule is exact unless a source is known to need more:
`RULES_OF_SOURCE` is the whole policy. Nothing from the data is ever evaluated as code; formulas go to math-verify in a
child process with a time limit.
"""

import enum
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from internvl_mpo.answer_wording import bare_choice, reword, same_ratio, same_saying
from internvl_mpo.math_equality import compare_formulas

FORMATS = ("marker", "boxed", "think", "text")
MIN_REASONING_CHARS = 20
MAX_ANSWER_CHARS = 300  # longer texts explain, they do not answer
MAX_OPEN_BOXES = 20  # a loop of unclosed boxes must not cost a pass each


class Outcome(enum.StrEnum):
    """What comparing a response with the ground truth can come to."""

    RIGHT = "right"
    WRONG = "wrong"
    UNPARSABLE = "unparsable"
    UNDECIDED = "undecided"


_OUTCOMES = {True: Outcome.RIGHT, False: Outcome.WRONG, None: Outcome.UNDECIDED}


class ParsedAnswer(NamedTuple):
    """The final answer of a response, or None and why there is none."""

    answer: str | None
    reason: str


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

# ---------------------------------------------------------------------------------------------- finding the answer

_MARKER = re.compile(r"(?:final\s+answer|答案)\s*(?:is\s*)?[*_]*\s*[:：]", re.IGNORECASE)
_ANSWER_LINE = re.compile(r"(?im)^[ \t*_#]*(?:the\s+)?answer\s*[*_]*\s*[:：]\s*(.+)$")


def parse_answer(response: str, answer_format: str) -> ParsedAnswer:
    r"""Return the final answer of a response.

    Args:
        response: the model's whole text.
        answer_format: where the answer stands. "marker": on one line after the last `Final answer:` or `答案:`, with
            reasoning before it; "boxed": in the last `\boxed{}`; "think": boxed, after exactly one think block;
            "text": the response itself, or what follows `Answer:`.

    Raises:
        ValueError: unknown format.
    """
    if answer_format == "marker":
        return _parse_marker(response)
    if answer_format == "boxed":
        return _parse_boxed(response, response)
    if answer_format == "think":
        if response.count("<think>") != 1 or response.count("</think>") != 1:
            return ParsedAnswer(None, "not exactly one think block")
        thoughts, _, solution = response.partition("<think>")[2].partition("</think>")
        if len(thoughts.strip()) < MIN_REASONING_CHARS:
            return ParsedAnswer(None, "the think block is empty")
        return _parse_boxed(solution, thoughts)
    if answer_format == "text":
        text = response.strip()
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


def _parse_marker(response: str) -> ParsedAnswer:
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
    if not response[:start].strip(" \t\r\n*#_") and not before.strip(" \t\r\n*#_"):
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


# ------------------------------------------------------------------------------------------- comparing two answers


def judge_response(
    response: str, gold: str, *, answer_format: str = "marker", source: str = "", question: str = ""
) -> Verdict:
    """Parse a response and compare its final answer with the ground truth; see `parse_answer`, `compare_answers`."""
    parsed = parse_answer(response, answer_format)
    if parsed.answer is None:
        return Verdict(Outcome.UNPARSABLE, None, "parse", parsed.reason)
    return compare_answers(parsed.answer, gold, source=source, question=question)


def compare_answers(prediction: str, gold: str, *, source: str = "", question: str = "") -> Verdict:
    """Compare a final answer with the ground truth.

    Args:
        prediction: the answer alone, as `parse_answer` finds it.
        gold: the ground truth.
        source: data set name; `rules_of_source` says which rules it gets.
        question: where options A, B, ... are listed, if any.

    Returns:
        RIGHT or WRONG; UNPARSABLE when nothing is left of the prediction after clean-up.
    """
    if len(prediction) > max(MAX_ANSWER_CHARS, 2 * len(gold)):
        return Verdict(Outcome.UNPARSABLE, None, "parse", f"{len(prediction)} characters are no final answer")
    clean = clean_answer(prediction)
    wanted = clean_answer(gold)
    if not clean:
        return Verdict(Outcome.UNPARSABLE, prediction, "parse", "the answer is empty")
    if clean == wanted:
        return Verdict(Outcome.RIGHT, clean, "same", "same text")
    options = parse_options(question)
    if not options:
        return _compare_open(clean, wanted, rules_of_source(source))
    return _compare(clean, wanted, rules_of_source(source), options)


def _compare(clean: str, wanted: str, rules: Sequence[str], options: "Options") -> Verdict:
    verdict = _apply_rules(clean, wanted, rules, options)
    if verdict.outcome is Outcome.WRONG and not (clean.isdecimal() and wanted.isdecimal()):
        return _second_look(verdict, wanted, rules, options)
    return verdict


@lru_cache(maxsize=65536)
def _compare_open(clean: str, wanted: str, rules: Sequence[str]) -> Verdict:
    """`_compare` without options, where the same short answers meet again and again."""
    return _compare(clean, wanted, rules, {})


def _apply_rules(clean: str, wanted: str, rules: Sequence[str], options: "Options") -> Verdict:
    for rule in rules:
        decided = _RULES[rule](clean, wanted, options)
        if decided is not None:
            right, reason = decided
            return Verdict(_OUTCOMES[right], clean, rule, reason)
    return Verdict(Outcome.WRONG, clean, "none", f"no rule finds '{clean[:40]}' equal to '{wanted[:40]}'")


def _second_look(verdict: Verdict, wanted: str, rules: Sequence[str], options: "Options") -> Verdict:
    """What two answers found different come to when both are put into one wording; only right changes the verdict."""
    clean = verdict.answer
    if verdict.rule == "choice":
        bare = bare_choice(clean)
        second = _apply_rules(bare, wanted, ("choice",), options) if bare != clean else verdict
        if second.outcome is Outcome.RIGHT:
            return second._replace(answer=clean)
        starts = re.match(r"[A-H]\b", clean)  # "A blue" may be an article or an option
        said = [
            letter for letter, option in options.items() if not starts and same_saying(reword(clean), reword(option))
        ]
        both = re.fullmatch(r"([A-H])\s*[-–—(]?\s*(.+?)\)?", clean)
        if both and both[1] in options and same_saying(reword(both[2]), reword(options[both[1]])):
            said = [both[1]]
        if len(said) == 1:
            second = _apply_rules(said[0], wanted, ("choice",), options)
        return second._replace(answer=clean) if second.outcome is Outcome.RIGHT else verdict
    given, gold = reword(clean), reword(wanted)
    if not given or not gold:
        return verdict
    if (given, gold) != (clean, wanted):
        second = _apply_rules(given, gold, [rule for rule in rules if rule != "choice"], options)
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


_LEAD = re.compile(
    r"^(?:so|thus|therefore|hence)?[,\s]*(?:the\s+)?(?:(?:final|correct|right)\s+)?(?:answer|option|choice)\s*"
    r"(?:is|should\s+be|would\s+be|=|:|：)+\s*(?:that\s+)?|^(?:it\s+is|it's|that\s+is)\s+|^答案(?:是|为|:|：)\s*",
    re.IGNORECASE,
)
_HEDGE = re.compile(r"^(?:about|approximately|approx\.?|around|roughly|nearly|~|≈|\\approx)\s*", re.IGNORECASE)
_TEXT_MACRO = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|textit|operatorname|rm)\s*\{([^{}]*)\}")
_ONE_SPELLING = str.maketrans(
    {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)}  # full-width forms
    | {"\u3000": " ", "。": ".", "−": "-", "½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3"}
    | {"²": "^2", "³": "^3"}
)


@lru_cache(maxsize=65536)
def clean_answer(text: str) -> str:
    """Return an answer without what carries no meaning: lead-in, hedge, markdown, `$`, full-width forms, end point."""
    text = text.translate(_ONE_SPELLING).strip()
    if "\\" in text:
        boxed = last_boxed(text)
        text = boxed if boxed is not None else text
        text = _TEXT_MACRO.sub(r" \1 ", text)
        text = re.sub(r"\\[()\[\]]|\\[,;:! ]|\\quad|~", " ", text).replace("\\%", "%").replace("\\$", "$").strip()
    text = text.strip("*_`").strip()
    if len(text) > 1 and text[0] == "$" and text[-1] == "$":
        text = text.strip("$").strip()
    for pattern in (_LEAD, _HEDGE):
        text = pattern.sub("", text).strip()
    text = text.strip("*_`").strip()
    if len(text) > 2 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip()
    text = text.rstrip(".;,").rstrip() or text
    return re.sub(r"\s+", " ", text)


# Every rule takes (prediction, gold, options) and returns (right, reason), or None where it has nothing to say; right
# is None where the rule applies and cannot tell.
Decision = tuple[bool | None, str] | None
Options = dict[str, str]

# -- choice

_OPTION = re.compile(r"(?m)^[ \t]*\(?([A-H])[.):：][ \t]*(\S.*)$")
_INLINE_OPTION = re.compile(r"\(([A-H])\)[ \t]*([^()\n]+)")
_GOLD_LETTER = re.compile(r"\(?([A-H])\)?\.?")
_OTHER_LETTER = re.compile(r"^(?:(?:and|or)\b|[,&/])?\s*\(?(?:[B-H]\b|A\b(?! \w))(?!')|^(?:and|or)\b")
_DENIAL = re.compile(r"(?i)\b(?:not|neither|except|incorrect|wrong)\b|n't\b")
_LETTER = re.compile(r"^(?:option|choice|answer)?\s*[(\[]?\s*([A-Ha-h])\s*(?:[)\].:,]|$)\s*(.*)$", re.IGNORECASE)


@lru_cache(maxsize=1024)
def parse_options(question: str) -> Options:
    """Return letter -> text of the options a question lists, `A. ...` or `(A) ...`; empty where there are none."""
    for pattern in (_OPTION, _INLINE_OPTION):
        found = pattern.findall(question)
        letters = [letter for letter, _ in found]
        if len(letters) > 1 and letters == [chr(65 + i) for i in range(len(letters))]:
            return {letter: text.strip() for letter, text in found}
    return {}


def option_letter(text: str, options: Options) -> str | None:
    """Return the letter an answer names: `B`, `(B)`, `B. blue`, the text of one option, "so (B) is right"; else None.

    Two letters, or a letter with the text of another option, name nothing.
    """
    match = _LETTER.match(text)
    if match and (not options or match.group(1).upper() in options):
        letter, rest = match.group(1).upper(), match.group(2).strip()
        if not rest:
            return letter
        started = _options_at_start(rest, options)
        if letter in started:
            return letter
        if _OTHER_LETTER.match(rest) or (letter != match.group(1) and not options):
            return None  # "A, B", and "a. dog", where a may be an article
        return None if started else letter
    if re.match(r"[A-H] ?[(–—-]", text):
        return None  # a letter with the text of another option; with its own, the second look finds it
    named = _option_by_text(text, options)
    if named is not None or _DENIAL.search(text):
        return named
    letters = {letter for letter in re.findall(r"\(([A-H])\)", text) if letter in options}
    return letters.pop() if len(letters) == 1 else None


def _options_at_start(text: str, options: Options) -> list[str]:
    """The options with the longest text that `text` begins with, else the one it is."""
    start = plain_text(clean_answer(text))
    found = {letter: plain_text(clean_answer(option)) for letter, option in options.items()}
    fitting = [letter for letter, option in found.items() if option and f"{start} ".startswith(f"{option} ")]
    if not fitting:
        named = _option_by_text(text, options)
        return [named] if named else []
    longest = max(len(found[letter]) for letter in fitting)
    return [letter for letter in fitting if len(found[letter]) == longest]


def _option_by_text(text: str, options: Options) -> str | None:
    key = plain_text(text)
    cleaned = {letter: clean_answer(option) for letter, option in options.items()}
    same = [letter for letter, option in options.items() if option == text]  # "Ee" is not "ee"
    same = same or [letter for letter in options if key in (plain_text(options[letter]), plain_text(cleaned[letter]))]
    if not same and (value := parse_number(text)) is not None:
        same = [letter for letter, option in cleaned.items() if _equal_numbers(value, parse_number(option))]
    if not same:
        same = [letter for letter, option in cleaned.items() if (_math(text, option, {}) or (False,))[0]]
    return same[0] if len(same) == 1 else None


def _choice(prediction: str, gold: str, options: Options) -> Decision:
    wanted = _GOLD_LETTER.fullmatch(gold)
    if wanted is None and not options:
        return None
    letter = wanted.group(1) if wanted else _option_by_text(gold, options)
    if letter is None or (options and letter not in options):
        return None
    given = option_letter(prediction, options)
    if given is None:
        return (False, f"names no option, expected {letter}")
    return (given == letter, f"option {given}, expected {letter}")


# -- yes or no

_YES_NO = {
    **dict.fromkeys(("yes", "true", "是", "对", "正确", "是的", "对的"), "yes"),
    **dict.fromkeys(("no", "false", "否", "不是", "错", "错误", "不对", "不"), "no"),
}


def yes_or_no(text: str) -> str | None:
    """Return "yes" or "no" where an answer is one of them or opens with it as a word of its own; else None."""
    words = re.findall(r"[a-z]+|[\u4e00-\u9fff]+", text.lower())
    if re.match(r"no\. ?\d", text.lower()):
        return None
    if not words or words[0] not in _YES_NO:
        return None
    first = _YES_NO[words[0]]
    if len(words) > 1 and not re.match(r"^\W*\w+\s*[,.;:!-]", text):
        return None  # "no one", "true north"
    if any(_YES_NO.get(word, first) != first for word in words if word in ("yes", "no", "true", "false")):
        return None
    return first


def _yes_no(prediction: str, gold: str, options: Options) -> Decision:
    wanted = _YES_NO.get(gold.lower())
    if wanted is None:
        return None
    given = yes_or_no(prediction)
    if gold.lower() in ("true", "false") and prediction in ("T", "F"):
        given = "yes" if prediction == "T" else "no"
    return (given == wanted, f"says {given or 'neither yes nor no'}, expected {wanted}")


# -- numbers


class Number(NamedTuple):
    """A number as written: exact value, unit in one spelling, and how many decimals the writer gave (None: exact)."""

    value: Fraction
    unit: str
    decimals: int | None


_BELOW_TWENTY = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
_TENS = "ten twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = {word: 10 * tens for tens, word in enumerate(_TENS.split(), start=1)}
_WORDS |= {word: value for value, word in enumerate(_BELOW_TWENTY.split())}
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_CURRENCIES = {
    "$": "$",
    "usd": "$",
    "dollar": "$",
    "us$": "$",
    "€": "€",
    "eur": "€",
    "euro": "€",
    "£": "£",
    "pound": "£",
}
_CURRENCIES |= {"¥": "¥", "yuan": "¥", "rmb": "¥", "元": "¥", "₹": "₹", "rs": "₹", "rm": "RM"}
# unit -> (dimension, how many base units)
_UNITS: dict[str, tuple[str, Fraction]] = {
    name: (dimension, Fraction(size))
    for dimension, table in {
        "length": {"mm": "1/1000", "cm": "1/100", "m": 1, "km": 1000, "厘米": "1/100", "米": 1}
        | {"millimeter": "1/1000", "centimeter": "1/100", "meter": 1, "metre": 1, "kilometer": 1000},
        "mass": {"mg": "1/1000", "g": 1, "kg": 1000, "gram": 1, "kilogram": 1000, "克": 1, "千克": 1000},
        "time": {"ms": "1/1000", "s": 1, "sec": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hr": 3600}
        | {"hour": 3600, "秒": 1, "分钟": 60, "小时": 3600},
        "volume": {"ml": "1/1000", "l": 1, "liter": 1, "litre": 1, "milliliter": "1/1000"},
        "angle": {"°": 1, "degree": 1, "deg": 1, "^\\circ": 1, "^{\\circ}": 1, "度": 1},
        "percent": {"%": 1, "percent": 1, "pct": 1},
    }.items()
    for name, size in table.items()
}
_PERCENT = ("%", "percent", "pct")
_UNIT_WORDS = re.compile(
    r"(?:[A-Za-z]{2,}|(?<=/)[a-z]|[a-z](?=[\^/])|[\u4e00-\u9fff]+)(?:\^?\{?[23]\}?)?"
    r"(?:[ /](?:[A-Za-z]{2,}|(?<=/)[a-z])(?:\^?\{?[23]\}?)?)*"
)
_DIGITS = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,3}(?:[ ]\d{3})+(?:\.\d+)?(?!\d)|\d+(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    rf"""^(?P<sign>[+-]?)\s*(?:(?P<currency>us\$|rm|rs\.?|[$€£¥₹])\s*(?P<sign2>-?))?
    (?:(?P<whole>\d+)(?:\s+(?P<wn>\d+)/(?P<wd>\d+)|\s*\\[dt]?frac\{{(?P<wn2>\d+)\}}\{{(?P<wd2>\d+)\}})
      |\\[dt]?frac\s*\{{\s*(?P<fn>-?\d+)\s*\}}\s*\{{\s*(?P<fd>\d+)\s*\}}
      |(?P<n>{_DIGITS})(?:\s*/\s*(?P<d>\d+(?:\.\d+)?))?
      |(?P<word>[a-z]+(?:[ -][a-z]+)?))
    (?:\s*(?:e|(?:x|×|\*|\\times|\\cdot)\s*10\s*\^?\s*)\{{?(?P<exp>[+-]?\d{{1,3}})\}}?)?
    \s*(?P<scale>hundred|thousand|million|billion|trillion)?
    \s*(?P<unit>[^\d].*)?$""",
    re.VERBOSE | re.IGNORECASE,
)
# A decade, an ordinal, a year before our era and "12 or more" are no plain numbers.
_NO_NUMBER = re.compile(r"\d0s$|\d(?:st|nd|rd|th)\b|\d ?B\.?C\.?(?:E\.?)?$|\d\+$|\dM$|\d ?[ap]\.?m\.?$")
_CHANGED = re.compile(r"(?i)\b(?:half|quarters?|third|minus|negative|past|[ap]\.?m)\b|\?$")
_ASSIGNED = re.compile(r"^(?:\\?[A-Za-z]\w{0,2}|\\?angle\s*[A-Z]{1,3}|∠\s*[A-Z]{1,3})\s*=\s*(?=[^=]+$)")


@lru_cache(maxsize=65536)
def parse_number(text: str) -> Number | None:
    """Return the number an answer consists of, or None.

    Understands thousands separators, signs, fractions and mixed numbers, powers of ten, number words up to ninety-nine,
    hundred to trillion, currency, percent and units; a text that only contains a number is not one.
    """
    text = _ASSIGNED.sub("", text.strip())
    match = _NUMBER.match(text)
    if match is None or _NO_NUMBER.search(text):
        return None
    part = match.groupdict()
    decimals: int | None = None
    if part["whole"]:
        over, under = (int(part[key] or part[f"{key}2"]) for key in ("wn", "wd"))
        if under == 0:
            return None
        value = int(part["whole"]) + Fraction(over, under)
    elif part["fn"]:
        if int(part["fd"]) == 0:
            return None
        value = Fraction(int(part["fn"]), int(part["fd"]))
    elif part["n"]:
        digits = part["n"].replace(",", "").replace(" ", "")
        value = Fraction(digits if not digits.startswith(".") else "0" + digits)
        decimals = len(digits.partition(".")[2])
        if part["d"]:
            if Fraction(part["d"]) == 0:
                return None
            value, decimals = value / Fraction(part["d"]), None
    else:
        words = re.split(r"[ -]", part["word"].lower())
        unit_word = ""
        if len(words) == 2 and words[0] in _WORDS and (words[1] not in _WORDS or _WORDS[words[0]] < 20):
            unit_word = words.pop()
            if unit_word in _SCALES:
                part["scale"], unit_word = unit_word, ""
        if not all(word in _WORDS for word in words) or (len(words) == 2 and not 0 < _WORDS[words[1]] < 10):
            return None
        value, decimals = Fraction(sum(_WORDS[word] for word in words)), 0
        if unit_word:
            part["unit"] = f"{unit_word} {part['unit'] or ''}".strip()
    if part["exp"]:
        exponent = int(part["exp"])
        value *= Fraction(10) ** exponent
        decimals = None if decimals is None else max(0, decimals - exponent)
    if part["scale"]:
        value *= _SCALES[part["scale"].lower()]
        decimals = None if decimals is None else decimals - len(str(_SCALES[part["scale"].lower()])) + 1
    if "-" in (part["sign"], part["sign2"]):
        value = -value
    unit = _unit(part["currency"], part["unit"])
    if unit is None:
        return None
    if unit in _PERCENT:
        unit = "percent"
    return Number(value, unit, decimals)


def _unit(currency: str | None, unit: str | None) -> str | None:
    """One spelling for a unit; None where what follows the number is no unit."""
    unit = (unit or "").strip().rstrip(".").strip()
    if currency:
        name = _CURRENCIES[currency.lower().rstrip(".")]
        return name if not unit or _CURRENCIES.get(_singular(unit.lower())) == name else None
    if not unit:
        return ""
    lowered = _singular(unit.lower().strip("()[] "))
    if lowered in _CURRENCIES:
        return _CURRENCIES[lowered]
    if unit in _UNITS or lowered in _UNITS:
        return unit if unit in _UNITS else lowered
    # words only: "5 red cubes" has the unit "red cube"; "5 - 3", "5 or 6", "5x" and "5\\pi" have none
    if _UNIT_WORDS.fullmatch(unit) and not _HEDGED.search(unit):
        return lowered.replace("square ", "sq ")
    return None


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _equal_numbers(given: Number | None, wanted: Number | None) -> bool:
    """Whether two numbers say the same: equal, or the finer one rounds to the coarser one."""
    if given is None or wanted is None:
        return False
    if given.unit != wanted.unit and given.unit and wanted.unit:
        (one, size), (other, other_size) = (_UNITS.get(number.unit, (number.unit, 1)) for number in (given, wanted))
        return one == other and given.value * size == wanted.value * other_size
    if "percent" in (given.unit, wanted.unit) and given.unit != wanted.unit:
        plain, percent = (given, wanted) if wanted.unit == "percent" else (wanted, given)
        if plain.value == percent.value / 100:
            return True
        if percent is given and abs(plain.value) <= 1:
            return False  # 0.5 is not 0.5 %, while 60 may well have meant 60 %
    if given.value == wanted.value:
        return True
    if wanted.decimals is None or wanted.decimals > 0:
        # an exact third may be given as 0.33, never as 0.3 or as a whole number
        if wanted.decimals is None and given.decimals is not None and given.decimals >= 2:
            return (1000 * wanted.value).denominator != 1 and _rounds_to(wanted.value, given)
        if wanted.decimals is not None and (given.decimals is None or given.decimals >= wanted.decimals):
            return _rounds_to(given.value, wanted)
        if given.decimals is not None and given.decimals >= 2:
            return _rounds_to(wanted.value, given)
    return False


def _rounds_to(fine: Fraction, coarse: Number) -> bool:
    return abs(fine - coarse.value) <= Fraction(1, 2) / Fraction(10) ** (coarse.decimals or 0)


_HEDGED = re.compile(r"(?i)\b(?:not?|than|least|most|over|under|between|from|or|and|to|except|n't)\b|n't|[<>≤≥]")
_LONE_NUMBER = re.compile(rf"(?<![\w.,/-])-?[$€£¥]?(?:{_DIGITS})(?:\s?%|°)?(?![\w/]|[.,]\d)")


def number_in_sentence(text: str) -> Number | None:
    """Return the only number of a sentence such as "There are 5 cats"; None where it is hedged or not alone."""
    if " " not in text or "\\" in text or any(p.search(text) for p in (_HEDGED, _NO_NUMBER, _CHANGED)):
        return None
    found = _LONE_NUMBER.findall(text)
    words = [word for word in re.findall(r"[a-z]+", text.lower()) if word in _WORDS and word != "one"]
    if len(found) + len(words) != 1:
        return None
    return parse_number((found or words)[0])


def _number(prediction: str, gold: str, options: Options) -> Decision:
    wanted = parse_number(gold)
    if wanted is None:
        return None
    given = parse_number(prediction) or number_in_sentence(prediction)
    if given is None:
        if re.search(r"[\\^√π=*+/]|sqrt|pi\b|^\d+ ?: ?\d+$", prediction) and not _HEDGED.search(prediction):
            return None  # may be a formula with this value: left to `math`
        return (False, f"no number, expected {gold[:40]}")
    return (_equal_numbers(given, wanted), f"{float(given.value):.12g}, expected {gold[:40]}")


def _relaxed(prediction: str, gold: str, options: Options) -> Decision:
    """ChartQA's relaxed accuracy: 5 % of the gold value; years and zero are exact."""
    wanted, given = parse_number(gold), parse_number(prediction) or number_in_sentence(prediction)
    if wanted is None or given is None:
        return None
    if given.unit and wanted.unit and given.unit != wanted.unit:
        return None
    is_year = wanted.decimals == 0 and not wanted.unit and 1900 <= wanted.value <= 2099
    if wanted.value == 0 or is_year:
        return (given.value == wanted.value, "exact for a year or zero")
    value = given.value
    if given.unit == "percent" and not wanted.unit and abs(wanted.value) <= 1:
        value /= 100
    if wanted.unit == "percent" and not given.unit and abs(value) <= 1 < abs(wanted.value):
        value *= 100
    error = abs(value - wanted.value) / abs(wanted.value)
    return (error <= Fraction(1, 20), f"off by {float(error):.1%}, 5 % allowed")


# -- dates

_MONTH_NAMES = (
    "january jan|february feb|march mar|april apr|may|june jun|july jul|august aug|september sep sept|october oct|"
    "november nov|december dec"
)
_MONTHS = {name: number for number, names in enumerate(_MONTH_NAMES.split("|"), start=1) for name in names.split()}
_DATE_FORMS = (
    (re.compile(r"^(\d{4})[-/.年](\d{1,2})[-/.月](\d{1,2})日?$"), "ymd"),
    (re.compile(r"^(\d{1,2})(?:st|nd|rd|th)?[ -](?:of )?([a-z]+)\.?,?[ -](\d{4})$"), "dmy"),
    (re.compile(r"^([a-z]+)\.? (\d{1,2})(?:st|nd|rd|th)?,? (\d{4})$"), "mdy"),
    (re.compile(r"^([a-z]+)\.?,? (\d{4})$"), "my"),
    (re.compile(r"^([a-z]+)\.? (\d{1,2})(?:st|nd|rd|th)?$"), "md"),
    (re.compile(r"^(\d{1,2})(?:st|nd|rd|th)? (?:of )?([a-z]+)\.?$"), "dm"),
    (re.compile(r"^(\d{1,2})[-/.](\d{1,2})[-/.](\d{4}|\d{2})$"), "??y"),
)


def parse_date(text: str) -> tuple[str, ...] | None:
    """Return a date as (year, month, day), missing parts empty, or None.

    Two numbers below 13 may be day and month either way round: they stay in the order written, marked "?".
    """
    text = re.sub(r"^(?:on |(?:mon|tues|wednes|thurs|fri|satur|sun)day,? )+", "", text.lower().strip())
    for pattern, order in _DATE_FORMS:
        match = pattern.match(text)
        if match is None:
            continue
        part = dict(zip(order, match.groups(), strict=True)) if "?" not in order else {}
        if order == "??y":
            first, second, year = (int(group) for group in match.groups())
            if first > 12 >= second:
                part = {"d": first, "m": second, "y": year}
            elif second > 12 >= first:
                part = {"m": first, "d": second, "y": year}
            else:
                return ("?", str(first), str(second), str(year))
        month = part.get("m", "")
        if isinstance(month, str) and month and not month.isdigit():
            if month not in _MONTHS:
                return None
            month = _MONTHS[month]
        return tuple(str(int(value)) if value != "" else "" for value in (part.get("y", ""), month, part.get("d", "")))
    return None


def _date(prediction: str, gold: str, options: Options) -> Decision:
    wanted = parse_date(gold)
    if wanted is None:
        return None
    given = next((date for text in _said(prediction) if (date := parse_date(text)) is not None), None)
    if given is None:
        return None
    return (given == wanted, f"date {'-'.join(given)}, expected {'-'.join(wanted)}")


# -- text

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# Marks that carry meaning stay: a decimal point or comma, a colon between digits, signs, roots.
_PUNCTUATION = re.compile(
    r"[^\w\s%$€£¥°+<>=/\\^.,:√±×÷≠≤≥∞-]|[.,](?!\d)|(?<!\d)[.,]|:(?!\s?\d)|(?<!\d)(?<!\d\s):"
    r"|(?<=[^\W\d])-|-(?!\d)|(?<!\d)/|/(?!\d)|_"
)


@lru_cache(maxsize=65536)
def plain_text(text: str) -> str:
    """Return text for comparison: lower case, compatible characters, no articles, no punctuation, single spaces.

    What would become empty ("A", "the") stays as it is.
    """
    lowered = (
        unicodedata.normalize("NFKC", text.replace("²", "^2").replace("³", "^3"))
        .lower()
        .replace("'", "")
        .replace("’", "")
    )
    bare = _PUNCTUATION.sub(" ", lowered)
    short = re.sub(r" ?([:<>=±×÷]) ?", r"\1", " ".join(_ARTICLES.sub(" ", bare).split()))
    return short or " ".join(bare.split()) or lowered.strip()


_COPULA = re.compile(r"\b(?:is|are|was|were)\s+(.+)$", re.IGNORECASE)


def _text(prediction: str, gold: str, options: Options) -> Decision:
    wanted = plain_text(gold)
    if not wanted:
        return None
    said = [text for text in _said(prediction) if plain_text(text) == wanted]
    if not said or not any(_same_marks(text, gold) for text in said):
        return None
    return (True, "same words")


_BRACKETED = re.compile(r"(?:.*=\s*)?(?:\\left)?([\[(]).*,.*?(?:\\right)?([\])])")


def _same_marks(given: str, gold: str) -> bool:
    """Whether marks that `plain_text` drops agree: both are in (1, 2] or in neither, -x is not x, a/b is not b/a."""
    if "\\frac" in given and "\\frac" in gold:
        return "".join(given.split()) == "".join(gold.split())
    if bool(re.match(r"-[a-z]", given)) != bool(re.match(r"-[a-z]", gold)):
        return False
    if any(re.search(r"\b[A-Za-z]\s*[-+*/]\s*[A-Za-z]\b", text) for text in (given, gold)):
        return "".join(given.lower().split()) == "".join(gold.lower().split())
    pairs = [_BRACKETED.fullmatch(text) for text in (given, gold)]
    return not all(pairs) or pairs[0].groups() == pairs[1].groups()


def _said(text: str) -> Iterator[str]:
    """The text, and what it says of its subject: "The car is red" says "red"."""
    yield text
    text = re.split(r"\b(?:because|since|but)\b", text)[0].strip()
    while match := _COPULA.search(text):
        text = match.group(1)
        yield text


# -- lists

_SEPARATOR = re.compile(r"\s*(?:,\s*and\b|;|,|、|\band\b|&|和)\s*")


def _list(prediction: str, gold: str, options: Options) -> Decision:
    """Several items: numbers in order (in any order inside braces), words in any order."""
    wanted, given = _items(gold), _items(prediction)
    if len(wanted) < 2:
        return None
    if len(wanted) != len(given):
        return None
    any_order = gold.strip().startswith(("{", "\\{")) or not any(parse_number(item) for item in wanted)
    pairs = _matching(given, wanted) if any_order else zip(given, wanted, strict=True)
    right = pairs is not None and _same_marks(prediction, gold) and all(_same_item(a, b) for a, b in pairs)
    return (True, "same items") if right else None


def _items(text: str) -> list[str]:
    text = text.strip().removeprefix("\\{").removesuffix("\\}").strip("{}()[] ")
    return [item for item in _SEPARATOR.split(text) if item]


def _same_item(given: str, wanted: str) -> bool:
    number = parse_number(wanted)
    return _equal_numbers(parse_number(given), number) if number else plain_text(given) == plain_text(wanted)


def _matching(given: list[str], wanted: list[str]) -> list[tuple[str, str]] | None:
    left = list(given)
    pairs = []
    for item in wanted:
        found = next((other for other in left if _same_item(other, item)), None)
        if found is None:
            return None
        left.remove(found)
        pairs.append((found, item))
    return pairs


# -- transcribed text


def anls(prediction: str, gold: str) -> float:
    """Return the normalised Levenshtein similarity, 1 - distance / longer length: 1 is equal, 0 has nothing in common.

    This is the similarity of DocVQA's ANLS before its 0.5 threshold.
    """
    a, b = " ".join(prediction.lower().split()), " ".join(gold.lower().split())
    if a == b:
        return 1.0
    if not a or not b:
        return 0.0
    previous = list(range(len(b) + 1))
    for i, char in enumerate(a, start=1):
        current = [i]
        for j, other in enumerate(b, start=1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (char != other)))
        previous = current
    return 1 - previous[-1] / max(len(a), len(b))


def _anls(prediction: str, gold: str, options: Options) -> Decision:
    """Text read off a page: a slip of a letter in ten is forgiven, a digit never."""
    if len(prediction) > 2 * len(gold) or re.findall(r"\d", prediction) != re.findall(r"\d", gold):
        return None
    similarity = anls(prediction, gold)
    return (True, f"ANLS {similarity:.2f}") if similarity > 0.9 else None


# -- formulas

_FORMULA = re.compile(r"[\\^√π=*+/]|\d\s*[a-z]\b|\bpi\b|sqrt|\d!")
_FORMULA_WORDS = (
    "frac dfrac tfrac sqrt cdot times div left right infty theta alpha beta gamma lambda circ degree sin cos tan cot "
    "sec csc log exp cup cap mathrm mathbb angle overline leq geq neq"
)
_FORMULA_NAMES = frozenset(_FORMULA_WORDS.split())


def _math(prediction: str, gold: str, options: Options) -> Decision:
    """Formulas, by algebra in a child process; a formula also equals its decimal value given to two places or more."""
    if not (_FORMULA.search(prediction) or _FORMULA.search(gold)) or _HEDGED.search(prediction):
        return None
    if _NO_NUMBER.search(prediction) or _NO_NUMBER.search(gold):
        return None
    for text in (prediction, gold):
        words = re.findall(r"[A-Za-z]{3,}", text)
        if len(text) > 200 or any(word.lower() not in _FORMULA_NAMES for word in words):
            return None  # algebra would read "red" as r*e*d
    compared = compare_formulas(_latex(prediction), _latex(gold))
    if compared is None:
        return (None, "algebra ran out of time or memory")
    if compared.equal:
        return (True, "equal formulas")
    for text, formula_value in ((prediction, compared.gold_value), (gold, compared.prediction_value)):
        number = parse_number(text)
        if number is None or formula_value is None or (number.decimals or 0) < 2:
            continue
        if _rounds_to(Fraction(formula_value), number):
            return (True, "decimal value of the formula")
    return (False, "unequal formulas")


def _latex(text: str) -> str:
    text = re.sub(r"√\s*(?=\{)", r"\\sqrt", text)
    text = re.sub(r"√\s*(\d+|\([^()]*\))", r"\\sqrt{\1}", text).replace("π", r"\pi ")
    text = re.sub(r"(?<!\\)\bsqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    return re.sub(r"(?<![\\A-Za-z])pi\b", r"\\pi ", text)


_RULES: dict[str, Callable[[str, str, Options], Decision]] = {
    "choice": _choice,
    "yes_no": _yes_no,
    "number": _number,
    "relaxed": _relaxed,
    "date": _date,
    "text": _text,
    "list": _list,
    "math": _math,
    "anls": _anls,
}
