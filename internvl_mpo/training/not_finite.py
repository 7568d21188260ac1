"""What is kept of a step whose loss is not finite."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn

from internvl_mpo.files import atomic_writer
from internvl_mpo.mmpr.pairs import PairRow

# --- a step that is not finite ----------------------------------------------------------------------------------------


def weights_not_finite(model: nn.Module, rank: int) -> list[str]:
    """Return the names of the weights that are not finite any more; under ZeRO-3, where this rank's share is not.

    Args:
        model: the policy as it is now.
        rank: this rank.
    """
    broken = []
    for name, weight in model.named_parameters():
        own = weight.detach()
        if hasattr(weight, "ds_tensor"):  # the parameter itself is an empty placeholder; the last share is padded
            share = weight.ds_tensor.numel()
            own = weight.ds_tensor[: max(0, weight.ds_numel - rank * share)]
        if not bool(torch.isfinite(own).all()):
            broken.append(name)
    return broken


def dump_step(path: Path, header: Mapping[str, Any], rows: Sequence[PairRow], logps: Mapping[str, Any]) -> None:
    """Write what `internvl_mpo.replay` needs to repeat a step.

    Pictures in archives or Parquet rows are copied beside the file, so that the dump needs nothing else; `image` then
    names the copies.

    Args:
        path: file to write.
        header: settings of the run that the numbers depend on.
        rows: the pairs.
        logps: reference log-probs of the chosen and of the rejected response, by pair id.
    """
    pairs = []
    for row in rows:
        pair, root = row.pair, row.image_root
        if not isinstance(root, (str, Path)):
            root = path.with_suffix("")
            pair = replace(pair, images=tuple(_copy(row.image_root.read(name), name, root) for name in pair.images))
        place = {"where": row.where, "image_root": str(Path(root).resolve()), "max_tiles": row.max_tiles}
        pairs.append({**pair.to_json(), **place, "reference_logps": logps[pair.id]})
    with atomic_writer(path) as out:
        json.dump({**header, "pairs": pairs}, out, indent=1, ensure_ascii=False)


def _copy(picture: bytes, name: str, folder: Path) -> str:
    """Write a picture under a name of its content, since pictures of several folders meet here, and return it."""
    copy = hashlib.sha256(picture).hexdigest()[:16] + PurePosixPath(name).suffix
    folder.mkdir(parents=True, exist_ok=True)
    (folder / copy).write_bytes(picture)
    return copy
