r"""Numbers in words, English or Chinese, as digits; and what is said of numbers ("twice 4", "3 squared") as a formula.

in_digits("two hundred and five cats")     "205 cats"
in_digits("一又二分之一")                   "1 1/2"
digits_throughout("there are five cats")   "there are 5 cats"
spoken_formula("the square root of 9")     "\sqrt{9}"
"""

import re
from fractions import Fraction
from functools import lru_cache

_BELOW_TWENTY = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
VALUES = {word: value for value, word in enumerate(_BELOW_TWENTY.split())}
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
VALUES |= {word: 10 * tens for tens, word in enumerate(_TENS.split(), start=2)}
# what multiplies the number before it; dozens and scores end a number
SCALES = {"thousand": 10**3, "lakh": 10**5, "million": 10**6, "crore": 10**7, "billion": 10**9, "trillion": 10**12}
LOTS = {"dozen": 12, "score": 20, "gross": 144}
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_PARTS = {"half": 2, "halves": 2, "quarter": 4, "quarters": 4}
_PARTS |= {word + end: number for number, word in enumerate(ORDINALS[2:], start=3) for end in ("", "s")}

_SCALE = "|".join(["hundred", *SCALES, *LOTS])
_WORD = "|".join([*VALUES, _SCALE])
_SEQUENCE = (
    rf"(?:an? (?={_SCALE}))?(?:{_WORD})"
    rf"(?:[ -](?:{_WORD})|(?:(?<=hundred)|(?<=thousand)|(?<=million)|(?<=billion)) and (?:{_WORD}))*"
    rf"(?: point(?: (?:{'|'.join(list(VALUES)[:10])}))+)?"
)
# "5 million" is one number already
_CARDINAL = re.compile(rf"(?<![\w-])(?!(?<=\d )(?:{_SCALE})){_SEQUENCE}(?![\w-])", re.IGNORECASE)
_LEADING = re.compile(rf"(?:{_SEQUENCE})(?![\w])", re.IGNORECASE)
_SHARE = rf"(?:(?P<over>an?|{'|'.join(VALUES)})[ -])?(?P<under>{'|'.join(_PARTS)})"
_FRACTION = re.compile(rf"{_SHARE}\b(?! (?:past|to)\b)", re.IGNORECASE)
_AND_FRACTION = re.compile(rf" and {_SHARE}\b", re.IGNORECASE)
_HALF_A_LOT = re.compile(rf"half (?:an? )?({'|'.join(LOTS)})\b", re.IGNORECASE)
_MINUS = re.compile(r"(?:minus|negative)\s+|负", re.IGNORECASE)

_HAN = {character: value for value, character in enumerate("零一二三四五六七八九")} | {"两": 2, "〇": 0}
_HAN_SCALES = {"十": 10, "百": 100, "千": 1000, "打": 12}
_HAN_GROUPS = {"万": 10**4, "亿": 10**8}
_HAN_DIGIT = f"[{''.join(_HAN)}]"
_HAN_WORD = f"[{''.join((*_HAN, *_HAN_SCALES, *_HAN_GROUPS))}]"
_HAN_NUMBER = rf"(?:\d+(?:\.\d+)?(?={_HAN_WORD})|{_HAN_WORD}(?=\d)|{_HAN_WORD})+(?:\d+(?!\.?\d))?(?:点{_HAN_DIGIT}+)?"
# A numeral followed by a noun is none: 一般, 十分. What may follow is a measure word or a unit.
_MEASURES = "个只条张本人岁年天次点名件块元米辆头匹座棵枝把位幅种层排列行升克吨秒周月日号度倍厘毫公千平立分小"
_HAN_END = rf"(?=$|[\s{_MEASURES}。，,]|又)"
_HAN_LEADING = re.compile(rf"({_HAN_NUMBER}){_HAN_END}")
_HAN_SHARE = re.compile(rf"(?:({_HAN_NUMBER}|\d+)又)?({_HAN_NUMBER}|\d+)分之({_HAN_NUMBER}|\d+)")
_HAN_MIXED = re.compile(r"(\d+)又(\d+/\d+)")


@lru_cache(maxsize=65536)
def in_digits(text: str) -> str:
    """Return the text with the number at its beginning in digits, "-3" for "minus three", "1/3" for "a third"."""
    sign = _MINUS.match(text)
    start = sign.end() if sign else 0
    rewritten = _english(text[start:]) or _chinese(text[start:])
    if rewritten is None:
        is_signed = sign is not None and text[start : start + 1].isdigit()
        return f"-{text[start:]}" if is_signed else text
    return f"-{rewritten}" if sign else rewritten


def digits_throughout(text: str) -> str:
    """Return a sentence with its number words in digits; "one" alone stays, it may be a pronoun."""
    return _CARDINAL.sub(lambda match: (_cardinal(match[0]) if match[0].lower() != "one" else None) or match[0], text)


def _english(text: str) -> str | None:
    lot = _HALF_A_LOT.match(text)
    if lot:
        return f"{LOTS[lot[1].lower()] // 2}{text[lot.end() :]}"
    part = _FRACTION.match(text)
    if part and (part["over"] or part["under"].lower() == "half"):
        return _share(part) + text[part.end() :]
    said = _LEADING.match(text)
    value = _cardinal(said[0]) if said else None
    if said is None or value is None:
        return None
    more = _AND_FRACTION.match(text, said.end())
    if more and (more["over"] or more["under"].lower() == "half"):
        return f"{value} {_share(more)}{text[more.end() :]}"
    return value + text[said.end() :]


def _share(match: re.Match[str]) -> str:
    over = VALUES.get((match["over"] or "a").lower(), 1)
    return f"{over}/{_PARTS[match['under'].lower()]}"


def _cardinal(words: str) -> str | None:
    """The number as digits; None for words that are several numbers, such as "five six"."""
    whole, _, decimals = words.lower().partition(" point ")
    total = group = 0
    for word in re.split(r"[ -]", whole):
        if word in ("a", "an", "and"):
            continue
        if word in VALUES:
            value, below = VALUES[word], group % 100
            if below and not (below >= 20 and below % 10 == 0 and 0 < value < 10):
                return None
            group += value
        elif word == "hundred":
            if group >= 100:
                return None
            group = (group or 1) * 100
        elif word in SCALES:
            # "two million three thousand", and "a thousand million"
            total = total + (group or 1) * SCALES[word] if group or not total else total * SCALES[word]
            group = 0
        else:
            total, group = (total + group or 1) * LOTS[word], 0
    tail = "".join(str(VALUES[word]) for word in decimals.split())
    return f"{total + group}.{tail}" if tail else str(total + group)


def _chinese(text: str) -> str | None:
    if not text or not (text[0] in _HAN or text[0] in _HAN_SCALES or text[0] in "半万亿一" or text[0].isdigit()):
        return None
    if text in ("半", "一半"):
        return "1/2"
    mixed = _HAN_MIXED.match(text)
    if mixed:
        return f"{mixed[1]} {mixed[2]}{text[mixed.end() :]}"
    if text.startswith("百分之"):
        percent = _HAN_LEADING.match(text, 3) or re.compile(r"(\d+(?:\.\d+)?)").match(text, 3)
        return f"{_han_value(percent[1])}%{text[percent.end() :]}" if percent else None
    share = _HAN_SHARE.match(text)
    if share:
        whole = f"{_han_value(share[1])} " if share[1] else ""
        return f"{whole}{_han_value(share[3])}/{_han_value(share[2])}{text[share.end() :]}"
    said = _HAN_LEADING.match(text)
    if said is None or re.fullmatch(r"[\d.]+", said[1]):
        return None
    return _han_value(said[1]) + text[said.end() :]


def _han_value(text: str) -> str:
    whole, _, decimals = text.partition("点")
    total = group = digit = Fraction(0)
    for part in re.findall(r"\d+(?:\.\d+)?|.", whole):
        if part in _HAN:
            digit = 10 * digit + _HAN[part]
        elif part in _HAN_GROUPS:
            size, below = _HAN_GROUPS[part], group + digit
            # 一亿三千万 is 一亿 and 三千万, 一千万亿 so many 亿
            total = total + below * size if below and total >= size else (total + below or 1) * size
            group = digit = Fraction(0)
        elif part in _HAN_SCALES:
            group += (digit or 1) * _HAN_SCALES[part]
            digit = Fraction(0)
        else:
            digit = Fraction(part)
    value = total + group + digit
    shown = str(value.numerator) if value.denominator == 1 else f"{float(value):.12g}"
    return shown + ("." + "".join(str(_HAN[character]) for character in decimals) if decimals else "")


_NUMBER = r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)"
_SPOKEN = (
    (re.compile(rf"(?:the )?(?:square root of|sqrt|根号)\s*({_NUMBER})", re.IGNORECASE), r"\\sqrt{\1}"),
    (re.compile(rf"(?:the )?cube root of ({_NUMBER})", re.IGNORECASE), r"\\sqrt[3]{\1}"),
    (re.compile(rf"({_NUMBER})\s*(?:squared|的平方)", re.IGNORECASE), r"(\1)^2"),
    (re.compile(rf"({_NUMBER})\s*(?:cubed|的立方)", re.IGNORECASE), r"(\1)^3"),
    (re.compile(rf"({_NUMBER})\s*(?:factorial|的阶乘)", re.IGNORECASE), r"(\1)!"),
    (re.compile(rf"({_NUMBER}) to the power (?:of )?({_NUMBER})", re.IGNORECASE), r"(\1)^{\2}"),
    (re.compile(rf"(?:twice|double|two times) ({_NUMBER})", re.IGNORECASE), r"2*(\1)"),
    (re.compile(rf"(?:thrice|triple|three times) ({_NUMBER})", re.IGNORECASE), r"3*(\1)"),
    (re.compile(rf"(?:a )?half (?:of )?({_NUMBER})", re.IGNORECASE), r"\1/2"),
    (re.compile(rf"(\d+/\d+) of ({_NUMBER})", re.IGNORECASE), r"\1*(\2)"),
    (re.compile(rf"({_NUMBER})\s*(?:times|乘以?)\s*({_NUMBER})", re.IGNORECASE), r"(\1)*(\2)"),
    (re.compile(rf"({_NUMBER})\s*(?:plus|加上?)\s*({_NUMBER})", re.IGNORECASE), r"\1+(\2)"),
    (re.compile(rf"({_NUMBER})\s*(?:minus|减去?)\s*({_NUMBER})", re.IGNORECASE), r"\1-(\2)"),
    (re.compile(rf"({_NUMBER})\s*(?:divided by|除以)\s*({_NUMBER})", re.IGNORECASE), r"(\1)/(\2)"),
)


def spoken_formula(text: str) -> str:
    """Return what is said of numbers in signs: "3 squared" as "(3)^2"; other text is left as it is."""
    text = digits_throughout(text) if re.search(r"[a-z] [a-z]", text) else text
    for pattern, signs in _SPOKEN:
        found = pattern.fullmatch(text)
        if found:
            return found.expand(signs)
    return text


MONTH_NAMES = (
    *("january", "february", "march", "april", "may", "june", "july"),
    *("august", "september", "october", "november", "december"),
)
# also by their first three letters, and "sept"
MONTHS = {name[:letters]: number for number, name in enumerate(MONTH_NAMES, start=1) for letters in (3, None)}
MONTHS["sept"] = 9
