"""Which rows go into which Parquet shard, from an index of the raw lines."""

import hashlib
import multiprocessing
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from internvl_mpo.errors import BadInputError, RowError
from internvl_mpo.mmpr.lines import Annotation, cuts, read_lines
from internvl_mpo.mmpr.manifest import safe_name
from internvl_mpo.mmpr.release import Subset, parse_line, read_subsets

MEGABYTE = 1 << 20


INDEX_BYTES = 32 * MEGABYTE  # of annotations per task of the first pass


TINY_ROWS = 200  # of the `tiny` configuration, spread over all subsets


MAX_TOKENIZED = 20_000  # pairs whose tokens are counted


@dataclass(frozen=True)
class Options:
    """What decides the bytes of the shards.

    Attributes:
        raw: folder of the release, its meta.json, or a JSONL file.
        image_root: another folder to look for images and archives in.
        shard_bytes: size of a shard, before compression.
        decode: decode every picture once, which finds files that were cut off.
        tokenizer: folder or Hub id of a tokenizer to count tokens with, over a sample.
    """

    raw: str
    image_root: str | None = None
    shard_bytes: int = 500 * MEGABYTE
    decode: bool = True
    tokenizer: str | None = None

    def subsets(self) -> list[Subset]:
        """Return the subsets of the release."""
        return read_subsets(self.raw, self.image_root)


@dataclass(frozen=True)
class Piece:
    """Neighbouring lines of one annotation file.

    Attributes:
        subset: index of the subset.
        start, stop: byte offsets.
        number: line number of the first line.
        repeated: line number -> `file:line` of the row with the same id that came first.
        num_tiny: rows from here that go into the `tiny` configuration too.
    """

    subset: int
    start: int
    stop: int
    number: int
    repeated: dict[str, str] = field(default_factory=dict)
    num_tiny: int = 0


@dataclass(frozen=True)
class Shard:
    """One Parquet file: its path below the output folder, and its rows; `sample` is the share to count tokens of."""

    path: str
    source: str
    pieces: list[Piece]
    sample: float = 0.0


# --- first pass: the plan ---------------------------------------------------------------------------------------------


@dataclass
class Index:
    """Lines of a part of one annotation file, in order.

    Attributes:
        start, stop: bytes covered.
        offsets: byte offset of every line, blank ones too.
        ids: hash of the pair's id, 0 for a line that is none.
        costs: bytes of text.
        pictures: bytes of each picture of the part, by its number.
        shown: (line, picture) numbers, flat.
    """

    start: int
    stop: int
    offsets: array
    ids: array
    costs: array
    pictures: dict[int, int]
    shown: array


def plan(options: Options, subsets: Sequence[Subset], workers: int) -> list[Shard]:
    """Return the shards of a release, in order of its sources."""
    tasks = []
    for number, subset in enumerate(subsets):
        tasks += [(number, start, stop) for start, stop in cuts(subset.annotation, INDEX_BYTES)]
    parts = progress_bar(
        map_in_processes(partial(index_part, options=options), tasks, workers),
        total=len(tasks),
        unit="part",
        text="indexing",
    )
    by_subset: dict[int, list[Index]] = {number: [] for number in range(len(subsets))}
    for (number, _, _), part in zip(tasks, parts, strict=True):
        by_subset[number].append(part)
    repeated = _repeated(subsets, by_subset)
    num_rows = sum(len(part.ids) for parts in by_subset.values() for part in parts)
    sample = min(1.0, MAX_TOKENIZED / max(1, num_rows)) if options.tokenizer else 0.0
    sources: dict[str, list[int]] = {}
    for number, subset in enumerate(subsets):
        sources.setdefault(subset.source, []).append(number)
    shards = []
    for source, members in sources.items():
        groups = _cut(members, by_subset, repeated, options.shard_bytes, max(1, TINY_ROWS // len(subsets)))
        folder = safe_name(source)
        for index, pieces in enumerate(groups):
            shards.append(
                Shard(f"data/{folder}/train-{index:05d}-of-{len(groups):05d}.parquet", source, pieces, sample)
            )
    paths = [shard.path for shard in shards]
    if len(set(paths)) < len(paths):
        raise BadInputError("two sources have the same folder name; rename a subset in meta.json")
    return shards


def index_part(task: tuple[int, int, int | None], options: Options) -> Index:
    """Read the lines that begin in a range of bytes of a subset's annotation file."""
    number, start, stop = task
    subset = subsets_of(options)[number]
    begin = line_start(subset.annotation, start)
    part = Index(begin, begin, array("Q"), array("Q"), array("I"), {}, array("Q"))
    keys: dict[str, int] = {}
    for offset, length, line in read_lines(subset.annotation, begin, stop):
        part.stop = offset + length
        identity, cost = 0, 0
        try:
            pair = subset.pair(parse_line(line, ""), "")
        except RowError:
            pass
        else:
            identity = (
                int.from_bytes(hashlib.blake2b(pair.id.encode("utf-8", "replace"), digest_size=8).digest(), "big") or 1
            )
            cost = len(line)
            for name in pair.images:
                if name not in keys:
                    keys[name] = len(keys)
                    part.pictures[keys[name]] = subset.pictures.size(name)
                part.shown.extend((len(part.offsets), keys[name]))
        part.offsets.append(offset)
        part.ids.append(identity)
        part.costs.append(cost)
    return part


def line_start(text: Annotation, position: int) -> int:
    """The begin of the first line at or after a byte."""
    if position == 0:
        return position
    for offset, length, _ in read_lines(text, position - 1):
        return offset + length
    return position


def _repeated(subsets: Sequence[Subset], by_subset: Mapping[int, list[Index]]) -> dict[int, dict[int, str]]:
    """Return subset -> line number -> `file:line` of the first row with the same id."""
    parts = [(number, part) for number, found in by_subset.items() for part in found]
    ids = np.concatenate([np.frombuffer(part.ids, dtype=np.uint64) for _, part in parts] or [np.zeros(0, np.uint64)])
    order = np.argsort(ids, kind="stable")
    same = np.flatnonzero((ids[order][1:] == ids[order][:-1]) & (ids[order][1:] != 0)) + 1
    starts = np.cumsum([0, *(len(part.ids) for _, part in parts)])
    first_line: dict[int, int] = {}
    lines_before: list[int] = []
    for number, part in parts:
        lines_before.append(first_line.get(number, 0))
        first_line[number] = lines_before[-1] + len(part.ids)

    def place(row: int) -> tuple[int, int]:
        part = int(np.searchsorted(starts, row, side="right")) - 1
        return parts[part][0], lines_before[part] + row - int(starts[part]) + 1

    found: dict[int, dict[int, str]] = {}
    first = None
    for position in same:
        if ids[order[position]] != (ids[order[first]] if first is not None else None):
            first = position - 1
        subset, line = place(int(order[first]))
        again, number = place(int(order[position]))
        found.setdefault(again, {})[number] = f"{subsets[subset].annotation}:{line}"
    return found


def _cut(
    members: Sequence[int],
    by_subset: Mapping[int, list[Index]],
    repeated: Mapping[int, dict[int, str]],
    shard_bytes: int,
    num_tiny: int,
) -> list[list[Piece]]:
    """Cut the lines of a source into shards of about equal size; a picture counts once per shard."""
    shards: list[list[Piece]] = [[]]
    cost = 0
    for member in members:
        marks = repeated.get(member, {})
        line, tiny = 1, num_tiny
        for part in by_subset[member]:
            shown: dict[int, list[int]] = {}
            for position in range(0, len(part.shown), 2):
                shown.setdefault(part.shown[position], []).append(part.shown[position + 1])
            seen: set[int] = set()
            start, first = part.start, line
            for row in range(len(part.offsets)):
                new = [key for key in dict.fromkeys(shown.get(row, ())) if key not in seen]
                more = part.costs[row] + sum(part.pictures[key] for key in new)
                if cost and cost + more > shard_bytes:
                    if part.offsets[row] > start:
                        shards[-1].append(_piece(member, start, part.offsets[row], first, line, marks, tiny))
                        tiny = 0
                    shards.append([])
                    start, first, cost, seen = part.offsets[row], line, 0, set()
                    new = list(dict.fromkeys(shown.get(row, ())))  # a row may show one twice
                    more = part.costs[row] + sum(part.pictures[key] for key in new)
                cost += more
                seen.update(new)
                line += 1
            if part.stop > start:
                shards[-1].append(_piece(member, start, part.stop, first, line, marks, tiny))
                tiny = 0
    return [shard for shard in shards if shard]


def _piece(subset: int, start: int, stop: int, number: int, end: int, marks: Mapping[int, str], num_tiny: int) -> Piece:
    repeated = {str(line): where for line, where in marks.items() if number <= line < end}
    return Piece(subset, start, stop, number, repeated, num_tiny)


OPENED: dict[Options, list[Subset]] = {}


def subsets_of(options: Options) -> list[Subset]:
    """The subsets, read once per process."""
    if options not in OPENED:
        OPENED.clear()
        OPENED[options] = options.subsets()
    return OPENED[options]


def map_in_processes(work: Callable, tasks: Sequence, workers: int) -> Iterator:
    if workers <= 1 or len(tasks) <= 1:
        yield from map(work, tasks)
        return
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(work, tasks)


def progress_bar(
    items: Iterator, *, total: int, done: int = 0, unit: str = "shard", text: str = "converting"
) -> Iterator:
    from tqdm import tqdm

    return tqdm(items, total=total, initial=done, unit=unit, desc=text, disable=total == 0)
