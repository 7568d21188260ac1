"""The number Python's `eval` would give for a line of arithmetic, without running it.

    python_value("5 or 6")           5
    python_value("2*a", {"a": 3})    6
    python_value("open('x')")        None

VLMEvalKit hands replies to `eval`; what it counts as right is reproduced from the syntax tree: numbers, operators,
comparisons and conditions. Names, calls, attributes, indices and texts have no value here.
"""

import ast
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import Any

MAX_CHARS = 400
MAX_BITS = 20_000

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
    ast.BitXor: operator.xor,
    ast.RShift: operator.rshift,
}
_UNARY: dict[type, Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
    ast.Invert: operator.invert,
}
_COMPARE: dict[type, Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


class _NoValue(Exception):
    """The text is no arithmetic."""


def python_value(text: str, names: Mapping[str, complex] | None = None) -> complex | None:
    """Return the number, or None for anything `eval` would refuse, or make something else of.

    Args:
        text: one expression.
        names: values of variables.
    """
    if len(text) > MAX_CHARS:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "6or 7" is deprecated, not wrong
            tree = ast.parse(text.strip(), mode="eval")
        return _value(tree.body, names or {})
    except (_NoValue, SyntaxError, ValueError, TypeError, ArithmeticError, MemoryError, RecursionError):
        return None


def _value(node: ast.expr, names: Mapping[str, complex]) -> Any:
    match node:
        case ast.Constant(value=int() | float() | complex() as number):
            return number
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return _power(_value(left, names), _value(right, names))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_value(left, names), _value(right, names))
        case ast.UnaryOp(op=op, operand=operand):
            return _UNARY[type(op)](_value(operand, names))
        case ast.BoolOp(op=op, values=parts):  # later parts are not looked at once the outcome is known
            for part in parts:
                value = _value(part, names)
                if bool(value) is isinstance(op, ast.Or):
                    break
            return value
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return _value(body if _value(test, names) else orelse, names)
        case ast.Compare(left=left, ops=ops, comparators=parts) if all(type(op) in _COMPARE for op in ops):
            before = _value(left, names)
            for op, part in zip(ops, parts, strict=True):
                after = _value(part, names)
                if not _COMPARE[type(op)](before, after):
                    return False
                before = after
            return True
    raise _NoValue


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * abs(exponent) > MAX_BITS:
        raise _NoValue
    return base**exponent
