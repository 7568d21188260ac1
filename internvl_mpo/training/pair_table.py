"""The pairs of a data set on disk, mapped into memory: every rank and every worker looks at the same pages.

    table.json             parts in order, their sources, unusable rows, what all of it was made from; written last
    columns-5b0e...arrow   numbers of all pairs in one record batch: sizes, digests, keys, places
    3f0c...arrow           texts of the pairs of one block of a source, and the same numbers
    3f0c...json            its unusable rows, and size and time of change of its pictures; written after it

A part is named after a digest of the rows it was made from and of all settings that matter, so that an interrupted pass
goes on with the parts that are there, and an edited file costs only the parts that differ.
"""

import bisect
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow

from internvl_mpo.errors import BadInputError
from internvl_mpo.files import atomic_path, atomic_writer
from internvl_mpo.mmpr.pairs import PairRow
from internvl_mpo.mmpr.sources import PairSource
from internvl_mpo.pack_plan import PairSize
from internvl_mpo.records import PreferencePair, to_json_text

# Numbers of a pair beside its size, all of 64 bits but `kind`:
#     digest    `PairRow.digest`, the key of its reference log-probs
#     key       equal for pairs that share pictures, prompt and tiling
#     share     its question's place between 0 and 2 ** 56, by which questions are held out
#     id_hash   tells its id from others
#     number    of the row in its source
#     kind      index into `Kind`s
NUMBERS = {
    **{name: np.dtype(np.int64 if name.endswith("_key") else np.int32) for name in PairSize._fields},
    "num_tokens": np.dtype(np.int32),
    **dict.fromkeys(("digest", "key", "id_hash"), np.dtype(np.uint64)),
    **dict.fromkeys(("share", "number"), np.dtype(np.int64)),
    "kind": np.dtype(np.int32),
}
INDEX = "table.json"


class Kind(NamedTuple):
    """What many pairs of a source have in common.

    Attributes:
        source: number of the source.
        subset: see `PairRow`.
        repeat_time: see `PairRow`.
        max_tiles: see `PairRow`.
        folder: `str(PairRow.image_root)`.
    """

    source: int
    subset: str
    repeat_time: float
    max_tiles: int | None
    folder: str


class Unusable(NamedTuple):
    """A row that cannot be used: its source, its number there, and why."""

    source: int
    number: int
    reason: str


class PairTable:
    """The usable pairs of a data set; numbers are columns, a row is read when it is asked for.

    Attributes:
        kinds: what the column `kind` counts.
        unusable: rows that are not in it, in the order of the data.
        clashes: pairs whose id another pair has with other content, as {index: reason}.
        columns: the columns of `NUMBERS`, mapped. Shape of each: (N,)
    """

    def __init__(self, folder: Path, sources: Sequence[PairSource], index: Mapping[str, Any] | None = None):
        """Map the files.

        Args:
            folder: of the table.
            sources: those the table was made from, in the same order.
            index: what `table.json` holds; None reads it.
        """
        self.folder, self.sources = folder, sources
        index = index or read_index(folder)
        self.kinds = [Kind(*kind) for kind in index["kinds"]]
        self.unusable = [Unusable(*row) for row in index["unusable"]]
        self.clashes = {int(number): reason for number, reason in index["clashes"].items()}
        (batch,) = map_batches(folder / index["columns"])
        self.columns = {name: batch.column(name).to_numpy(zero_copy_only=True) for name in NUMBERS}
        self._parts = [name for _, _, name, count in index["parts"] if count]
        self._ends = np.cumsum([count for *_, count in index["parts"] if count]).tolist()

    def __reduce__(self) -> tuple:
        return PairTable, (self.folder, self.sources)

    def __len__(self) -> int:
        return len(self.columns["kind"])

    def row(self, index: int) -> PairRow:
        """Return a pair with its pictures at hand."""
        kind, number = self.kinds[self.columns["kind"][index]], int(self.columns["number"][index])
        source = self.sources[kind.source]
        pictures = source.pictures(kind.folder, number)
        pair = pair_of_text(self._text("pair", index))
        return PairRow(pair, pictures, kind.max_tiles, source.where(number), kind.subset, kind.repeat_time)

    def size(self, index: int) -> PairSize:
        """Return the size of a pair."""
        return PairSize(*(int(self.columns[name][index]) for name in PairSize._fields))

    def pair_id(self, index: int) -> str:
        """Return the id of a pair."""
        return self._text("id", index)

    def where(self, index: int) -> str:
        """Return what names a pair in messages."""
        return self.sources[self.kinds[self.columns["kind"][index]].source].where(int(self.columns["number"][index]))

    def _text(self, name: str, index: int) -> str:
        part = bisect.bisect_right(self._ends, index)
        start = self._ends[part - 1] if part else 0
        return self._batch(part).column(name)[index - start].as_py()

    def _batch(self, part: int) -> pyarrow.RecordBatch:
        return _part_batch(self.folder / f"{self._parts[part]}.arrow")


@functools.lru_cache(maxsize=4096)
def _part_batch(path: Path) -> pyarrow.RecordBatch:
    (batch,) = map_batches(path)
    return batch


def map_batches(path: Path) -> list[pyarrow.RecordBatch]:
    """Return the record batches of a file, mapped: they take no memory of this process.

    Raises:
        BadInputError: the file is missing or damaged.
    """
    try:
        with pyarrow.memory_map(str(path)) as file:
            reader = pyarrow.ipc.open_file(file)
            return [reader.get_batch(number) for number in range(reader.num_record_batches)]
    except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
        raise BadInputError(
            f"{path} cannot be read ({error}); delete the folder {path.parent}, its pairs are read again"
        ) from error


def write_batch(columns: Mapping[str, Any], path: Path) -> None:
    """Write columns as one record batch, so that each can be mapped as an array."""
    batch = pyarrow.record_batch(dict(columns))
    with (
        atomic_path(path) as temporary,
        pyarrow.OSFile(str(temporary), "wb") as file,
        pyarrow.ipc.new_file(file, batch.schema) as writer,
    ):
        writer.write_batch(batch)


def text_of_pair(pair: PreferencePair) -> bytes:
    """Return a pair as UTF-8 JSON that `pair_of_text` reads; what is not there is left out."""
    said = [f'"{key}": {to_json_text(value)}' for key, value in vars(pair).items() if value or value == ""]
    return f"{{{', '.join(said)}}}".encode("utf-8", "backslashreplace")


def pair_of_text(text: str) -> PreferencePair:
    """Return the pair of a text."""
    values = json.loads(text)
    history = tuple(tuple(turn) for turn in values.pop("history", ()))
    return PreferencePair(**{**values, "images": tuple(values.get("images", ())), "history": history})


def text_hash(text: str) -> int:
    """Return a number below 2 ** 64 that tells a text from others."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


class Part(NamedTuple):
    """A part of a table: its source, the number of its first row there, its name, how many pairs it holds."""

    source: int
    first: int
    name: str
    num_pairs: int


def write_index(folder: Path, parts: Sequence[Part], made_from: str, sources: Sequence[PairSource]) -> None:
    """Put parts together: write their numbers as one file, and `table.json`.

    Args:
        folder: of the table; holds the parts.
        parts: in the order of the data.
        made_from: digest of the sources and settings.
        sources: of the data.
    """
    name = f"columns-{made_from}.arrow"
    kinds, unusable = _write_columns(folder, parts, folder / name)
    index = {"made_from": made_from, "columns": name, "parts": parts, "kinds": kinds, "unusable": unusable}
    clashes = dict(same_id_twice(PairTable(folder, sources, {**index, "clashes": {}})))
    with atomic_writer(folder / INDEX) as out:
        json.dump({**index, "clashes": clashes}, out, ensure_ascii=False)


def _write_columns(folder: Path, parts: Sequence[Part], path: Path) -> tuple[list[Kind], list[Unusable]]:
    """Write the numbers of all parts as one batch and let go of them; return what they count and what is left out."""
    columns = {name: np.empty(sum(part.num_pairs for part in parts), dtype) for name, dtype in NUMBERS.items()}
    kinds: dict[Kind, int] = {}
    unusable: list[Unusable] = []
    start = 0
    for part in parts:
        facts = read_facts(folder, part.name)
        unusable += (Unusable(part.source, part.first + number, reason) for number, reason in facts["unusable"])
        if not part.num_pairs:
            continue
        (batch,) = map_batches(folder / f"{part.name}.arrow")
        place = slice(start, start := start + part.num_pairs)
        for name, column in columns.items():
            column[place] = batch.column(name).to_numpy(zero_copy_only=True)
        columns["number"][place] += part.first
        own = [kinds.setdefault(Kind(part.source, *kind), len(kinds)) for kind in facts["kinds"]]
        columns["kind"][place] = np.array(own, np.int32)[columns["kind"][place]]
    write_batch({name: pyarrow.array(column) for name, column in columns.items()}, path)
    return list(kinds), unusable


def read_index(folder: Path) -> dict[str, Any]:
    """Return what `table.json` holds, nothing where no pass was completed."""
    path = folder / INDEX
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def read_facts(folder: Path, name: str) -> dict[str, Any] | None:
    """Return what is known of a part beside pairs: `num_pairs`, `kinds`, `unusable`, `pictures`; None if absent."""
    try:
        return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def same_id_twice(table: PairTable) -> Iterator[tuple[int, str]]:
    """Yield the pairs whose id an earlier one has with other content; reference log-probs go by id."""
    hashes, digests = table.columns["id_hash"], table.columns["digest"]
    order = np.argsort(hashes, kind="stable")
    first = np.ones(len(order), bool)
    first[1:] = hashes[order[1:]] != hashes[order[:-1]]
    heads = order[np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))]
    folders = np.array([hash(kind.folder) for kind in table.kinds], np.int64)[table.columns["kind"]]
    differs = (digests[order] != digests[heads]) | (folders[order] != folders[heads])
    for index, head in sorted(zip(order[differs].tolist(), heads[differs].tolist(), strict=True)):
        pair_id = table.pair_id(index)
        if pair_id == table.pair_id(head):
            yield index, f"id '{pair_id}' is also that of {table.where(head)}, with other content"
