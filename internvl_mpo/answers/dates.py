"""Dates in the usual spellings."""

import re

from internvl_mpo.answers.common import Asked, Decision, said_values
from internvl_mpo.answers.number_words import MONTHS

# -- dates

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
        part = dict(zip(order, match.groups(), strict=True))
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
            if month not in MONTHS:
                return None
            month = MONTHS[month]
        return tuple(str(int(value)) if value != "" else "" for value in (part.get("y", ""), month, part.get("d", "")))
    return None


def decide_date(prediction: str, gold: str, asked: Asked) -> Decision:
    wanted = parse_date(gold)
    if wanted is None:
        return None
    given = next((date for text in said_values(prediction) if (date := parse_date(text)) is not None), None)
    if given is None:
        return None
    return (given == wanted, f"date {'-'.join(given)}, expected {'-'.join(wanted)}")
