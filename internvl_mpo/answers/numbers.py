"""Numbers with their units, and when two of them are the same."""

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from internvl_mpo.answers.common import HEDGED, Decision, Options

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
UNITS: dict[str, tuple[str, Fraction]] = {
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
NO_NUMBER = re.compile(r"\d0s$|\d(?:st|nd|rd|th)\b|\d ?B\.?C\.?(?:E\.?)?$|\d\+$|\dM$|\d ?[ap]\.?m\.?$")


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
    if match is None or NO_NUMBER.search(text):
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
    if unit in UNITS or lowered in UNITS:
        return unit if unit in UNITS else lowered
    # words only: "5 red cubes" has the unit "red cube"; "5 - 3", "5 or 6", "5x" and "5\\pi" have none
    if _UNIT_WORDS.fullmatch(unit) and not HEDGED.search(unit):
        return lowered.replace("square ", "sq ")
    return None


def _singular(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def equal_numbers(given: Number | None, wanted: Number | None) -> bool:
    """Whether two numbers say the same: equal, or the finer one rounds to the coarser one."""
    if given is None or wanted is None:
        return False
    if given.unit != wanted.unit and given.unit and wanted.unit:
        (one, size), (other, other_size) = (UNITS.get(number.unit, (number.unit, 1)) for number in (given, wanted))
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
            return (1000 * wanted.value).denominator != 1 and rounds_to(wanted.value, given)
        if wanted.decimals is not None and (given.decimals is None or given.decimals >= wanted.decimals):
            return rounds_to(given.value, wanted)
        if given.decimals is not None and given.decimals >= 2:
            return rounds_to(wanted.value, given)
    return False


def rounds_to(fine: Fraction, coarse: Number) -> bool:
    return abs(fine - coarse.value) <= Fraction(1, 2) / Fraction(10) ** (coarse.decimals or 0)


_LONE_NUMBER = re.compile(rf"(?<![\w.,/-])-?[$€£¥]?(?:{_DIGITS})(?:\s?%|°)?(?![\w/]|[.,]\d)")


def number_in_sentence(text: str) -> Number | None:
    """Return the only number of a sentence such as "There are 5 cats"; None where it is hedged or not alone."""
    if " " not in text or "\\" in text or any(p.search(text) for p in (HEDGED, NO_NUMBER, _CHANGED)):
        return None
    found = _LONE_NUMBER.findall(text)
    words = [word for word in re.findall(r"[a-z]+", text.lower()) if word in _WORDS and word != "one"]
    if len(found) + len(words) != 1:
        return None
    return parse_number((found or words)[0])


def decide_number(prediction: str, gold: str, options: Options) -> Decision:
    wanted = parse_number(gold)
    if wanted is None:
        return None
    given = parse_number(prediction) or number_in_sentence(prediction)
    if given is None:
        if re.search(r"[\\^√π=*+/]|sqrt|pi\b|^\d+ ?: ?\d+$", prediction) and not HEDGED.search(prediction):
            return None  # may be a formula with this value: left to `math`
        return (False, f"no number, expected {gold[:40]}")
    return (equal_numbers(given, wanted), f"{float(given.value):.12g}, expected {gold[:40]}")


def decide_relaxed(prediction: str, gold: str, options: Options) -> Decision:
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
