"""Parquet -> a raw MMPR release: meta.json, annotations and image files as they were before the conversion."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from internvl_mpo.errors import BadInputError
from internvl_mpo.files import atomic_writer
from internvl_mpo.jsonl import json_line
from internvl_mpo.mmpr.files import relative
from internvl_mpo.mmpr.manifest import MANIFEST
from internvl_mpo.mmpr.parquet import open_dataset, to_raw
from internvl_mpo.mmpr.row_groups import HUB_PREFIX


def restore(data: str, output: Path) -> tuple[int, int]:
    """Write the raw release of a data set.

    Rows keep their order within a subset. meta.json is as it was, except that paths of the cluster it was written on
    are relative.

    Args:
        data: converted folder, or `hub:OWNER/NAME[@REVISION]`.
        output: folder to make; must not exist or be empty.

    Returns:
        Number of rows, number of image files.

    Raises:
        BadInputError: no such data set, or the output is not empty.
    """
    from tqdm import tqdm

    if output.exists() and any(output.iterdir()):
        raise BadInputError(f"{output} is not empty; give another --output")
    meta = _meta(data)
    num_images = num_rows = 0
    with ExitStack() as files:
        annotations: dict[str, IO[str]] = {}
        for row in tqdm(open_dataset(data), desc="restoring", unit="row"):
            subset = row["subset"]
            entry = meta.setdefault(subset, {})
            entry.setdefault("root", row["image_root"] or "images")
            entry.setdefault("annotation", f"annotations/{subset}.jsonl")
            entry.setdefault("repeat_time", row["repeat_time"])
            if subset not in annotations:
                path = output / relative(entry["annotation"])
                annotations[subset] = files.enter_context(atomic_writer(path))
            annotations[subset].write(json_line(to_raw(row)))
            num_rows += 1
            for picture in row["images"]:
                num_images += _write_picture(
                    output / relative(entry["root"]) / relative(picture["path"]), picture["bytes"]
                )
        for subset, entry in meta.items():  # a subset of which no row was usable
            if subset not in annotations and "annotation" in entry:
                files.enter_context(atomic_writer(output / relative(entry["annotation"])))
    with atomic_writer(output / "meta.json") as out:
        json.dump(meta, out, ensure_ascii=False, indent=2)
        out.write("\n")
    return num_rows, num_images


def _write_picture(path: Path, content: bytes) -> bool:
    """Write a picture once.

    Raises:
        BadInputError: another picture has the same path.
    """
    if path.exists():
        if path.stat().st_size != len(content) or path.read_bytes() != content:
            raise BadInputError(f"two different pictures of the data set have the path {path}")
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return True


def _meta(data: str) -> dict[str, dict[str, Any]]:
    """The entries of meta.json, from the manifest."""
    if data.startswith(HUB_PREFIX):
        from huggingface_hub import hf_hub_download

        name, _, revision = data.removeprefix(HUB_PREFIX).partition(":")[0].partition("@")
        path = Path(hf_hub_download(name, MANIFEST, repo_type="dataset", revision=revision or None))
    else:
        path = Path(data) / MANIFEST
    if not path.is_file():
        raise BadInputError(f"{data} holds no {MANIFEST}, so the settings of its subsets are not known")
    meta: Mapping[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["meta"]
    return {name: dict(entry) for name, entry in meta.items()}
