"""Runs tests for bench/mutants.py: each once with coverage, then again and again with one fault each.

pytest collects once. Every run is a fork of the process that has collected: there the fault is put into the modules
that are loaded already, so that nothing is imported again and no file changes on disk. Programs that a test starts get
it by an import hook.
"""

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import types
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "internvl_mpo"
CAUGHT, SURVIVED, TOO_LONG = "caught", "survived", "caught by the clock"
MUTANT_FILE = "INTERNVL_MPO_MUTANT"  # environment: a JSON file with [path, source]
SITE = f"""
import json, os, sys
if os.environ.get("{MUTANT_FILE}"):
    sys.path.append({str(Path(__file__).parent)!r})
    import mutant_runs
    mutant_runs.hook_in(*json.load(open(os.environ["{MUTANT_FILE}"])))
"""


def forked(work: Callable[[Path], Any], cpu_s: float, wall_s: float) -> Any:
    """Return what a function returns in a fork of this process, None if it had to be stopped.

    Args:
        work: gets a folder of its own; returns something JSON holds.
        cpu_s: processor time it may take.
        wall_s: time it may take.
    """
    folder = Path(tempfile.mkdtemp(prefix="mutants_"))
    child = os.fork()
    if not child:
        try:
            _alone(folder, cpu_s)
            (folder / "result").write_text(json.dumps(work(folder)))
        finally:
            os._exit(0)
    deadline = time.monotonic() + wall_s
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            break
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)  # programs it started
    result = folder / "result"
    found = json.loads(result.read_text()) if result.exists() and result.stat().st_size else None
    shutil.rmtree(folder, ignore_errors=True)
    return found


def _alone(folder: Path, cpu_s: float) -> None:
    """A group of its own, a limit, and nothing on the terminal."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CPU, (int(cpu_s) + 1, int(cpu_s) + 1))
    output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)


def run_items(session: Any, items: list[Any]) -> list[str]:
    """Run tests until one fails; return the names of those that failed."""
    failed = _watch_failures(session)
    session.config.pluginmanager.unregister(name="terminalreporter")
    for index, item in enumerate(items):
        after = items[index + 1] if index + 1 < len(items) else None
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        if failed:
            break
    return failed


def _watch_failures(session: Any) -> list[str]:
    """Return a list that the names of tests join as they fail."""
    failed: list[str] = []

    class Watch:
        @staticmethod
        def pytest_runtest_logreport(report: Any) -> None:
            if report.failed:
                failed.append(report.nodeid)

    session.config.pluginmanager.register(Watch())
    return failed


def with_fault(session: Any, items: list[Any], path: str, source: str, folder: Path) -> list[str]:
    """Run tests with a fault; return what failed, the fault itself if the file cannot be loaded with it."""
    (folder / "mutant.json").write_text(json.dumps([path, source]))
    (folder / "sitecustomize.py").write_text(SITE)
    os.environ[MUTANT_FILE] = str(folder / "mutant.json")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    _own_temporary_folders(session, folder)
    try:
        put_in(path, source)
    except Exception as error:
        return [f"cannot be imported: {error!r}"[:150]]
    return run_items(session, items)


def _own_temporary_folders(session: Any, folder: Path) -> None:
    factory = session.config._tmp_path_factory
    (folder / "tests").mkdir()
    factory._basetemp = folder / "tests"


# ------------------------------------------------------------------------------------------------ a fault put in


def put_in(path: str, source: str) -> None:
    """Give the loaded module of a file what it would be with another text.

    Functions and methods keep their identity and get other code, so that whoever imported them meets the fault; other
    values are exchanged wherever a module of ours holds them under the same name.
    """
    name = module_name(path)
    module = importlib.import_module(name)
    other = types.ModuleType(name)
    kept = ("__file__", "__package__", "__spec__", "__path__")
    other.__dict__.update({key: value for key, value in module.__dict__.items() if key in kept})
    exec(compile(source, str(ROOT / path), "exec", dont_inherit=True), other.__dict__)
    for key, new in other.__dict__.items():
        if not key.startswith("__") and not _become(module.__dict__.get(key), new, name):
            _exchange(key, module.__dict__.get(key), new, module)


def module_name(path: str) -> str:
    """`internvl_mpo.answers` for internvl_mpo/answers/__init__.py."""
    return path.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


def _become(old: Any, new: Any, name: str) -> bool:
    """Give a function or class the code of another one; False where the object itself must be exchanged."""
    if old is new:
        return True
    if isinstance(old, types.FunctionType) and isinstance(new, types.FunctionType):
        if hasattr(old, "__wrapped__") and hasattr(new, "__wrapped__"):  # a decorator stays: it is never changed
            return _become(old.__wrapped__, new.__wrapped__, name)
        free = old.__code__.co_freevars
        # `super()` needs the class that the method was made in: that of the loaded one stays
        if old.__module__ != name or free != new.__code__.co_freevars or free not in ((), ("__class__",)):
            return False
        old.__code__, old.__defaults__, old.__kwdefaults__ = new.__code__, new.__defaults__, new.__kwdefaults__
        return True
    if isinstance(old, functools._lru_cache_wrapper) and isinstance(new, functools._lru_cache_wrapper):
        old.cache_clear()
        return _become(old.__wrapped__, new.__wrapped__, name)
    if isinstance(old, type) and isinstance(new, type) and old.__module__ == name:
        return _become_class(old, new, name)
    if isinstance(old, types.ModuleType):
        return True
    with contextlib.suppress(Exception):
        return type(old) is type(new) and bool(old == new)
    return False


def _become_class(old: type, new: type, name: str) -> bool:
    for key, value in vars(new).items():
        before = vars(old).get(key)
        if key in ("__dict__", "__weakref__", "__module__", "__doc__") or isinstance(value, types.MemberDescriptorType):
            continue
        if isinstance(value, property) and isinstance(before, property) and value.fget and before.fget:
            value, before = value.fget, before.fget
        elif isinstance(value, functools.cached_property) and isinstance(before, functools.cached_property):
            value, before = value.func, before.func
        elif isinstance(value, (staticmethod, classmethod)) and isinstance(before, (staticmethod, classmethod)):
            value, before = value.__func__, before.__func__
        if not _become(before, value, name):
            with contextlib.suppress(AttributeError, TypeError):  # members of an enumeration
                setattr(old, key, vars(new)[key])
    return True


def _exchange(key: str, old: Any, new: Any, module: types.ModuleType) -> None:
    for other in [other for name, other in sys.modules.items() if name.split(".")[0] == PACKAGE or name[:5] == "test_"]:
        if other.__dict__.get(key) is old:
            setattr(other, key, new)
    setattr(module, key, new)


def hook_in(path: str, source: str) -> None:
    """Import a file of ours with another text, in a program that has not imported it yet."""
    name, file = module_name(path), str(ROOT / path)

    class Loader(importlib.machinery.SourceFileLoader):
        def get_code(self, fullname: str) -> Any:
            return compile(source, file, "exec", dont_inherit=True)

    class Finder:
        @staticmethod
        def find_spec(fullname: str, *_: Any) -> Any:
            if fullname != name:
                return None
            return importlib.util.spec_from_file_location(
                fullname,
                file,
                loader=Loader(fullname, file),
                submodule_search_locations=[str(Path(file).parent)] if path.endswith("__init__.py") else None,
            )

    sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- coverage


def covered(session: Any, items: list[Any], folder: Path) -> dict[str, Any]:
    """Run tests; return for each one its processor time and the lines of the package that it ran: file -> lines.

    A test that fails without a fault says nothing of one; it is left out.
    """
    import coverage

    _own_temporary_folders(session, folder)
    measured = coverage.Coverage(data_file=None, include=[f"{ROOT}/{PACKAGE}/*"], config_file=False)
    measured.start()
    times: dict[str, float] = {}
    failed = _watch_failures(session)
    for index, item in enumerate(items):
        began = time.process_time()
        measured.switch_context(item.nodeid)
        after = items[index + 1] if index + 1 < len(items) else None
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        times[item.nodeid] = round(time.process_time() - began, 3)
        measured.switch_context("")
    measured.stop()
    data = measured.get_data()
    lines: dict[str, dict[str, list[int]]] = defaultdict(dict)
    for file in data.measured_files():
        if file.endswith(".py"):  # not a template
            for line, contexts in data.contexts_by_lineno(file).items():
                for context in filter(None, contexts):
                    lines[context].setdefault(str(Path(file).relative_to(ROOT)), []).append(line)
    sound = {test: cpu_s for test, cpu_s in times.items() if test not in failed}
    return {test: {"cpu_s": cpu_s, "lines": lines.get(test, {})} for test, cpu_s in sound.items()}
