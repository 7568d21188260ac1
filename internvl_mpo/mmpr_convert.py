"""A raw MMPR release -> Parquet shards with the pictures' own bytes inside.

Two passes over the annotations, both in parallel and both in constant memory. The first gives every line its place:
which shard it goes to and whether its id was seen before. The second writes the shards, each by itself: a shard's bytes
depend on the release and the settings alone, a finished shard is never written again, and a killed run goes on.
"""

import base64
import hashlib
import json
import multiprocessing
import os
import shutil
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Any

import numpy as np

from internvl_mpo.errors import BadInputError
from internvl_mpo.mmpr import Subset, parse_line, read_subsets
from internvl_mpo.mmpr_files import Member, check_picture, read_lines, relative
from internvl_mpo.mmpr_parquet import arrow_schema, to_columns
from internvl_mpo.mmpr_statistics import Statistics
from internvl_mpo.records import PreferencePair, RowError, atomic_writer

MEGABYTE = 1 << 20
INDEX_BYTES = 32 * MEGABYTE  # of annotations per task of the first pass
ROW_GROUP_BYTES = 64 * MEGABYTE  # of Arrow data; the Hub's viewer refuses row groups of about 300 MB
BATCH_ROWS = 500  # rows that are Python objects at a time
CACHE_BYTES = 64 * MEGABYTE  # of pictures, per process: pairs of one question lie together
TINY_ROWS = 200  # of the `tiny` configuration, spread over all subsets
MAX_TOKENIZED = 20_000  # pairs whose tokens are counted
# What `datasets` writes, so that an edited release uploads only what changed.
CHUNKING = {"min_chunk_size": 256 * 1024, "max_chunk_size": 1024 * 1024, "norm_level": 0}
MANIFEST = "manifest.json"


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


@dataclass
class Result:
    """What became of a release.

    Attributes:
        num_rows: converted pairs.
        num_rejects: lines that were not converted; they are all in the rejects file.
        shards: entries of the manifest.
        statistics: of the converted pairs.
        problems: what archives could not offer.
    """

    num_rows: int = 0
    num_rejects: int = 0
    shards: list[dict[str, Any]] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)
    problems: list[str] = field(default_factory=list)


def convert(options: Options, output: Path, *, workers: int = 1, rejects: Path | None = None) -> Result:
    """Convert a release; the same call goes on after a kill and does nothing where all is done.

    Args:
        options: what to convert and how.
        output: folder for `data/SOURCE/train-*.parquet`, `tiny/` and manifest.json.
        workers: processes.
        rejects: JSONL file for the lines that could not be converted; None is `OUTPUT.rejects.jsonl`.

    Raises:
        BadInputError: no release there, or the output belongs to another one.
    """
    rejects = rejects or output.with_name(f"{output.name}.rejects.jsonl")
    work = output.with_name(f"{output.name}.work")
    subsets = options.subsets()
    fingerprint = _fingerprint(options, subsets)
    finished = _finished(output, fingerprint)
    if finished is not None:
        return finished
    _token_counter(options.tokenizer)  # refused before any work
    work.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    shards = _load_plan(work, fingerprint, output)
    if shards is None:
        shards = plan(options, subsets, workers)
        _save_plan(work, fingerprint, shards)
    waiting = [shard for shard in shards if not _is_done(work, output, shard)]
    write = partial(write_shard, options=options, output=str(output), work=str(work))
    for _ in _progress(_map(write, waiting, workers), total=len(shards), done=len(shards) - len(waiting)):
        pass
    result = _collect(work, output, shards, rejects)
    _write_tiny(work, output, len(subsets), result)
    meta = {subset.name: _published(subset.entry) for subset in subsets}
    manifest = {
        "version": 1,
        "num_rows": result.num_rows,
        "num_rejects": result.num_rejects,
        "shards": result.shards,
        "meta": meta,
        "statistics": result.statistics.to_json(),
        "fingerprint": fingerprint,
    }
    with atomic_writer(output / MANIFEST) as out:
        json.dump(manifest, out, ensure_ascii=False, indent=1)
        out.write("\n")
    shutil.rmtree(work)
    return result


def _published(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of meta.json without paths of the cluster it was written on."""
    paths = {key: relative(entry[key]) for key in ("root", "annotation") if key in entry}
    return {**entry, **paths}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return manifest.json of a converted folder.

    Raises:
        BadInputError: it is not there or not whole.
    """
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInputError(f"{folder} holds no {MANIFEST}, so convert_mmpr.py has not finished it") from error
    except ValueError as error:
        raise BadInputError(f"{folder / MANIFEST} is not valid JSON ({error}); convert again") from error


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
        size = None if isinstance(subset.annotation, Member) else subset.annotation.stat().st_size
        cuts = [0] if size is None else list(range(0, max(1, size), INDEX_BYTES))
        tasks += [(number, cut, None if size is None else min(cut + INDEX_BYTES, size)) for cut in cuts]
    parts = _progress(
        _map(partial(index_part, options=options), tasks, workers), total=len(tasks), unit="part", text="indexing"
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
    subset = _subsets(options)[number]
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


def line_start(text: Path | Member, position: int) -> int:
    """The begin of the first line at or after a byte."""
    if position == 0 or isinstance(text, Member):
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
                new = [key for key in shown.get(row, ()) if key not in seen]
                more = part.costs[row] + sum(part.pictures[key] for key in new)
                if cost and cost + more > shard_bytes:
                    if part.offsets[row] > start:
                        shards[-1].append(_piece(member, start, part.offsets[row], first, line, marks, tiny))
                        tiny = 0
                    shards.append([])
                    start, first, cost, seen = part.offsets[row], line, 0, set()
                    new = shown.get(row, [])
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


# --- second pass: the shards ------------------------------------------------------------------------------------------


def write_shard(shard: Shard, options: Options, output: str, work: str) -> str:
    """Write one shard, its rejects and its counts; the last file written says that it is done."""
    import pyarrow.parquet as pq

    subsets = _subsets(options)
    path, folder = Path(output) / shard.path, Path(work)
    mark = _mark(folder, shard)
    part, rejects = mark.with_suffix(".parquet"), mark.with_suffix(".rejects.jsonl")
    mark.parent.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    statistics, num_rejects = Statistics(), 0
    pictures = Pictures(options.decode, statistics)
    count_tokens = _token_counter(options.tokenizer)
    schema = arrow_schema()
    with open(rejects, "w", encoding="utf-8") as rejected, ShardWriter(part, schema) as writer:
        for piece in shard.pieces:
            subset = subsets[piece.subset]
            tiny: list[dict[str, Any]] = []
            for where, line, error_or_row in _rows(subset, piece):
                try:
                    if isinstance(error_or_row, RowError):
                        raise error_or_row
                    row, pair = error_or_row
                    files = [pictures.read(subset, name) for name in pair.images]
                    columns = to_columns(row, pair, subset, files)
                except RowError as error:
                    _reject(rejected, where, error, line)
                    num_rejects += 1
                    continue
                sampled = (
                    count_tokens is not None and int(pair.id[:8].encode().hex()[:8], 16) % 997 < 997 * shard.sample
                )
                statistics.add(pair, subset.name, count_tokens if sampled else None)
                writer.add(columns)
                if len(tiny) < piece.num_tiny:
                    tiny.append(columns)
            if tiny:
                pq.write_table(writer.table(tiny), folder / f"tiny-{piece.subset:05d}.parquet")
    if writer.num_rows:
        _sync(part)
        entry = {"path": shard.path, "source": shard.source, "num_rows": writer.num_rows, **file_facts(part)}
        os.replace(part, path)
    else:
        part.unlink()
        entry = None
    done = {"shard": entry, "num_rejects": num_rejects, "statistics": statistics.to_json()}
    done["problems"] = sorted({problem for subset in subsets for problem in _problems(subset)})
    with atomic_writer(mark) as out:
        json.dump(done, out)
    return shard.path


class ShardWriter:
    """Writes rows to a Parquet file in row groups of about `ROW_GROUP_BYTES`."""

    def __init__(self, path: Path, schema: Any):
        """Open the file."""
        import pyarrow.parquet as pq

        self.schema, self.num_rows = schema, 0
        self._rows: list[dict[str, Any]] = []
        self._batches: list[Any] = []
        self._bytes = 0
        text = [leaf for leaf in _leaves(schema) if leaf != _PICTURE_BYTES]
        self._writer = pq.ParquetWriter(
            path,
            schema,
            compression={**dict.fromkeys(text, "zstd"), _PICTURE_BYTES: "none"},
            use_dictionary=True,
            dictionary_pagesize_limit=2 * ROW_GROUP_BYTES,  # all pictures of a row group, each once
            use_content_defined_chunking=CHUNKING,
            write_page_index=True,
        )
        self._writer.add_key_value_metadata({"content_defined_chunking": json.dumps(CHUNKING)})

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            self._batch()
            self._group()
        self._writer.close()

    def add(self, columns: dict[str, Any]) -> None:
        """Add one row."""
        self._rows.append(columns)
        self._bytes += sum(len(picture["bytes"]) for picture in columns["images"])
        if len(self._rows) >= BATCH_ROWS or self._bytes >= ROW_GROUP_BYTES:
            self._batch()
        if self._bytes >= ROW_GROUP_BYTES:
            self._group()

    def table(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """Return rows as an Arrow table."""
        import pyarrow as pa

        arrays = [pa.array([row[field.name] for row in rows], type=field.type) for field in self.schema]
        return pa.Table.from_arrays(arrays, schema=self.schema)

    def _batch(self) -> None:
        if self._rows:
            self._batches.append(self.table(self._rows))
            self.num_rows += len(self._rows)
            self._rows = []
            self._bytes = sum(batch.nbytes for batch in self._batches)

    def _group(self) -> None:
        import pyarrow as pa

        if self._batches:
            table = pa.concat_tables(self._batches)
            self._writer.write_table(table, row_group_size=table.num_rows)
        self._batches, self._bytes = [], 0


_PICTURE_BYTES = "images.list.element.bytes"


def _leaves(schema: Any) -> list[str]:
    import pyarrow as pa

    def below(path: str, kind: Any) -> Iterator[str]:
        if pa.types.is_struct(kind):
            for part in kind:
                yield from below(f"{path}.{part.name}", part.type)
        elif pa.types.is_list(kind):
            yield from below(f"{path}.list.element", kind.value_type)
        else:
            yield path

    return [leaf for entry in schema for leaf in below(entry.name, entry.type)]


class Pictures:
    """Reads and checks pictures, and keeps the last ones: pairs of one question lie together."""

    def __init__(self, decode: bool, statistics: Statistics):
        """Start empty; distinct pictures are counted into `statistics`."""
        self.decode, self.statistics = decode, statistics
        self._kept: OrderedDict[tuple[str, str], bytes | RowError] = OrderedDict()
        self._bytes = 0
        self._counted: set[int] = set()

    def read(self, subset: Subset, name: str) -> bytes:
        """Return a picture's file.

        Raises:
            RowError: it cannot be read or is no picture.
        """
        key = (str(subset.root), name)
        found = self._kept.get(key)
        if found is None:
            found = self._load(subset, name, key)
            self._kept[key] = found
            self._bytes += len(found) if isinstance(found, bytes) else 0
            while self._bytes > CACHE_BYTES and len(self._kept) > 1:
                dropped = self._kept.popitem(last=False)[1]
                self._bytes -= len(dropped) if isinstance(dropped, bytes) else 0
        else:
            self._kept.move_to_end(key)
        if isinstance(found, RowError):
            raise RowError(found.reason)
        return found

    def _load(self, subset: Subset, name: str, key: tuple[str, str]) -> bytes | RowError:
        try:
            content = subset.pictures.read(name)
            width, height, format = check_picture(content, name, decode=self.decode)
        except RowError as error:
            return error
        number = hash(key)
        if number not in self._counted:
            self._counted.add(number)
            self.statistics.add_image(width, height, format, len(content))
        return content


def _rows(
    subset: Subset, piece: Piece
) -> Iterator[tuple[str, bytes, tuple[dict[str, Any], PreferencePair] | RowError]]:
    for number, (_, _, line) in enumerate(read_lines(subset.annotation, piece.start, piece.stop), start=piece.number):
        if line.isspace():
            continue
        where = f"{subset.annotation}:{number}"
        try:
            row = parse_line(line, where)
            pair = subset.pair(row, where)
            if str(number) in piece.repeated:
                raise RowError(f"id {pair.id} was used before, at {piece.repeated[str(number)]}")
        except RowError as error:
            yield where, line, error
        else:
            yield where, line, (row, pair)


def _reject(out: IO[str], where: str, error: RowError, line: bytes) -> None:
    """Keep the line itself: what was not converted is not lost."""
    entry = {"row": where, "reason": error.reason}
    try:
        entry["line"] = line.decode().rstrip("\n")
    except UnicodeDecodeError:
        entry["line_base64"] = base64.b64encode(line).decode()
    out.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _problems(subset: Subset) -> list[str]:
    archive = [subset.annotation.archive] if isinstance(subset.annotation, Member) else []
    return [*subset.pictures.files.problems, *(problem for one in archive for problem in one.problems)]


@lru_cache(maxsize=1)
def _token_counter(tokenizer: str | None) -> Callable[[str], int] | None:
    if tokenizer is None:
        return None
    from transformers import PreTrainedTokenizerFast  # not AutoTokenizer: no code of a model folder is run

    try:
        loaded = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    except Exception as error:  # the Hub client raises dozens of types
        raise BadInputError(
            f"no tokenizer.json in {tokenizer} ({error}); `python -m internvl_mpo.publish model` makes one"
        ) from error
    return lambda text: len(loaded(text, add_special_tokens=False)["input_ids"])


# --- files ------------------------------------------------------------------------------------------------------------


def safe_name(source: str) -> str:
    """Return the folder and configuration name of a source."""
    plain = "".join(letter if letter.isalnum() or letter in "_.+-" else "_" for letter in source)
    return plain.lstrip(".") or "unnamed"


def file_facts(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file."""
    with open(path, "rb") as file:
        return {"num_bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _fingerprint(options: Options, subsets: Sequence[Subset]) -> str:
    """Hash of the settings, meta.json and annotations: what decides the bytes, pictures apart."""
    facts: list[Any] = [{key: value for key, value in asdict(options).items() if key not in ("raw", "image_root")}]
    for subset in subsets:
        text = subset.annotation
        content = text.entry.crc if isinstance(text, Member) else file_facts(text)["sha256"]
        facts.append([subset.name, dict(subset.entry), content])
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _finished(output: Path, fingerprint: str) -> Result | None:
    """What a finished run of the same conversion left, or None."""
    if not (output / MANIFEST).is_file():
        return None
    manifest = read_manifest(output)
    if manifest.get("fingerprint") != fingerprint:
        raise BadInputError(f"{output} was made from another release or with other settings; give another --output")
    for shard in manifest["shards"]:
        path = output / shard["path"]
        if not path.is_file() or path.stat().st_size != shard["num_bytes"]:
            return None
    statistics = Statistics.from_json(manifest["statistics"])
    return Result(manifest["num_rows"], manifest["num_rejects"], manifest["shards"], statistics)


def _save_plan(work: Path, fingerprint: str, shards: Sequence[Shard]) -> None:
    with atomic_writer(work / "plan.json") as out:
        json.dump({"fingerprint": fingerprint, "shards": [asdict(shard) for shard in shards]}, out)


def _load_plan(work: Path, fingerprint: str, output: Path) -> list[Shard] | None:
    path = work / "plan.json"
    if not path.is_file():
        return None
    saved = json.loads(path.read_text(encoding="utf-8"))
    if saved["fingerprint"] != fingerprint:
        raise BadInputError(
            f"{work} holds a half-finished conversion of another release or with other settings; "
            f"finish that, or delete {work} and {output}"
        )
    return [Shard(**{**shard, "pieces": [Piece(**piece) for piece in shard["pieces"]]}) for shard in saved["shards"]]


def _mark(work: Path, shard: Shard) -> Path:
    return work / "done" / shard.path.replace("/", "__").replace(".parquet", ".json")


def _is_done(work: Path, output: Path, shard: Shard) -> bool:
    mark = _mark(work, shard)
    if not mark.is_file():
        return False
    entry = json.loads(mark.read_text(encoding="utf-8"))["shard"]
    path = output / shard.path
    return entry is None or (path.is_file() and path.stat().st_size == entry["num_bytes"])


def _collect(work: Path, output: Path, shards: Sequence[Shard], rejects: Path) -> Result:
    result = Result()
    problems: set[str] = set()
    with atomic_writer(rejects) as out:
        for shard in shards:
            mark = _mark(work, shard)
            done = json.loads(mark.read_text(encoding="utf-8"))
            if done["shard"] is not None:
                result.shards.append(done["shard"])
                result.num_rows += done["shard"]["num_rows"]
            result.num_rejects += done["num_rejects"]
            result.statistics.merge(Statistics.from_json(done["statistics"]))
            problems.update(done["problems"])
            with open(mark.with_suffix(".rejects.jsonl"), encoding="utf-8") as lines:
                shutil.copyfileobj(lines, out)
    if not result.num_rejects:
        rejects.unlink()
    result.problems = sorted(problems)
    return result


def _write_tiny(work: Path, output: Path, num_subsets: int, result: Result) -> None:
    """Join the first rows of every subset to the file of the configuration `tiny`."""
    import pyarrow.parquet as pq

    paths = [path for number in range(num_subsets) if (path := work / f"tiny-{number:05d}.parquet").is_file()]
    if not paths:
        return
    target = output / "tiny" / "train-00000-of-00001.parquet"
    target.parent.mkdir(exist_ok=True)
    part = work / "tiny.parquet"
    with ShardWriter(part, arrow_schema()) as writer:
        for path in paths:
            for row in pq.read_table(path).to_pylist():
                writer.add(row)
    _sync(part)
    result.shards.append(
        {"path": str(target.relative_to(output)), "source": "tiny", "num_rows": writer.num_rows, **file_facts(part)}
    )
    os.replace(part, target)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


_OPENED: dict[Options, list[Subset]] = {}


def _subsets(options: Options) -> list[Subset]:
    """The subsets, read once per process."""
    if options not in _OPENED:
        _OPENED.clear()
        _OPENED[options] = options.subsets()
    return _OPENED[options]


def _map(work: Callable, tasks: Sequence, workers: int) -> Iterator:
    if workers <= 1 or len(tasks) <= 1:
        yield from map(work, tasks)
        return
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(work, tasks)


def _progress(items: Iterator, *, total: int, done: int = 0, unit: str = "shard", text: str = "converting") -> Iterator:
    from tqdm import tqdm

    return tqdm(items, total=total, initial=done, unit=unit, desc=text, disable=total == 0)
