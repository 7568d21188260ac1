"""Arithmetic with numbers of bounded size: exact fractions where possible, complex numbers elsewhere.

A term is a function of a point, that is of the numbers put in for the letters of a formula.
"""

import cmath
import math
from collections.abc import Callable, Mapping
from fractions import Fraction

Value = Fraction | complex
Term = Callable[[Mapping[str, Value]], Value]

MAX_BITS = 20_000


class NoFormulaError(Exception):
    """The text is no formula, or one without a value."""


class TooLargeError(Exception):
    """A value of more than `MAX_BITS` bits."""


FUNCTIONS: dict[str, Callable[[complex], complex]] = {
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "cot": lambda x: 1 / cmath.tan(x),
    "sec": lambda x: 1 / cmath.cos(x),
    "csc": lambda x: 1 / cmath.sin(x),
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "ln": cmath.log,
    "exp": cmath.exp,
}


def fraction(token: str) -> Fraction:
    """Return the number a token of digits is."""
    return Fraction(f"0{token.replace(',', '')}")


def added(a: Term, b: Term, minus: bool) -> Term:
    """Return the sum, or with `minus` the difference."""
    return lambda point: a(point) - b(point) if minus else a(point) + b(point)


def multiplied(a: Term, b: Term, over: bool) -> Term:
    """Return the product, or with `over` the quotient."""

    def calculate(point: Mapping[str, Value]) -> Value:
        left, right = a(point), b(point)
        if over and right == 0:
            raise NoFormulaError
        return _bounded(lambda: left / right if over else left * right)

    return calculate


def _bounded(calculate: Callable[[], Value]) -> Value:
    try:
        value = calculate()
    except OverflowError:
        raise TooLargeError from None
    except (ArithmeticError, ValueError):
        raise NoFormulaError from None
    if isinstance(value, Fraction):
        if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
            raise TooLargeError
    elif not cmath.isfinite(value):
        raise TooLargeError
    return value


def raised(base: Term, exponent: Term) -> Term:
    """Return the power."""

    def calculate(point: Mapping[str, Value]) -> Value:
        a, b = base(point), exponent(point)
        if isinstance(a, Fraction) and isinstance(b, Fraction) and b.denominator == 1:
            bits = max(a.numerator.bit_length(), a.denominator.bit_length())
            if bits > 1 and bits * abs(b.numerator) > MAX_BITS:
                raise TooLargeError
            return _bounded(lambda: a ** int(b))
        if b == 0:
            return Fraction(1)
        if a == 0:
            raise NoFormulaError
        return _rooted(a, Fraction(1) / b) if isinstance(b, Fraction) else _bounded(lambda: complex(a) ** complex(b))

    return calculate


def _rooted(value: Value, degree: Value) -> Value:
    """The root, exact where it is a number of its own: the square root of 9/4 is 3/2."""
    if isinstance(value, Fraction) and isinstance(degree, Fraction) and degree.denominator == 1 and degree > 0:
        index = int(degree)
        if value < 0 and index % 2:
            return -_rooted(-value, degree)
        if value >= 0 and index <= 64:
            parts = [round(part ** (1 / index)) if part.bit_length() < 900 else 0 for part in value.as_integer_ratio()]
            exact = Fraction(parts[0], parts[1] or 1)
            if exact**index == value:
                return exact
    return _bounded(lambda: complex(value) ** (1 / complex(degree)))


def root(value: Term, degree: Term) -> Term:
    """Return the root of a degree."""
    return lambda point: _rooted(value(point), degree(point))


def logarithm(value: Term, base: Term) -> Term:
    """Return the logarithm to a base."""

    def calculate(point: Mapping[str, Value]) -> Value:
        a, b = value(point), base(point)
        return _bounded(lambda: cmath.log(complex(a)) / cmath.log(complex(b)))

    return calculate


def applied(function: Callable[[complex], complex], value: Term) -> Term:
    """Return a function of the term."""
    return lambda point: _bounded(lambda: function(complex(value(point))))


def absolute(value: Term) -> Term:
    """Return the absolute value."""

    def calculate(point: Mapping[str, Value]) -> Value:
        number = value(point)
        return abs(number) if isinstance(number, Fraction) else complex(abs(number))

    return calculate


def factorial(value: Term) -> Term:
    """Return the factorial; only whole numbers have one."""

    def calculate(point: Mapping[str, Value]) -> Value:
        number = value(point)
        if not isinstance(number, Fraction) or number.denominator != 1 or number < 0:
            raise NoFormulaError
        if number > 1000:
            raise TooLargeError
        return Fraction(math.factorial(int(number)))

    return calculate
