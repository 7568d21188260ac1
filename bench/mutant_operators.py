"""One-line faults for bench/mutants.py: what can be changed in a piece of Python so that it still runs.

A mutant is a replacement of one span of the source. Texts of messages, annotations, decorators and documentation are
left alone: a wrong word there breaks no data and no training.
"""

import ast
import builtins
import codecs
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS = {
    ast.Lt: ("<=", ">="),
    ast.LtE: ("<", ">"),
    ast.Gt: (">=", "<="),
    ast.GtE: (">", "<"),
    ast.Eq: ("!=",),
    ast.NotEq: ("==",),
    ast.In: ("not in",),
    ast.NotIn: ("in",),
    ast.Is: ("is not",),
    ast.IsNot: ("is",),
}
ARITHMETIC = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "/",
    ast.Mod: "//",
    ast.Pow: "*",
    ast.BitOr: "&",
    ast.BitAnd: "|",
    ast.BitXor: "&",
    ast.LShift: ">>",
    ast.RShift: "<<",
}
SYMMETRIC = {"max", "min", "gcd", "lcm", "print", "isclose", "allclose", "equal"}
TWINS = [
    *[("min", "max"), ("any", "all"), ("chosen", "rejected"), ("policy", "reference"), ("width", "height")],
    *[("first", "last"), ("start", "end"), ("left", "right"), ("prefix", "suffix"), ("float64", "float32")],
    *[("startswith", "endswith"), ("find", "rfind"), ("split", "rsplit"), ("floor", "ceil"), ("lstrip", "rstrip")],
    *[("bisect_left", "bisect_right"), ("popleft", "pop"), ("append", "appendleft"), ("fullmatch", "match")],
    *[("match", "search"), ("sum", "mean"), ("removeprefix", "removesuffix"), ("ge", "gt"), ("le", "lt")],
]
# Calls that could be left out, so that a value goes on as it is.
TRANSPARENT = {
    *("abs", "sorted", "reversed", "set", "round", "strip", "lstrip", "rstrip", "lower", "upper", "casefold"),
    *("detach", "double", "float", "long", "contiguous", "clone", "copy", "resolve", "clamp", "removeprefix"),
    *("removesuffix", "normalize", "_wide"),
}
# Arguments that say what holds anyway: `strict` of zip, and UTF-8, which is what tests run with.
GUARDS = {"strict", "encoding"}
# Text of these calls is for people.
SPOKEN = re.compile(r"(Error|Warning|warn|print|log|info|debug|write_line|warning|setting|add_argument|tqdm|progress)$")


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        path: file, relative to the repository.
        function: dotted name of the function or class it lies in; empty at the top of a module.
        offset: lines between `def` and the statement; the line itself at the top of a module.
        num_lines: lines of the statement, or of the head of a compound one.
        kind: what was done.
        before: the source line without its indent.
        after: the same line with the fault, of a removed statement `pass`.
        source: the whole file with the fault.
    """

    path: str
    function: str
    offset: int
    num_lines: int
    kind: str
    before: str
    after: str
    source: str

    def runs(self) -> bool:
        """Say whether Python takes it at all."""
        try:
            compile(self.source, self.path, "exec")
        except (SyntaxError, ValueError):
            return False
        return True

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What names it in the list of equivalents and the journal; line numbers may change."""
        return self.path, self.function, self.before, self.after


Change = tuple[int, int, str, str]  # start, end (bytes), new text, kind


def mutants_of(path: str, source: str) -> Iterator[Mutant]:
    """Yield every mutant of a file.

    Args:
        path: file, relative to the repository.
        source: its text.
    """
    tree = ast.parse(source)
    code = source.encode()
    starts = [0, *itertools.accumulate(len(line) for line in code.splitlines(keepends=True))]
    for statement, function, first in statements(tree):
        last = head_end(statement)
        before = code[starts[statement.lineno - 1] : starts[last]].decode()
        for start, end, text, kind in changes(statement, code, starts):
            mutated = (code[:start] + text.encode() + code[end:]).decode()
            line = code[:start].count(b"\n")
            grown = mutated.count("\n") - source.count("\n")
            after = "\n".join(mutated.split("\n")[statement.lineno - 1 : max(last + grown, statement.lineno)])
            if kind != "statement removed" and code[start:end].count(b"\n"):
                continue  # one line, as a slip of the hand would be
            shown = after if kind == "statement removed" else mutated.split("\n")[line]
            was = before if kind == "statement removed" else source.split("\n")[line]
            offset = statement.lineno - first
            was, shown = " ".join(was.split()), " ".join(shown.split())
            yield Mutant(path, function, offset, last - statement.lineno + 1, kind, was, shown, mutated)


def statements(tree: ast.AST, function: str = "", first: int = 0) -> Iterator[tuple[ast.stmt, str, int]]:
    """Yield (statement, dotted name of its function, line of its `def`)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            name = f"{function}.{node.name}" if function else node.name
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            if not isinstance(node, ast.ClassDef):
                yield node, name, start
            yield from statements(node, name, start)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        else:
            if isinstance(node, ast.stmt):
                yield node, function, first
            yield from statements(node, function, first)


def head_end(statement: ast.stmt) -> int:
    """The last line of a statement, of a compound one the last before its body."""
    body = getattr(statement, "body", None) or getattr(statement, "cases", None)
    if not body:
        return statement.end_lineno or statement.lineno
    first = body[0]
    line = first.pattern.lineno if isinstance(first, ast.match_case) else first.lineno
    return max(statement.lineno, line - 1)


def changes(statement: ast.stmt, code: bytes, starts: list[int]) -> Iterator[Change]:
    """Yield the changes of one statement, of a compound one those of its head."""

    def span(node: ast.AST) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    yield from removals(statement, span)
    for node in parts(statement):
        for change in itertools.chain(
            operators(node, code, span), conditions(node, span), values(node, span, code), calls(node, code, span)
        ):
            if code[change[0] : change[1]].decode() != change[2]:
                yield change


def removals(statement: ast.stmt, span) -> Iterator[Change]:
    """A statement that is not there."""
    kept = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant | ast.Yield | ast.YieldFrom)
    again = isinstance(statement, ast.Assign) and _assigned_again(statement)
    removable = ast.Expr | ast.AugAssign | ast.Delete | ast.Break | ast.Continue
    if (isinstance(statement, removable) and not kept) or again:
        if isinstance(statement, ast.Expr) and _spoken(statement.value):
            return
        yield *span(statement), "pass", "statement removed"


def _assigned_again(statement: ast.Assign) -> bool:
    """`x = f(x)`, `self.x = ..` and `x[key] = ..` can be left out without a NameError."""
    targets = [part for target in statement.targets for part in getattr(target, "elts", [target])]
    read = {node.id for node in ast.walk(statement.value) if isinstance(node, ast.Name)}
    return all(
        isinstance(target, ast.Attribute | ast.Subscript) or (isinstance(target, ast.Name) and target.id in read)
        for target in targets
    )


def parts(statement: ast.stmt) -> Iterator[ast.AST]:
    """The expressions of a statement without messages, annotations, decorators and the statements inside."""
    if isinstance(statement, ast.Raise | ast.Import | ast.ImportFrom | ast.Assert | ast.Global):
        return
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
        return
    if isinstance(statement, ast.Assign):
        if re.match(r"(tuple|list|dict|Callable)\[|TypeVar\(", ast.unparse(statement.value)):
            return  # the name of a type
        if ast.unparse(statement.targets[0]) in {"__all__", "__slots__"}:
            return  # cannot be exchanged in a running process; a wrong name fails at once, see tests/test_rooms.py
    skipped = {"annotation", "returns", "decorator_list", "type_params", "body", "orelse", "finalbody", "handlers"}

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        if isinstance(node, ast.Call) and _spoken(node):
            return
        yield node
        if isinstance(node, ast.keyword) and node.arg in GUARDS:
            return
        for field, value in ast.iter_fields(node):
            inside = field in {"body", "orelse"} and not isinstance(node, ast.stmt)  # of a lambda, of `a if b else c`
            if (field in skipped and not inside) or isinstance(node, ast.JoinedStr):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST) and not isinstance(child, ast.stmt | ast.match_case):
                    yield from walk(child)

    yield from walk(statement)


def _spoken(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and bool(SPOKEN.search(ast.unparse(node.func)))


def operators(node: ast.AST, code: bytes, span) -> Iterator[Change]:
    """Comparisons, arithmetic, and, or, not, minus."""
    if isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
        for operator, left, right in zip(node.ops, sides, sides[1:], strict=False):
            for other in COMPARISONS[type(operator)]:
                yield *_between(left, right, code, span, other), "comparison"
    elif isinstance(node, ast.BoolOp):
        other = "or" if isinstance(node.op, ast.And) else "and"
        for left, right in itertools.pairwise(node.values):
            yield *_between(left, right, code, span, other), "and, or"
            yield span(left)[1], span(right)[1], "", "operand dropped"
        yield span(node.values[0])[0], span(node.values[1])[0], "", "operand dropped"
    elif isinstance(node, ast.BinOp) and not _is_text(node):
        if type(node.op) in ARITHMETIC:
            yield *_between(node.left, node.right, code, span, ARITHMETIC[type(node.op)]), "arithmetic"
    elif isinstance(node, ast.UnaryOp):
        start, _ = span(node)
        yield start, span(node.operand)[0], "", "sign or not"


def _between(left: ast.AST, right: ast.AST, code: bytes, span, text: str) -> tuple[int, int, str]:
    """The span of an operator, brackets of its sides left where they are."""
    start, end = span(left)[1], span(right)[0]
    between = code[start:end].decode()
    match = re.search(r"is\s+not|not\s+in|[^\s()\\]+", between)
    assert match is not None, between
    opened = len(between[: match.start()].encode())
    return start + opened, start + opened + len(match.group().encode()), text


def _is_text(node: ast.BinOp) -> bool:
    sides = [side for side in (node.left, node.right) if isinstance(side, ast.JoinedStr | ast.Constant)]
    return any(isinstance(side, ast.JoinedStr) or isinstance(side.value, str) for side in sides)


def conditions(node: ast.AST, span) -> Iterator[Change]:
    """What is asked, always or never true."""
    if isinstance(node, ast.If | ast.IfExp):
        yield *span(node.test), "True", "condition"
        yield *span(node.test), "False", "condition"
    elif isinstance(node, ast.While):
        yield *span(node.test), "False", "condition"
    elif isinstance(node, ast.comprehension):
        for test in node.ifs:
            yield *span(test), "True", "condition"


def values(node: ast.AST, span, code: bytes) -> Iterator[Change]:
    """Constants, names and elements."""

    def known(name: str) -> bool:
        """A name that nothing has would be noticed by anything."""
        return hasattr(builtins, name) or bool(re.search(rb"\b%b\b" % name.encode(), code))

    if isinstance(node, ast.Constant):
        yield from ((*span(node), text, "constant") for text in _other_constants(node.value))
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        start, end = span(node)
        yield from ((start, end, text, "name") for text in _twins(node.id) if known(text))
    elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
        end = span(node)[1]
        yield from ((end - len(node.attr.encode()), end, text, "name") for text in _twins(node.attr) if known(text))
    elif isinstance(node, ast.List | ast.Set | ast.Tuple) and isinstance(getattr(node, "ctx", None), ast.Load | None):
        yield from _dropped([span(element) for element in node.elts], "element dropped")
    elif isinstance(node, ast.Dict) and None not in node.keys:
        pairs = zip(node.keys, node.values, strict=True)
        yield from _dropped([(span(key)[0], span(value)[1]) for key, value in pairs if key], "key dropped")
    elif isinstance(node, ast.Slice):
        yield from ((*span(bound), "", "bound dropped") for bound in (node.lower, node.upper) if bound)
    elif isinstance(node, ast.Return) and node.value and not isinstance(node.value, ast.Constant):
        yield *span(node.value), "None", "return value"


def _other_constants(value: object) -> list[str]:
    if isinstance(value, bool):
        return [str(not value)]
    if isinstance(value, int):
        return [str(value + 1)] + ([str(value - 1)] if value > 0 else [])
    if isinstance(value, float):
        return [repr(value * 2), repr(value / 2)] if value else ["1.0"]
    if isinstance(value, str) and value:
        return [repr("ascii" if _is_codec(value) else value + "_")]
    return []


def _is_codec(name: str) -> bool:
    """Whether it names an encoding that Python also knows with another end, as "utf-8_"."""
    try:
        return codecs.lookup(name) == codecs.lookup(f"{name}_")
    except (LookupError, ValueError):
        return False


def _twins(name: str) -> Iterator[str]:
    """Names that are easily taken for this one."""
    words = name.split("_")
    for one, other in itertools.chain(TWINS, ((b, a) for a, b in TWINS)):
        if name == one:
            yield other
        elif one in words and len(words) > 1:
            yield "_".join(other if word == one else word for word in words)


def _dropped(spans: list[tuple[int, int]], kind: str) -> Iterator[Change]:
    if len(spans) < 2:
        return
    yield spans[0][0], spans[1][0], "", kind
    yield from ((before[1], here[1], "", kind) for before, here in itertools.pairwise(spans))


def calls(node: ast.AST, code: bytes, span) -> Iterator[Change]:
    """Arguments swapped or left out, and calls that change a value left out."""
    if not isinstance(node, ast.Call):
        return
    start, end = span(node)
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    plain = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
    if name not in SYMMETRIC and len(plain) == len(node.args):
        for left, right in itertools.pairwise(plain):
            (a, b), (c, d) = span(left), span(right)
            swapped = code[c:d] + code[b:c] + code[a:b]
            yield a, d, swapped.decode(), "arguments swapped"
    ends = [span(argument)[1] for argument in node.args] + [span(keyword.value)[1] for keyword in node.keywords]
    for index, keyword in enumerate(node.keywords, start=len(node.args)):
        if keyword.arg in GUARDS:
            continue
        before = ends[index - 1] if index else span(keyword)[0]
        yield before, ends[index], "", "argument dropped"
    if name in TRANSPARENT:
        kept = node.func.value if isinstance(node.func, ast.Attribute) else (plain or [None])[0]
        if kept is not None:
            a, b = span(kept)
            yield start, end, code[a:b].decode(), "call dropped"
