r"""Expressions read as functions of their letters: LaTeX, plain signs, or a mixture of both.

`2\frac{1}{2}` is two and a half, `\frac34` three quarters, `1/2x` half of x, `2^3^2` 512, `\sin 2x` the sine of 2x.
"""

import math
import re
from fractions import Fraction

from internvl_mpo.answers.arithmetic import (
    FUNCTIONS,
    NoFormulaError,
    Term,
    absolute,
    added,
    applied,
    factorial,
    fraction,
    logarithm,
    multiplied,
    raised,
    root,
)

MAX_DEPTH = 40

_BARE_NAMES = "arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|ln|log|lg|exp|sqrt|pi"
_BARE_NAME = re.compile(rf"(?<![\\A-Za-z])({_BARE_NAMES})(?![A-Za-z])")
_GREEK = "alpha|beta|gamma|delta|theta|lambda|mu|phi|omega|sigma|tau|rho|epsilon"
_SPELLING = (
    (re.compile(r"\\(?:left|right|displaystyle|limits)(?![A-Za-z])|\\[,;:! ]|[$~]"), " "),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\(?:cdot|times|ast)(?![A-Za-z])|[×·∙⋅]"), "*"),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"(?<=\d)\s*[xX]\s*(?=\d)"), "*"),
    (re.compile(r"\\div(?![A-Za-z])|[÷∕⁄]"), "/"),
    (re.compile(r"\\(?:leq?|leqslant)(?![A-Za-z])|<="), "≤"),
    (re.compile(r"\\(?:geq?|geqslant)(?![A-Za-z])|>="), "≥"),
    (re.compile(r"\\neq?(?![A-Za-z])|!="), "≠"),
    (re.compile(r"\\lt(?![A-Za-z])"), "<"),
    (re.compile(r"\\gt(?![A-Za-z])"), ">"),
    (re.compile(r"\\[lr]?[vV]ert(?![A-Za-z])|\\mid(?![A-Za-z])"), "|"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])"), "°"),
    (re.compile(r"π"), r"\\pi "),
    (re.compile(r"√"), r"\\sqrt "),
    (re.compile(r"∛"), r"\\sqrt[3]"),
)
_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:,\d{3})*(?:\.\d+)?(?![\d,])|\.\d+|\d+(?:\.\d+)?)|(?P<command>\\[A-Za-z]+)"
    r"|(?P<letter>[A-Za-zα-ωΑ-Ω])|(?P<sign>[-+*/:^_()\[\]{{}}|=<>≤≥≠!°]))"
)
_CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|"}


def in_one_spelling(text: str) -> str:
    r"""Return a formula in the signs the grammar knows: `√2` and `sqrt 2` as `\sqrt 2`, `×` as `*`, `>=` as `≥`."""
    for pattern, sign in _SPELLING:
        text = pattern.sub(sign, text)
    return _BARE_NAME.sub(r"\\\1 ", text)


class Parser:
    """Recursive descent from text to functions of a point."""

    def __init__(self, text: str):
        self.text = text
        self.position = 0
        self.depth = 0
        self.letters: set[str] = set()
        self.degrees = False
        self.advance()

    def advance(self) -> None:
        match = _TOKEN.match(self.text, self.position)
        if match is None:
            if self.text[self.position :].strip():
                raise NoFormulaError
            self.token, self.kind = "", "end"
            return
        self.position = match.end()
        self.kind = match.lastgroup or ""
        self.token = match.group(self.kind)

    def take(self, token: str) -> None:
        if self.token != token:
            raise NoFormulaError
        self.advance()

    def sum(self) -> Term:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise NoFormulaError
        value = self.product()
        while self.token in ("+", "-"):
            minus = self.token == "-"
            self.advance()
            value = added(value, self.product(), minus)
        self.depth -= 1
        return value

    def product(self) -> Term:
        value = self.unary()
        while True:
            if self.token in ("*", "/", ":"):
                over = self.token != "*"
                self.advance()
                value = multiplied(value, self.unary(), over)
            elif self.starts_factor():
                value = multiplied(value, self.power(), False)
            else:
                return value

    def starts_factor(self) -> bool:
        return self.kind in ("letter", "command") or self.token in ("(", "[", "{")

    def unary(self) -> Term:
        negative = False
        while self.token in ("+", "-"):
            negative ^= self.token == "-"
            self.advance()
        value = self.power()
        return (lambda point: -value(point)) if negative else value

    def power(self) -> Term:
        value = self.postfix(self.atom())
        if self.token == "^":
            self.advance()
            value = self.postfix(raised(value, self.exponent()))
        return value

    def exponent(self) -> Term:
        if self.token in ("+", "-"):
            return self.unary()
        value = self.atom()
        if self.token == "^":  # 2^3^4 is 2^(3^4)
            self.advance()
            value = raised(value, self.exponent())
        return value

    def postfix(self, value: Term) -> Term:
        while self.token in ("!", "°"):
            if self.token == "!":
                value = factorial(value)
            elif self.degrees:
                value = multiplied(value, lambda point: complex(math.pi / 180), False)
            self.advance()
        return value

    def atom(self) -> Term:
        token, kind = self.token, self.kind
        if kind == "number":
            return self.number()
        if kind == "letter":
            self.advance()
            return self.letter(token)
        if token in _CLOSING:
            return self.group()
        if kind == "command":
            self.advance()
            return self.command(token[1:])
        raise NoFormulaError

    def number(self) -> Term:
        value = fraction(self.token)
        is_whole = "." not in self.token
        self.advance()
        if self.kind == "number" or (self.token == "e" and re.match(r"\s*[-+]?\d", self.text[self.position :])):
            raise NoFormulaError  # "1 2" is no formula, and "1e5000" no product
        mixed = re.match(r"\s*(?:\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d)\s*(\d))", self.text[self.position :])
        if is_whole and self.token == "\\frac" and mixed:
            self.position += mixed.end()
            self.advance()
            over, under = (int(part) for part in mixed.groups() if part)
            if not under:
                raise NoFormulaError
            value += Fraction(over, under)
        return lambda point: value

    def plain_number(self) -> Term:
        r"""A number that another may follow: 2 of `\sin^2 30°`."""
        value = fraction(self.token)
        self.advance()
        return lambda point: value

    def letter(self, name: str) -> Term:
        if self.token == "_":  # x_1 is a letter of its own
            self.advance()
            index = re.match(r"\{?\w*\}?", self.token + self.text[self.position :])[0]  # of anything else it is empty
            name += index.strip("{}")
            self.position += len(index) - len(self.token)
            self.advance()
        if name == "e":
            return lambda point: complex(math.e)
        if name == "i":
            return lambda point: 1j
        self.letters.add(name)
        return lambda point: point[name]

    def group(self) -> Term:
        opening = self.token
        self.take(opening)
        value = self.sum()
        self.take(_CLOSING[opening])
        return absolute(value) if opening == "|" else value

    def argument(self) -> Term:
        r"""A group in braces, or the next sign alone: 3 of `\frac34`."""
        if self.token[:1].isdigit():
            self.position -= len(self.token) - 1
            value = fraction(self.token[0])
            self.advance()
            return lambda point: value
        return self.atom()

    def command(self, name: str) -> Term:
        if name == "pi":
            return lambda point: complex(math.pi)
        if name == "frac":
            over = self.argument()
            return multiplied(over, self.argument(), True)
        if name == "sqrt":
            degree = self.group() if self.token == "[" else _constant(2)
            return root(self.atom(), degree)
        if name in ("log", "lg"):
            base = _constant(10)
            if self.token == "_":
                self.advance()
                base = self.argument()
            return logarithm(self.operand(), base)
        if name in FUNCTIONS:
            return self.function(name)
        if re.fullmatch(_GREEK, name):
            return self.letter(name)
        raise NoFormulaError

    def function(self, name: str) -> Term:
        power: Term | None = None
        if self.token == "^":
            self.advance()
            power = self.plain_number() if self.kind == "number" else self.exponent()
        outer, self.degrees = self.degrees, name not in ("ln", "exp")
        value = applied(FUNCTIONS[name], self.operand())
        self.degrees = outer
        return value if power is None else raised(value, power)

    def operand(self) -> Term:
        """What a function is of: a group, or the factors side by side that follow."""
        if self.token in ("(", "{", "["):
            return self.postfix(self.group())
        value = self.power()
        while self.kind == "letter" or self.token in ("\\pi", "\\frac", "\\sqrt"):
            value = multiplied(value, self.power(), False)
        return value


def _constant(number: int) -> Term:
    return lambda point: Fraction(number)
