"""MMPR on disk: meta.json, annotation files and image folders, ours or an official release.

    meta.json   {"geo170k_pairs_vqa_correctness_rules": {"root": "images/geo170k", "annotation": "annotations/x.jsonl",
                 "repeat_time": 0.5, "length": 9000, "max_dynamic_patch": 12, "data_augment": false}, ...}
    x.jsonl     {"image": "1.png", "question": "...", "chosen": "...", "rejected": "...", "answer_gt": "12"}

Official releases are read as they are published: absolute cluster paths, annotations.zip, images in zip parts.

`repeat_time` is how often a subset is seen in one epoch. The fraction is honoured exactly, also above 1: 2.5 means
every row twice and a seeded half of the rows a third time.
"""

import codecs
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from internvl_mpo.errors import BadInputError, RowError
from internvl_mpo.files import atomic_writer
from internvl_mpo.formats import to_own_form
from internvl_mpo.jsonl import parse_object
from internvl_mpo.mmpr.files import PictureFolder, ReleaseFiles, is_absolute
from internvl_mpo.mmpr.lines import MAX_LINE_BYTES, Annotation, is_array, read_lines
from internvl_mpo.mmpr.row_groups import HUB_PREFIX
from internvl_mpo.mmpr.tables import TablePictures, TableRows, is_table
from internvl_mpo.programs import way_to
from internvl_mpo.records import PreferencePair, content_id, images_of
from internvl_mpo.row_keys import holds

# Name suffixes of the official subsets and the rule they stand for.
_RULE_OF_SUFFIX = (
    (re.compile(r"_pairs_vqa_correctness_rules$"), "correctness"),
    (re.compile(r"_pairs_vqa_format_rules$"), "format"),
    (re.compile(r"_pairs_vqa_direct_rules$"), "direct"),
    (re.compile(r"_prefix_pair_sr[\d.]+_wo_image$"), "dropout_ntp"),
    (re.compile(r"_prefix_pair_sr[\d.]+_with_image$"), "prefix_with_image"),
)
# What tells rows without an id: keys of official files, and those that other rows have.
_CONTENT = ("image", "question", "answer_gt", "chosen", "rejected")
_MORE_CONTENT = ("images", "answer", "system", "history")


@dataclass(frozen=True)
class Subset:
    """One entry of meta.json, with its files found.

    Attributes:
        name: key in meta.json.
        pictures: folder that image paths are relative to: on disk, or in the archives of the release.
        annotation: preference rows: JSONL or a JSON array, on disk or in an archive, or a table.
        repeat_time: how often its rows are seen per epoch, >= 0.
        max_tiles: cap on the tiles per image, or None for that of the run.
        entry: the entry as it stands in meta.json; empty for a JSONL file without one.
    """

    name: str
    pictures: PictureFolder
    annotation: Annotation
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

        The row may be in any form of `formats`. One without an id gets one from its content, with the name of the image
        folder in it: two folders may both hold a `1.png`.

        Raises:
            RowError: see `PreferencePair.from_json`.
        """
        try:
            row = to_own_form(row)[1]
        except RowError as error:
            raise RowError(error.reason, where) from error
        source, rule = split_subset_name(self.name)
        added = {} if row.get("rule") else {"rule": rule}
        if not row.get("id") and self.entry:
            folder = _last_part(str(self.entry["root"]))
            more = {key: row[key] for key in _MORE_CONTENT if key in row and holds(row[key])}
            added["id"] = content_id(folder, [row.get(key) for key in _CONTENT], *([more] if more else []))
        pair = PreferencePair.from_json({**row, **added}, source=source, where=where)
        for name in filter(is_absolute, pair.images):
            self._check_name(name, where)
        return pair

    def _check_name(self, name: str, where: str) -> None:
        """Refuse an absolute path that may be two pictures here, or that is one picture with another such path."""
        try:
            meant = self.pictures.meant(name)
        except RowError as error:
            raise RowError(error.reason, where) from error
        others = self._claims().get(meant, {name}) - {name}
        if meant != name and others:
            both = f"images '{name}' and '{min(others)}' are both '{meant}' here"
            raise RowError(f"{both}; write their paths relative to the image folder", where)

    def _claims(self) -> dict[str, set[str]]:
        """Return picture -> absolute paths that stand for it, in all rows that show this folder; read once."""
        if not self.pictures.claims:
            for text in {str(text): text for text in (self.annotation, *self.pictures.annotations)}.values():
                for name in _absolute_names(text):
                    with suppress(RowError):
                        self.pictures.claims.setdefault(self.pictures.meant(name), set()).add(name)
        return self.pictures.claims


@lru_cache(maxsize=4096)
def _last_part(path: str) -> str:
    return PurePosixPath(path).name


def _absolute_names(text: Annotation) -> Iterator[str]:
    for _, _, line in read_lines(text):
        with suppress(RowError):
            if not line.isspace():
                yield from filter(is_absolute, images_of(to_own_form(parse_line(line, ""))[1]))


@lru_cache(maxsize=4096)
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
            `internvl_mpo.mmpr.files` describes.
        image_root: another folder to look for images and archives in.

    Raises:
        BadInputError: the file is unreadable, or an entry lacks a key, has a wrong type, or names a missing annotation.
    """
    path = Path(path)
    try:
        meta = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(meta, dict) or not meta:
        raise BadInputError(f"{path} must be an object of subsets, each with 'root', 'annotation' and 'repeat_time'")
    files = ReleaseFiles(*([image_root] if image_root else []), path.parent)
    subsets = [_subset(path, name, entry, files) for name, entry in meta.items()]
    _refuse_shared(path, subsets, "annotation", [str(subset.annotation) for subset in subsets])
    _refuse_shared(path, subsets, "root", [str(subset.root) for subset in subsets])
    return subsets


def _refuse_shared(path: Path, subsets: Sequence[Subset], key: str, found: Sequence[str]) -> None:
    """Refuse two names of another machine's files that have become one here."""
    firsts: dict[str, Subset] = {}
    for subset, place in zip(subsets, found, strict=True):
        first = firsts.setdefault(place, subset)
        names = [one.entry[key].rstrip("/") for one in (first, subset)]
        if names[0] != names[1] and all(map(is_absolute, names)):
            raise BadInputError(
                f"{path}: the {key} '{names[0]}' of subset '{first.name}' and '{names[1]}' of '{subset.name}' are both "
                f"{place} here; write them relative to the release"
            )


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
    pictures = files.pictures(entry["root"])
    pictures.annotations.append(annotation)
    return Subset(name, pictures, annotation, float(entry["repeat_time"]), max_tiles, entry)


def read_subsets(data: str | Path, image_root: str | Path | None = None) -> list[Subset]:
    """Return the subsets of a release's folder, of its meta.json, or of one file or table of rows, named after it.

    Raises:
        BadInputError: see `read_meta`; a folder holds no meta.json.
    """
    if is_table(data):
        return [_table_subset(str(data), image_root)]
    data = Path(data)
    if data.is_dir():
        found = [path for path in (data / "meta.json", *sorted(data.glob("*/meta.json"))) if path.is_file()]
        if not found:
            raise BadInputError(f"{data} holds no meta.json, so it is no MMPR release")
        data = found[0]
    if data.suffix == ".json" and not (data.is_file() and _holds_rows(data)):
        return read_meta(data, image_root)
    if not data.is_file():
        raise BadInputError(f"data file '{data}' does not exist; {way_to(str(data))}")
    return [Subset(data.stem, ReleaseFiles(image_root or data.parent).pictures("."), data)]


def _holds_rows(path: Path) -> bool:
    """Whether a `.json` file holds rows, as an array or line by line, instead of subsets."""
    if is_array(path):
        return True
    first = next((line for _, _, line in read_lines(path) if not line.isspace()), b"")
    try:
        row = parse_line(first.removeprefix(codecs.BOM_UTF8), "")
    except RowError:
        return False
    return not any(isinstance(entry, dict) and "root" in entry for entry in row.values())


def _table_subset(data: str, image_root: str | Path | None) -> Subset:
    rows = TableRows(data)
    name = Path(data.removeprefix(HUB_PREFIX)).stem
    here = Path("." if data.startswith(HUB_PREFIX) else data)
    root = image_root or (here.parent if here.suffix == ".parquet" else here)
    files = TablePictures(rows, str(root)) if rows.picture_columns else ReleaseFiles(root).pictures(".")
    return Subset(name, files, rows)


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
        text = line.decode("utf-8-sig", "surrogatepass")
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 text (byte {error.start + 1} of the line)", where) from error
    return parse_object(text, where)


# ---------------------------------------------------------------------------------------------------- MMPR layout


def subset_name(source: str, rule: str, *, ratio: float = 0.5, with_image: bool = False) -> str:
    """Return the name of a file in MMPR's suffix grammar, e.g. `m3cot_train_pairs_vqa_correctness_rules`."""
    base = re.sub(r"[^\w.+-]", "_", source) or "unnamed"
    if rule in ("correctness", "format", "direct"):
        return f"{base}_pairs_vqa_{rule}_rules"
    if rule in ("dropout_ntp", "prefix_with_image"):
        return f"{base}_prefix_pair_sr{ratio}_{'with' if with_image else 'wo'}_image"
    return f"{base}_{rule}"


def write_meta(path: str | Path, subsets: Mapping[str, Mapping[str, Any]]) -> None:
    """Write MMPR's meta.json.

    Args:
        path: the file to write.
        subsets: name -> {"root": image folder, "annotation": jsonl file, and any of "data_augment", "repeat_time",
            "length", "max_dynamic_patch"}. Paths are given as this process sees them and written relative to the
            folder of `path`, so that the release can be moved. A missing length is counted.
    """
    folder = Path(path).resolve().parent
    meta = {}
    for name, subset in subsets.items():
        entry = {"data_augment": False, "repeat_time": 1, **subset}
        for key in ("root", "annotation"):
            entry[key] = Path(os.path.relpath(Path(subset[key]).resolve(), folder)).as_posix()
        if "length" not in entry:
            with open(subset["annotation"], encoding="utf-8") as lines:
                entry["length"] = sum(1 for line in lines if line.strip())
        meta[name] = {key: entry[key] for key in ("root", "annotation", *sorted(entry)) if key in entry}
    with atomic_writer(path) as out:
        json.dump(meta, out, ensure_ascii=False, indent=2)
        out.write("\n")
