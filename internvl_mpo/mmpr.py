"""MMPR on disk: meta.json, annotation files and image folders, ours or an official release.

    meta.json   {"geo170k_pairs_vqa_correctness_rules": {"root": "images/geo170k", "annotation": "annotations/x.jsonl",
                 "repeat_time": 0.5, "length": 9000, "max_dynamic_patch": 12, "data_augment": false}, ...}
    x.jsonl     {"image": "1.png", "question": "...", "chosen": "...", "rejected": "...", "answer_gt": "12"}

Official releases are read as they are published: absolute cluster paths, annotations.zip, images in zip parts.

`repeat_time` is how often a subset is seen in one epoch. The fraction is honoured exactly, also above 1: 2.5 means
every row twice and a seeded half of the rows a third time.
"""

import json
import math
import os
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from internvl_mpo.errors import BadInputError
from internvl_mpo.mmpr_files import MAX_LINE_BYTES, Member, PictureFolder, ReleaseFiles, read_lines
from internvl_mpo.records import PreferencePair, RowError, content_id

Resample = Literal["none", "sqrt"]

# Name suffixes of the official subsets and the rule they stand for.
_RULE_OF_SUFFIX = (
    (re.compile(r"_pairs_vqa_correctness_rules$"), "correctness"),
    (re.compile(r"_pairs_vqa_format_rules$"), "format"),
    (re.compile(r"_pairs_vqa_direct_rules$"), "direct"),
    (re.compile(r"_prefix_pair_sr[\d.]+_wo_image$"), "dropout_ntp"),
    (re.compile(r"_prefix_pair_sr[\d.]+_with_image$"), "prefix_with_image"),
)


@dataclass(frozen=True)
class Subset:
    """One entry of meta.json, with its files found.

    Attributes:
        name: key in meta.json.
        pictures: folder that image paths are relative to: on disk, or in the archives of the release.
        annotation: JSONL file of preference rows, on disk or in an archive.
        repeat_time: how often its rows are seen per epoch, >= 0.
        max_tiles: cap on the tiles per image, or None for that of the run.
        entry: the entry as it stands in meta.json; empty for a JSONL file without one.
    """

    name: str
    pictures: PictureFolder
    annotation: Path | Member
    repeat_time: float = 1.0
    max_tiles: int | None = None
    entry: Mapping[str, Any] = field(default_factory=dict)

    @property
    def root(self) -> Path | PictureFolder:
        """The folder on disk where there is one."""
        return self.pictures.path or self.pictures

    @property
    def source(self) -> str:
        """The data set its questions come from."""
        return split_subset_name(self.name)[0]

    def pair(self, row: Mapping[str, Any], where: str) -> PreferencePair:
        """Return the pair of a row of the annotation file.

        A row without an id gets one from its content, with the name of the image folder in it: two folders may both
        hold a `1.png`.

        Raises:
            RowError: see `PreferencePair.from_json`.
        """
        source, rule = split_subset_name(self.name)
        added = {} if row.get("rule") else {"rule": rule}
        if not row.get("id") and self.entry:
            keys = ("image", "question", "answer_gt", "chosen", "rejected")
            folder = PurePosixPath(str(self.entry["root"])).name
            added["id"] = content_id(folder, [row.get(key) for key in keys])
        return PreferencePair.from_json({**row, **added}, source=source, where=where)


@dataclass(frozen=True)
class PairRow:
    """A preference pair as a trainer needs it.

    Attributes:
        pair: the row.
        image_root: what its image paths are relative to: a folder, or an object with `read(name) -> bytes`.
        max_tiles: cap on the tiles per image, or None for that of the run.
        where: `file:line`, for messages.
        subset: name of the subset it belongs to.
        repeat_time: that of the subset.
    """

    pair: PreferencePair
    image_root: Path | Any
    max_tiles: int | None
    where: str
    subset: str
    repeat_time: float = 1.0

    @property
    def key(self) -> tuple[str, str, int | None]:
        """Rows with the same key share pictures, prompt and tiling."""
        return self.pair.group_key, str(self.image_root), self.max_tiles

    @property
    def digest(self) -> str:
        """A digest of what the log-probs depend on: it goes with the data to another place, so no bytes of pictures.

        Two folders may both hold a `1.png`. Of the folder only the name counts, since all above it changes when the
        data moves; folders of one name are told apart by the ids, which no two pairs of a run share.
        """
        pair, folder = self.pair, os.path.basename(os.path.abspath(str(self.image_root)))
        return content_id(pair.id, folder, pair.images, pair.question, pair.chosen, pair.rejected, self.max_tiles)


def split_subset_name(name: str) -> tuple[str, str]:
    """Return (source, rule) of a subset name; a name without a known suffix has rule "other"."""
    for suffix, rule in _RULE_OF_SUFFIX:
        match = suffix.search(name)
        if match:
            return name[: match.start()], rule
    return name, "other"


def read_meta(path: str | Path, image_root: str | Path | None = None) -> list[Subset]:
    """Return the subsets of a meta.json, in its order.

    Args:
        path: the file. Relative paths in it are relative to its folder; what is not there is looked for as
            `mmpr_files` describes.
        image_root: another folder to look for images and archives in.

    Raises:
        BadInputError: the file is unreadable, or an entry lacks a key, has a wrong type, or names a missing annotation.
    """
    path = Path(path)
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise BadInputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(meta, dict) or not meta:
        raise BadInputError(f"{path} must be an object of subsets, each with 'root', 'annotation' and 'repeat_time'")
    files = ReleaseFiles(*([image_root] if image_root else []), path.parent)
    return [_subset(path, name, entry, files) for name, entry in meta.items()]


def _subset(path: Path, name: str, entry: object, files: ReleaseFiles) -> Subset:
    where = f"{path}, subset '{name}'"
    if not isinstance(entry, dict):
        raise BadInputError(f"{where}: expected an object, found {type(entry).__name__}")
    for key, kind in (("root", str), ("annotation", str), ("repeat_time", (int, float))):
        if key not in entry:
            raise BadInputError(f"{where}: key '{key}' is missing")
        if not isinstance(entry[key], kind) or isinstance(entry[key], bool):
            raise BadInputError(f"{where}: key '{key}' has the wrong type, {type(entry[key]).__name__}")
    if not 0 <= entry["repeat_time"] < float("inf"):
        raise BadInputError(f"{where}: repeat_time is {entry['repeat_time']}, expected 0 or more")
    max_tiles = entry.get("max_dynamic_patch")
    if max_tiles is not None and (not isinstance(max_tiles, int) or max_tiles < 1):
        raise BadInputError(f"{where}: max_dynamic_patch is {max_tiles!r}, expected a whole number of 1 or more")
    annotation = files.text(entry["annotation"])
    if annotation is None:
        raise BadInputError(
            f"{where}: annotation file {path.parent / entry['annotation']} does not exist, nor does it lie elsewhere "
            f"below {path.parent} or in a zip archive there"
        )
    return Subset(name, files.pictures(entry["root"]), annotation, float(entry["repeat_time"]), max_tiles, entry)


def read_subsets(data: str | Path, image_root: str | Path | None = None) -> list[Subset]:
    """Return the subsets of a release's folder, of its meta.json, or of one JSONL file (one subset named after it).

    Raises:
        BadInputError: see `read_meta`; a folder holds no meta.json.
    """
    data = Path(data)
    if data.is_dir():
        found = [path for path in (data / "meta.json", *sorted(data.glob("*/meta.json"))) if path.is_file()]
        if not found:
            raise BadInputError(f"{data} holds no meta.json, so it is no MMPR release")
        data = found[0]
    if data.suffix == ".json":
        return read_meta(data, image_root)
    if not data.is_file():
        raise BadInputError(f"data file '{data}' does not exist")
    return [Subset(data.stem, ReleaseFiles(image_root or data.parent).pictures("."), data)]


def parse_line(line: bytes, where: str) -> dict[str, Any]:
    """Return the object of a JSONL line.

    Raises:
        RowError: it is no JSON object, or no text at all.
    """
    if len(line) > MAX_LINE_BYTES:
        raise RowError(f"the line has over {MAX_LINE_BYTES:,} bytes", where)
    if b"\0" in line:
        raise RowError(f"the line holds a NUL byte at column {line.index(0) + 1}", where)
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 text (byte {error.start + 1} of the line)", where) from error
    except json.JSONDecodeError as error:
        raise RowError(f"not valid JSON ({error.msg} at column {error.colno})", where) from error
    except RecursionError as error:
        raise RowError("not valid JSON (nested too deep)", where) from error
    if not isinstance(row, dict):
        raise RowError(f"expected a JSON object, found {type(row).__name__}", where)
    return row


def iter_pairs(data: str | Path, image_root: str | Path | None = None) -> Iterator[PairRow | RowError]:
    """Yield the rows of training data; an unusable row is yielded as its error.

    Args:
        data: a release (its meta.json or folder), one JSONL file, or MMPR as Parquet (a folder, a file, or a data set
            on the Hub as `hub:OWNER/NAME[@REVISION][:CONFIG]`, see `mmpr_parquet`).
        image_root: folder of the images of a JSONL file; None means the folder the file is in.

    Raises:
        BadInputError: a file is missing or unreadable.
    """
    from internvl_mpo.mmpr_parquet import is_parquet, iter_rows

    if is_parquet(data):
        yield from iter_rows(data)
        return
    for subset in read_subsets(data, image_root):
        for number, (_, _, line) in enumerate(read_lines(subset.annotation), start=1):
            if line.isspace():
                continue
            where = f"{subset.annotation}:{number}"
            try:
                pair = subset.pair(parse_line(line, where), where)
            except RowError as error:
                yield error
                continue
            images = tuple(map(subset.pictures.below, pair.images))
            if images != pair.images:
                pair = replace(pair, images=images)
            yield PairRow(pair, subset.root, subset.max_tiles, where, subset.name, subset.repeat_time)


def repeats(rows: Sequence[PairRow], seed: int, resample: Resample = "none") -> list[int]:
    """Return how often each row is seen in an epoch.

    Args:
        rows: usable rows.
        seed: decides which rows of a subset are seen once more than the others.
        resample: "none" sees each subset `repeat_time` times, so that its counts add up to round(rows * repeat_time).
            "sqrt" keeps the total of that and shares it out in proportion to the square root of each subset's part, as
            the original's `use_data_resampling` does on average by drawing; here the counts are exact.
    """
    members: dict[tuple[str, float], list[int]] = {}
    for index, row in enumerate(rows):
        members.setdefault((row.subset, row.repeat_time), []).append(index)
    totals = {key: round(len(indices) * key[1]) for key, indices in members.items()}
    if resample == "sqrt":
        totals = _share_out(sum(totals.values()), {key: math.sqrt(total) for key, total in totals.items()})
    counts = [0] * len(rows)
    for key, indices in members.items():
        whole, extra = divmod(totals[key], len(indices))
        once_more = set(random.Random(f"{seed} {key[0]}").sample(indices, extra))
        for index in indices:
            counts[index] = whole + (index in once_more)
    return counts


def _share_out(total: int, weights: dict[Any, float]) -> dict[Any, int]:
    """Whole numbers in proportion to `weights` that add up to `total` (largest remainders)."""
    scale = total / (sum(weights.values()) or 1)
    shares = {key: int(weight * scale) for key, weight in weights.items()}
    by_remainder = sorted(weights, key=lambda key: shares[key] - weights[key] * scale)
    for key in by_remainder[: total - sum(shares.values())]:
        shares[key] += 1
    return shares


def mixture_table(rows: Sequence[PairRow], counts: Sequence[int], costs: Sequence[int]) -> str:
    """Return a table of what each subset adds to an epoch, for a terminal.

    Args:
        rows: usable rows.
        counts: how often each of them is seen, from `repeats`.
        costs: tokens of each of them.
    """
    subsets: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        subsets.setdefault(row.subset, []).append(index)
    total = sum(counts) or 1
    tokens = [count * cost for count, cost in zip(counts, costs, strict=True)]
    width = min(60, max(len("subset"), *map(len, subsets)))
    lines = [f"{'subset':<{width}}  {'rows':>10}  {'repeat':>7}  {'seen':>10}  {'share':>7}  {'tokens each':>11}"]
    for name, indices in subsets.items():
        seen = sum(counts[index] for index in indices)
        each = sum(tokens[index] for index in indices) / seen if seen else 0
        repeat_times = {rows[index].repeat_time for index in indices}
        repeat = f"{repeat_times.pop():g}" if len(repeat_times) == 1 else "mixed"
        lines.append(
            f"{name:<{width}}  {len(indices):>10,}  {repeat:>7}  {seen:>10,}  {seen / total:>7.1%}  {each:>11,.0f}"
        )
    each = sum(tokens) / total
    lines.append(f"{'all':<{width}}  {len(rows):>10,}  {'':>7}  {sum(counts):>10,}  {1:>7.1%}  {each:>11,.0f}")
    return "\n".join(lines)
