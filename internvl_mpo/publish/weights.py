"""Weights of a checkpoint folder: found, checked by their headers, linked or cut into shards anew."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from internvl_mpo.errors import BadInputError
from internvl_mpo.files import link, read_json, update_json

INDEX = "model.safetensors.index.json"


def weight_files(source: Path) -> list[Path]:
    """Return the shards of a folder: safetensors if there are any, else `.bin`.

    Raises:
        BadInputError: there are none, or one that the index names is missing.
    """
    for single, index in (("model.safetensors", INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json")):
        if (source / index).exists():
            names = sorted(set(read_json(source / index)["weight_map"].values()))
            missing = [name for name in names if not (source / name).exists()]
            if missing:
                raise BadInputError(f"{source / index} names {missing[0]}, which is not there; download it again")
            return [source / name for name in names]
        if (source / single).exists():
            return [source / single]
    raise BadInputError(f"{source} has no weights; expected model.safetensors or its index, or pytorch_model.bin")


def place_weights(
    source: Path,
    output: Path,
    *,
    check: Callable[[list[Path]], None],
    max_shard_size: int = 5 * 10**9,
    dtype: str | None = None,
) -> None:
    """Put the weights of a folder into another one.

    Shards that are small enough are linked; `.bin` files are read with `weights_only=True` and become safetensors.

    Args:
        source: folder with weights.
        output: folder to fill.
        check: looks at the shards in the output folder, and raises BadInputError where they do not fit config.json.
        max_shard_size: in bytes.
        dtype: cast to "bfloat16", "float16" or "float32"; None leaves the weights as they are.

    Raises:
        BadInputError: a missing or damaged shard, or weights that do not fit the configuration.
    """
    shards = weight_files(source)
    if shards[0].suffix == ".bin":
        shards = _convert_bins(shards, output)
    else:
        shards = [link(path, output) for path in shards]
        if (source / INDEX).exists():
            shutil.copyfile(source / INDEX, output / INDEX)
    check(shards)
    _cut_anew(output, shards, limit=max_shard_size, dtype=dtype)


def _convert_bins(shards: list[Path], output: Path) -> list[Path]:
    import torch
    from safetensors.torch import save_file

    written, weight_map, total = [], {}, 0
    for number, path in enumerate(shards, start=1):
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises its own kinds for damage and for forbidden content
            raise BadInputError(f"{path} is not a plain file of tensors ({type(error).__name__})") from error
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # A tensor that is a view of another would be refused; safetensors stores each by itself.
        tensors = {key: value.clone().contiguous() for key, value in tensors.items()}
        save_file(tensors, output / name, metadata={"format": "pt"})
        written.append(output / name)
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(value.numel() * value.element_size() for value in tensors.values())
    if len(shards) > 1:
        update_json(output / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return written


def check_weights(config: Any, shards: list[Path]) -> None:
    """Compare names and shapes in the shards' headers with those of the network.

    Args:
        config: an `InternVLChatConfig`.
        shards: files of weights.

    Raises:
        BadInputError: they do not fit, or a file is damaged.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    from modeling_internvl_mpo import InternVLChatModel

    with torch.device("meta"):
        network = InternVLChatModel(config)
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    for path in shards:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - the file is not a mapping
                    shape, wanted = tuple(file.get_slice(name).get_shape()), expected.pop(name, None)
                    if wanted is None:
                        raise BadInputError(f"{path} has a tensor {name} that the network of config.json does not have")
                    if shape != wanted:
                        raise BadInputError(f"{path}: {name} has shape {shape}, config.json asks for {wanted}")
        except SafetensorError as error:
            raise BadInputError(f"{path} is damaged ({error}); download it again") from error
    missing = [name for name in expected if name not in network.all_tied_weights_keys]  # a tied matrix is stored once
    if missing:
        raise BadInputError(f"the weights of {shards[0].parent} lack {missing[0]}, {len(missing)} in all")


def _cut_anew(output: Path, shards: list[Path], *, limit: int, dtype: str | None) -> None:
    """Write new shards, one in memory at a time, if one is too large or the type of the weights changes."""
    import torch
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors import safe_open
    from safetensors.torch import save_file

    wanted = getattr(torch, dtype) if dtype else None
    shapes, where = {}, {}
    for path in shards:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file is not a mapping
                where[name] = path
                piece = file.get_slice(name)
                kind = wanted or getattr(torch, _TORCH_NAMES[piece.get_dtype()])
                shapes[name] = torch.empty(piece.get_shape(), dtype=kind, device="meta")
    if wanted is None and all(_num_bytes(shapes, where, path) <= limit for path in shards):
        return
    split = split_torch_state_dict_into_shards(shapes, max_shard_size=limit)
    old = [path.rename(path.with_name(f"{path.name}.old")) for path in shards]
    moved = dict(zip(shards, old, strict=True))
    for file_name, names in split.filename_to_tensors.items():
        tensors = {}
        for name in names:
            with safe_open(moved[where[name]], framework="pt") as file:
                tensors[name] = file.get_tensor(name).to(wanted) if wanted else file.get_tensor(name)
        save_file(tensors, output / file_name, metadata={"format": "pt"})
    for path in old:
        path.unlink()
    (output / INDEX).unlink(missing_ok=True)
    if split.is_sharded:
        update_json(output / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def _num_bytes(shapes: dict[str, Any], where: dict[str, Path], path: Path) -> int:
    return sum(shapes[name].numel() * shapes[name].element_size() for name, its in where.items() if its == path)


def parse_size(text: str) -> int:
    """Return the bytes that "5GB" or "300MB" stand for.

    Raises:
        BadInputError: it is no size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMG]?)B?\s*", text)
    if not match or not float(match[1]):
        raise BadInputError(f"max_shard_size is '{text}'; give a size such as 5GB or 300MB")
    return int(float(match[1]) * {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}[match[2].upper()])


_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64"}
