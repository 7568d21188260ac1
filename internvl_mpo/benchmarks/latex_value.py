r"""The number a LaTeX expression stands for, without a computer algebra system and without evaluating text as code.

    latex_value(r"\frac{3\sqrt{3}}{2}")      2.598...
    latex_value("2 x + 1")                   None: a letter has no value

MathVision's official scorer hands answers to latex2sympy2 1.9.1 and the result to Python's `eval`. This evaluator
follows what comes out of that pair, oddities included: text after a complete expression is passed over ("5)" is 5),
`7\frac{1}{2}` is a product, `3:2` a quotient, `1<2` is 1, `\ln` and `|x|` have no value (sympy's names for them do not
exist in `math`), angles are radians, and letters are variables, so "sqrt(2)" without a backslash has none.
"""

import math
import re
from collections.abc import Callable
from fractions import Fraction

Number = int | float

MAX_CHARS = 400
MAX_DEPTH = 40
MAX_BITS = 20_000

_TOKEN = re.compile(
    r"""\s+
      | (?P<number>[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?|\.[0-9]+)
      | (?P<command>\\right\||\\[a-zA-Z]+|\\[%{}|\\])
      | (?P<letter>[a-zA-Z])
      | (?P<sign>[-+*/^_()\[\]{}|,;:<>=!&.'])
    """,
    re.VERBOSE,
)
_SPACING = re.compile(r"\\displaystyle|\\q?quad|\\,|[~$]")
_OPERATOR = re.compile(r"\\operatorname\{(gcd|lcm)\}")
_GREEK = (
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma upsilon "
    "phi varphi chi psi omega"
)
_FUNCTIONS: dict[str, Callable[[float], float]] = {
    "\\sin": math.sin,
    "\\cos": math.cos,
    "\\tan": math.tan,
    "\\arcsin": math.asin,
    "\\arccos": math.acos,
    "\\arctan": math.atan,
    "\\sinh": math.sinh,
    "\\cosh": math.cosh,
    "\\tanh": math.tanh,
}
_CLOSING = {"(": ")", "[": "]", "{": "}", "\\{": "\\}"}
_TIMES = ("*", "\\cdot", "\\times")
_OVER = ("/", ":", "\\div")
_COMPARE: dict[str, Callable[[Number, Number], bool]] = {
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
    "\\lt": lambda a, b: a < b,
    "\\gt": lambda a, b: a > b,
    "\\le": lambda a, b: a <= b,
    "\\leq": lambda a, b: a <= b,
    "\\ge": lambda a, b: a >= b,
    "\\geq": lambda a, b: a >= b,
}
_VALUELESS = {f"\\{name}" for name in _GREEK.split()} | {"\\infty"}
_INVERSE = {name: f"\\arc{name[1:]}" for name in ("\\sin", "\\cos", "\\tan")}
_NAMED = {"e", "\\log", "\\exp", "\\sqrt", *_FUNCTIONS}
_IRRATIONAL = (_NAMED - {"\\sqrt"}) | {"\\pi", "\\tau", "\\lfloor"}
_NO_FACTOR = {
    "\\%",
    "\\}",
    "\\|",
    "\\\\",
    "\\right|",
    "\\choose",
    "\\rfloor",
    "\\ne",
    "\\neq",
    "\\rightarrow",
    "\\to",
} | {*_TIMES, *_OVER, *_COMPARE}
_COMMANDS = (
    {"\\frac", "\\dfrac", "\\tfrac", "\\sqrt", "\\pi", "\\tau", "\\log", "\\ln", "\\exp", "\\left", "\\right", "\\%"}
    | {"\\binom", "\\dbinom", "\\tbinom", "\\lfloor", "\\rfloor", "\\ne", "\\neq", "\\{", "\\}", "\\|", "\\rightarrow"}
    | {"\\\\", "\\right|", "\\choose", "\\gcd", "\\lcm", "\\to", *_TIMES, *_OVER, *_COMPARE, *_VALUELESS, *_FUNCTIONS}
)


class _NoValue(Exception):
    """The text is no expression, or one without a number."""


def latex_value(text: str, *, whole: bool = False, rational: bool = False, a: Number | None = None) -> Number | None:
    """Return the value of an expression, or None.

    Args:
        text: LaTeX, dollar signs allowed.
        whole: refuse text after the expression and relations, which the official pair passes over.
        rational: roots, pi, functions, factorials and "x = 5" have no value, as where `math` is not imported.
        a: value of the letter a, if it has one.
    """
    if len(text) > MAX_CHARS:
        return None
    text = _OPERATOR.sub(r"\\\1", _SPACING.sub(" ", text))
    if not text.strip():
        return None
    try:
        parser = _Parser(text, rational, a)
        value = parser.relation(whole)
        return value if math.isfinite(value) or isinstance(value, int) else None
    except (_NoValue, ArithmeticError, ValueError, TypeError):
        return None


class _Parser:
    """Recursive descent over tokens that are read only as far as needed: an illegal character beyond does no harm."""

    def __init__(self, text: str, rational: bool, a: Number | None):
        self.text = text
        self.rational = rational
        self.a = a
        self.position = 0
        self.depth = 0
        self.token = ""
        self.kind = ""
        self.advance()

    def advance(self) -> None:
        while self.position < len(self.text):
            match = _TOKEN.match(self.text, self.position)
            if match is None:
                raise _NoValue
            self.position = match.end()
            if match.lastgroup:
                self.token, self.kind = match.group(), match.lastgroup
                if self.kind == "command" and self.token not in _COMMANDS:
                    raise _NoValue
                if self.token in ("\\left", "\\right"):
                    continue
                return
        self.token, self.kind = "", "end"

    def take(self, token: str) -> None:
        if self.token != token:
            raise _NoValue
        self.advance()

    def relation(self, whole: bool) -> Number:
        if self.kind == "letter" and not self.rational:
            start = self.position, self.token, self.kind
            self.advance()
            if self.token == "=":  # "x = 5" is 5
                self.advance()
            else:
                self.position, self.token, self.kind = start
        value = self.sum()
        if whole and self.kind != "end":
            raise _NoValue
        while self.token in _COMPARE:
            compare = _COMPARE[self.token]
            self.advance()
            value = compare(value, self.sum())
        if self.token in (",", ";", "=", "\\ne", "\\neq"):
            raise _NoValue
        return value

    def sum(self) -> Number:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _NoValue
        value = self.product()
        while self.token in ("+", "-"):
            minus = self.token == "-"
            self.advance()
            term = self.product()
            value = value - term if minus else value + term
        self.depth -= 1
        return value

    def product(self, functions: bool = True) -> Number:
        value = self.unary(functions)
        while True:
            if self.token in _TIMES:
                self.advance()
                value = value * self.unary(functions)
            elif self.token in _OVER:
                self.advance()
                value = value / self.unary(functions)
            else:
                return value

    def unary(self, functions: bool) -> Number:
        r"""A sign, then factors side by side: these bind tighter than a written operator, so 1/2\pi is 1/(2 pi)."""
        negative = False
        while self.token in ("+", "-"):
            negative ^= self.token == "-"
            self.advance()
        value = self.power()
        while self.starts_factor() and (functions or self.token not in _NAMED):
            value = value * self.power()
        return -value if negative else value

    def starts_factor(self) -> bool:
        if self.kind in ("number", "letter"):
            return True
        if self.kind == "sign":
            return self.token in ("(", "[", "{", "|")
        return self.kind == "command" and self.token not in _NO_FACTOR

    def power(self) -> Number:
        if self.token == "e":  # a power of e has a value in `math`, e itself has not
            self.advance()
            self.take("^")
            power = self.exponent()
            if self.rational and power:
                raise _NoValue
            value: Number = math.exp(power)
        else:
            value = self.atom()
        while self.token == "^":
            self.advance()
            value = _power(value, self.exponent())
        return self.postfix(value)

    def exponent(self) -> Number:
        if self.token == "{":
            return self.group("{")
        if self.kind != "number" and self.token != "\\pi":
            raise _NoValue
        return self.atom()

    def postfix(self, value: Number) -> Number:
        while self.token in ("!", "'"):
            if self.token == "!":
                if self.rational or not isinstance(value, int) or not 0 <= value <= 1000:
                    raise _NoValue
                value = math.factorial(value)
            self.advance()
            if self.token == "^":  # no power of a factorial: the grammar stops here
                self.token, self.kind = "", "end"
                self.position = len(self.text)
        if self.token == "\\%":  # a percent sign belongs to a number, anything else is a remainder upstream
            raise _NoValue
        return value

    def atom(self) -> Number:
        token, kind = self.token, self.kind
        if self.rational and token in _IRRATIONAL:
            raise _NoValue
        if token == "a" and self.a is not None:
            self.advance()
            return self.a
        if kind == "number":
            return self.number()
        if token in _CLOSING:
            return self.group(token)
        if token in ("\\pi", "\\tau"):
            self.advance()
            return math.pi if token == "\\pi" else math.tau
        if token in ("\\frac", "\\dfrac", "\\tfrac"):
            self.advance()
            upper = self.group("{")
            return upper / self.group("{")
        if token in ("\\binom", "\\dbinom", "\\tbinom"):
            self.advance()
            upper, lower = self.group("{"), self.group("{")
            if not isinstance(upper, int) or not isinstance(lower, int) or not 0 <= lower <= upper <= 1000:
                raise _NoValue
            return math.comb(upper, lower)
        if token == "\\sqrt":
            self.advance()
            degree = self.group("[") if self.token == "[" else None
            if self.rational and degree in (None, 2):  # a third root is printed as a power upstream
                raise _NoValue
            value = self.group("{")
            return math.sqrt(value) if degree is None else _power(value, 1 / degree)
        return self.function()

    def number(self) -> Number:
        token = self.token
        self.advance()
        exact = Fraction(token.replace(",", "") if token[0] != "." else f"0{token}")
        if self.token == "\\%":
            self.advance()
            if self.kind == "letter" and self.token != "e":
                raise _NoValue
            return float(exact / 100)
        return exact.numerator if exact.denominator == 1 else float(exact)

    def function(self) -> Number:
        """A command that is followed by what it works on."""
        token = self.token
        if token == "\\lfloor":
            self.advance()
            value = math.floor(self.sum())
            self.take("\\rfloor")
            return value
        if token == "\\log":
            self.advance()
            base: Number = 10
            if self.token == "_":
                self.advance()
                base = self.exponent()
            return math.log(self.argument(), base)
        if token == "\\exp":
            self.advance()
            power = self.argument()
            if power == 1:  # upstream is left with e itself
                raise _NoValue
            return math.exp(power)
        if token in ("\\gcd", "\\lcm"):
            self.advance()
            return self.common(math.gcd if token == "\\gcd" else math.lcm)
        if token in _FUNCTIONS:
            self.advance()
            power = None
            if self.token == "^":
                self.advance()
                power = self.exponent()
                if power == -1 and token in _INVERSE:
                    return _FUNCTIONS[_INVERSE[token]](self.argument())
            value = _FUNCTIONS[token](self.argument())
            return value if power is None else _power(value, power)
        raise _NoValue

    def argument(self) -> Number:
        r"""In parentheses, or else the whole product that follows: \sin 2x/3 is the sine of 2x/3."""
        return self.group("(") if self.token == "(" else self.product(functions=False)

    def common(self, join: Callable[..., int]) -> int:
        self.take("(")
        numbers = [self.sum()]
        while self.token == ",":
            self.advance()
            numbers.append(self.sum())
        self.take(")")
        if not all(isinstance(number, int) for number in numbers):
            raise _NoValue
        return join(*numbers)

    def group(self, opening: str) -> Number:
        self.take(opening)
        value = self.sum()
        self.take(_CLOSING[opening])
        return value


def _power(base: Number, exponent: Number) -> Number:
    if isinstance(base, int) and isinstance(exponent, int):
        if exponent >= 0 and base.bit_length() * exponent > MAX_BITS:
            raise _NoValue
        if exponent < 0:
            return 1 / _power(base, -exponent)
    value = base**exponent
    if isinstance(value, complex):
        raise _NoValue
    return value
