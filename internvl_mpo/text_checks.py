"""Checks on response texts: repetition, near copies, entailment of short answers, cutting a prefix."""

import math
import re
from functools import lru_cache

from internvl_mpo.records import IMAGE_PLACEHOLDER

# A text of at least so many words loops where less than this share of its runs of four words is distinct.
LONG_WORDS, LOOP_SHARE = 24, 0.5


def is_repetitive(text: str) -> bool:
    """Return whether a text loops: fewer than half of its runs of four words (or of eight characters) are distinct."""
    words = text.split()
    if len(words) >= LONG_WORDS:
        if len(set(words)) - 3 >= LOOP_SHARE * len(words):
            return False  # every distinct word opens a distinct run
        runs = [*zip(words, words[1:], words[2:], words[3:], strict=False)]
        return len(set(runs)) < LOOP_SHARE * len(runs)
    if len(text) >= 96:
        runs = [text[start : start + 8] for start in range(len(text) - 7)]
        return len(set(runs)) < 0.35 * len(runs)
    return False


def word_shingles(words: list[str]) -> frozenset[int]:
    """The word triples of a text by their hashes, which compare faster than the words."""
    return frozenset(map(hash, zip(words, words[1:], words[2:], strict=False))) or frozenset(map(hash, words))


def has_similar(mine: frozenset, others: list[frozenset], limit: float) -> bool:
    """Whether the Jaccard similarity with any other reaches the limit."""
    size = len(mine)
    share = limit / (1 + limit)  # |A & B| / |A | B| >= limit, in terms of |A| + |B|
    smallest, largest = limit * size, size / limit
    for other in others:
        number = len(other)
        if smallest <= number <= largest and len(mine & other) >= share * (size + number):
            return True
    return False


@lru_cache(maxsize=65536)
def entails(answer: str, part: str) -> bool:
    """Return whether `part` occurs in `answer` as whole words, so that calling `answer` wrong would be unsafe.

    "12" does not contain "1", and "none" does not contain "no".
    """
    words, wanted = _answer_words(answer), _answer_words(part)
    if not wanted:
        return False
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))


def _answer_words(text: str) -> list[str]:
    return re.findall(r"-?\d+(?:[.,]\d+)*|[^\W\d_]+|[^\w\s]", text.lower().strip(" ."))


# --------------------------------------------------------------------------------------------------- Dropout-NTP

_UNIT = re.compile(r"[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]|[^\s\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]+")
_IMAGE_LINE = re.compile(r"(?:(?:Image|图)-?\d+\s*[:：]\s*)?" + IMAGE_PLACEHOLDER + r"[ \t]*\n?")


def cut_prefix(text: str, ratio: float) -> str:
    """Return the first `ratio` of a text, counted in words, in Chinese in characters, without trailing space.

    At most all but the last word: something must be left to continue.
    """
    units = list(_UNIT.finditer(text))
    count = min(math.floor(len(units) * ratio), len(units) - 1)
    return text[: units[count - 1].end()] if count > 0 else ""


def without_images(question: str) -> str:
    """Return the question without its `<image>` placeholders and their numbering."""
    return _IMAGE_LINE.sub("", question).strip()
