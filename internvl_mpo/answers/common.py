"""What every rule of the matcher shares: cleaning an answer, words without marks, hedges."""

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache

from internvl_mpo.answers.finding import last_boxed

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


HEDGED = re.compile(r"(?i)\b(?:not?|than|least|most|over|under|between|from|or|and|to|except|n't)\b|n't|[<>≤≥]")


# -- text

ARTICLES = re.compile(r"\b(?:a|an|the)\b")


# Marks that carry meaning stay: a decimal point or comma, a colon between digits, signs, roots.
PUNCTUATION = re.compile(
    r"[^\w\s%$€£¥°+<>=/\\^.,:√±×÷≠≤≥∞-]|[.,](?!\d)|(?<!\d)[.,]|:(?!\s?\d)|(?<!\d)(?<!\d\s):"
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
    )
    bare = PUNCTUATION.sub(" ", lowered)
    short = re.sub(r" ?([:<>=±×÷]) ?", r"\1", " ".join(ARTICLES.sub(" ", bare).split()))
    return short or " ".join(bare.split()) or lowered.strip()


COPULA = re.compile(r"\b(?:is|are|was|were)\s+(.+)$", re.IGNORECASE)


def said_values(text: str) -> Iterator[str]:
    """The text, and what it says of its subject: "The car is red" says "red"."""
    yield text
    text = re.split(r"\b(?:because|since|but)\b", text)[0].strip()
    while match := COPULA.search(text):
        text = match.group(1)
        yield text
