"""Sources of pairs, read in blocks: by one process after the other, or by many at once.

A block is a run of rows that one process reads. Rows are numbered within their source, lines of a file from 1, so that
a row read once can be named and its pictures found without reading it again.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from internvl_mpo.errors import BadInputError, RowError
from internvl_mpo.mmpr.lines import Member, read_lines
from internvl_mpo.mmpr.manifest import MANIFEST
from internvl_mpo.mmpr.pairs import PairRow
from internvl_mpo.mmpr.parquet import REQUIRED, EmbeddedPictures, check_columns, to_pair
from internvl_mpo.mmpr.release import Subset, parse_line, read_subsets
from internvl_mpo.mmpr.row_groups import ParquetTable, open_table
from internvl_mpo.mmpr.tables import RowPictures, TablePictures, TableRows, columns_of, is_table

BLOCK_BYTES, BLOCK_ROWS = 8 << 20, 8192  # of a file of lines
TABLE_ROWS = 1 << 16  # of a row group


class Block(NamedTuple):
    """A run of rows.

    Attributes:
        first: number of its first row.
        num_rows: how many there are, blank lines included.
        num_bytes: how much of `PairSource.num_bytes` it is.
        lines: the rows as they stand; None where the source reads them by their numbers.
    """

    first: int
    num_rows: int
    num_bytes: int
    lines: list[bytes] | None = None


class PairSource(ABC):
    """One file or table of pairs."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """How much there is to read, for a progress bar."""

    @abstractmethod
    def settings(self) -> list[Any]:
        """Return what its rows depend on beside their own text, pictures inside archives included; JSON-able."""

    @abstractmethod
    def facts(self) -> list[Any]:
        """Return what differs when a row may differ, `settings` apart, without reading one; JSON-able."""

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Return the hash of the content of each of its files on the Hub, by name; files here have none."""

    @abstractmethod
    def blocks(self) -> Iterator[Block]:
        """Yield the source in blocks.

        Raises:
            BadInputError: it cannot be read.
        """

    @abstractmethod
    def rows(self, block: Block) -> Iterator[tuple[int, PairRow | RowError]]:
        """Yield (number, row) of a block; an unusable row is given as its error."""

    @abstractmethod
    def where(self, number: int) -> str:
        """Return what names a row in messages."""

    @abstractmethod
    def pictures(self, folder: str, number: int) -> Any:
        """Return what the image paths of a row are relative to; `folder` is `str(PairRow.image_root)`."""


class SubsetSource(PairSource):
    """A subset of a release, a JSONL file, or a table of another project."""

    def __init__(self, subset: Subset):
        self.subset = subset

    @property
    def num_bytes(self) -> int:
        text = self.subset.annotation
        if isinstance(text, TableRows):
            return sum(group.num_bytes for group in text.table.groups)
        return text.entry.size if isinstance(text, Member) else text.stat().st_size

    def settings(self) -> list[Any]:
        subset = self.subset
        version = None if isinstance(subset.root, Path) else subset.pictures.version
        return [subset.name, dict(subset.entry), str(subset.root), subset.max_tiles, subset.repeat_time, version]

    def facts(self) -> list[Any]:
        text = self.subset.annotation
        if isinstance(text, TableRows):
            return [str(text), text.version]
        return [str(text), *map(_file_facts, text.archive.parts if isinstance(text, Member) else [text])]

    def versions(self) -> dict[str, str]:
        text = self.subset.annotation
        return text.table.versions if isinstance(text, TableRows) else {}

    def blocks(self) -> Iterator[Block]:
        text = self.subset.annotation
        if isinstance(text, TableRows):
            yield from _blocks(text.table, first=1)
            return
        first, size, lines = 1, 0, []
        try:
            for _, length, line in read_lines(text):
                lines.append(line)
                size += length
                if size >= BLOCK_BYTES or len(lines) == BLOCK_ROWS:
                    yield Block(first, len(lines), size, lines)
                    first, size, lines = first + len(lines), 0, []
        except BadInputError:
            if lines:
                yield Block(first, len(lines), size, lines)  # what comes before the broken place
            raise
        if lines:
            yield Block(first, len(lines), size, lines)

    def rows(self, block: Block) -> Iterator[tuple[int, PairRow | RowError]]:
        lines = block.lines
        if lines is None:
            first = block.first - 1
            lines = (line for _, _, line in self.subset.annotation.lines(first, first + block.num_rows))
        for number, line in enumerate(lines, start=block.first):
            if not line.isspace():
                yield number, self._row(line, number)

    def _row(self, line: bytes, number: int) -> PairRow | RowError:
        subset, where = self.subset, self.where(number)
        try:
            pair = subset.pair(parse_line(line, where), where)
        except RowError as error:
            return error
        images = tuple(map(subset.pictures.below, pair.images))
        if images != pair.images:
            pair = replace(pair, images=images)
        return PairRow(pair, self.pictures("", number), subset.max_tiles, where, subset.name, subset.repeat_time)

    def where(self, number: int) -> str:
        return f"{self.subset.annotation}:{number}"

    def pictures(self, folder: str, number: int) -> Any:
        pictures = self.subset.pictures
        return RowPictures(pictures, number - 1) if isinstance(pictures, TablePictures) else self.subset.root


class ParquetSource(PairSource):
    """MMPR as Parquet, as convert_mmpr.py makes it, here or on the Hub; pictures stay where they are."""

    def __init__(self, data: str):
        """Find the files.

        Raises:
            BadInputError: there are none, or they have other columns.
        """
        self.table = open_table(data)
        check_columns(data, self.table.schema.names)

    @property
    def num_bytes(self) -> int:
        return sum(group.num_bytes for group in self.table.groups)

    def settings(self) -> list[Any]:
        return [str(self.table), self.table.facts]

    def versions(self) -> dict[str, str]:
        return self.table.versions

    def facts(self) -> list[Any]:
        return []

    def blocks(self) -> Iterator[Block]:
        return _blocks(self.table, first=0)

    def rows(self, block: Block) -> Iterator[tuple[int, PairRow | RowError]]:
        names = [name for name in self.table.schema.names if name not in ("images", "prompt")]
        for number, columns in self.table.rows(block.first, block.first + block.num_rows, names):
            yield number, self._row(columns, number)

    def _row(self, columns: dict[str, Any], number: int) -> PairRow | RowError:
        where = self.where(number)
        try:
            pair = to_pair(columns)
        except (RowError, ValueError, LookupError, TypeError) as error:
            return RowError(getattr(error, "reason", f"not a pair ({error})"), where)
        pictures = self.pictures(f"{self.table}/{columns['image_root']}", number)
        return PairRow(pair, pictures, columns["max_dynamic_patch"], where, columns["subset"], columns["repeat_time"])

    def where(self, number: int) -> str:
        return f"{self.table}, row {number}"

    def pictures(self, folder: str, number: int) -> Any:
        return EmbeddedPictures(self.table, number, folder)


def open_sources(data: str | Path, image_root: str | Path | None = None) -> list[PairSource]:
    """Return the sources that some data stands for, in their order; see `reading.iter_pairs`.

    Raises:
        BadInputError: a file is missing or unreadable.
    """
    if is_parquet(data):
        return [ParquetSource(str(data))]
    return [SubsetSource(subset) for subset in read_subsets(data, image_root)]


def is_parquet(data: str | Path) -> bool:
    """Return whether `data` names MMPR as Parquet, as convert_mmpr.py makes it: a folder or file of it, or `hub:..`."""
    if not is_table(data):
        return False
    columns = columns_of(data)
    return columns is None or set(REQUIRED) <= set(columns) or (Path(data) / MANIFEST).is_file()


def _blocks(table: ParquetTable, first: int) -> Iterator[Block]:
    """Yield the row groups of a table, large ones in pieces; `first` is the number of its first row."""
    for group in table.groups:
        for start in range(0, group.num_rows, TABLE_ROWS):
            count = min(TABLE_ROWS, group.num_rows - start)
            yield Block(first + group.first + start, count, group.num_bytes * count // group.num_rows)


def _file_facts(path: Path) -> list[Any]:
    """Return what tells a file that was changed: its place, size and time of change."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
