"""Put one fault at a time into the package and look whether a test notices.

    pip install coverage
    python bench/mutants.py --count 300 --seed 1 --journal mutants.jsonl
    python bench/mutants.py --journal mutants.jsonl --again true     # once more what survived, after tests were added
    python bench/mutants.py --modules steps,training --tests tests/test_steps.py --journal steps.jsonl

A seed draws lines of the modules, each with one fault of `mutant_operators.py`. Against a fault run the tests that run
its line, as coverage saw it once for each test; slow ones only where no fast one does. A test file that changes is
measured anew. The journal keeps what was drawn and every verdict, so that a run that was stopped goes on.

Faults that change nothing a user could see are listed with the reason in `mutants_equivalent.jsonl`.
"""

import ast
import functools
import hashlib
import json
import os
import random
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutant_operators import Mutant, mutants_of
from mutant_runs import CAUGHT, ROOT, SURVIVED, TOO_LONG, covered, forked, with_fault

sys.path.insert(0, str(ROOT))  # runs from a checkout without installation

from internvl_mpo.errors import BadInputError, need_package, run_program
from internvl_mpo.jsonl import AppendLog, read_whole_lines
from internvl_mpo.settings import parse_settings, setting

# What damages data or training where nobody looks.
MODULES = [
    *("objective.py", "packing.py", "pack_plan.py", "logps.py", "encoding.py", "steps.py", "pairing.py", "records.py"),
    *("answers/*.py", "mmpr/*.py", "convert.py", "engines/journal.py", "demo/guard.py", "publish/hygiene.py"),
    *("training/preflight.py", "training/reference_cache.py", "training/checkpoint.py", "training/trainer.py"),
]
EQUIVALENT = ROOT / "bench" / "mutants_equivalent.jsonl"


@dataclass
class Settings:
    """Settings of the program."""

    count: int = setting(300, help="faults to draw")
    seed: int = setting(0, help="decides lines and faults")
    modules: list[str] = setting(MODULES, help="files or folders of internvl_mpo, * allowed")
    journal: str = setting("mutants.jsonl", help="file for what was drawn and the verdicts; an old one is gone on with")
    coverage: str = setting("mutants_coverage", help="folder for which test runs which line")
    tests: list[str] = setting(["tests"], help="files or folders of tests")
    slow: bool = setting(False, help="measure slow tests as well, for lines that no fast test runs")
    again: bool = setting(False, help="test what survived once more")
    seconds: float = setting(60.0, help="most processor time of tests for one fault")


def main(argv: list[str]) -> int:
    """Draw, run, print the table."""
    settings = parse_settings(Settings, argv, program="bench/mutants.py", about=__doc__, config=False)
    need_package("coverage", "bench/mutants.py")
    import pytest

    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    drawn = drawn_mutants(Path(settings.journal), settings)
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", *settings.tests]
    pytest.main(options, plugins=[Trial(settings, drawn)])
    print(table(drawn, read_verdicts(Path(settings.journal))))
    return 0


class Trial:
    """Plugin of pytest that runs the collected tests against faults, instead of running them once."""

    def __init__(self, settings: Settings, drawn: list[Mutant]):
        """Take what was drawn."""
        self.settings, self.drawn = settings, drawn

    def pytest_runtestloop(self, session: Any) -> bool:
        """Measure coverage where it is missing, then judge every fault that waits for it."""
        items = {item.nodeid: item for item in session.items}
        tests = coverage_map(session, Path(self.settings.coverage), self.settings.slow)
        tests = [test for test in tests if test.name in items]
        journal = Path(self.settings.journal)
        verdicts, excused = read_verdicts(journal), equivalents()
        with AppendLog(journal) as log:
            for number, mutant in enumerate(self.drawn, start=1):
                verdict = verdicts.get(mutant.key)
                if mutant.key in excused or (verdict and not (self.settings.again and verdict == SURVIVED)):
                    continue
                verdicts[mutant.key], what = judge(
                    session, items, mutant, tests_of(mutant, tests, self.settings.seconds)
                )
                log.append({"mutant": mutant.key, "verdict": verdicts[mutant.key], "by": what})
                print(
                    f"{number}/{len(self.drawn)} {verdicts[mutant.key]}: {' | '.join(mutant.key)} [{what}]", flush=True
                )
        return True


# What is drawn


def drawn_mutants(journal: Path, settings: Settings) -> list[Mutant]:
    """Return what the journal says was drawn, as far as the lines are still there, or draw and write it down."""
    rows = [row["drawn"] for row in read_whole_lines(journal) if "drawn" in row] if journal.exists() else []
    if not rows:
        mutants = draw(source_files(settings.modules), settings.count, settings.seed)
        with AppendLog(journal) as log:
            for mutant in mutants:
                log.append({"drawn": mutant.key, "kind": mutant.kind})
        return mutants
    keys = {tuple(row) for row in rows}
    files = sorted({key[0] for key in keys if (ROOT / key[0]).exists()})
    found = {mutant.key: mutant for file in files for mutant in mutants_of(file, (ROOT / file).read_text())}
    gone = keys - set(found)
    if gone:
        print(f"{len(gone)} drawn faults are of lines that are no longer there")
    return [found[key] for key in map(tuple, rows) if key in found]


def source_files(patterns: Iterable[str]) -> list[str]:
    """Return the files of the package that patterns name: `steps`, `steps.py`, `training`, `answers/*.py`.

    Raises:
        BadInputError: a pattern that names none.
    """
    package = ROOT / "internvl_mpo"
    files: list[str] = []
    for pattern in patterns:
        paths = [path for form in (pattern, f"{pattern}.py", f"{pattern}/**/*.py") for path in package.glob(form)]
        found = sorted(str(path.relative_to(ROOT)) for path in paths if path.suffix == ".py")
        if not found:
            raise BadInputError(f"modules has '{pattern}', which names no file below internvl_mpo")
        files += found
    return list(dict.fromkeys(files))


def draw(files: Iterable[str], count: int, seed: int) -> list[Mutant]:
    """Draw lines, every line as likely as any other, and one fault for each of them."""
    lines: dict[tuple[str, ...], list[Mutant]] = defaultdict(list)
    for file in files:
        for mutant in mutants_of(file, (ROOT / file).read_text(encoding="utf-8")):
            lines[mutant.key[:3]].append(mutant)
    rng = random.Random(seed)
    drawn = []
    for line in rng.sample(sorted(lines), len(lines)):
        mutants = [mutant for mutant in lines[line] if mutant.runs()]
        if mutants and len(drawn) < count:
            drawn.append(rng.choice(mutants))
    return drawn


# Which tests run a line


@dataclass(frozen=True)
class Test:
    """A test: its name, processor time, and the lines it runs as (file, function, lines after its `def`)."""

    name: str
    cpu_s: float
    is_slow: bool
    lines: frozenset[tuple[str, str, int]]


def coverage_map(session: Any, folder: Path, slow: bool) -> list[Test]:
    """Return every test with the lines it runs, measured where its file changed since the last time."""
    folder.mkdir(parents=True, exist_ok=True)
    by_file: dict[tuple[Path, bool], list[Any]] = defaultdict(list)
    for item in session.items:
        by_file[item.path, item.get_closest_marker("slow") is not None].append(item)
    tests: list[Test] = []
    for (path, is_slow), items in sorted(by_file.items(), key=lambda entry: (entry[0][1], entry[0][0])):
        kept = folder / f"{path.stem}{'-slow' if is_slow else ''}.json"
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        row = json.loads(kept.read_text()) if kept.exists() else {}
        if row.get("digest") != digest and (slow or not is_slow):
            row = {"digest": digest, "tests": measure(session, items)}
            kept.write_text(json.dumps(row))
        for name, test in row.get("tests", {}).items():
            lines = frozenset(
                (file, function, offset)
                for file, functions in test["lines"].items()
                for function, offsets in functions.items()
                for offset in offsets
            )
            tests.append(Test(name, test["cpu_s"], is_slow, lines))
    return tests


def measure(session: Any, items: list[Any]) -> dict[str, Any]:
    """Run tests with coverage; lines are kept by function, so that they stay right when another one changes."""
    began = time.time()
    raw = forked(functools.partial(covered, session, items), cpu_s=1800, wall_s=3600) or {}
    print(
        f"coverage of {len(raw)} of {len(items)} tests of {items[0].path.name}: {time.time() - began:.0f} s", flush=True
    )
    for row in raw.values():
        named: dict[str, dict[str, list[int]]] = {}
        for file, lines in row["lines"].items():
            places = line_places((ROOT / file).read_text(encoding="utf-8"))
            for line in filter(range(len(places)).__contains__, lines):  # a dataclass's own code has no place
                function, offset = places[line]
                named.setdefault(file, {}).setdefault(function, []).append(offset)
        row["lines"] = named
    return raw


@functools.cache
def line_places(source: str) -> list[tuple[str, int]]:
    """Return (function, lines after its `def`) of every line, counted from 1."""
    places = [("", line) for line in range(source.count("\n") + 2)]

    def walk(node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = name
            if isinstance(child, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
                inner = f"{name}.{child.name}" if name else child.name
                first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                for line in range(first, child.end_lineno + 1):
                    places[line] = inner, line - first
            walk(child, inner)

    walk(ast.parse(source), "")
    return places


def tests_of(mutant: Mutant, tests: list[Test], seconds: float) -> list[Test]:
    """Return the tests that run a line, those of the file of its name first, then the quickest; slow ones if no other.

    Tests beyond so many seconds of processor time are not asked.

    A line that runs at import only is tested by whatever names what it defines, or runs the functions that do.
    """
    here = {(mutant.path, mutant.function, mutant.offset + line) for line in range(mutant.num_lines)}
    found = [test for test in tests if test.lines & here] if mutant.function else []  # else: run by any import
    if not found:
        functions, named = importers(mutant), naming_tests(mutant)
        found = [
            test
            for test in tests
            if test.name.split("[")[0] in named or any(line[:2] in functions for line in test.lines)
        ]
    if not found:
        found = [test for test in tests if any(line[0] == mutant.path for line in test.lines)]
    fast = [test for test in found if not test.is_slow] or found
    files: dict[str, list[Test]] = defaultdict(list)
    for test in fast:
        files[test.name.split("::")[0]].append(test)
    stem = Path(mutant.path).stem

    def rank(file: str) -> tuple[bool, float]:
        return stem not in file, sum(test.cpu_s for test in files[file]) / len(files[file])

    chosen, cpu_s = [], 0.0
    for test in [test for file in sorted(files, key=rank) for test in files[file]]:
        if cpu_s + test.cpu_s <= seconds or not chosen or test.is_slow:
            chosen.append(test)
            cpu_s += test.cpu_s
    return chosen


def names_of(mutant: Mutant) -> set[str]:
    """Return the names of what a line at the top of a module or a class defines."""
    return {mutant.function.split(".")[-1]} if mutant.function else _built_of(mutant.path, _defined(mutant))


def naming_tests(mutant: Mutant) -> set[str]:
    """Return the tests, without their parameters, that name what a line at the top of a module or a class defines."""
    names = names_of(mutant)
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        source = path.read_text(encoding="utf-8")
        if Path(mutant.path).parts[-2] in source and any(name in source for name in names):
            for node, function, _ in _functions(ast.parse(source)):
                if names & {getattr(part, "id", getattr(part, "attr", None)) for part in ast.walk(node)}:
                    found.add(f"{path.relative_to(ROOT)}::{function.replace('.', '::')}")
    return found


def importers(mutant: Mutant) -> set[tuple[str, str]]:
    """Return (file, function) of what names the thing that a line at the top of a module or a class defines."""
    names = names_of(mutant)
    found = {(mutant.path, mutant.function)}
    for path in (ROOT / "internvl_mpo").rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if any(name and name in source for name in names):
            for node, function, _ in _functions(ast.parse(source)):
                used = {getattr(part, "id", getattr(part, "attr", None)) for part in ast.walk(node)}
                if used & names:
                    found.add((str(path.relative_to(ROOT)), function))
    return found


def _functions(tree: ast.AST) -> Iterator[tuple[ast.AST, str, int]]:
    from mutant_operators import statements

    return ((node, name, first) for node, name, first in statements(tree) if isinstance(node, ast.FunctionDef))


def _built_of(path: str, names: list[str]) -> set[str]:
    """The names of a module's top that are made of others, and of those made of them: a pattern of the words in it."""
    found = set(names)
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:  # nothing is used before it is made
        parts = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and found & {part.id for part in parts}:
            found |= {part.id for part in parts if isinstance(part.ctx, ast.Store)}
    return found


def _defined(mutant: Mutant) -> list[str]:
    """The names that the statement of a line at the top of a module gives."""
    source = (ROOT / mutant.path).read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if node.lineno <= mutant.offset <= (node.end_lineno or 0):
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            return [part.id for target in targets if target for part in ast.walk(target) if isinstance(part, ast.Name)]
    return []


# What tests say


def judge(session: Any, items: dict[str, Any], mutant: Mutant, chosen: list[Test]) -> tuple[str, str]:
    """Return the verdict of some tests on a fault, and the test that caught it or how many did not."""
    if not chosen:
        return SURVIVED, "no test runs this line"
    expected = sum(test.cpu_s for test in chosen)
    run = functools.partial(with_fault, session, [items[test.name] for test in chosen], mutant.path, mutant.source)
    failed = forked(run, cpu_s=20 + 4 * expected, wall_s=300 + 40 * expected)
    if failed is None:
        return TOO_LONG, f"{len(chosen)} tests"
    return (CAUGHT, failed[0][:150]) if failed else (SURVIVED, f"{len(chosen)} tests passed")


def read_verdicts(journal: Path) -> dict[tuple[str, ...], str]:
    """Return the last verdict on each fault."""
    return {tuple(row["mutant"]): row["verdict"] for row in read_whole_lines(journal) if "mutant" in row}


def equivalents() -> dict[tuple[str, ...], str]:
    """Return the reasons of faults that change nothing a user could see."""
    rows = [json.loads(line) for line in EQUIVALENT.read_text(encoding="utf-8").splitlines()]
    return {(row["path"], row["function"], row["before"], row["after"]): row["reason"] for row in rows}


def table(drawn: list[Mutant], verdicts: dict[tuple[str, ...], str]) -> str:
    """Return a row for each module and a list of what survived."""
    excused = equivalents()
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    survivors = []
    for mutant in drawn:
        verdict = "equivalent" if mutant.key in excused else verdicts.get(mutant.key, "to do")
        for module in (mutant.path.removeprefix("internvl_mpo/"), "all"):
            counts[module][verdict] += 1
        if verdict == SURVIVED:
            where = f"{mutant.path} {mutant.function} ({mutant.kind})"
            survivors.append(f"{where}\n  - {mutant.before}\n  + {mutant.after}")
    lines = ["| module | faults | caught | equivalent | survived |", "| --- | --- | --- | --- | --- |"]
    for module in [*sorted(set(counts) - {"all"}), "all"]:
        row = counts[module]
        caught, survived = row[CAUGHT] + row[TOO_LONG], row[SURVIVED]
        lines.append(f"| {module} | {row.total()} | {caught} | {row['equivalent']} | {survived} |")
    return "\n".join([*lines, "", *survivors])


if __name__ == "__main__":
    sys.exit(run_program(main))
