"""Folders and small files: read, change, and replace a whole folder at once."""

import contextlib
import fnmatch
import glob
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from internvl_mpo.errors import BadInputError, full_disk
from internvl_mpo.locks import held

if TYPE_CHECKING:
    import pyarrow

_HOST = platform.node().replace(".", "-")


@contextlib.contextmanager
def replaced_folder(
    output: str | Path,
    *,
    sources: Sequence[str | Path] = (),
    name: str = "output",
    unmarked: Sequence[str] = (),
    is_main: bool = True,
) -> Iterator[Path]:
    """Give a new folder to build in; it takes the place of `output` when the block succeeds, and goes when it fails.

    A hidden file beside the folder lists what was built, so that later runs know what they may replace.

    Args:
        output: may exist if an earlier run built it.
        sources: see `check_replaceable`.
        name: see `check_replaceable`.
        unmarked: see `check_replaceable`.
        is_main: whether this rank writes; the others get the same path and touch nothing.

    Raises:
        BadInputError: `output` is not ours to replace.
    """
    output = Path(output)
    place = output.resolve()  # a symbolic link stays, and what it points to is replaced
    part, old = (place.with_name(f".{place.name}.{end}") for end in ("part", "old"))
    if not is_main:
        yield part
        return
    check_replaceable(output, sources=sources, name=name, unmarked=unmarked)
    with held(place.with_name(f".{place.name}.lock"), f"another program is writing {output}"):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            with naming_full_disk(output, kept="what stood there before is whole"):
                yield part
            check_replaceable(output, sources=sources, name=name, unmarked=unmarked)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        _put_in_place(part, place, old)


@contextlib.contextmanager
def work_folder(output: str | Path) -> Iterator[Path]:
    """Give an empty hidden folder beside `output`, gone after the block; what a killed program left there goes first.

    Raises:
        BadInputError: another program works on this output.
    """
    output = Path(output)
    folder = output.with_name(f".{output.name}.work")
    with held(output.with_name(f".{output.name}.lock"), f"another program is writing {output}"):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            with naming_full_disk(folder):
                folder.mkdir(parents=True)
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(part: Path, place: Path, old: Path) -> None:
    """Let a finished folder take its place, with a list of its files beside it."""
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    with atomic_writer(_marker(place)) as out:  # between the two, so that the list never speaks of another folder
        json.dump({"files": {key: _facts(path) for key, path in _files(part).items()}}, out, indent=1)
    part.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def check_replaceable(
    output: str | Path, *, sources: Sequence[str | Path] = (), name: str = "output", unmarked: Sequence[str] = ()
) -> None:
    """Refuse a folder that `replaced_folder` may not replace; a program calls this before expensive work.

    Only what was built there and nobody has touched since may go: a file that was added or changed is somebody's work.

    Args:
        output: the folder, which need not exist.
        sources: folders and files that the program reads or writes, which must stay.
        name: the setting, for messages.
        unmarked: patterns of the files that version 0.2 built there without marking the folder; the first one is the
            name of the file that was written last.

    Raises:
        BadInputError: naming the folder, what is in it, and the way out.
    """
    output = Path(output)
    where = output.resolve()
    for source in sources:
        if where == Path(source).resolve() or where in Path(source).resolve().parents:
            raise BadInputError(f"{name} {output} is {source}, or lies around it, and would replace it; give another")
    if not output.exists():
        return
    if not output.is_dir():
        raise BadInputError(f"{name} {output} is a file; give a folder")
    if where.is_mount():
        raise BadInputError(f"{name} {output} is a mount point, which cannot be replaced; give a folder in it")
    is_built = _rule(where, unmarked)
    foreign = next((key for key, path in _files(where).items() if not is_built(key, path)), None)
    if foreign is not None:
        raise BadInputError(
            f"{name} {output} holds other things than were built there ({foreign}); give an empty or a new folder, or "
            "move it away"
        )


def _rule(folder: Path, unmarked: Sequence[str]) -> Callable[[str, Path], bool]:
    """What tells files that were built in a folder from others: their list, or what version 0.2 left in its place."""
    marker = _marker(folder)
    if marker.is_file() and marker.stat().st_size:
        built = read_json(marker).get("files", {})
        # a file with a second hard link, as `link` makes them, is changed with its source and not lost with the folder
        return lambda key, path: key in built and (built[key] == _facts(path) or path.lstat().st_nlink > 1)
    last = marker if marker.is_file() else folder / unmarked[0] if unmarked else None
    if last is None or not last.is_file():
        return lambda key, path: False
    patterns = ("*",) if last == marker else unmarked
    until = last.stat().st_mtime_ns
    return lambda key, path: (
        (path.lstat().st_mtime_ns <= until or path.lstat().st_nlink > 1)
        and any(fnmatch.fnmatch(key, pattern) for pattern in patterns)
    )


def _files(folder: Path) -> dict[str, Path]:
    """Everything in a folder but folders, by its path in it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix(): path for path in paths}


def _facts(path: Path) -> list[int]:
    stat = path.lstat()
    return [stat.st_size, stat.st_mtime_ns]


def _marker(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.built")


def link(path: Path, folder: Path, name: str | None = None) -> Path:
    """Hard-link a file into a folder, or copy it to another file system; an older file there is replaced."""
    target = folder / (name or path.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(path.resolve(), target)
    except OSError:
        shutil.copyfile(path, target)
    return target


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a file.

    Raises:
        BadInputError: the file is unreadable or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{path} is not valid JSON ({error})") from error


def update_json(path: Path, values: dict[str, Any]) -> None:
    """Set keys of an object in a file, which is made if absent."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content.update(values)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sync_to_disk(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    with open(path, "rb") as written:
        os.fsync(written.fileno())


@contextlib.contextmanager
def naming_full_disk(path: str | Path, kept: str = "") -> Iterator[None]:
    """Turn a full disk, which every library reports otherwise, into one sentence.

    Args:
        path: what is written.
        kept: what is still whole, for the message.

    Raises:
        BadInputError: the disk, a quota or a limit on file sizes was in the way.
    """
    try:
        yield
    except BadInputError:
        raise
    except Exception as error:
        reason = full_disk(error)
        if reason is None:
            raise
        raise BadInputError(
            f"cannot write {path}: {reason}{kept and f'; {kept}'}; make room and give the same command again"
        ) from error


def remove_leftovers(folder: str | Path, name: str = "*") -> None:
    """Delete what killed programs left half-written in a folder, see `atomic_path`; what others write now stays.

    Args:
        folder: need not exist.
        name: of the file that was to be written; * for all.
    """
    for path in Path(folder).glob(f".{name}.part"):
        found = re.search(r"\.(?P<host>[^.]*)\.(?P<process>\d+)\.part$", path.name)
        with contextlib.suppress(OSError):  # another program was faster, or the folder is not ours
            if found and path.is_file() and _is_left_behind(path, found["host"], int(found["process"])):
                path.unlink()


def _is_left_behind(path: Path, host: str, process: int) -> bool:
    """Whether nobody writes a file any more: its process is gone, or an hour has passed on another machine."""
    if host != _HOST:
        return time.time() - path.stat().st_mtime > 3600
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # it lives, and is somebody else's
        pass
    return False


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a path beside `path`; the file written there takes the place of `path` when the block succeeds.

    It is flushed to the disk first, and removed when the block fails; what a killed program left goes with the next.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, f"{glob.escape(path.name)}.*")
    temporary = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}.part")
    try:
        with naming_full_disk(path):
            yield temporary
            sync_to_disk(temporary)
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_writer(path: str | Path) -> Iterator[IO[str]]:
    """Open a text file that appears under `path` only when the block succeeds, flushed to the disk.

    Half of a character outside the basic plane, which JSON can bring along, is written as JSON's own escape: it must
    not cost a run its output.
    """
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", errors="backslashreplace") as out:
        yield out


def write_parquet(table: "pyarrow.Table", path: Path) -> None:
    """Write a table so that the file appears whole or not at all, flushed to the disk."""
    import pyarrow.parquet

    with atomic_path(path) as temporary:
        pyarrow.parquet.write_table(table, temporary)
