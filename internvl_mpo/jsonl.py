"""JSONL files, one JSON object per line: read, written whole, or grown row by row.

Half of a character outside the basic plane, which JSON can bring along, is written as JSON's own escape, so that every
file here is UTF-8.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from internvl_mpo.errors import BadInputError, RowError
from internvl_mpo.files import atomic_writer, naming_full_disk
from internvl_mpo.locks import lock_file

MAX_LINE = 64 << 20  # characters of a line; the longest of MMPR has some ten thousand


class _RepeatedKeyError(ValueError):
    """A key stands twice in one object, of which Python would silently take the last."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in row if names.count(name) > 1)
        raise _RepeatedKeyError(f"key '{twice[:80]}' stands there twice; keep one of them")
    return row


_decoder = json.JSONDecoder(object_pairs_hook=_unique)


def iter_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (`file:line`, object) of a JSONL file; blank lines are passed over.

    Raises:
        BadInputError: the file cannot be read.
        RowError: a line is not a JSON object, or has over `MAX_LINE` characters.
    """
    for where, _, row in iter_json_lines(path):
        yield where, row


def iter_json_lines(path: str | Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (`file:line`, the line as it stands, object); see `iter_jsonl`."""
    name = str(path)
    try:
        with open(path, encoding="utf-8-sig") as file:  # some programs put a byte-order mark in front
            lines = iter(lambda: file.readline(MAX_LINE + 1), "")
            for number, line in enumerate(lines, start=1):
                if not line.isspace():
                    where = f"{name}:{number}"
                    if len(line) > MAX_LINE:
                        raise RowError(f"the line has over {MAX_LINE:,} characters", where)
                    yield where, line, parse_object(line, where)
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInputError(f"{path} is not UTF-8 text (byte {error.start})") from error


def read_whole_lines(path: str | Path) -> list[dict[str, Any]]:
    """Return the rows of a file that may still grow: a last line without its end is passed over.

    Raises:
        BadInputError: the file cannot be read.
        RowError: a whole line is not a JSON object.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror}") from error
    lines = content.split(b"\n")[:-1]  # splitlines would also cut at U+2028 inside a text
    return [parse_object(line.decode("utf-8", "surrogatepass"), f"{path}:{i}") for i, line in enumerate(lines, start=1)]


def json_line(row: Mapping[str, Any]) -> str:
    """Return a row as it stands in a file, with its line end."""
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_jsonl(rows: Iterable[Mapping[str, Any]], path: str | Path) -> int:
    """Write rows and return their number; the file appears whole or not at all."""
    count = 0
    with atomic_writer(path) as out:
        for row in rows:
            out.write(json_line(row))
            count += 1
    return count


class AppendLog:
    """A JSONL file that grows by whole lines, each handed to the operating system before `append` returns.

    A last line without its end, left by a kill or a full disk, is cut off when the file is opened again, so its row is
    simply missing. While it is open no other process can open it.

    Args:
        path: the file; made if absent.
        output: what it belongs to, for the message.

    Raises:
        BadInputError: another run has it open.
    """

    def __init__(self, path: str | Path, output: str | Path | None = None):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")  # noqa: SIM115 - closed by `close`
        self._lock(output or path)
        self._cut_torn_line()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def append(self, row: Mapping[str, Any]) -> int:
        """Add a row and return its offset."""
        with naming_full_disk(self.path):
            offset = self._file.seek(0, os.SEEK_END)
            self._file.write(json_line(row).encode("utf-8", "backslashreplace"))
            self._file.flush()
        return offset

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (offset, row) of every row.

        Raises:
            RowError: a line is not a JSON object.
        """
        offset = self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            yield offset, parse_object(line.decode("utf-8", "surrogatepass"), f"{self.path}:{number}")
            offset += len(line)

    def read(self, offset: int) -> dict[str, Any]:
        """Return the row at an offset."""
        self._file.seek(offset)
        return json.loads(self._file.readline())

    def close(self) -> None:
        """Let other processes open it."""
        self._file.close()

    def _lock(self, output: str | Path) -> None:
        if lock_file(self._file.fileno()) is False:
            self._file.close()
            raise BadInputError(f"another run is writing {output}; wait for it or give another --output")

    def _cut_torn_line(self) -> None:
        end = self._file.seek(0, os.SEEK_END)
        while end:
            start = max(0, end - 2**16)
            self._file.seek(start)
            whole = self._file.read(end - start).rfind(b"\n") + 1
            if whole or not start:
                self._file.truncate(start + whole)
                return
            end = start


def parse_object(line: str, where: str) -> dict[str, Any]:
    """Return the JSON object in a line.

    Args:
        line: the text.
        where: `file:line` for messages.

    Raises:
        RowError: it is something else, or holds a key twice.
    """
    try:
        row = _loads(line)
    except json.JSONDecodeError as error:
        raise RowError(f"not valid JSON ({error.msg} at column {error.colno})", where) from error
    except _RepeatedKeyError as error:
        raise RowError(str(error), where) from error
    except RecursionError as error:
        raise RowError("not valid JSON (nested too deep)", where) from error
    except ValueError as error:  # Python's own limit
        raise RowError("not valid JSON (a number of over 4,300 digits)", where) from error
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object, found {type(row).__name__}", where)
    return row


def _loads(line: str) -> Any:
    """`json.loads` of a line, without its search for white space at both ends, which takes half as long again."""
    try:
        value, end = _decoder.scan_once(line, 0)
    except (StopIteration, json.JSONDecodeError):  # no value begins here, or it breaks off
        end = 0
    return value if end and end >= len(line) - line.endswith("\n") else _decoder.decode(line.rstrip())
