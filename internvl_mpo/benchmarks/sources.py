"""Rows of a benchmark, from wherever a user has it: official JSON and JSONL, VLMEvalKit TSV, the Hub, or memory."""

import ast
import base64
import binascii
import csv
import hashlib
import json
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from internvl_mpo.benchmarks.common import Picture, Source
from internvl_mpo.errors import BadInputError

HUB_PREFIX = "hub:"


def read_rows(source: Source, *names: str) -> tuple[list[dict[str, Any]], Path | None]:
    """Return the rows of a source and the folder its picture paths are relative to.

    Args:
        source: a file; a folder that holds one of `names`; `hub:OWNER/NAME[@REVISION][:SPLIT]`; or rows.
        names: file names looked for in a folder, best first; `*` matches.

    Raises:
        BadInputError: nothing there, or it is not what its name says.
    """
    if not isinstance(source, (str, Path)):
        return [dict(row) for row in source], None
    if str(source).startswith(HUB_PREFIX):
        return _hub_rows(str(source).removeprefix(HUB_PREFIX)), None
    path = find_file(source, *names)
    if path.suffix in (".tsv", ".csv"):
        return _table_rows(path), path.parent
    return _json_rows(path), path.parent


def find_file(source: str | Path, *names: str) -> Path:
    """Return `source` if it is a file, else the first match of `names` in the folder.

    Raises:
        BadInputError: there is neither.
    """
    path = Path(source)
    if path.is_file():
        return path
    if not path.is_dir():
        raise BadInputError(
            f"no file or folder at {path}; give a local copy with --data or a data set as hub:OWNER/NAME"
        )
    for name in names:
        found = sorted(path.glob(name))
        if found:
            return found[0]
    raise BadInputError(f"{path} holds none of {', '.join(names)}")


def read_json_file(path: Path) -> Any:
    """Return the content of a JSON file; one object per line is read as a list, whatever the file is called.

    Raises:
        BadInputError: it is neither, or cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"cannot read {path}: {error}") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pass
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise BadInputError(f"{path}:{number} is not valid JSON ({error.msg})") from error
    return rows


def image_source(value: Any, root: Path | None) -> Picture:
    """Return a picture as rows hold it (a path, base64 text, bytes, or the Hub's `{"bytes", "path"}`) unopened."""
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, Path)) or callable(value):
        return value
    if not isinstance(value, str) or not value:
        raise BadInputError(f"a picture must be a path, base64 text or bytes, found {type(value).__name__}")
    if len(value) > 256:
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadInputError(f"a picture of {len(value)} characters is not base64 text") from error
    return (root or Path()) / value


def shared_picture(row: Mapping[str, Any], picture: Any) -> str:
    """Return a name for the picture of a row, the same for all questions about it; "" for a row without one.

    A column that names it (`image_source`, `image_id`), its path, or a hash of its bytes.
    """
    for key in ("image_source", "image_id"):
        if isinstance(row.get(key), str) and row[key]:
            return row[key]
    if not picture:
        return ""
    if isinstance(picture, str) and len(picture) <= 256:
        return picture
    content = image_source(picture, None)
    content = content() if callable(content) else content
    return hashlib.sha256(content if isinstance(content, bytes) else str(content).encode()).hexdigest()[:16]


def parse_list(value: Any) -> list[str]:
    """Return the texts of a list cell: a list, JSON, or Python's spelling of a list of plain literals in a table.

    Raises:
        BadInputError: it is none of these.
    """
    if value is None or value == "":
        return []
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)  # literals only: no names, calls or operators
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise BadInputError(f"a list was expected, found {value[:60]!r}") from error
    if not isinstance(value, (list, tuple)):
        raise BadInputError(f"a list was expected, found {type(value).__name__}")
    return [str(item) for item in value]


def _json_rows(path: Path) -> list[dict[str, Any]]:
    content = read_json_file(path)
    if isinstance(content, Mapping):
        if all(isinstance(row, Mapping) for row in content.values()):  # {id: row}: MathVista and MM-Vet
            content = [{"id": key, **row} for key, row in content.items()]
        else:  # a JSONL file of one line
            content = [content]
    if not isinstance(content, list) or not content or not all(isinstance(row, Mapping) for row in content):
        raise BadInputError(f"{path} must hold rows: a list of objects, one object per line, or an object of objects")
    return [dict(row) for row in content]


def _table_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a VLMEvalKit table; an image cell may name the index of the row that holds the picture."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open(path, encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ","))
    if not rows:
        raise BadInputError(f"{path} holds no rows")
    pictures = {row.get("index"): row.get("image") for row in rows}
    for row in rows:
        if row.get("image") in pictures:
            row["image"] = pictures[row["image"]]
    return [{key: value for key, value in row.items() if value not in (None, "")} for row in rows]


def _hub_rows(name: str) -> list[dict[str, Any]]:
    import datasets  # only here: everything else reads local copies without it

    name, _, split = name.partition(":")
    name, _, revision = name.partition("@")
    split = split or "test"
    try:
        table = datasets.load_dataset(name, split=split, revision=revision or None)
    except Exception as error:  # the Hub client raises dozens of types
        raise BadInputError(
            f"cannot load split {split} of {name} from the Hub: {error}; give a local copy with --data"
        ) from error
    pictures = [column for column, feature in table.features.items() if isinstance(feature, datasets.Image)]
    rows = list(table.remove_columns(pictures))
    for column in pictures:
        table = table.cast_column(column, datasets.Image(decode=False))
    for index, row in enumerate(rows):  # thousands of pictures stay on disk until a model or the report asks for one
        row.update({column: partial(_hub_picture, table, index, column) for column in pictures})
    return rows


def _hub_picture(table: Any, index: int, column: str) -> bytes:
    picture = table[index][column] or {}
    if not picture.get("bytes"):
        raise BadInputError(f"row {index} of the data set holds no picture in column '{column}'")
    return picture["bytes"]
