"""Text files of rows, on disk or inside an archive, read line by line: JSONL, JSON arrays, tables."""

import codecs
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from internvl_mpo.errors import BadInputError
from internvl_mpo.mmpr.archives import Archive, Entry

MAX_LINE_BYTES = 64 << 20
_STEP = 1 << 20
_OPENING, _BETWEEN = re.compile(r"[ \t\r\n]*\[?[ \t\r\n]*"), re.compile(r"[ \t\r\n,]*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Member:
    """A text file inside an archive."""

    archive: Archive
    entry: Entry

    def __str__(self) -> str:
        return f"{self.archive.parts[0]}/{self.entry.name}"


class Rows(Protocol):
    """Rows that are no lines of a file; see `tables`."""

    def lines(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int, bytes]]:
        """Yield rows as `read_lines` does."""


Annotation = Path | Member | Rows


def read_lines(text: Annotation, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int, bytes]]:
    """Yield (byte offset, number of bytes, line) of a JSONL file from byte `start`, the begin of a line, to `stop`.

    The items of a JSON array (a `.json` file that begins with a bracket) and the rows of a table come as lines as well.
    Lines over `MAX_LINE_BYTES` are cut to one byte more than that; their rest is passed over.

    Raises:
        BadInputError: the file cannot be read.
    """
    if not isinstance(text, (Path, Member)):
        yield from text.lines(start, stop)
        return
    try:
        with _open(text, start) as file:
            yield from _items(file, text, start, stop) if is_array(text) else _lines(file, start, stop)
    except OSError as error:
        raise BadInputError(f"cannot read {text}: {error.strerror}") from error


def _lines(file: Any, start: int, stop: int | None) -> Iterator[tuple[int, int, bytes]]:
    offset = start
    while stop is None or offset < stop:
        line = file.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        length, rest = len(line), line
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES)
            length += len(rest)
        yield offset, length, line
        offset += length


def _items(file: Any, text: Path | Member, start: int, stop: int | None) -> Iterator[tuple[int, int, bytes]]:
    """Yield the items of a JSON array; a part from `start` on begins at an item."""
    decoder, is_over = codecs.getincrementaldecoder("utf-8")(), False
    head = file.read(len(codecs.BOM_UTF8)) if start == 0 else b""
    waiting, at, offset = ("", 0, len(head)) if head == codecs.BOM_UTF8 else (decoder.decode(head), 0, start)
    between = _OPENING if start == 0 else _BETWEEN
    while True:
        skipped = between.match(waiting, at).end()
        at, offset = skipped, offset + skipped - at
        if skipped < len(waiting):
            between = _BETWEEN
        if (stop is not None and offset >= stop) or waiting[at : at + 1] == "]" or (is_over and at == len(waiting)):
            return
        end = _item_end(waiting, at)
        if end is None and not is_over and len(waiting) - at <= MAX_LINE_BYTES:
            piece = file.read(max(_STEP, len(waiting) - at))
            is_over = not piece
            try:
                waiting, at = waiting[at:] + decoder.decode(piece, is_over), 0
            except UnicodeDecodeError as error:
                raise BadInputError(f"{text} is not UTF-8 text (near byte {offset:,})") from error
            continue
        item = waiting[at : at + MAX_LINE_BYTES + 1 if end is None else end].encode()
        yield offset, len(item), item
        if end is None:
            raise BadInputError(
                f"{text}: the item at byte {offset:,} is broken or too long, so its rest cannot be read"
            )
        at, offset = end, offset + len(item)


def _item_end(text: str, at: int) -> int | None:
    """Return where the value at a place of a text ends, None where it is cut off or broken."""
    try:
        end = _DECODER.raw_decode(text, at)[1] if at < len(text) else None
    except (ValueError, RecursionError):
        return None
    return None if end == len(text) and text[-1] not in '}]"' else end


def is_array(text: Path | Member) -> bool:
    """Return whether a `.json` file holds an array, by its first character."""
    if not (text.name if isinstance(text, Path) else text.entry.name).endswith(".json"):
        return False
    with _open(text, 0) as file:
        return file.read(1 << 16).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def cuts(text: Annotation, step: int) -> list[tuple[int, int | None]]:
    """Return byte ranges (begin, end) of about `step` bytes that a file can be read in; None is its end."""
    if not isinstance(text, Path) or is_array(text):
        return [(0, None)]
    size = text.stat().st_size
    return [(cut, min(cut + step, size)) for cut in range(0, max(1, size), step)]


def _open(text: Path | Member, start: int) -> Any:
    if isinstance(text, Path):
        file = open(text, "rb", buffering=1 << 20)  # noqa: SIM115 (the caller closes it)
        file.seek(start)
        return file
    return io.BufferedReader(_Unpacked(text.archive.stream(text.entry), start), 1 << 20)


class _Unpacked(io.RawIOBase):
    """A stream of pieces as a file, its first `skip` bytes left out."""

    def __init__(self, pieces: Iterator[bytes], skip: int):
        self.pieces, self.skip, self.rest = pieces, skip, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self.rest:
            piece = next(self.pieces, None)
            if piece is None:
                return 0
            self.rest = memoryview(piece)[min(self.skip, len(piece)) :]
            self.skip -= min(self.skip, len(piece))
        count = min(len(buffer), len(self.rest))
        buffer[:count] = self.rest[:count]
        self.rest = self.rest[count:]
        return count
