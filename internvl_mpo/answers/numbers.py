"""Numbers as answers: read once, here, for the matcher and for the rule `ours` of the benchmarks alike."""

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from internvl_mpo.answers.algebra import closed_value
from internvl_mpo.answers.common import Asked, Decision, affirmed, without_reason
from internvl_mpo.answers.number_words import LOTS, SCALES, digits_throughout, in_digits, spoken_formula

MAX_CHARS = 1000  # a longer number is text; Python refuses to read 4,301 digits


class Number(NamedTuple):
    """A number as written: exact value, unit in one spelling, and how many decimals the writer gave (None: exact)."""

    value: Fraction
    unit: str
    decimals: int | None


_SIZES = {
    "hundred": 10**2,
    **SCALES,
    **LOTS,
    "k": 10**3,
    "m": 10**6,
    "mn": 10**6,
    "mil": 10**6,
    "b": 10**9,
    "bn": 10**9,
}
_SIZES |= {"百": 10**2, "千": 10**3, "万": 10**4, "亿": 10**8, "打": 12}
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
        | {"millimeter": "1/1000", "centimeter": "1/100", "meter": 1, "metre": 1, "kilometer": 1000}
        | {
            "millimetre": "1/1000",
            "centimetre": "1/100",
            "kilometre": 1000,
            "公里": 1000,
            "毫米": "1/1000",
        },
        "mass": {"mg": "1/1000", "g": 1, "kg": 1000, "gram": 1, "kilogram": 1000, "克": 1, "公斤": 1000},
        "time": {"ms": "1/1000", "s": 1, "sec": 1, "second": 1, "min": 60, "minute": 60, "h": 3600, "hr": 3600}
        | {"hour": 3600, "秒": 1, "分钟": 60, "小时": 3600},
        "volume": {"ml": "1/1000", "l": 1, "liter": 1, "litre": 1, "milliliter": "1/1000"},
        "angle": {"°": 1, "degree": 1, "deg": 1, "^\\circ": 1, "^{\\circ}": 1, "度": 1},
    }.items()
    for name, size in table.items()
}
_PERCENT = ("%", "percent", "pct", "per cent")
_UNIT_WORDS = re.compile(
    r"(?:[A-Za-z]{2,}|(?<=/)[a-z]|[a-z](?=[\^/])|[\u4e00-\u9fff]+)(?:\^?\{?[23]\}?)?"
    r"(?:[ /](?:[A-Za-z]{2,}|(?<=/)[a-z])(?:\^?\{?[23]\}?)?)*"
)
# After a number these are no unit: they change the number, compare it, deny it or go on with a sentence.
_NO_UNIT = re.compile(
    r"\b(?:is|are|was|were|be|been|has|have|does|do|can|may|might|not?|never|nor|or|and|to|than|least|most|more|less|"
    r"fewer|greater|higher|lower|over|under|above|below|between|from|except|excluding|without|but|plus|minus|by|"
    r"squared|cubed|factorial|power|root|half|halves|thirds?|quarters?|dozens?|scores?|hundreds?|thousands?|millions?|"
    r"billions?|trillions?|mill?|crores?|lakhs?|wrong|incorrect|false|maybe|if|pi|sqrt|infinity)\b|n['’]t\b"
    r"|[的万亿千百十半几不非没无是或和与至到超多余以约错除负]",
    re.IGNORECASE,
)
_DIGITS = (
    r"\d{1,3}(?:[,'’]\d{3})+(?:\.\d+)?|\d{1,2}(?:,\d{2})+,\d{3}(?:\.\d+)?|\d{1,3}(?:[ ]\d{3})+(?:\.\d+)?(?!\d)"
    r"|\d+(?:\.\d+)?|\.\d+"
)
_SCALE = rf"(?:{'|'.join(['hundred', *SCALES, *LOTS])})s?(?![a-z])|(?-i:mn|bn|mil|[kKMB])(?![A-Za-z])|[百千万亿打]"
_NUMBER = re.compile(
    rf"""^(?P<sign>[+-]?)\s*(?:(?P<currency>us\$|rm|rs\.?|[$€£¥₹])\s*(?P<sign2>-?)\s*)?
    (?:(?P<whole>\d+)(?:(?:\s+|\s+and\s+)(?P<wn>\d+)/(?P<wd>\d+)
        |\s*\\[dt]?frac(?:\{{(?P<wn2>\d+)\}}\{{(?P<wd2>\d+)\}}|\s*(?P<wn3>\d)\s*(?P<wd3>\d)))
      |\\[dt]?frac\s*(?:\{{\s*(?P<fn>-?\d+)\s*\}}\s*\{{\s*(?P<fd>\d+)\s*\}}|(?P<fn2>\d)\s*(?P<fd2>\d)(?!\d))
      |(?P<n>{_DIGITS})(?:\s*/\s*(?P<d>\d+(?:\.\d+)?))?)
    (?:\s*(?:e|(?:x|×|\*|\\times|\\cdot)\s*10\s*\^?\s*)\{{?(?P<exp>[+-]?\d{{1,3}})\}}?)?
    (?P<scales>(?:\s*(?:{_SCALE}))*)
    \s*(?P<unit>[^\d].*)?$""",
    re.VERBOSE | re.IGNORECASE,
)
# A decade, an ordinal, a year before our era, a time of day and "12 or more" are no plain numbers.
_NO_NUMBER = re.compile(r"\d0s$|\d(?:st|nd|rd|th)\b|\d ?B\.?C\.?(?:E\.?)?$|\d\+$|\d ?[ap]\.?m\.?$")
_ASSIGNED = re.compile(r"^(?:\\?[A-Za-z]\w{0,2}|[A-Za-z]{3,15}|\\?angle\s*[A-Z]{1,3}|∠\s*[A-Z]{1,3})\s*=\s*(?=[^=]+$)")
_NAME = re.compile(r"^\\?([A-Za-z]\w{0,2})\s*=(?!=)")
_SIMPLE = re.compile(r"-?\d{1,15}(?:\.\d{1,15})?")


@lru_cache(maxsize=65536)
def parse_number(text: str) -> Number | None:
    """Return the number an answer consists of, or None.

    Understands thousands separators, signs, fractions and mixed numbers, powers of ten, number words in English and
    Chinese, what multiplies a number (dozen, million, 万), currency, percent and units; a text that only contains a
    number is not one.
    """
    text = text.strip()
    if _SIMPLE.fullmatch(text):
        return Number(Fraction(text), "", len(text.partition(".")[2]))
    if len(text) > MAX_CHARS:
        return None
    text = in_digits(_ASSIGNED.sub("", text))
    match = _NUMBER.match(text)
    if match is None or _NO_NUMBER.search(text):
        return None
    part = match.groupdict()
    decimals: int | None = None
    if part["whole"]:
        value = _ratio(part["wn"] or part["wn2"] or part["wn3"], part["wd"] or part["wd2"] or part["wd3"])
        value = None if value is None else int(part["whole"]) + value
    elif part["fn"] or part["fn2"]:
        value = _ratio(part["fn"] or part["fn2"], part["fd"] or part["fd2"])
    else:
        digits = re.sub(r"[,'’ ]", "", part["n"])
        value = Fraction(f"0{digits}")
        decimals = len(digits.partition(".")[2])
        if part["d"]:
            value, decimals = _ratio(value, part["d"]), None
    if value is None:
        return None
    if part["exp"]:
        exponent = int(part["exp"])
        value *= Fraction(10) ** exponent
        decimals = None if decimals is None else max(0, decimals - exponent)
    for scale in re.findall(_SCALE, part["scales"], re.IGNORECASE):
        size = _SIZES.get(scale.lower()) or _SIZES[scale.lower().rstrip("s")]
        value *= size
        decimals = None if decimals is None else decimals - len(str(size)) + 1
    if "-" in (part["sign"], part["sign2"]):
        value = -value
    unit = _unit(part["currency"], part["unit"])
    return None if unit is None else Number(value, unit, decimals)


def assigned_name(text: str) -> str | None:
    """Return the letter that "x = 5" gives a value."""
    match = _NAME.match(text.strip())
    return match[1] if match else None


def _ratio(over: str | Fraction, under: str) -> Fraction | None:
    below = Fraction(under)
    return Fraction(over) / below if below else None


def _unit(currency: str | None, unit: str | None) -> str | None:
    """One spelling for a unit; None where what follows the number is no unit."""
    unit = (unit or "").strip().rstrip(".").strip()
    unit = unit if "\\" in unit else unit.replace("{", "").replace("}", "")
    if currency:
        name = _CURRENCIES[currency.lower().rstrip(".")]
        return name if not unit or _CURRENCIES.get(_singular(unit.lower())) == name else None
    if not unit:
        return ""
    lowered = _singular(unit.lower().strip("()[] "))
    if lowered in _CURRENCIES:
        return _CURRENCIES[lowered]
    if lowered in _PERCENT:
        return "percent"
    if lowered in _UNITS:
        return lowered
    # words only: "5 red cubes" has the unit "red cube"; "5 - 3", "5 or 6", "5x" and "5\\pi" have none
    if _UNIT_WORDS.fullmatch(unit) and not _NO_UNIT.search(unit):
        return lowered.replace("square ", "sq ")
    return None


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def split_unit(text: str) -> tuple[str, str]:
    """Return a formula and the known unit behind it, "" without one: 2√3 cm is ("2√3", "cm")."""
    match = _FORMULA_UNIT.match(text)
    if match is None:
        return text, ""
    return match[1].strip(), match[2]


_LONG_UNITS = sorted((unit for unit in (*_UNITS, "percent") if unit.isalpha() and len(unit) > 1), key=len, reverse=True)
_FORMULA_UNIT = re.compile(rf"^(.*[\d)}}!πi°])\s*(?:\b|(?<=[\d)}}!]))({'|'.join(_LONG_UNITS)})s?(?:\^?[23])?$")

# ------------------------------------------------------------------------------------------- numbers in sentences

BOUND = re.compile(
    r"\b(?:than|at least|at most|over|under|above|below|up to|minimum|maximum|exceed(?:s|ing)?|between|from|"
    r"or (?:more|less|fewer|so|over|above|below|under|higher|lower)|too|enough|except|without|plus or minus|or|per)\b"
    r"|[<>≤≥≠±]|\\(?:geq?|leq?|neq?|pm|gt|lt)\b|\+/-|!=|\d\s?\+\W*$"
    r"|至少|至多|最多|最少|大于|小于|超过|不到|以上|以下|以内|少于|多于|多|余|几|低于|高于|正负|或|之间",
    re.IGNORECASE,
)
_OPERATION = re.compile(
    r"\b(?:sqrt|roots?|log|ln|lg|sin|cos|tan|squared|cubed|factorial|twice|thrice|double|triple|times|plus|minus|"
    r"negative|half|halves|thirds?|quarters?|past|[ap]\.?m|divided|multiplied|power|percent of|[b-hj-z])\b"
    r"|[=*^\\√!{}|]|\d\s?[+/×÷·-]|[+/×÷·-]\s?\d.*\d|[平立]方|根号|的?倍|除|乘|负|\?$",
    re.IGNORECASE,
)
_SCALED = rf"(?:{_DIGITS})(?:\s?(?:{_SCALE}))*"
_LONE_NUMBER = re.compile(rf"(?<![\w.,/-])-?[$€£¥]?{_SCALED}(?:\s?%|°)?(?![A-Za-z0-9_/]|[.,]\d)", re.IGNORECASE)
_VALUE = rf"(?:only |exactly |about |approximately |around |roughly )?(-?[$€£¥]?(?:{_DIGITS}|\\frac).*)"
_PREDICATE = re.compile(rf"^.*\b(?:is|are|was|were|equals?(?: to)?|be)\s+{_VALUE}$", re.IGNORECASE)
_COUNTED = re.compile(
    rf"^(?:[\w\s]+, )?there (?:is|are|were|was) (?:only |exactly |a total of )?({_SCALED})\s+(?!or\b|to\b|and\b)",
    re.IGNORECASE,
)
_QUALIFIED = re.compile(
    r"^(.+?)\s+(?:with|which|where|when|for|in|on|at(?!\s+(?:least|most)\b))\b(?!\s*[\d$])", re.IGNORECASE
)
_COMPARED = re.compile(r"\b(?:than or equal|at least|at most|up to|no (?:more|less|fewer) than)\b", re.IGNORECASE)
_ABOUT = re.compile(r"^(.*?)\s+is (?:the|my) (?:(?:final|correct|right) )?answer$", re.IGNORECASE)


def number_in_sentence(text: str) -> Number | None:
    """Return the number that a sentence such as "There are 5 cats" or "The sum of 2 and 3 is 5" answers with.

    None where it is bounded ("at least 5"), worked with ("3 squared") or not the only one. What is denied is left out.
    """
    left = affirmed(text)
    if left != text and (number := parse_number(left)) is not None:
        return number
    text = left
    if not text or len(text) > 300 or not re.search(r"[ \u4e00-\u9fff]", text):
        return None
    text = without_reason(digits_throughout(text))
    counted = _COUNTED.match(text)
    if counted:
        return parse_number(counted[1])
    for pattern in (_PREDICATE, _ABOUT, _QUALIFIED):
        part = None if _COMPARED.search(text) else pattern.match(text)
        said = part[1].rstrip(". ") if part else ""
        if said and (number := parse_number(said) or _exact(said)) is not None:
            return number
    if BOUND.search(text) or _OPERATION.search(text) or _NO_NUMBER.search(text):
        return None
    found = _LONE_NUMBER.findall(text)
    return parse_number(found[0]) if len(found) == 1 else None


@lru_cache(maxsize=65536)
def read_number(text: str) -> Number | None:
    """Return the number a final answer stands for: itself a number, one in a sentence, or an exact formula's value."""
    number = parse_number(text)
    if number is None and not re.match(r"^[<>≤≥≠±~]|\\(?:geq?|leq?|neq?|pm)\b", text):
        value = number_value_of_formula(text)
        number = _exact(text) if value is not None else number_in_sentence(text)
    return number


def _exact(text: str) -> Number | None:
    value = number_value_of_formula(text)
    return Number(value, "", None) if isinstance(value, Fraction) else None


def number_value_of_formula(text: str) -> Fraction | float | None:
    """Return what a formula without letters comes to, said in signs or words; None where the text is none."""
    if not _WORKED.search(text):
        return None
    return None if _RANGE.fullmatch(text) else closed_value(spoken_formula(text))


_WORKED = re.compile(
    r"[\\^√∛π=*×÷·+/!|()-]|\d x \d|sqrt|pi\b|\b(?:log|ln|lg|sin|cos|tan)(?![a-z])|[平立]方|根号|阶乘"
    r"|\b(?:root|squared|cubed|factorial|twice|double|triple|half|times|plus|minus|divided|power)\b"
)
_RANGE = re.compile(r"\s*\d+(?:\.\d+)?\s*[-–]\s*\d+(?:\.\d+)?\s*")


def value_of(text: str) -> Fraction | float | None:
    """Return the value a final answer stands for, whatever its unit; irrational values as floats."""
    number = read_number(text)
    return number_value_of_formula(text) if number is None else number.value


# ------------------------------------------------------------------------------------------------------ comparing


def equal_numbers(given: Number | None, wanted: Number | None) -> bool:
    """Whether two numbers say the same: equal, or the finer one rounds to the coarser one."""
    if given is None or wanted is None:
        return False
    if given.unit != wanted.unit and given.unit and wanted.unit:
        if not {given.unit, wanted.unit} <= _UNITS.keys():
            return False
        (one, size), (other, other_size) = _UNITS[given.unit], _UNITS[wanted.unit]
        return one == other and given.value * size == wanted.value * other_size
    if "percent" in (given.unit, wanted.unit) and given.unit != wanted.unit:
        plain, percent = (given, wanted) if wanted.unit == "percent" else (wanted, given)
        if plain.value == percent.value / 100:
            return True
        if abs(plain.value) <= 1:
            return False  # 0.5 is not 0.5 %, while 60 may well have meant 60 %
    if given.value == wanted.value:
        return True
    if wanted.decimals is None or wanted.decimals > 0:
        # an exact third may be given as 0.33, never as 0.3 or as a whole number
        if wanted.decimals is None and given.decimals is not None and given.decimals >= 2:
            return (1000 * wanted.value).denominator != 1 and rounds_to(wanted.value, given)
        if wanted.decimals is not None and (given.decimals is None or given.decimals >= wanted.decimals):
            return rounds_to(given.value, wanted)
        if given.decimals is not None and given.decimals >= 2:
            return rounds_to(wanted.value, given)
    return False


def is_close(given: Fraction | float, wanted: Fraction | float, relative: float) -> bool:
    """Whether two values differ by at most a share of the second (of 1, where it is smaller)."""
    if isinstance(given, Fraction) and isinstance(wanted, Fraction):
        return abs(given - wanted) <= Fraction(relative) * max(1, abs(wanted))
    try:
        return abs(float(given) - float(wanted)) <= relative * max(1.0, abs(float(wanted)))
    except OverflowError:
        return False


def rounds_to(fine: Fraction, coarse: Number) -> bool:
    """Whether a value rounds to a number with its decimals."""
    return abs(fine - coarse.value) <= Fraction(1, 2) / Fraction(10) ** (coarse.decimals or 0)


def shown(value: Fraction) -> str:
    """A value in a few characters; one that no float holds by its size."""
    try:
        return f"{float(value):.12g}"
    except OverflowError:
        return "a number beyond 10^308"


_MAY_BE_FORMULA = re.compile(r"[\\^√π=*+/]|sqrt|pi\b|^\d+ ?: ?\d+$")


def decide_number(prediction: str, gold: str, asked: Asked) -> Decision:
    """The rule for ground truths that are numbers."""
    wanted = parse_number(gold)
    if wanted is None:
        return None
    given = read_number(prediction)
    if given is None:
        is_formula = number_value_of_formula(prediction) is not None or _MAY_BE_FORMULA.search(prediction)
        if is_formula and not BOUND.search(prediction):
            return None  # may have this value: left to `math`
        return (False, f"no number, expected {gold[:40]}")
    return (equal_numbers(given, wanted), f"{shown(given.value)}, expected {gold[:40]}")


def decide_relaxed(prediction: str, gold: str, asked: Asked) -> Decision:
    """ChartQA's relaxed accuracy: 5 % of the gold value; years and zero are exact."""
    wanted, given = parse_number(gold), read_number(prediction)
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
    return (error <= Fraction(1, 20), f"off by {shown(100 * error)} %, 5 % allowed")
