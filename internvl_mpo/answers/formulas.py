"""Formulas as answers."""

import re
from fractions import Fraction

from internvl_mpo.answers.algebra import MAX_CHARS, compare_formulas
from internvl_mpo.answers.arithmetic import NoFormulaError
from internvl_mpo.answers.common import Asked, Decision
from internvl_mpo.answers.number_words import spoken_formula
from internvl_mpo.answers.numbers import BOUND, parse_number, rounds_to, split_unit

_FORMULA = re.compile(r"[\\^√π=*+/<>≤≥≠|]|\d\s*[a-z]\b|\bpi\b|sqrt|\b(?:log|ln|lg|sin|cos|tan)(?![a-z])|\d!|\broot\b")


def _are_formulas(one: str, other: str) -> bool:
    """Whether two texts, short enough for formulas, may be some: one of them has a sign that words have not."""
    return max(len(one), len(other)) <= 2 * MAX_CHARS and bool(_FORMULA.search(one) or _FORMULA.search(other))


def same_formula(given: str, wanted: str) -> bool:
    """Return whether two formulas are equal; a decimal value of one is not."""
    if not _are_formulas(given, wanted):
        return False
    try:
        compared = compare_formulas(spoken_formula(given), spoken_formula(wanted))
    except NoFormulaError:
        return False
    return compared is not None and compared.equal


def decide_math(prediction: str, gold: str, asked: Asked) -> Decision:
    """The rule for formulas: equal by value; a formula also equals its decimal value given to two places or more."""
    if not _are_formulas(prediction, gold):
        return None
    if bool(BOUND.search(prediction)) != bool(BOUND.search(gold)):
        return None  # "at least 3" is not 3
    given, wanted = (split_unit(text) for text in (prediction, gold))
    if given[1] and wanted[1] and given[1] != wanted[1]:
        return (False, f"{given[1]}, expected {wanted[1]}")
    try:
        compared = compare_formulas(spoken_formula(given[0]), spoken_formula(wanted[0]))
    except NoFormulaError:
        return None
    if compared is None:
        return (None, "both are too large to compare")
    if compared.equal:
        return (True, "equal formulas")
    for text, value in ((given[0], compared.wanted), (wanted[0], compared.given)):
        number = parse_number(text)
        if number is None or value is None or (number.decimals or 0) < 2:
            continue
        if rounds_to(Fraction(value), number):
            return (True, "decimal value of the formula")
    return (False, "unequal formulas")
