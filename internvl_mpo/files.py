"""Folders and small files: read, change, and replace a whole folder at once."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet

from internvl_mpo.errors import BadInputError


@contextlib.contextmanager
def replaced_folder(output: str | Path, *, sources: Sequence[str | Path]) -> Iterator[Path]:
    """Give a new folder to build in; it takes the place of `output` when the block succeeds.

    A hidden file beside the folder tells later runs that the folder was built here and may be replaced.

    Args:
        output: may exist if an earlier run built it.
        sources: folders that are read, which must not be touched.

    Raises:
        BadInputError: `output` holds, or lies around, something that is not ours to replace.
    """
    output = Path(output)
    where = output.resolve()
    for source in sources:
        if where == Path(source).resolve() or where in Path(source).resolve().parents:
            raise BadInputError(f"output is the source folder {source}, or lies around it; give another folder")
    marker = output.with_name(f".{output.name}.built")
    if output.exists() and not output.is_dir():
        raise BadInputError(f"output {output} is a file; give a folder")
    if output.exists() and any(output.iterdir()) and not marker.exists():
        raise BadInputError(f"output {output} holds other things; give an empty or a new folder")
    part = output.with_name(f".{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    yield part
    marker.touch()
    shutil.rmtree(output, ignore_errors=True)
    part.rename(output)


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
    except ValueError as error:
        raise BadInputError(f"{path} is not valid JSON ({error})") from error


def update_json(path: Path, values: dict[str, Any]) -> None:
    """Set keys of an object in a file, which is made if absent."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content.update(values)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def whole_folder(target: Path, is_main: bool) -> Iterator[Path]:
    """Give a temporary folder that takes the place of `target` when the block succeeds; only rank 0 touches disk."""
    temporary = target.with_name(f".{target.name}.part")
    if is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    yield temporary
    if is_main:
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        print(f"the trained {target.name} is in {target}")


def sync_to_disk(path: Path) -> None:
    """Wait until a file's content is on the disk."""
    with open(path, "rb") as written:
        os.fsync(written.fileno())


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a path beside `path`; the file written there takes the place of `path` when the block succeeds.

    It is flushed to the disk first, and removed when the block fails.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
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


def write_parquet(table: pyarrow.Table, path: Path) -> None:
    """Write a table so that the file appears whole or not at all, flushed to the disk."""
    with atomic_path(path) as temporary:
        pyarrow.parquet.write_table(table, temporary)
