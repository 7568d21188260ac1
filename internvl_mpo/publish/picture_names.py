"""Takes the folders of some computer out of the picture names in a Parquet shard."""

import hashlib
from pathlib import Path
from typing import Any

from internvl_mpo.files import atomic_path
from internvl_mpo.mmpr.shard_writer import ShardWriter

# Columns of strings, lists of strings, and lists of pictures.
_COLUMNS = ("image_root", "image_paths", "images")


def shorten_names(path: Path) -> bool:
    """Rewrite a shard in which a picture or an image folder has an absolute path; say whether it was necessary.

    Official annotation files name some pictures by their place on a cluster. What is below the folder `images` stays;
    of other paths the last part, in a folder named by a hash, since two pictures may have the same name. The file is
    replaced, not changed: it may be a link to another one.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        names = [name for name in _COLUMNS if name in schema.names]
        if "images" not in names or not any(_is_absolute(text) for text in _texts(file, names)):
            return False
        with atomic_path(path) as part, ShardWriter(part, schema) as out:
            for batch in file.iter_batches(batch_size=100):
                for row in batch.to_pylist():
                    out.add({**row, **{name: _shorten(row[name]) for name in names}})
    return True


def _texts(file: Any, names: list[str]) -> Any:
    """All names of a shard; the pictures themselves are not read."""
    leaves = [f"{name}.list.element.path" if name == "images" else name for name in names]
    for batch in file.iter_batches(batch_size=5000, columns=leaves):
        for values in batch.to_pydict().values():
            for value in values:
                yield from _strings(value)


def _strings(value: Any) -> Any:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from _strings(value.get("path"))
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _shorten(value: Any) -> Any:
    if isinstance(value, str):
        return shorten(value)
    if isinstance(value, dict):
        return {**value, "path": _shorten(value["path"])}
    return [_shorten(inner) for inner in value] if isinstance(value, list) else value


def shorten(name: str) -> str:
    """Return a path without the folders of the computer it comes from; a relative one stays."""
    if not _is_absolute(name):
        return name
    parts = [part for part in name.replace("\\", "/").split("/") if part and not part.endswith(":")]
    if "images" in parts[:-1]:
        return "/".join(parts[len(parts) - parts[::-1].index("images") :])
    folder = hashlib.sha256("/".join(parts[:-1]).encode()).hexdigest()[:8]
    return f"{folder}/{parts[-1]}"


def _is_absolute(name: str) -> bool:
    return name.startswith(("/", "\\")) or name[1:3] in (":\\", ":/") or "://" in name
