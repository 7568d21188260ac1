"""What tells the weights of one model from those of another, here and behind a URL."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def model_revision(model_path: str) -> str | None:
    """Return what identifies the weights: the commit of a Hub model, or a short hash of a folder.

    The hash covers names, sizes and both ends of every file: reading 16 GB would take longer than answering.
    """
    folder = Path(model_path)
    if not folder.is_dir():
        from transformers.utils import cached_file
        from transformers.utils.hub import extract_commit_hash

        return extract_commit_hash(cached_file(model_path, "config.json"), None)
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".json", ".model")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read(1 << 20))
    return digest.hexdigest()[:16]


def why_other(served: Mapping[str, Any], model: str) -> str:
    """Return why what a server has loaded is not a model of ours; "" where it is.

    Args:
        served: an entry of the server's `/v1/models`. Ours tells the `revision`; vLLM and SGLang tell the `root`, the
            folder or Hub id they loaded; of others only the name is known.
        model: folder or Hub id.
    """
    if served.get("revision"):
        revision = model_revision(model)
        return "" if served["revision"] == revision else f"revision {served['revision']}, not {revision}"
    root = str(served.get("root") or served["id"])
    same = Path(root).resolve() == Path(model).resolve() if Path(model).is_dir() else root == model
    return "" if same else f"'{root}'"
