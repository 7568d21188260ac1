"""Options as answers: read once, here, for the matcher and for the rule `ours` of the benchmarks alike."""

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import NamedTuple

from internvl_mpo.answers.common import (
    DENIAL,
    Asked,
    Decision,
    Options,
    affirmed,
    clean_answer,
    plain_words,
    said_values,
    without_reason,
)
from internvl_mpo.answers.formulas import decide_math, same_formula
from internvl_mpo.answers.numbers import equal_numbers, parse_number, read_number
from internvl_mpo.answers.wording import bare_choice, reword, same_saying
from internvl_mpo.answers.yes_no import YES_NO, yes_or_no

MAX_LINE = 240  # a longer text argues: an option it mentions need not be the one it settles on

_OPTION = re.compile(r"(?m)^[ \t]*\(?([A-H])[.):：][ \t]*(\S.*)$")
_INLINE_OPTION = re.compile(r"\(([A-H])\)[ \t]*([^()\n]+)")
_GOLD_LETTER = re.compile(r"\(?([A-H])\)?\.?")


class Chosen(NamedTuple):
    """The letter of the option an answer names, or None, and how it was found or why not."""

    letter: str | None
    how: str


FROM_THE_START = frozenset(("letter first", "letter and text of the option", "text of the option"))
_SEVERAL = Chosen(None, "several options")
_DENIES = Chosen(None, "denies what it names")
_CONTRADICTS = Chosen(None, "a letter with the text of another option")


@lru_cache(maxsize=1024)
def parse_options(question: str) -> Options:
    """Return letter -> text of the options a question lists, `A. ...` or `(A) ...`; empty where there are none."""
    for pattern in (_OPTION, _INLINE_OPTION):
        found = pattern.findall(question)
        letters = [letter for letter, _ in found]
        if len(letters) > 1 and letters == [chr(65 + i) for i in range(len(letters))]:
            return {letter: text.strip() for letter, text in found}
    return {}


def read_option(text: str, options: Mapping[str, str], question: str = "") -> Chosen:
    """Return the option an answer settles on.

    A letter first, with its own text or a reason after it; the text of exactly one option, in another spelling or with
    another unit sign; one letter in parentheses or after "option"; the only option a short sentence mentions. What the
    answer denies is left out. Several letters, or a letter with the text of another option, name nothing.

    Args:
        text: a final answer as it was given.
        options: letter -> text; empty where any letter A to H may be meant.
        question: what was asked, for options that are yes and no.
    """
    text = _END_TOKEN.sub("", text)
    said = clean_answer(text)
    wanted = yes_or_no(text, question) if options and all(_yes_no(option) for option in options.values()) else None
    named = [letter for letter, option in options.items() if wanted and _yes_no(option) == wanted]
    if len(named) == 1:
        return Chosen(named[0], f"says {wanted}")
    for opening in (text.strip(), said, bare_choice(said)):
        chosen = _opening_letter(opening, options)
        if chosen is not None:
            return chosen
    closing = _CLOSING.match(said)
    if closing and (letter := _by_text(closing[1], options)):
        return Chosen(letter, "text and letter") if letter == closing[2] else _CONTRADICTS
    letter = _by_text(said, options)
    if letter:
        return Chosen(letter, "text of the option")
    labelled = _labelled(said, options)
    if labelled:
        return Chosen(labelled, "letter and text of the option")
    left = affirmed(said)
    if left == said:
        return _mentioned(said, options)
    return read_option(left, options, question) if left else _DENIES


_END_TOKEN = re.compile(r"(?:</s>|<\|[a-z_]{1,20}\|>)\s*$")


def _yes_no(option: str) -> str | None:
    return YES_NO.get(plain_words(option))


# ------------------------------------------------------------------------------------------------- a letter first

_LEAD = re.compile(
    r"^(?:[\s*_`\"'“”]|(?:i (?:would )?(?:think|believe|choose|pick|select|say)|so|thus|therefore|hence|must be|"
    r"should be|probably|likely|maybe)\b[,:\s]*(?:that\s)?|the (?:correct |right )?(?:option|choice|letter)\s"
    r"|(?:option|choice|answer|letter)\b\s*|选项?|选择|答案)*",
    re.IGNORECASE,
)
# a letter that opens the answer, and the mark that sets it apart from a word
_OPENING = re.compile(
    r"(?P<open>[(\[（【{<\"'“`*]*)\s*(?P<letter>[A-Za-z])(?![A-Za-z0-9'’])\s*"
    r"(?P<mark>[)\]）】}>\"'”`*.:：,，、;；!?/&+–—-]*)(?P<rest>.*)$",
    re.DOTALL,
)
_MORE_LETTERS = re.compile(
    r"^\W*(?:(?:and|or|和|或|与)\b\s*|[,&/、，+]\s*)?\(?(?:[B-Z]|A(?! [a-z]))\b(?!')|^\W*(?:and|or|nor|和|或|与)\b",
    re.IGNORECASE,
)
_OR_LETTER = re.compile(r"^\W*(?:or|and|/|&)\W*\(?[A-H]\)?(?![A-Za-z])")
_PREDICATE = re.compile(
    r"^\W*(?:is|was|are|would|will|seems?|looks?|appears?|because|since|as|due|it|the correct|the right|选项|是|因为)"
    r"(?![A-Za-z])|^\W*$",
    re.IGNORECASE,
)
_DENIED = re.compile(
    r"^\W*(?:(?:is|was|would|can|could|does|do|should|seems|looks|must)\b|(?:is|was|ca|does|are)n['’]t|cannot|不|是错|错)",
    re.IGNORECASE,
)
_SECOND_THOUGHT = re.compile(r"\b(?:wait|actually)\b", re.IGNORECASE)


def _is_valid(letter: str, options: Mapping[str, str]) -> bool:
    return letter in options if options else "A" <= letter <= "H"


def _opening_letter(said: str, options: Mapping[str, str]) -> Chosen | None:
    """What an answer that opens with a letter names; None where that letter is a word, or no option's."""
    match = _OPENING.match(said, _LEAD.match(said).end())  # of no words the lead is empty
    if match is None:
        return None
    letter, rest = match["letter"].upper(), match["rest"].strip()
    is_apart = bool(match["mark"] or match["open"]) or "\n" in match["rest"][:2]
    is_capital = match["letter"] == letter
    if rest and clean_answer(said).lower() in {clean_answer(option).lower() for option in options.values()}:
        return None
    if not _is_valid(letter, options):
        is_label = bool(options) and is_capital and match["mark"][:1] in (")", ".", ":") and letter != "I"
        return Chosen(None, f"no option {letter}") if is_label else None
    if not rest:
        return Chosen(letter, "letter")
    if not is_capital and not (options and is_apart):
        return None  # an article
    return _with_rest(letter, match["mark"], rest, is_apart, options)


def _with_rest(letter: str, mark: str, rest: str, is_apart: bool, options: Mapping[str, str]) -> Chosen | None:
    """What a letter at the beginning names with what follows it: its own text, a reason, a denial, another letter."""
    started = _options_at_start(rest, options)
    if letter in started:
        after = _after(rest, options[letter])
        several = _OR_LETTER.match(after) or _others_in(after, letter, options)
        return _SEVERAL if several else Chosen(letter, "letter and text of the option")
    if _MORE_LETTERS.match(mark + rest):
        return _SEVERAL
    if _DENIED.match(rest):
        first, *others = re.split(r"[,;.，；。]\s|\s+but\s+", rest, maxsplit=1)
        if DENIAL.search(first):
            return read_option(others[0], options) if others else _DENIES
    if started or _says_another(rest, letter, options):
        return _CONTRADICTS
    if not is_apart:
        return Chosen(letter, "letter first") if _PREDICATE.match(rest) else None
    if _others_in(rest, letter, options) or _SECOND_THOUGHT.search(rest):
        return _SEVERAL
    return Chosen(letter, "letter first")


def _others_in(text: str, letter: str, options: Mapping[str, str]) -> bool:
    """Whether a text names other options by letters in parentheses, and does not deny them."""
    found = {other.upper() for other in re.findall(r"\(([A-Za-z])\)", affirmed(without_reason(text)))}
    return any(_is_valid(other, options) for other in found - {letter})


def _says_another(rest: str, letter: str, options: Mapping[str, str]) -> bool:
    """Whether what follows a letter says the text, or the number, of another option and not of its own."""
    sentence = re.split(r"(?<=[^.])\.\s|\n", without_reason(rest))[0]
    for said in said_values(clean_answer(sentence)):
        named = _by_text(said, options)
        if named is not None:
            return named != letter
    number, own = parse_number(clean_answer(sentence)), parse_number(clean_answer(options.get(letter, "")))
    return number is not None and own is not None and not equal_numbers(number, own)


def _after(text: str, option: str) -> str:
    """What stands behind an option's text at the beginning of a text."""
    found = re.match(r"\W*" + r"\W+".join(map(re.escape, re.findall(r"\w+", option))), text, re.IGNORECASE)
    return text[found.end() :] if found else ""


def _options_at_start(text: str, options: Mapping[str, str]) -> list[str]:
    """The options with the longest text that `text` begins with, else the one it is."""
    start = plain_words(clean_answer(text))
    found = {letter: plain_words(clean_answer(option)) for letter, option in options.items()}
    fitting = [letter for letter, option in found.items() if option and f"{start} ".startswith(f"{option} ")]
    if not fitting:
        named = _by_text(text, options)
        return [named] if named else []
    longest = max(len(found[letter]) for letter in fitting)
    return [letter for letter in fitting if len(found[letter]) == longest]


# --------------------------------------------------------------------------------------------- the text of an option

_TAIL = re.compile(
    r"\s+(?:(?:is|are|was) (?:the )?(?:correct|right|best|appropriate|true)?\s?(?:answer|option|choice|response|one)?|"
    r"should be (?:selected|chosen)|which corresponds to)\W*$",
    re.IGNORECASE,
)
_NOUN = re.compile(r"(?<=[\d})])\s+(?:[A-Za-z]{3,}\s?)+$")


def _by_text(text: str, options: Mapping[str, str]) -> str | None:
    """The only option whose text, number or formula the text is, in whatever spelling."""
    for same in _sameness(text, options):
        if same:
            return same[0] if len(same) == 1 else None
    return None


def _sameness(text: str, options: Mapping[str, str]) -> Iterator[list[str]]:
    """Letters of the options that are the text, in one way of looking after another."""
    yield [letter for letter, option in options.items() if option == text]  # "Ee" is not "ee"
    key = plain_words(text)
    cleaned = {letter: clean_answer(option) for letter, option in options.items()}
    yield [letter for letter in options if key in (plain_words(options[letter]), plain_words(cleaned[letter]))]
    value = parse_number(text)
    if value is not None:
        yield [letter for letter, option in cleaned.items() if equal_numbers(value, parse_number(option))]
    if len(text) > MAX_LINE:
        return
    bare = _TAIL.sub("", text)
    yield [letter for letter, option in cleaned.items() if _TAIL.sub("", option) == bare]
    # "\frac{1}{12} turn" is "\frac{1}{12}"
    yield [letter for letter, option in cleaned.items() if same_formula(text, _NOUN.sub("", option))]
    if not re.match(r"[A-H]\b", text):  # "A blue" may be an article or an option
        said = reword(text)
        yield [letter for letter, option in cleaned.items() if same_saying(said, reword(option))]


# ------------------------------------------------------------------------------------------- mentioned in a sentence

_PARENTHESISED = re.compile(r"[(（\[]\s?([A-Za-z])\s?[)）\]]")
_CLOSING = re.compile(r"^(.+?)\s*[(（\[]\s?([A-H])\s?[)）\]]\W*$", re.DOTALL)
# where a letter within a sentence is an option and not a point, a sample or an article
_STANDING = re.compile(
    r"(?:(?:^|[:(]\s*|\b(?:is|be|are|option|choice|answer|letter|choose|chose|pick|select|with|go for|as)\s+"
    r"|选项?|是|为)[(\"'“*]*)"
    r"((?-i:[A-H]))(?![A-Za-z0-9'’])(?=\W*$|\s?[).:：,、;]|(?-i:(?<=[B-H]))\s(?!or\b|and\b)[a-z])",
    re.IGNORECASE,
)
# What may stand before an option's text in a sentence; "yellowish blue" does not say blue.
_BEFORE_WORDS = (
    "is are was were be been being become becomes as of in on at to by with from for called named option choice shows "
    "contains has have holds represents likely clearly also and or than not it this that these both all they he she i "
    "see choose"
)
_BEFORE = frozenset(_BEFORE_WORDS.split())


def _mentioned(said: str, options: Mapping[str, str]) -> Chosen:
    """The option that a sentence mentions by letter, number or text."""
    said = without_reason(said) or said
    found = {match[1].upper(): said[match.end() :] for match in _PARENTHESISED.finditer(said)}
    found = {letter: rest for letter, rest in found.items() if _is_valid(letter, options)}
    if len(found) > 1:
        return _SEVERAL
    for letter, rest in found.items():
        started = _options_at_start(rest, options) if rest.strip() else []
        return _CONTRADICTS if started and letter not in started else Chosen(letter, "letter in parentheses")
    if len(said) > MAX_LINE:
        return Chosen(None, "no option in the answer")
    standing = {letter for letter in _STANDING.findall(said) if _is_valid(letter, options)}
    if standing:
        return Chosen(standing.pop(), "letter on its own") if len(standing) == 1 else _SEVERAL
    number = read_number(said)
    numbers = {letter: parse_number(clean_answer(option)) for letter, option in options.items()} if number else {}
    equal = [letter for letter, other in numbers.items() if equal_numbers(number, other)]
    if len(equal) == 1:
        return Chosen(equal[0], "number of one option")
    named = _named_in(said, options)
    if len(named) == 1:
        return Chosen(named[0], "text of one option in the answer")
    return Chosen(None, "several options in the answer" if named else "no option in the answer")


def _labelled(said: str, options: Mapping[str, str]) -> str | None:
    """The only letter in parentheses with its own text behind it, which may deny something: "(A) False"."""
    found = [(match[1], said[: match.start()], said[match.end() :]) for match in _PARENTHESISED.finditer(said)]
    if len(found) != 1 or DENIAL.search(found[0][1]) or found[0][0] not in options:
        return None
    letter, _, rest = found[0]
    return letter if letter in _options_at_start(rest, options) else None


def _named_in(text: str, options: Mapping[str, str]) -> list[str]:
    """Letters of the options whose text a sentence says; one inside another named option does not count."""
    padded = f" {plain_words(text)} "
    found = {letter: plain_words(clean_answer(option)) for letter, option in options.items()}
    found = {
        letter: option
        for letter, option in found.items()
        if len(option) > 1 and _stands_in(option, padded) and parse_number(option) is None
    }
    return [
        letter
        for letter, option in found.items()
        if not any(option != other and f" {option} " in f" {other} " for other in found.values())
    ]


def _stands_in(option: str, padded: str) -> bool:
    """Whether a sentence holds an option's text in whole words that no other word qualifies."""
    start = padded.find(f" {option} ")
    while start >= 0:
        before = padded[:start].split()
        if not before or before[-1] in _BEFORE or " " in option or re.search(r"[\u4e00-\u9fff:]$", before[-1]):
            return True
        start = padded.find(f" {option} ", start + 1)
    return False


def decide_choice(prediction: str, gold: str, asked: Asked) -> Decision:
    """The rule for ground truths that are options, by letter or by text."""
    wanted, options = _GOLD_LETTER.fullmatch(gold), asked.options
    if wanted is None and not options:
        return None
    letter = wanted.group(1) if wanted else _by_text(gold, options)
    if letter is None or (options and letter not in options):
        return None
    given, how = read_option(prediction, options, asked.question)
    if given is None:
        said = clean_answer(prediction)
        rounded = [letter for letter, option in options.items() if (decide_math(said, option, asked) or (False,))[0]]
        given = rounded[0] if len(rounded) == 1 else None  # 1.41 is the option √2
    if given is None:
        return (False, f"names no option ({how}), expected {letter}")
    return (given == letter, f"option {given}, expected {letter}")
