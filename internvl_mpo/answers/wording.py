"""Other ways to say the same answer: number words, Roman and Chinese numerals, times, ranges, ratios, units, spelling.

    reword("two hundred and fifty metres")     "250 m"
    reword("half past two")                    "2:30"
    same_saying("A and C", "AC")               True

`internvl_mpo.answers` asks here only after its own rules found two answers different, so what is plain stays quick and
nothing here can turn a right answer wrong. Each rewriting keeps the meaning; where one might not, it is left out.
"""

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from internvl_mpo.answers.number_words import MONTH_NAMES, ORDINALS, VALUES, in_digits
from internvl_mpo.answers.spelling import american, singular

MAX_CHARS = 300  # what is longer is compared as it stands
_SIGN_OR_DIGIT = re.compile(r"[\d<>≤≥≠±∞=∅]")
_ROMAN = re.compile(r"(?=[MDCLXVI]{2})M{0,3}(?:CM|CD|D?C{0,3})(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})")
_ROMAN_VALUES = {"M": 1000, "D": 500, "C": 100, "L": 50, "X": 10, "V": 5, "I": 1}
_CIRCLED = re.compile("[\u2460-\u2473]")  # ①② are two marks, not twelve
_LEFTOVERS = re.compile(r"</?answer>|</s>|<\|[a-z_]+\|>|^[*_]*(?:final )?answer[*_]*\s*[:：]\s*[*_]*", re.IGNORECASE)
_JSON = re.compile(r"""[\[{]\s*(?:["'](?:final_)?answer["']\s*:\s*)?["']?([^"'{}:,]*)["']?\s*[\]}]""", re.IGNORECASE)
_OPENING = re.compile(
    r"^(?:probably|likely|most likely|apparently|maybe|i(?:'d)? (?:think|believe|guess|say|would say)(?: that)?|"
    r"(?:it|this|that) (?:looks like|looks|appears to be|seems to be|must be|should be|is|was)|it's|that's|"
    r"looks like|definitely|clearly|obviously|made of|the (?:number|value|color|colour|word|name)(?: is)?|"
    r"there (?:is|are)(?: only)?)\s+",
    re.IGNORECASE,
)
_REASON = re.compile(r"[,;]?\s+(?:because|since|as (?:it|the|he|she|they|there))\b.*$|\s+\([^()]*\)$", re.IGNORECASE)
_ENCLOSED = re.compile(r"^[\[(]\s*(-?[\w./ %]+)\s*[\])]$")
_SYMBOLS = (
    (re.compile(r"\\infty|\binfinity\b", re.IGNORECASE), "∞"),
    (re.compile(r"\+\s*∞"), "∞"),
    (re.compile(r"^(?:at least|no (?:less|fewer) than|至少|不少于)\s*(?=[\d.$-])", re.IGNORECASE), "≥"),
    (re.compile(r"^(?:at most|no more than|up to|至多|最多|不超过)\s*(?=[\d.$-])", re.IGNORECASE), "≤"),
    (re.compile(r"^(?:more than|greater than|over|above|大于|超过)\s*(?=[\d.$-])", re.IGNORECASE), ">"),
    (re.compile(r"^(?:less than|fewer than|under|below|小于|少于)\s*(?=[\d.$-])", re.IGNORECASE), "<"),
    (re.compile(r"\\geq?(?![a-z])|>="), "≥"),
    (re.compile(r"\\leq?(?![a-z])|<="), "≤"),
    (re.compile(r"\\neq?(?![a-z])|!="), "≠"),
    (re.compile(r"\\pm(?![a-z])|\+/-"), "±"),
    (re.compile(r"\\(?:emptyset|varnothing)"), "∅"),
    (re.compile(r"\\angle\s*"), "∠"),
    (re.compile(r"\\triangle\s*|△\s*"), "triangle "),
    (re.compile(r"\\(?:parallel|mid)(?![a-z])"), "∥"),
    (re.compile(r"\\perp(?![a-z])"), "⊥"),
    (re.compile(r"\\(?=(?:sin|cos|tan|cot|sec|csc|log|ln|exp)(?![a-z]))"), ""),
    (re.compile(r"\bm∠"), "∠"),
)
_DIGITS = (
    (re.compile(r"(?<=\d)\s*[–—～]\s*(?=\d)"), "-"),
    (re.compile(r"^[–—−]\s*(?=[\d.])"), "-"),
    (re.compile(r"^(?:minus|negative|负)\s*", re.IGNORECASE), "-"),
    (re.compile(r"(?<=\d)['’](?=\d{3}\b)"), ""),
    (re.compile(r"^(?:#|no\. ?|number )(?=\d)", re.IGNORECASE), ""),
    (re.compile(r"^\$([\d.,/-]+)\$ ?(?=[a-z°%])", re.IGNORECASE), r"\1 "),
    (re.compile(r"(?<=\d)~(?=[a-z])", re.IGNORECASE), " "),
    (re.compile(r"^([A-Za-z])\s*≈\s*"), r"\1 = "),
    (re.compile(r"^(?:between|from) (\S+) (?:and|to) (\S+)$", re.IGNORECASE), r"\1-\2"),
    (re.compile(r"^(-?[\d.,]+) to (-?[\d.,]+)$", re.IGNORECASE), r"\1-\2"),
    (re.compile(r"^(-?)10\^\{?(-?\d{1,2})\}?$"), r"\g<1>1 x 10^\2"),
)
_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
_SPELLINGS = {name[:3]: name for name in (*MONTH_NAMES, *_DAYS)}
_SPELLINGS |= {"sept": "september", "tues": "tuesday", "thurs": "thursday", "thur": "thursday"}
_SPELLINGS |= {"grey": "gray", "colour": "color", "centre": "center", "yep": "yes", "yeah": "yes", "yup": "yes"}
_SPELLINGS |= {"nope": "no", "correct": "yes", "incorrect": "no", "wrong": "no", "absolutely": "yes"}
_SPELLINGS |= {"affirmative": "yes", "certainly": "yes", "usa": "united states", "us": "united states"}
_SPELLINGS |= {"uk": "united kingdom", "dne": "does not exist", "没有": "否", "有": "是"}
_SPELLINGS |= {f"{n}{end}": word for n, word in enumerate(ORDINALS, start=1) for end in ("st", "nd", "rd", "th")}
_SPELLINGS |= {"none": "0", "nil": "0", "null": "0"}
_UNIT_WORDS = (
    (r"\b(?:square|sq\.?)\s(\w+)|平方(\w+)", r"\1\2^2"),
    (r"\bcubic\s(\w+)|立方(\w+)", r"\1\2^3"),
    (r"(\w+) per (\w+)", r"\1/\2"),
    (r"(?:degrees? ?|° ?)(?:celsius|c)\b", "degC"),
    (r"(?:degrees? ?|° ?)(?:fahrenheit|f)\b", "degF"),
)
_UNITS = {
    name: unit
    for unit, names in {
        "mm": "millimeter millimetre 毫米",
        "cm": "centimeter centimetre 厘米",
        "m": "meter metre 米",
        "km": "kilometer kilometre 公里 千米",
        "ft": "foot feet '",
        "in": "inch inches",
        "yd": "yard",
        "mi": "mile",
        "g": "gram 克",
        "kg": "kilogram kilo 千克 公斤",
        "lb": "lbs",
        "s": "sec second 秒",
        "min": "minute 分钟",
        "h": "hr hour 小时",
        "day": "d 天",
        "week": "wk 周",
        "year": "yr 年",
        "l": "liter litre 升",
        "ml": "milliliter millilitre 毫升",
        "mol": "mole",
        "n": "newton",
        "j": "joule",
        "kj": "kilojoule",
        "w": "watt",
        "v": "volt",
        "a": "amp ampere",
        "Ω": "ohm",
        "hz": "hertz",
        "khz": "kilohertz",
        "mhz": "megahertz",
        "ghz": "gigahertz",
        "mb": "megabyte",
        "gb": "gigabyte",
        "tb": "terabyte",
        "k": "kelvin",
        "cent": "¢",
    }.items()
    for name in names.split()
}
_UNIT_NAMES = frozenset(_UNITS.values())
# unit -> (base unit, how many of it, offset in it)
_SIZES: dict[str, tuple[str, Fraction, Fraction]] = {
    unit: (base, Fraction(size), Fraction(offset))
    for unit, base, size, offset in (
        ("mm", "m", "1/1000", 0),
        ("cm", "m", "1/100", 0),
        ("dm", "m", "1/10", 0),
        ("km", "m", 1000, 0),
        ("in", "ft", "1/12", 0),
        ("yd", "ft", 3, 0),
        ("mg", "g", "1/1000", 0),
        ("kg", "g", 1000, 0),
        ("ms", "s", "1/1000", 0),
        ("min", "s", 60, 0),
        ("h", "s", 3600, 0),
        ("day", "s", 86_400, 0),
        ("week", "s", 604_800, 0),
        ("ml", "l", "1/1000", 0),
        ("kj", "j", 1000, 0),
        ("kw", "w", 1000, 0),
        ("kn", "n", 1000, 0),
        ("kv", "v", 1000, 0),
        ("ma", "a", "1/1000", 0),
        ("kΩ", "Ω", 1000, 0),
        ("khz", "hz", 1000, 0),
        ("mhz", "hz", 10**6, 0),
        ("ghz", "hz", 10**9, 0),
        ("km/h", "m/s", "5/18", 0),
        ("km/s", "m/s", 1000, 0),
        ("cm^2", "m^2", "1/10000", 0),
        ("km^2", "m^2", 10**6, 0),
        ("cm^3", "m^3", "1/1000000", 0),
        ("degF", "degC", "5/9", "-160/9"),
    )
}
_MEASURE = re.compile(
    r"^(-?\d+(?:\.\d+)?|-?\d+/\d+) ?([A-Za-z°Ω¢'\u4e00-\u9fff]+(?:\^[23])?(?:/[A-Za-z]+(?:\^[23])?)?)$"
)
_ONE_LETTER_UNITS = frozenset("mgshlLNJWVAKΩ'克米秒升天周年¢")
_CLOCK = re.compile(
    r"^(?:at )?(\d{1,2})(?:[:.点时](\d{2}))?[点时]?\s?(?:([ap])\.?\s?m\.?|o'?clock|hours|h)?\.?$", re.IGNORECASE
)
_SAID_CLOCK = re.compile(r"^(half|quarter|\d{1,2}(?: minutes)?) (past|to) (\d{1,2})$")
_LETTERS = re.compile(r"\(?[A-H]\)?(?:\s*+(?:,\s*+and|,|and|&|\+|、)?+\s*+\(?[A-H]\)?)+")
_GENERIC = re.compile(
    r"^(?:(?:on|to|at|in) the |the (?:color )?)|\s(?:color|colored|side|one|angle|triangle|shape|direction)$"
)
_RATIO = re.compile(r"(\d+(?:\.\d+)?) ?(?::|/|to|比) ?(\d+(?:\.\d+)?)")


@lru_cache(maxsize=65536)
def reword(text: str) -> str:
    """Return an answer in one wording; see the module. Letters keep their case where it may matter."""
    if len(text) > MAX_CHARS:
        return text
    text = unicodedata.normalize("NFKC", _CIRCLED.sub(lambda match: f"({match[0]})", text)).strip()
    text = _LEFTOVERS.sub("", text).strip()
    quoted = _JSON.fullmatch(text)
    text = quoted[1].strip() if quoted else text
    text = text.removesuffix("?").rstrip("\\ ")
    text = _ENCLOSED.sub(r"\1", text)
    for _ in range(2):
        text = _OPENING.sub("", text)
    text = _REASON.sub("", text) or text
    for pattern, sign in _SYMBOLS:
        text = pattern.sub(sign, text)
    text = in_digits(text)
    for pattern, sign in _DIGITS:
        text = pattern.sub(sign, text)
    key = text.lower().rstrip(".")
    if key in _SPELLINGS:
        return _SPELLINGS[key]
    return _clock(text) or _measure(text) or text


def _clock(text: str) -> str | None:
    """A time of day as "14:30", or "2:30?" where half of the day is not said; a bare number is none."""
    lowered = in_digits(text.lower())
    if lowered in ("noon", "midday", "midnight"):
        return "0:00" if lowered == "midnight" else "12:00"
    said = _SAID_CLOCK.match(" ".join(_VALUES_IN_TEXT.get(word, word) for word in lowered.removeprefix("a ").split()))
    if said:
        minutes = {"half": 30, "quarter": 15}.get(said[1]) or int(said[1].split()[0])
        total = 60 * int(said[3]) + (minutes if said[2] == "past" else -minutes)
        return f"{total // 60}:{total % 60:02d}"
    match = _CLOCK.match(text)
    if match is None or lowered.isdigit() or re.fullmatch(r"\d+\.\d+|\d+ ?h(?:ours)?", lowered):
        return None
    hour, minute = int(match[1]), int(match[2] or 0)
    if hour > 24 or minute > 59:
        return None
    if match[3]:
        hour = hour % 12 + (12 if match[3].lower() == "p" else 0)
        return f"{hour}:{minute:02d} {match[3].lower()}m"
    return f"{hour}:{minute:02d}"


_VALUES_IN_TEXT = {word: str(value) for word, value in VALUES.items()}


def _measure(text: str) -> str | None:
    """A number with a unit in the base unit of its kind, "5 km" as "5000 m"."""
    lowered = text
    for pattern, unit in _UNIT_WORDS:
        lowered = re.sub(pattern, unit, lowered, flags=re.IGNORECASE)
    match = _MEASURE.match(lowered)
    if match is None:
        return None
    if (len(match[2]) == 1 and match[2] not in _ONE_LETTER_UNITS) or match[2].lower() in ("th", "st", "nd", "rd", "bc"):
        return None  # "12a" is a place in a list, "12th" too
    if re.search(r"\d0s$", text):
        return None  # a decade
    number = Fraction(match[1])
    unit = "/".join(_unit(part) for part in match[2].strip().split("/"))
    if unit == "cent":
        return f"${_decimal(number / 100)}"
    if unit not in _SIZES:
        return f"{_decimal(number)} {unit}"
    base, size, offset = _SIZES[unit]
    return f"{number * size + offset} {base}"  # a fraction: 0.02 m would say that 2 cm were rounded, and be 21 mm


def _unit(name: str) -> str:
    name, mark, power = name.partition("^")
    if name not in ("degC", "degF"):
        name = name.strip().lower() if name not in ("Ω", "kΩ") else name
        singular = name[:-1] if len(name) > 2 and name.endswith("s") else name
        name = _UNITS.get(name) or _UNITS.get(singular) or (singular if singular in _UNIT_NAMES else name)
    return name + mark + power


def _decimal(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    exact = float(value)
    return f"{exact:.12g}" if Fraction(f"{exact:.12g}") == value else f"{value.numerator}/{value.denominator}"


def same_saying(given: str, wanted: str) -> bool:
    """Return whether two reworded answers say the same in another order, script or spelling."""
    if given == wanted and given:
        return True
    if max(len(given), len(wanted)) > MAX_CHARS:
        return False
    if not _SIGN_OR_DIGIT.search(given) and not _SIGN_OR_DIGIT.search(wanted) and not _LETTERS.fullmatch(wanted):
        return _same_letters(given, wanted)
    if _LETTERS.fullmatch(wanted) and _LETTERS.fullmatch(given):
        letters = re.findall("[A-H]", wanted)
        return letters == sorted(set(letters)) == sorted(re.findall("[A-H]", given))
    times = [re.fullmatch(r"(\d{1,2}):(\d\d)( [ap]m)?", text) for text in (given, wanted)]
    if all(times):
        return _same_time(times[0], times[1])
    return (
        _roman(given, wanted)
        or _roman(wanted, given)
        or _same_share(given, wanted)
        or _same_share(wanted, given)
        or _same_relation(given, wanted)
        or _same_letters(given, wanted)
    )


def _same_time(given: re.Match, wanted: re.Match) -> bool:
    """Equal on the clock; without am or pm, up to 12:59 may be either half of the day."""
    if given[2] != wanted[2]:
        return False
    a, b = int(given[1]), int(wanted[1])
    is_open = any(not match[3] and int(match[1]) <= 12 for match in (given, wanted))
    return a == b or (is_open and bool(given[3] or wanted[3]) and a % 12 == b % 12)


def _roman(numeral: str, number: str) -> bool:
    if not number.isdecimal() or not _ROMAN.fullmatch(numeral):
        return False
    values = [_ROMAN_VALUES[letter] for letter in numeral]
    total = sum(-a if a < b else a for a, b in zip(values, [*values[1:], 0], strict=True))
    return total == int(number)


def same_ratio(given: str, wanted: str) -> bool:
    """Return whether two answers, as they were given, are one ratio: 2:3 is 4:6, 2/3 and "2 to 3".

    What may be a time of day is left alone.
    """
    ratios = [_RATIO.fullmatch(text) for text in (given, wanted) if len(text) <= MAX_CHARS]
    if (
        len(ratios) < 2
        or not all(ratios)
        or ":" not in wanted
        or any(re.fullmatch(r"\d{1,2}:[0-5]\d", text) for text in (given, wanted))
    ):
        return False
    (a, b), (c, d) = (map(Fraction, ratio.groups()) for ratio in ratios)
    return a * d == b * c and b != 0 and d != 0


def _same_share(percent: str, fraction: str) -> bool:
    """33.3 % is 1/3; without a decimal it is not."""
    number, parts = re.fullmatch(r"(\d+\.(\d+)) ?%", percent), re.fullmatch(r"(\d+)/(\d+)", fraction)
    if number is None or parts is None or int(parts[2]) == 0:
        return False
    return abs(Fraction(number[1]) - 100 * Fraction(fraction)) <= Fraction(1, 2 * 10 ** len(number[2]))


def _same_relation(given: str, wanted: str) -> bool:
    """x > 3 is 3 < x, ±2 is 2 and -2, and spaces mean nothing where signs are."""
    if not re.search(r"[<>≤≥≠±∞=∅]", given + wanted):
        return False
    return bool(_relations(given) & _relations(wanted))


def _relations(text: str) -> set[str]:
    text = re.sub(r"\s+|\\left|\\right", "", text.lower())
    found = {text}
    match = re.fullmatch(r"([^<>≤≥]+)([<>≤≥])([^<>≤≥]+)", text)
    if match:
        found.add(match[3] + match[2].translate(str.maketrans("<>≤≥", "><≥≤")) + match[1])
    if re.fullmatch(r"(?:[a-z]=)?±[\d./]+", text):
        size = text.split("±")[1]
        found |= {f"{size},-{size}", f"-{size},{size}"}
    roots = re.fullmatch(r"(?:([a-z])=)?(-?[\d./]+)(?:or|and|,)(?:\1=)?(-?[\d./]+)", text)
    if roots:
        found |= {f"{roots[2]},{roots[3]}", f"{roots[3]},{roots[2]}"} if "=" in text else {f"{roots[2]},{roots[3]}"}
    return found


def _same_letters(given: str, wanted: str) -> bool:
    """The same words without accents and hyphens, or with a noun more that adds nothing ("red color" is "red")."""
    a, b = _spellings(given), _spellings(wanted)
    if a is None or b is None:
        return False
    if a.joined & b.joined or a.singular & b.singular:
        return True
    if {a.bare, b.bare} & {"no", "not", "any", "every", "some"}:
        return False  # "no one" is not "no"
    return len(b.bare.split()) <= 2 and bool(a.generic & b.joined or a.joined & b.generic)


class _Spellings(NamedTuple):
    bare: str
    joined: frozenset[str]
    singular: frozenset[str]
    generic: frozenset[str]


@lru_cache(maxsize=65536)
def _spellings(text: str) -> _Spellings | None:
    """The words of a text in every way in which they may be spelled; None where there are no words."""
    if not _WORDS.fullmatch(text):
        return None
    bare = _bare(text)
    return _Spellings(bare, _joined(bare), _joined(singular(bare)), _joined(_generic(bare)))


_WORDS = re.compile(r"(?=.*[^\W\d_]{2})[^\W_]+(?:[ .'’-]{1,2}[^\W_]+)*\.?")


def _bare(text: str) -> str:
    text = "".join(c for c in unicodedata.normalize("NFKD", text.lower()) if not unicodedata.combining(c))
    text = " ".join(american(word) for word in text.split())
    return text.removesuffix("的").removesuffix("色") or text


def _generic(text: str) -> str:
    return _GENERIC.sub("", _GENERIC.sub("", text))


def _joined(text: str) -> frozenset[str]:
    """The words with hyphens read as spaces and as nothing; full stops and apostrophes mean nothing."""
    text = re.sub(r"^(?:an?|the) ", "", re.sub("[.'’]", "", text))
    return frozenset(" ".join(text.replace("-", between).split()) for between in (" ", ""))


_AROUND_CHOICE = re.compile(
    r"^(?:choose|pick|select|could be|may be) |\s+\((?:because|since|as) [^()]*\)$|[?!]$", re.IGNORECASE
)
_BEFORE_LETTER = re.compile(r"^(?:选项?|选择|答案|[<{\[`])\s*(?=[A-H](?![a-z]))")
_AFTER_LETTER = re.compile(
    r"(?<=^[A-H])(?:选项|[>}\]`]"
    r"|\s+is (?:the )?(?:correct|right|true|answer)(?: (?:answer|option|choice|one))?)\s*$"
)


def bare_choice(text: str) -> str:
    """Return an option without what is said around its letter: "I think (B)", "B is correct", "选B"."""
    text = _LEFTOVERS.sub("", unicodedata.normalize("NFKC", text)).strip().rstrip("\\ ")
    text = _OPENING.sub("", text)
    text = _AROUND_CHOICE.sub("", text)
    return _AFTER_LETTER.sub("", _BEFORE_LETTER.sub("", text)).strip()
