"""Writes one Parquet shard, pictures inside, or says why a row cannot go in."""

import base64
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from internvl_mpo.errors import BadInputError, RowError
from internvl_mpo.files import atomic_writer, sync_to_disk
from internvl_mpo.jsonl import json_line
from internvl_mpo.mmpr.files import check_picture
from internvl_mpo.mmpr.lines import Member, read_lines
from internvl_mpo.mmpr.manifest import file_facts
from internvl_mpo.mmpr.parquet import arrow_schema, to_columns
from internvl_mpo.mmpr.release import Subset, parse_line
from internvl_mpo.mmpr.shard_plan import MEGABYTE, Options, Piece, Shard, subsets_of
from internvl_mpo.mmpr.statistics import ReleaseStatistics
from internvl_mpo.records import PreferencePair

ROW_GROUP_BYTES = 64 * MEGABYTE  # of Arrow data; the Hub's viewer refuses row groups of about 300 MB


BATCH_ROWS = 500  # rows that are Python objects at a time


CACHE_BYTES = 64 * MEGABYTE  # of pictures, per process: pairs of one question lie together


# What `datasets` writes, so that an edited release uploads only what changed.
CHUNKING = {"min_chunk_size": 256 * 1024, "max_chunk_size": 1024 * 1024, "norm_level": 0}


# --- second pass: the shards ------------------------------------------------------------------------------------------


def write_shard(shard: Shard, options: Options, output: str, work: str) -> str:
    """Write one shard, its rejects and its counts; the last file written says that it is done."""
    import pyarrow.parquet as pq

    subsets = subsets_of(options)
    path, folder = Path(output) / shard.path, Path(work)
    mark = done_mark(folder, shard)
    part, rejects = mark.with_suffix(".parquet"), mark.with_suffix(".rejects.jsonl")
    mark.parent.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    statistics, num_rejects = ReleaseStatistics(), 0
    pictures = ShardPictures(options.decode, statistics)
    count_tokens = token_counter(options.tokenizer)
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
        sync_to_disk(part)
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
        self._writer = pq.ParquetWriter(
            path,
            schema,
            compression={**dict.fromkeys(_leaves(schema), "zstd"), _PICTURE_BYTES: "none"},
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
            self._writer.write_table(pa.concat_tables(self._batches))
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


class ShardPictures:
    """Reads and checks pictures, and keeps the last ones: pairs of one question lie together."""

    def __init__(self, decode: bool, statistics: ReleaseStatistics):
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
    out.write(json_line(entry))


def _problems(subset: Subset) -> list[str]:
    archive = [subset.annotation.archive] if isinstance(subset.annotation, Member) else []
    return [*subset.pictures.files.problems, *(problem for one in archive for problem in one.problems)]


@lru_cache(maxsize=1)
def token_counter(tokenizer: str | None) -> Callable[[str], int] | None:
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


def done_mark(work: Path, shard: Shard) -> Path:
    return work / "done" / shard.path.replace("/", "__").replace(".parquet", ".json")
