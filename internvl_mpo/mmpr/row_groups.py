"""Parquet read by row groups, here or on the Hub: one group at a time, no copy of the data on the disk.

A group keeps pictures as the file does, each once however many rows show it. A row of a data set on the Hub costs the
reading of its group over the network, unless it is among those that were read last.
"""

import bisect
import os
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from internvl_mpo.errors import BadInputError

HUB_PREFIX = "hub:"
KEPT_GROUPS = 2  # row groups with pictures that a process keeps; each has some ten MB


class Group(NamedTuple):
    """A row group.

    Attributes:
        shard: number of the file.
        group: its number in the file.
        first: number of its first row in the table.
        num_rows: rows in it.
        num_bytes: of all its columns, unpacked.
    """

    shard: int
    group: int
    first: int
    num_rows: int
    num_bytes: int


class ParquetTable:
    """The rows of some Parquet files, one after the other, numbered from 0.

    Attributes:
        data: folder, `.parquet` file, or `hub:OWNER/NAME[@REVISION][:CONFIG]`.
        shards: paths of the files, or addresses on the Hub that name a commit.
    """

    def __init__(self, data: str):
        """Find the files; their footers are read when the first row is asked for.

        Raises:
            BadInputError: there are none.
        """
        self.data = data
        self.shards = _hub_shards(data) if data.startswith(HUB_PREFIX) else _local_shards(Path(data))

    def __reduce__(self) -> tuple:
        return open_table, (self.data,)

    def __str__(self) -> str:
        return self.data

    def __len__(self) -> int:
        return sum(group.num_rows for group in self.groups)

    @property
    def facts(self) -> list[Any]:
        """What differs when a file differs; JSON-able."""
        if self.versions:
            return sorted(self.versions.items())
        stats = [(path, Path(path).stat()) for path in self.shards]
        return [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]

    @cached_property
    def versions(self) -> dict[str, str]:
        """Hash of the content of each shard on the Hub by its name there; empty for data that was never there."""
        if not self.data.startswith(HUB_PREFIX):
            return {}
        name = self.data.removeprefix(HUB_PREFIX).partition(":")[0].partition("@")[0]
        return {f"{HUB_PREFIX}{name}/{place}": version for place, version in map(_place_and_version, self.shards)}

    @cached_property
    def schema(self) -> Any:
        """Arrow schema of the first file."""
        return self._file(0).metadata.schema.to_arrow_schema()

    @cached_property
    def groups(self) -> list[Group]:
        """All row groups.

        Raises:
            BadInputError: a file cannot be read, or has other columns than the first.
        """
        found, first = [], 0
        for shard in range(len(self.shards)):
            file = self._file(shard)
            if file.metadata.schema.to_arrow_schema().names != self.schema.names:
                raise BadInputError(f"{self.shards[shard]} has other columns than {self.shards[0]}; give one of them")
            for number in range(file.num_row_groups):
                group = file.metadata.row_group(number)
                found.append(Group(shard, number, first, group.num_rows, group.total_byte_size))
                first += group.num_rows
        return found

    @cached_property
    def _firsts(self) -> list[int]:
        return [group.first for group in self.groups]

    def read(self, group: Group, columns: Sequence[str] | None = None) -> Any:
        """Return a row group as an Arrow table.

        Raises:
            BadInputError: it cannot be read.
        """
        try:
            return self._file(group.shard).read_row_group(group.group, columns=columns, use_threads=False)
        except _errors(self.shards[group.shard]) as error:
            if isinstance(error, BadInputError):
                raise
            raise BadInputError(
                f"{self.shards[group.shard]}: row group {group.group} cannot be read ({error})"
            ) from error

    def rows(self, start: int, stop: int, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (number, columns) of some rows."""
        for group in self.groups:
            begin, end = max(start, group.first), min(stop, group.first + group.num_rows)
            if begin < end:
                table = self.read(group, columns)
                for at in range(begin, end, 64):
                    part = table.slice(at - group.first, min(64, end - at))
                    yield from enumerate(part.to_pylist(), start=at)

    def value(self, number: int, column: str) -> Any:
        """Return one value; the row groups that were read last are kept."""
        group = self.groups[bisect.bisect_right(self._firsts, number) - 1]
        return _kept(self, group, column)[column][number - group.first].as_py()

    def _file(self, shard: int) -> Any:
        path = self.shards[shard]
        try:
            return _file(path, None if "://" in path else Path(path).stat().st_mtime_ns, os.getpid())
        except _errors(path) as error:
            raise BadInputError(f"{path} cannot be read as Parquet: {error}") from error


@lru_cache(maxsize=8)
def open_table(data: str) -> ParquetTable:
    """Return the table that some data names, opened once per process."""
    return ParquetTable(data)


@lru_cache(maxsize=KEPT_GROUPS)
def _kept(table: ParquetTable, group: Group, column: str) -> Any:
    return table.read(group, [column])


@lru_cache(maxsize=64)
def _file(path: str, time_of_change: int | None, process: int) -> Any:
    """Return a file that this process has opened; pictures in it come as its dictionaries have them, each once."""
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(_open(path))
    columns = [metadata.schema.column(number) for number in range(len(metadata.schema))]
    pictures = [column.path for column in columns if column.path.endswith(".bytes")]
    return pq.ParquetFile(_open(path), metadata=metadata, memory_map=True, read_dictionary=pictures)


def _errors(path: str) -> type[Exception] | tuple[type[Exception], ...]:
    """What reading a file raises; the Hub client has dozens of types of its own."""
    return Exception if "://" in path else (OSError, ValueError)


def _open(path: str) -> Any:
    if "://" not in path:
        return path
    import fsspec

    return fsspec.open(path, "rb", block_size=8 << 20).open()


def _local_shards(path: Path) -> list[str]:
    shards = (
        [path] if path.is_file() else sorted(path.glob("data/*/train-*.parquet")) or sorted(path.rglob("*.parquet"))
    )
    if not shards:
        raise BadInputError(f"cannot load {path}: there is no Parquet file")
    return list(map(str, shards))


def _hub_shards(data: str) -> list[str]:
    """The files of the split `train`, each at the commit that the revision names now."""
    import datasets
    from huggingface_hub import constants, snapshot_download

    name, _, config = data.removeprefix(HUB_PREFIX).partition(":")
    name, _, revision = name.partition("@")
    try:
        if constants.HF_HUB_OFFLINE:  # what `hf download` has left in the cache
            name = snapshot_download(name, repo_type="dataset", revision=revision or None, local_files_only=True)
            revision = ""
        builder = datasets.load_dataset_builder(name, config or None, revision=revision or None)
        files = (builder.config.data_files or {}).get("train", [])
    except Exception as error:  # the Hub client raises dozens of types
        raise BadInputError(f"cannot load {data}: {error}") from error
    shards = [str(file) for file in files if str(file).endswith(".parquet")]
    if not shards or len(shards) < len(files):
        raise BadInputError(
            f"cannot load {data}: its split train is not Parquet; download it, or give @refs/convert/parquet, the "
            "Parquet that the Hub makes of it"
        )
    return shards


def _place_and_version(shard: str) -> tuple[str, str]:
    """The path of a shard in its repository, and the hash that its Hub or the Hub's cache here knows it by."""
    if "://" not in shard:  # .../snapshots/COMMIT/PLACE, a link to .../blobs/HASH
        return shard.partition("/snapshots/")[2].partition("/")[2] or shard, Path(shard).resolve().name
    import fsspec

    files, path = fsspec.core.url_to_fs(shard)
    info = files.info(path)
    place = shard.rpartition("@")[2].partition("/")[2]
    return place, (info.get("lfs") or {}).get("sha256") or info.get("blob_id") or shard
