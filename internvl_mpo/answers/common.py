"""Text as every rule reads it: one spelling, without lead-in and dressing, without what the answer itself denies."""

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from internvl_mpo.answers.finding import last_boxed

# Every rule takes (prediction, gold, asked) and returns (right, reason), or None where it has nothing to say; right is
# None where the rule applies and cannot tell.
Decision = tuple[bool | None, str] | None
Options = dict[str, str]


class Asked(NamedTuple):
    """What was asked: the question's own words, and letter -> text of its options, if any."""

    question: str
    options: Options


NOTHING_ASKED = Asked("", {})

_LEAD = re.compile(
    r"^(?:so|thus|therefore|hence)?[,\s]*(?:the\s+)?(?:(?:final|correct|right)\s+)?(?:answer|option|choice)"
    r"(?:\s+to\s+(?:the|this)\s+question)?\s*(?:is|should\s+be|would\s+be|=|:|：)+\s*(?:that\s+)?"
    r"|^(?:it\s+is|it's|that\s+is)\s+"
    r"|^(?:因此|所以|故|综上)?[,，]?\s*(?:最终|正确|标准)?(?:的)?(?:答案|选项|结果)\s*(?:应该|应)?\s*(?:是|为|:|：)\s*[:：]?\s*",
    re.IGNORECASE,
)
_HEDGE = re.compile(
    r"^(?:(?:about|approximately|approx\.?|around|roughly|nearly|exactly|precisely)\s+|~|≈|\\approx|大约|大概|差不多|恰好|正好|约)\s*",
    re.IGNORECASE,
)
_TEXT_MACRO = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|textit|operatorname|rm)\s*\{([^{}]*)\}")
_MATH_MODE = re.compile(r"\$([^$]*\\[^$]*)\$")
_VULGAR = {
    chr(code): f" {unicodedata.normalize('NFKC', chr(code)).replace(chr(0x2044), '/')}"
    for code in (*range(0xBC, 0xBF), *range(0x2150, 0x215F), 0x2189)
}
_ONE_SPELLING = str.maketrans(
    {chr(0xFF01 + i): chr(0x21 + i) for i in range(94)}  # full-width forms
    | dict.fromkeys("\u00a0\u2007\u2009\u202f\u3000", " ")
    | dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", "")
    | dict.fromkeys("\u2212\u2010\u2011\u2012\ufe63", "-")
    | {"。": ".", "º": "°", "˚": "°", "\u2044": "/", "\u2215": "/"}
    | _VULGAR
    | {sign: f"^{power}" for power, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")}
)
_DASH_SIGN = re.compile(r"(?:^|(?<=[(=$,]))\s*[–—]\s*(?=[$\d.√\\])")
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "「": "」", "『": "』"}


@lru_cache(maxsize=65536)
def clean_answer(text: str) -> str:
    """Return an answer without what carries no meaning: lead-in, hedge, markdown, `$`, full-width forms, end point."""
    text = text.translate(_ONE_SPELLING).strip()
    if "\\" in text:
        boxed = last_boxed(text)
        text = boxed if boxed is not None else text
        text = _TEXT_MACRO.sub(r" \1 ", _MATH_MODE.sub(r"\1", text))
        text = (
            re.sub(r"\\(?:left|right)(?![A-Za-z])|\\[()\[\]]|\\[,;:! ]|\\quad|~", " ", text)
            .replace("\\%", "%")
            .replace("\\$", "$")
            .strip()
        )
    if "–" in text or "—" in text:
        text = _DASH_SIGN.sub("-", text)
    text = text.strip("*_`").lstrip("=").strip()
    if len(text) > 1 and text[0] == "$" and text[-1] == "$":
        text = text.strip("$").strip()
    for pattern in (_LEAD, _HEDGE):
        text = pattern.sub("", text).strip()
    text = text.strip("*_`").strip()
    if len(text) > 2 and _QUOTES.get(text[0]) == text[-1]:
        text = text[1:-1].strip()
    text = text.rstrip(".;,").rstrip() or text
    if "{" in text:
        text = text.replace("{,}", ",")
        if text[0] == "{" and text[-1] == "}" and not re.search(r"[{},:\"]", text[1:-1]):
            text = text[1:-1].strip()
    return re.sub(r"\s+(?=\^)", "", re.sub(r"\s+", " ", text))


# ------------------------------------------------------------------------------------------------- what is denied

DENIAL = re.compile(
    r"\b(?:not|never|neither|nor|no|except|excluding|without|other than|incorrect|wrong|false|ruled? out|eliminated|"
    r"cannot|impossible|unlikely|exclude[sd]?)\b|n['’]t\b|不|并?非|没|错|除|排除",
    re.IGNORECASE,
)
_ALL_BUT = re.compile(r"\b(?:all|any(?:thing)?|every(?:thing)?|nothing|none) but\b", re.IGNORECASE)
_RATHER = re.compile(r"\s*,?\s*\b(?:rather than|instead of|as opposed to|and not)\b|，?而不是|，?而非", re.IGNORECASE)
_CLAUSE_END = re.compile(
    r"\s*[;；，\n]+\s*|,(?!\d)\s*|(?<=[.!?])\s+|\s*,?\s+(?:but|however|yet)\b,?\s*|而是|(?<=[A-H\d]),?是(?=[A-H\d])",
    re.IGNORECASE,
)


def affirmed(text: str) -> str:
    """Return an answer without the clauses that deny: "B, not A" is "B", "not 4 but 3" is "3", "not A" is empty."""
    if not (DENIAL.search(text) or _ALL_BUT.search(text) or _RATHER.search(text)):
        return text
    text = _RATHER.sub(", not ", _ALL_BUT.sub("except", text))
    clauses = [clause.strip() for clause in _CLAUSE_END.split(text)]
    return ", ".join(clause for clause in clauses if clause and not DENIAL.search(clause))


_REASON = re.compile(
    r"[,;]?\s+(?:because|since|as (?:it|the|he|she|they|there|this|that)|due to|given that)\b|因为|，因", re.I
)


def without_reason(text: str) -> str:
    """Return an answer without the reason given after it."""
    return _REASON.split(text)[0].strip()


# ----------------------------------------------------------------------------------------------- the plain wording

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
# Marks that carry meaning stay: a decimal point or comma, a colon between digits, signs, roots.
_INITIALS = re.compile(r"\b(?:[^\W\d_]\.){1,}[^\W\d_]\b\.?")
_PUNCTUATION = re.compile(
    r"[^\w\s%$€£¥°+<>=/\\^.,:√±×÷≠≤≥∞-]|[.,](?!\d)|(?<!\d),|(?<=[^\d\s])\.|:(?!\s?\d)|(?<!\d)(?<!\d\s):"
    r"|(?<=[^\W\d])-|-(?!\d)|(?<!\d)/|/(?!\d)|_"
)


@lru_cache(maxsize=65536)
def plain_words(text: str) -> str:
    """Return text for comparison: lower case, compatible characters, no articles, no punctuation, single spaces.

    What would become empty ("A", "the") stays as it is.
    """
    lowered = (
        unicodedata.normalize("NFKC", text.replace("²", "^2").replace("³", "^3"))
        .lower()
        .replace("'", "")
        .replace("’", "")
        .replace("&", " and ")
    )
    if "." in lowered:
        lowered = _INITIALS.sub(lambda match: match[0].replace(".", ""), lowered)
    bare = _PUNCTUATION.sub(" ", lowered)
    short = re.sub(r" ?([:<>=±×÷]) ?", r"\1", " ".join(_ARTICLES.sub(" ", bare).split()))
    return short or " ".join(bare.split()) or lowered.strip()


_COPULA = re.compile(r"\b(?:is|are|was|were)\s+(.+)$", re.IGNORECASE)


def said_values(text: str) -> Iterator[str]:
    """The text, and what it says of its subject: "The car is red" says "red"."""
    yield text
    text = re.split(r"\b(?:because|since|but)\b", text)[0].strip()
    while match := _COPULA.search(text):
        text = match.group(1)
        yield text
