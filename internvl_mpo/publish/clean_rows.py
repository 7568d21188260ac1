"""Reads a data set as a stranger does, streaming and whole; run by `dataset` in a process of its own.

    python -I clean_rows.py SOURCE REVISION NUM_ROWS SMALLEST RESULT

SOURCE is a folder or owner/name, REVISION a branch or "-". Of every configuration the first NUM_ROWS rows are streamed;
the configuration SMALLEST is loaded whole as well. RESULT becomes a JSON file with a digest of what came.
"""

import hashlib
import json
import sys
from pathlib import Path


def main(source: str, revision: str, num_rows: str, smallest: str, result: str) -> None:
    """Load, digest, save."""
    from datasets import get_dataset_config_names, load_dataset

    where = {} if revision == "-" else {"revision": revision}
    found: dict[str, dict] = {"streamed": {}, "whole": {}}
    for name in get_dataset_config_names(source, **where):
        stream = load_dataset(source, name, split="train", streaming=True, **where)
        rows = [digest(row) for row in stream.decode(False).take(int(num_rows))]
        found["streamed"][name] = {"rows": rows, "columns": list(stream.features)}
    whole = load_dataset(source, smallest, split="train", **where)
    pictures = whole.column_names.count("images") and next((row["images"] for row in whole if row["images"]), [])
    undecoded = whole.with_format("arrow")
    found["whole"] = {
        "config": smallest,
        "rows": [digest(row) for table in undecoded.iter(100) for row in table.to_pylist()],
        "decoded": [list(picture.size) for picture in pictures or []],
    }
    Path(result).write_text(json.dumps(found), encoding="utf-8")


def digest(row: dict) -> str:
    """Name a row by its content; a picture counts by its bytes, and has to have some."""

    def plain(value):
        if isinstance(value, dict) and set(value) == {"bytes", "path"}:
            if not value["bytes"]:
                raise SystemExit("a picture is not inside its row; write its bytes into the Parquet file")
            return hashlib.sha256(value["bytes"]).hexdigest()
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)

    return hashlib.sha256(json.dumps(plain(row), sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:16]


if __name__ == "__main__":
    main(*sys.argv[1:])
