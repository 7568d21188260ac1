"""Parts of a table of pairs: one block of a source, read, looked at, and written. See `pair_table` and `preflight`."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow

from internvl_mpo.files import atomic_writer
from internvl_mpo.measuring import Asked, PairMeter
from internvl_mpo.mmpr.pairs import PairRow
from internvl_mpo.mmpr.sources import Block, PairSource
from internvl_mpo.pack_plan import PairSize
from internvl_mpo.records import RowError, content_id
from internvl_mpo.training.pair_table import NUMBERS, read_facts, text_hash, text_of_pair, write_batch

TOGETHER = 256  # rows that go through all steps before the next are read, so that they stay in the cache


class Usable(NamedTuple):
    """A usable row: its number in the block, the pair, the number of its question, its size."""

    number: int
    row: PairRow
    question: int
    size: PairSize


class PartWriter:
    """Makes parts; one for each process."""

    def __init__(
        self,
        processor: Any,
        folder: Path,
        sources: Sequence[PairSource],
        *,
        max_tiles: int,
        max_length: int,
        decode: bool,
    ):
        """See `Preflight` for the arguments."""
        self.folder, self.sources, self.max_tiles = folder, sources, max_tiles
        self.meter = PairMeter(processor, max_length=max_length, decode=decode)
        self._settings = [content_id(source.settings()) for source in sources]

    def write(self, source: int, block: Block) -> tuple[str, int]:
        """Return the name of a block's part and the number of its pairs; one that is there already is not made again.

        Args:
            source: number of the source.
            block: of it.
        """
        name = self._name(source, block)
        known = read_facts(self.folder, name)
        if known is not None and not pictures_changed(known):
            return name, known["num_pairs"]
        pictures: dict[str, str] = {}
        columns = _Columns()
        unusable: list[tuple[int, str]] = []
        rows, questions = self.sources[source].rows(block), {}
        self.meter.forget()
        while some := list(islice(rows, TOGETHER)):
            for path in picture_paths(row for _, row in some if isinstance(row, PairRow)):
                pictures[path] = pictures.get(path) or _stat(path)  # before it is looked at, as it may change meanwhile
            good, bad = self._look(some, block.first, questions)
            if good:
                columns.add(good)
            unusable += bad
        num_pairs = len(columns.numbers["number"])
        if num_pairs:
            write_batch(columns.arrays(), self.folder / f"{name}.arrow")
        facts = {"num_pairs": num_pairs, "kinds": list(columns.kinds), "unusable": unusable, "pictures": pictures}
        with atomic_writer(self.folder / f"{name}.json") as out:
            json.dump(facts, out, ensure_ascii=False)
        return name, num_pairs

    def _name(self, source: int, block: Block) -> str:
        """Name a part after the text of its rows and what else they depend on."""
        digest = hashlib.blake2b(self._settings[source].encode(), digest_size=12)
        if block.lines is None:
            digest.update(f" {block.first} {block.num_rows}".encode())
        for line in block.lines or ():
            digest.update(line)
        return digest.hexdigest()

    def _look(
        self, rows: Sequence[tuple[int, PairRow | RowError]], first: int, questions: dict[tuple, int]
    ) -> tuple[list[Usable], list[tuple[int, str]]]:
        """Return the usable rows, and (number, reason) of the others, numbers from 0; add questions to `questions`."""
        asked = [
            Asked(
                row.pair,
                row.image_root,
                row.max_tiles or self.max_tiles,
                questions.setdefault(question_of(row), len(questions)),
            )
            for _, row in rows
            if isinstance(row, PairRow)
        ]
        measured = zip(asked, self.meter.measure(asked), strict=True)
        good, unusable = [], []
        for number, row in rows:
            if isinstance(row, RowError):
                unusable.append((number - first, row.reason))
                continue
            one, found = next(measured)
            if isinstance(found, PairSize):
                good.append(Usable(number - first, row, one.key, found))
            else:
                unusable.append((number - first, found))
        return good, unusable


class _Columns:
    """The growing columns of a part.

    Attributes:
        numbers: the columns of `NUMBERS`.
        kinds: what `kind` counts.
    """

    def __init__(self) -> None:
        self.numbers: dict[str, list[int]] = {name: [] for name in NUMBERS}
        self.kinds: dict[tuple, int] = {}
        self._keys: dict[int, tuple[int, int]] = {}
        self._texts: dict[str, list[bytes]] = {"id": [], "pair": []}

    def add(self, rows: Sequence[Usable]) -> None:
        """Add usable rows, at least one."""
        keys = [self._keys.get(one.question) or self._key(one) for one in rows]
        kinds = [(row.subset, row.repeat_time, row.max_tiles, str(row.image_root)) for _, row, *_ in rows]
        sizes = zip(PairSize._fields, zip(*(one.size for one in rows), strict=True), strict=True)
        numbers = {
            **dict(sizes),
            "num_tokens": [one.size.num_tokens for one in rows],
            "digest": [int(one.row.digest, 16) for one in rows],
            "key": [key for key, _ in keys],
            "share": [share for _, share in keys],
            "id_hash": [text_hash(one.row.pair.id) for one in rows],
            "number": [one.number for one in rows],
            "kind": [self.kinds.setdefault(kind, len(self.kinds)) for kind in kinds],
        }
        for name, values in numbers.items():
            self.numbers[name] += values
        self._texts["id"] += [one.row.pair.id.encode("utf-8", "backslashreplace") for one in rows]
        self._texts["pair"] += [text_of_pair(one.row.pair) for one in rows]

    def arrays(self) -> dict[str, pyarrow.Array]:
        """Return the columns."""
        numbers = {name: pyarrow.array(np.array(self.numbers[name], dtype)) for name, dtype in NUMBERS.items()}
        return numbers | {name: pyarrow.array(texts, pyarrow.string()) for name, texts in self._texts.items()}

    def _key(self, one: Usable) -> tuple[int, int]:
        """Return the columns `key` and `share` of a question that was not met before."""
        key = one.row.key
        found = self._keys[one.question] = int(content_id(*key), 16), question_share(key[0])
        return found


def question_of(row: PairRow) -> tuple:
    """Return what `PairRow.key` is a digest of."""
    pair = row.pair
    return pair.images, pair.question, pair.system, pair.history, str(row.image_root), row.max_tiles


def question_share(group_key: str) -> int:
    """Return a number below 2 ** 56 that depends on the question only, so that its pairs stay on one side."""
    return int.from_bytes(hashlib.sha256(group_key.encode()).digest()[:7], "big")


def picture_paths(rows: Iterable[PairRow]) -> dict[str, None]:
    """Return the image files of some pairs, in order; pictures in archives and tables have none."""
    roots: dict[Any, dict[str, None]] = {}
    for row in rows:
        if isinstance(row.image_root, (str, Path)):
            roots.setdefault(row.image_root, {}).update(dict.fromkeys(row.pair.images))
    return {os.path.join(root, name): None for root, names in roots.items() for name in names}


def pictures_changed(facts: Mapping[str, Any]) -> bool:
    """Return whether a picture of a part is another file than it was, see `read_facts`."""
    return any(_stat(path) != known for path, known in facts["pictures"].items())


def _stat(path: str) -> str:
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return "absent"
    return f"{stat.st_size}:{stat.st_mtime_ns}"
