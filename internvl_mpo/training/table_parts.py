"""Parts of a table of pairs: one block of a source, read, looked at, and written. See `pair_table` and `preflight`."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
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


class Good(NamedTuple):
    """A usable row: its number in the block, the number of the first row of its question, its size."""

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
        rows = list(self.sources[source].rows(block))
        pictures = picture_facts(row for _, row in rows if isinstance(row, PairRow))
        good, unusable = self._look(rows, block.first)
        kinds: dict[tuple, int] = {}
        if good:
            write_batch(_columns(good, kinds), self.folder / f"{name}.arrow")
        facts = {"num_pairs": len(good), "kinds": list(kinds), "unusable": unusable, "pictures": pictures}
        with atomic_writer(self.folder / f"{name}.json") as out:
            json.dump(facts, out, ensure_ascii=False)
        return name, len(good)

    def _name(self, source: int, block: Block) -> str:
        """Name a part after the text of its rows and what else they depend on."""
        digest = hashlib.blake2b(self._settings[source].encode(), digest_size=12)
        if block.lines is None:
            digest.update(f" {block.first} {block.num_rows}".encode())
        for line in block.lines or ():
            digest.update(line)
        return digest.hexdigest()

    def _look(
        self, rows: Sequence[tuple[int, PairRow | RowError]], first: int
    ) -> tuple[list[Good], list[tuple[int, str]]]:
        """Return the usable rows, and (number, reason) of the others, numbers from 0."""
        questions: dict[tuple, int] = {}
        asked = [
            Asked(
                row.pair,
                row.image_root,
                row.max_tiles or self.max_tiles,
                questions.setdefault(question_of(row), number),
            )
            for number, row in rows
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
                good.append(Good(number - first, row, one.key, found))
            else:
                unusable.append((number - first, found))
        return good, unusable


def _columns(rows: Sequence[Good], kinds: dict[tuple, int]) -> dict[str, pyarrow.Array]:
    """Return texts and numbers of pairs, and add their kinds to `kinds`."""
    keys: dict[int, tuple[int, int]] = {}
    for one in rows:
        if one.question not in keys:
            key = one.row.key
            keys[one.question] = int(content_id(*key), 16), question_share(key[0])
    found = [(row.subset, row.repeat_time, row.max_tiles, str(row.image_root)) for _, row, *_ in rows]
    sizes = PairSize(*map(np.array, zip(*(one.size for one in rows), strict=True)))
    numbers = {
        **sizes._asdict(),
        "num_tokens": sizes.num_tokens,
        "digest": [int(one.row.digest, 16) for one in rows],
        "key": [keys[one.question][0] for one in rows],
        "share": [keys[one.question][1] for one in rows],
        "id_hash": [text_hash(one.row.pair.id) for one in rows],
        "number": [one.number for one in rows],
        "kind": [kinds.setdefault(kind, len(kinds)) for kind in found],
    }
    columns = {name: pyarrow.array(np.array(numbers[name], dtype)) for name, dtype in NUMBERS.items()}
    ids = [one.row.pair.id.encode("utf-8", "backslashreplace") for one in rows]
    texts = [text_of_pair(one.row.pair) for one in rows]
    return {**columns, "id": pyarrow.array(ids, pyarrow.string()), "pair": pyarrow.array(texts, pyarrow.string())}


def question_of(row: PairRow) -> tuple:
    """Return what `PairRow.key` is a digest of."""
    pair = row.pair
    return pair.images, pair.question, pair.system, pair.history, str(row.image_root), row.max_tiles


def question_share(group_key: str) -> int:
    """Return a number below 2 ** 56 that depends on the question only, so that its pairs stay on one side."""
    return int.from_bytes(hashlib.sha256(group_key.encode()).digest()[:7], "big")


def picture_facts(rows: Iterable[PairRow]) -> dict[str, str]:
    """Return size and time of change of the image files of some pairs; pictures in archives and tables have none."""
    roots: dict[Any, dict[str, None]] = {}
    for row in rows:
        if isinstance(row.image_root, (str, Path)):
            roots.setdefault(row.image_root, {}).update(dict.fromkeys(row.pair.images))
    return {path: _stat(path) for root, names in roots.items() for path in (os.path.join(root, name) for name in names)}


def pictures_changed(facts: Mapping[str, Any]) -> bool:
    """Return whether a picture of a part is another file than it was, see `read_facts`."""
    return any(_stat(path) != known for path, known in facts["pictures"].items())


def _stat(path: str) -> str:
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return "absent"
    return f"{stat.st_size}:{stat.st_mtime_ns}"
