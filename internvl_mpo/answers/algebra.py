r"""Whether two formulas are equal, by value: both are calculated at the same points, numbers standing for letters.

    compare_formulas(r"\frac{10}{\sqrt{2}}", "5√2").equal        True
    compare_formulas("(x-1)(x+1)", "x^2 - 1").equal              True
    closed_value(r"2\frac{1}{2}")                                Fraction(5, 2)

Two different formulas that agree at every point would have to meet at all of them by chance. Nothing is transformed,
so there is nothing to wait for: a formula costs well under a millisecond, and one whose value no computer holds
(`9^{9^{9}}`) is seen before it is calculated. Text is read by the grammar of `expressions`
and never evaluated as code.
"""

import math
import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from internvl_mpo.answers.arithmetic import NoFormulaError, Term, TooLargeError, Value, added
from internvl_mpo.answers.expressions import Parser, in_one_spelling

MAX_CHARS = 200
CLOSE = 1e-9
# No identity of school algebra holds at these points alone; the last two tell |x| and roots of squares from x.
POINTS = (0.7390851, 1.3247179, 2.2360679, 3.1622776, -1.6180339, -0.5671432)


class Comparison(NamedTuple):
    """Whether two formulas are equal, and the number each comes to, if it is one."""

    equal: bool
    given: Fraction | float | None
    wanted: Fraction | float | None


class Relation(NamedTuple):
    """A formula: one side, or two with a sign between; `name` is what an assignment such as "x = 5" gives a value."""

    left: Term
    sign: str
    right: Term | None
    letters: frozenset[str]
    name: str | None


_SIGNS = frozenset("=<>≤≥≠")
_TURNED = {"<": ">", ">": "<", "≤": "≥", "≥": "≤"}
_CLOCK = re.compile(r"\d{1,2}:[0-5]\d")  # a time of day; other colons are ratios
_NAMED = re.compile(r"([A-Za-z](?:_\{?\w+\}?|\([a-z]\))?)\s*=(?!=)")


def closed_value(text: str) -> Fraction | float | None:
    """Return the real number a formula without letters comes to, None for anything else."""
    try:
        return _value_of(_read(text))
    except NoFormulaError:
        return None


@lru_cache(maxsize=65536)
def compare_formulas(given: str, wanted: str) -> Comparison | None:
    """Compare two formulas, equations or inequalities.

    Returns:
        None where both have values that are too large to compare.

    Raises:
        NoFormulaError: one of the two is no formula.
    """
    one, other = sides = [_read(given), _read(wanted)]
    letters = sorted(one.letters | other.letters)
    values = [_value_of(relation) for relation in sides]
    one, other = _as_equation(one, other), _as_equation(other, one)
    if (one.right is None) != (other.right is None) or (one.name and other.name and one.name != other.name):
        return Comparison(False, *values)
    try:
        equal = _same_sides(one, other, letters)
    except TooLargeError:
        return None if all(_is_too_large(relation, letters) for relation in sides) else Comparison(False, *values)
    return Comparison(equal, *values)


def _as_equation(relation: Relation, other: Relation) -> Relation:
    """An assignment "y = 2x" as an equation where the other one is "2x - y = 0"."""
    name = relation.name
    if name is None or other.right is None or name not in other.letters:
        return relation
    return relation._replace(left=lambda point: point[name], sign="=", right=relation.left, name=None)


def _value_of(relation: Relation) -> Fraction | float | None:
    if relation.right is not None or relation.letters:
        return None
    try:
        return _real(relation.left({}))
    except (NoFormulaError, TooLargeError):
        return None


def _is_too_large(relation: Relation, letters: list[str]) -> bool:
    try:
        relation.left(_point(letters, 0))
    except TooLargeError:
        return True
    except NoFormulaError:
        pass
    return False


def _same_sides(one: Relation, other: Relation, letters: list[str]) -> bool:
    """Equal values at all points, of relations the same but for a factor."""
    if one.right is None:  # neither has one
        pairs = list(_values(one.left, other.left, letters))
        return bool(pairs) and all(_close(a, b) for a, b in pairs)
    if other.sign != one.sign and other.sign != _TURNED.get(one.sign):
        return False
    turn = -1 if other.sign != one.sign else 1
    pairs = list(_values(added(one.left, one.right, True), added(other.left, other.right, True), letters))
    ratios = [turn * complex(a) / complex(b) for a, b in pairs if b != 0 and a != 0]
    if len(ratios) < min(len(pairs), 2) or not ratios:
        return bool(pairs) and all(_close(a, b) for a, b in pairs)
    is_constant = all(_close(ratio, ratios[0]) for ratio in ratios) and len(ratios) == len(pairs)
    return is_constant and (one.sign in "=≠" or ratios[0].real > 0)


def _values(one: Term, other: Term, letters: list[str]) -> list[tuple[Value, Value]]:
    """What both come to at each point where both have a value; one point is enough without letters."""
    found = []
    for number in range(len(POINTS) if letters else 1):
        point = _point(letters, number)
        try:
            found.append((one(point), other(point)))
        except NoFormulaError:
            continue
    return found if not letters or len(found) > len(POINTS) // 2 else []


def _point(letters: list[str], number: int) -> dict[str, Value]:
    """Another number for every letter at every point."""
    return {
        letter: POINTS[(number + place) % len(POINTS)] * (1 + place / 7) + 0j for place, letter in enumerate(letters)
    }


def _close(a: Value, b: Value) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    try:
        a, b = complex(a), complex(b)
    except OverflowError:
        raise TooLargeError from None
    return abs(a - b) <= CLOSE * max(1, abs(a), abs(b))


def _real(value: Value) -> Fraction | float | None:
    if isinstance(value, Fraction):
        return value
    return value.real if abs(value.imag) < CLOSE and math.isfinite(value.real) else None


@lru_cache(maxsize=8192)
def _read(text: str) -> Relation:
    if len(text) > MAX_CHARS or _CLOCK.fullmatch(text.strip()):
        raise NoFormulaError
    name = None
    assigned = _NAMED.match(text.strip())
    if assigned:
        name, text = assigned[1], text.strip()[assigned.end() :]
    parser = Parser(in_one_spelling(text))
    left = parser.sum()
    signs, sides = [], [left]
    while parser.token in _SIGNS:
        signs.append(parser.token)
        parser.advance()
        sides.append(parser.sum())
    if parser.kind != "end":
        raise NoFormulaError
    letters = frozenset(parser.letters)
    if signs and set(signs) == {"="} and not letters:
        return Relation(sides[-1], "", None, letters, name)  # "3 + 4 = 7"
    if len(signs) > 1 or (signs and name):
        raise NoFormulaError
    if name and name in letters:
        raise NoFormulaError  # "x = x + 1" says nothing about x
    return Relation(left, signs[0] if signs else "", sides[1] if signs else None, letters, name)
