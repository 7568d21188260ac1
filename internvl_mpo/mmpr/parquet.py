"""MMPR as Parquet: one row per pair with its pictures inside, for `datasets`, the Hub's viewer, TRL, and this trainer.

    id              stable id of the pair
    images          the pictures' files, byte for byte, decoded by `datasets`
    prompt          [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "..."}]}], after the
                    system message and earlier turns, where there are any
    chosen          [{"role": "assistant", "content": "..."}]
    rejected        likewise
    question        the user's text as MMPR spells it, `<image>` placeholders included
    answer          ground truth, or null; several of which one is enough are a JSON list
    system, history system message that replaces the model's own, or null; earlier turns
    source, rule    data set of the question; why chosen is preferred
    subset          name in meta.json; repeat_time and max_dynamic_patch are its settings there
    image_root      image folder of the subset; image_paths are relative to it
    provenance      JSON: how the pair was made, and whatever else the row said
    raw             JSON: what it takes to write the row exactly as it was read; null for a plain MMPR row

Lists are spelled `[..]` in the metadata of the schema: datasets 3, 4 and 5 all read that (5 by itself writes `List`).
Pictures are dictionary-encoded: pairs of one question lie together and share one copy of their picture.
"""

import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_mpo.errors import BadInputError, RowError
from internvl_mpo.mmpr.files import relative
from internvl_mpo.mmpr.release import Subset
from internvl_mpo.mmpr.row_groups import ParquetTable
from internvl_mpo.mmpr.tables import stream_table
from internvl_mpo.records import IMAGE_PLACEHOLDER, PreferencePair

_TEXT, _NUMBER, _COUNT = ({"dtype": name, "_type": "Value"} for name in ("string", "float64", "int32"))
_ANSWER = [{"role": _TEXT, "content": _TEXT}]
FEATURES = {
    "id": _TEXT,
    "images": [{"_type": "Image"}],
    "prompt": [{"role": _TEXT, "content": [{"type": _TEXT, "text": _TEXT}]}],
    "chosen": _ANSWER,
    "rejected": _ANSWER,
    "question": _TEXT,
    "answer": _TEXT,
    "system": _TEXT,
    "history": [{"question": _TEXT, "answer": _TEXT}],
    "source": _TEXT,
    "rule": _TEXT,
    "subset": _TEXT,
    "repeat_time": _NUMBER,
    "max_dynamic_patch": _COUNT,
    "image_root": _TEXT,
    "image_paths": [_TEXT],
    "provenance": _TEXT,
    "raw": _TEXT,
}
# Columns that data sets of earlier versions lack.
_LATER = frozenset(("system", "history"))
REQUIRED = tuple(column for column in FEATURES if column not in _LATER)
_JSON = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def arrow_schema() -> Any:
    """Return the Arrow schema, with the metadata that `datasets` reads column types from."""
    import pyarrow as pa

    def arrow_type(feature: Any) -> pa.DataType:
        if isinstance(feature, list):
            return pa.list_(arrow_type(feature[0]))
        if feature.get("_type") == "Image":
            return pa.struct({"bytes": pa.binary(), "path": pa.string()})
        if feature.get("_type") == "Value":
            return {"string": pa.string(), "float64": pa.float64(), "int32": pa.int32()}[feature["dtype"]]
        return pa.struct({name: arrow_type(part) for name, part in feature.items()})

    metadata = {"huggingface": json.dumps({"info": {"features": FEATURES}})}
    return pa.schema({name: arrow_type(feature) for name, feature in FEATURES.items()}, metadata=metadata)


# --- one row ----------------------------------------------------------------------------------------------------------


def to_columns(
    row: Mapping[str, Any], pair: PreferencePair, subset: Subset, pictures: Sequence[bytes]
) -> dict[str, Any]:
    """Return the columns of a pair.

    Args:
        row: the object of the annotation file.
        pair: the pair it stands for.
        subset: where it comes from.
        pictures: the files of `pair.images`.

    Raises:
        RowError: a text that is no Unicode (half a surrogate pair), which no Parquet reader could show.
    """
    paths = list(pair.images)
    columns = {
        "id": pair.id,
        "images": [{"bytes": content, "path": path} for content, path in zip(pictures, paths, strict=True)],
        "prompt": prompt_messages(pair),
        "chosen": [{"role": "assistant", "content": pair.chosen}],
        "rejected": [{"role": "assistant", "content": pair.rejected}],
        "question": pair.question,
        "answer": pair.answer,
        "system": pair.system,
        "history": [{"question": asked, "answer": answer} for asked, answer in pair.history],
        "source": pair.source,
        "rule": pair.rule,
        "subset": subset.name,
        "repeat_time": subset.repeat_time,
        "max_dynamic_patch": subset.max_tiles,
        "image_root": relative(subset.entry["root"]) if subset.entry else "",
        "image_paths": paths,
        "provenance": _JSON.encode(dict(pair.provenance)),
        "raw": _what_is_special(row, pair),
    }
    try:
        texts = (pair.id, pair.question, pair.chosen, pair.rejected, pair.answer or "", pair.source, *paths)
        turns = (pair.system or "", *(text for turn in pair.history for text in turn))
        "".join((*texts, *turns, columns["provenance"], columns["raw"] or "")).encode()
    except UnicodeEncodeError as error:
        raise RowError(
            f"holds half a surrogate pair (U+{ord(error.object[error.start]):04X}), which is no text"
        ) from error
    return columns


def prompt_messages(pair: PreferencePair) -> list[dict[str, Any]]:
    """Return the prompt as messages of content blocks: system message, earlier turns, question."""
    messages = [] if pair.system is None else [{"role": "system", "content": prompt_blocks(pair.system, 0)}]
    asked = [*(question for question, _ in pair.history), pair.question]
    marked = any(IMAGE_PLACEHOLDER in question for question in asked)
    for number, question in enumerate(asked):
        count = question.count(IMAGE_PLACEHOLDER) if pair.history and marked else 0 if number else len(pair.images)
        messages.append({"role": "user", "content": prompt_blocks(question, count)})
        if number < len(pair.history):
            messages.append({"role": "assistant", "content": prompt_blocks(pair.history[number][1], 0)})
    return messages


def prompt_blocks(question: str, num_images: int) -> list[dict[str, str | None]]:
    """Return the question as content blocks; a picture stands where its placeholder stood, or else in front."""
    parts = question.split(IMAGE_PLACEHOLDER)
    if len(parts) - 1 != num_images:  # no placeholder for one picture is usual; anything else has no better place
        parts = [*[""] * num_images, question]
    blocks = []
    for number, text in enumerate(parts):
        if number:
            blocks.append({"type": "image", "text": None})
        if text:
            blocks.append({"type": "text", "text": text})
    return blocks


def to_pair(columns: Mapping[str, Any]) -> PreferencePair:
    """Return the pair of a row; `images` is not needed for it."""
    return PreferencePair(
        id=columns["id"],
        images=tuple(columns["image_paths"]),
        question=columns["question"],
        chosen=columns["chosen"][0]["content"],
        rejected=columns["rejected"][0]["content"],
        answer=columns["answer"],
        system=columns.get("system"),
        history=tuple((turn["question"], turn["answer"]) for turn in columns.get("history") or ()),
        source=columns["source"],
        rule=columns["rule"],
        provenance=json.loads(columns["provenance"]),
    )


def to_raw(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row as the annotation file had it."""
    pair = to_pair(columns)
    special = json.loads(columns["raw"]) if columns["raw"] else {}
    row = pair.to_json() if special.get("form") == "own" else _mmpr_row(pair)
    for key in special.get("unset", ()):
        del row[key]
    return {**row, **special.get("set", {})}


def _mmpr_row(pair: PreferencePair) -> dict[str, Any]:
    """The row as an official file would have it."""
    row: dict[str, Any] = {}
    if pair.images:
        row["image"] = pair.images[0] if len(pair.images) == 1 else list(pair.images)
    row |= {"question": pair.question, "chosen": pair.chosen, "rejected": pair.rejected}
    own = pair.to_json()
    row |= {key: own[key] for key in ("system", "history", "answer_gt") if key in own}
    return {**row, **pair.provenance}


def _what_is_special(row: Mapping[str, Any], pair: PreferencePair) -> str | None:
    usual = _mmpr_row(pair)
    if usual == row and _same_types(usual, row):
        return None
    own = pair.to_json()
    if own == row and _same_types(own, row):
        return _JSON.encode({"form": "own"})
    changed = {
        key: value for key, value in row.items() if key not in usual or _JSON.encode(usual[key]) != _JSON.encode(value)
    }
    return _JSON.encode({"set": changed, "unset": [key for key in usual if key not in row]})


def _same_types(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Equal values may still differ in JSON: 1, 1.0 and true."""
    return all(
        isinstance(value, str) or _JSON.encode(value) == _JSON.encode(second[key]) for key, value in first.items()
    )


def open_dataset(data: str | Path) -> Any:
    """Return the split `train` as a `datasets` data set that gives rows as they are read; pictures are left as files.

    Args:
        data: folder, `.parquet` file, or `hub:OWNER/NAME[@REVISION][:CONFIG]`.

    Raises:
        BadInputError: nothing there, or it has other columns.
    """
    found = stream_table(str(data))
    check_columns(str(data), found.features or {})
    return found.decode(False)


def check_columns(data: str, columns: Container[str]) -> None:
    """Refuse a table that was not made by convert_mmpr.py.

    Raises:
        BadInputError: naming the column that is missing.
    """
    missing = [column for column in REQUIRED if column not in columns]
    if missing:
        raise BadInputError(
            f"{data} has no column '{missing[0]}', so it was not made by convert_mmpr.py; convert the raw release first"
        )


class EmbeddedPictures:
    """The pictures of one row, for `encode_group`; reading one touches nothing but the row group it is in."""

    def __init__(self, table: ParquetTable, number: int, folder: str):
        """Remember where they are.

        Args:
            table: of the rows.
            number: of the row.
            folder: names the folder the paths are relative to; rows that share it share pictures of equal names.
        """
        self.table, self.number, self.folder = table, number, folder

    def __str__(self) -> str:
        return self.folder

    @property
    def version(self) -> str:
        """Differs when the data set differs."""
        return json.dumps(self.table.facts)

    def read(self, name: str) -> bytes:
        """Return a picture's file.

        Raises:
            RowError: the row has no such picture.
        """
        for picture in self.table.value(self.number, "images"):
            if picture["path"] == name and picture["bytes"] is not None:
                return picture["bytes"]
        raise RowError(f"image '{name}' is not among those of row {self.number} of {self.folder}")
