"""Multiple choice and yes or no: which option an answer names, by letter or by text."""

import re
from functools import lru_cache

from internvl_mpo.answers.common import Decision, Options, clean_answer, plain_words
from internvl_mpo.answers.formulas import decide_math
from internvl_mpo.answers.numbers import equal_numbers, parse_number

# -- choice

_OPTION = re.compile(r"(?m)^[ \t]*\(?([A-H])[.):：][ \t]*(\S.*)$")


_INLINE_OPTION = re.compile(r"\(([A-H])\)[ \t]*([^()\n]+)")


GOLD_LETTER = re.compile(r"\(?([A-H])\)?\.?")


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
    named = option_by_text(text, options)
    if named is not None or _DENIAL.search(text):
        return named
    letters = {letter for letter in re.findall(r"\(([A-H])\)", text) if letter in options}
    return letters.pop() if len(letters) == 1 else None


def _options_at_start(text: str, options: Options) -> list[str]:
    """The options with the longest text that `text` begins with, else the one it is."""
    start = plain_words(clean_answer(text))
    found = {letter: plain_words(clean_answer(option)) for letter, option in options.items()}
    fitting = [letter for letter, option in found.items() if option and f"{start} ".startswith(f"{option} ")]
    if not fitting:
        named = option_by_text(text, options)
        return [named] if named else []
    longest = max(len(found[letter]) for letter in fitting)
    return [letter for letter in fitting if len(found[letter]) == longest]


def option_by_text(text: str, options: Options) -> str | None:
    key = plain_words(text)
    cleaned = {letter: clean_answer(option) for letter, option in options.items()}
    same = [letter for letter, option in options.items() if option == text]  # "Ee" is not "ee"
    same = same or [letter for letter in options if key in (plain_words(options[letter]), plain_words(cleaned[letter]))]
    if not same and (value := parse_number(text)) is not None:
        same = [letter for letter, option in cleaned.items() if equal_numbers(value, parse_number(option))]
    if not same:
        same = [letter for letter, option in cleaned.items() if (decide_math(text, option, {}) or (False,))[0]]
    return same[0] if len(same) == 1 else None


def decide_choice(prediction: str, gold: str, options: Options) -> Decision:
    wanted = GOLD_LETTER.fullmatch(gold)
    if wanted is None and not options:
        return None
    letter = wanted.group(1) if wanted else option_by_text(gold, options)
    if letter is None or (options and letter not in options):
        return None
    given = option_letter(prediction, options)
    if given is None:
        return (False, f"names no option, expected {letter}")
    return (given == letter, f"option {given}, expected {letter}")


# -- yes or no

YES_NO = {
    **dict.fromkeys(("yes", "true", "是", "对", "正确", "是的", "对的"), "yes"),
    **dict.fromkeys(("no", "false", "否", "不是", "错", "错误", "不对", "不"), "no"),
}


def yes_or_no(text: str) -> str | None:
    """Return "yes" or "no" where an answer is one of them or opens with it as a word of its own; else None."""
    words = re.findall(r"[a-z]+|[\u4e00-\u9fff]+", text.lower())
    if re.match(r"no\. ?\d", text.lower()):
        return None
    if not words or words[0] not in YES_NO:
        return None
    first = YES_NO[words[0]]
    if len(words) > 1 and not re.match(r"^\W*\w+\s*[,.;:!-]", text):
        return None  # "no one", "true north"
    if any(YES_NO.get(word, first) != first for word in words if word in ("yes", "no", "true", "false")):
        return None
    return first


def decide_yes_no(prediction: str, gold: str, options: Options) -> Decision:
    wanted = YES_NO.get(gold.lower())
    if wanted is None:
        return None
    given = yes_or_no(prediction)
    if gold.lower() in ("true", "false") and prediction in ("T", "F"):
        given = "yes" if prediction == "T" else "no"
    return (given == wanted, f"says {given or 'neither yes nor no'}, expected {wanted}")
