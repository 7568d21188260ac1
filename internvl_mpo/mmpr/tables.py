"""Parquet of other projects, here or on the Hub: its rows as lines of JSON, its pictures by their content.

A picture inside a row is named after a hash of its file, so that rows about one picture share their prompt. A picture
that is only a path lies in the image root.
"""

import json
from collections.abc import Iterator
from functools import cached_property
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import Any

from internvl_mpo.errors import BadInputError, RowError
from internvl_mpo.mmpr.files import PictureFolder, ReleaseFiles
from internvl_mpo.mmpr.row_groups import HUB_PREFIX, ParquetTable, open_table


def is_table(data: str | Path) -> bool:
    """Return whether `data` names Parquet: a folder or file of it, or `hub:..`."""
    if str(data).startswith(HUB_PREFIX):
        return True
    path = Path(data)
    if path.suffix == ".parquet":
        return True
    return not (path / "meta.json").is_file() and next(path.rglob("*.parquet"), None) is not None


def columns_of(data: str | Path) -> list[str] | None:
    """Return the columns of a table, None where its first file cannot be read."""
    if str(data).startswith(HUB_PREFIX):
        return list(open_table(str(data)).schema.names)
    import pyarrow.parquet as pq

    path = Path(data)
    first = path if path.is_file() else min(path.rglob("*.parquet"), default=path)
    try:
        return pq.read_schema(first).names
    except (OSError, ValueError):  # the error comes with its reader
        return None


def stream_table(data: str) -> Any:
    """Return the split `train` as a `datasets` data set that gives rows as they are read.

    Args:
        data: folder, `.parquet` file, or `hub:OWNER/NAME[@REVISION][:CONFIG]`.

    Raises:
        BadInputError: nothing there that can be loaded.
    """
    import datasets

    name, revision, config = data, None, None
    if name.startswith(HUB_PREFIX):
        name, _, config = name.removeprefix(HUB_PREFIX).partition(":")
        name, _, revision = name.partition("@")
    try:
        shards = sorted(map(str, Path(name).glob("data/*/train-*.parquet")))
        if shards or name.endswith(".parquet"):
            return datasets.load_dataset("parquet", data_files=shards or name, split="train", streaming=True)
        return datasets.load_dataset(name, config or None, split="train", revision=revision or None, streaming=True)
    except Exception as error:  # the Hub client raises dozens of types
        raise BadInputError(f"cannot load {data}: {error}") from error


class TableRows:
    """The rows of a table as lines of JSON, pictures by name; `read_lines` takes it for an annotation file.

    Attributes:
        data: as in `stream_table`.
        places: name of a picture -> row, column and number in it; grows as rows are read.
    """

    def __init__(self, data: str):
        self.data = data
        self.places: dict[str, tuple[int, str, int]] = {}

    def __reduce__(self) -> tuple:
        return TableRows, (self.data,)

    def __str__(self) -> str:
        return self.data

    @property
    def table(self) -> ParquetTable:
        """The data set, opened once per process."""
        return open_table(self.data)

    @property
    def version(self) -> str:
        """Differs when the table differs."""
        return json.dumps(self.table.facts)

    @cached_property
    def picture_columns(self) -> list[str]:
        """Columns that hold files: structs with `bytes`, bytes alone, or lists of them."""
        import pyarrow as pa

        def holds_files(kind: Any) -> bool:
            if pa.types.is_list(kind) or pa.types.is_large_list(kind):
                return holds_files(kind.value_type)
            if pa.types.is_struct(kind):
                return any(part.name == "bytes" for part in kind)
            return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

        return [column.name for column in self.table.schema if holds_files(column.type)]

    def lines(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int, bytes]]:
        """Yield (number of the row, 1, row as JSON) from row `start` on."""
        stop = len(self.table) if stop is None else stop
        for number, row in self.table.rows(start, stop, self.table.schema.names):
            for column in self.picture_columns:
                row[column] = self._names(row[column], number, column)
            yield number, 1, json.dumps(row, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")

    def picture(self, name: str) -> bytes | None:
        """Return the file of a picture, None for a name that no row gave."""
        if name not in self.places:
            for _ in self.lines():
                pass
        if name not in self.places:
            return None
        row, column, number = self.places[name]
        return _content(_several(self.table.value(row, column))[number])

    def picture_of_row(self, name: str, number: int) -> bytes | None:
        """Return the file of a picture that row `number` shows, None for a name that the row does not give."""
        for column in self.picture_columns:
            for value in _several(self.table.value(number, column)):
                if _content(value) is not None and _name(value) == name:
                    return _content(value)
        return None

    def _names(self, value: Any, row: int, column: str) -> Any:
        if isinstance(value, list):
            return [self._name(one, row, column, number) for number, one in enumerate(value)]
        return self._name(value, row, column, 0)

    def _name(self, value: Any, row: int, column: str, number: int) -> str | None:
        name = _name(value)
        if _content(value) is not None:
            self.places.setdefault(name, (row, column, number))
        return name


def _name(value: Any) -> str | None:
    """The name of a picture: a hash of its file, or its path where it is only that."""
    content = _content(value)
    path = value.get("path") if isinstance(value, dict) else None
    if content is None:
        return path
    return blake2b(content, digest_size=12).hexdigest() + PurePosixPath(path or "").suffix


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _content(value: Any) -> bytes | None:
    return value.get("bytes") if isinstance(value, dict) else value


class TablePictures(PictureFolder):
    """The pictures of a table: inside its rows, or files in the image root."""

    def __init__(self, rows: TableRows, image_root: str):
        super().__init__(ReleaseFiles(image_root), ".")
        self.rows, self.image_root = rows, image_root

    def __reduce__(self) -> tuple:
        return TablePictures, (self.rows, self.image_root)

    def __str__(self) -> str:
        return self.rows.data

    @property
    def path(self) -> None:
        """None: the pictures are in no folder."""
        return None

    @property
    def version(self) -> str:
        """Differs when the table differs."""
        return self.rows.version

    def size(self, name: str) -> int:
        """Return the bytes of a picture, 0 where it cannot be read."""
        try:
            return len(self.read(name))
        except RowError:
            return 0

    def read(self, name: str) -> bytes:
        """Return a picture's file.

        Raises:
            RowError: it is nowhere.
        """
        content = self.rows.picture(name)
        return PictureFolder(self.files, ".").read(name) if content is None else content


class RowPictures:
    """The pictures of one row of a table; reading one touches nothing but the row group it is in."""

    def __init__(self, pictures: TablePictures, number: int):
        """Remember where they are; rows are numbered from 0."""
        self.pictures, self.number = pictures, number

    def __str__(self) -> str:
        return str(self.pictures)

    @property
    def version(self) -> str:
        """Differs when the table differs."""
        return self.pictures.version

    def read(self, name: str) -> bytes:
        """Return a picture's file.

        Raises:
            RowError: it is nowhere.
        """
        content = self.pictures.rows.picture_of_row(name, self.number)
        return PictureFolder(self.pictures.files, ".").read(name) if content is None else content
