"""Folders of transformers' own families: weights that fit, the files the Auto classes read, and no code."""

from pathlib import Path
from typing import Any

from internvl_mpo.errors import BadInputError
from internvl_mpo.families.contract import Family
from internvl_mpo.families.registry import family_of_source
from internvl_mpo.files import link, read_json, update_json
from internvl_mpo.publish.weights import place_weights

# What transformers and servers read beside weights, config.json and tokenizer_config.json; nothing else goes out.
COMPANIONS = (
    *("generation_config.json", "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("chat_template.jinja", "chat_template.json", "tokenizer.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
)
# Where a model was loaded from and whose code it came with: nobody else has either.
_LOCAL = ("_name_or_path", "name_or_path", "auto_map")


def build_family_folder(
    source: Path, output: Path, *, max_shard_size: int = 5 * 10**9, dtype: str | None = None
) -> Path:
    """Put the weights of a folder of transformers' own classes, and what belongs to them, into another one.

    Args:
        source: folder with config.json, weights, tokenizer and processor files.
        output: made if absent.
        max_shard_size: in bytes; larger files of weights are cut anew.
        dtype: cast the weights to "bfloat16", "float16" or "float32"; None leaves them as they are.

    Returns:
        The folder that was built.

    Raises:
        BadInputError: of no family, no processor, a missing shard, or weights that do not fit the configuration.
    """
    family = family_of_source(str(source))
    try:
        family.load_processor(str(source))
    except (ValueError, OSError, KeyError) as error:
        raise BadInputError(f"{source}: {str(error).splitlines()[0]}") from error
    output.mkdir(parents=True, exist_ok=True)
    for name in COMPANIONS:
        if (source / name).is_file():
            link(source / name, output)
    for name in ("config.json", "tokenizer_config.json"):
        if (source / name).is_file():
            told = {key: value for key, value in read_json(source / name).items() if key not in _LOCAL}
            (output / name).unlink(missing_ok=True)  # of an earlier build
            update_json(output / name, _cast(told, dtype) if dtype and name == "config.json" else told)

    def check(shards: list[Path]) -> None:
        _check_weights(family, output)

    place_weights(source, output, check=check, max_shard_size=max_shard_size, dtype=dtype)
    return output


def _cast(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return a configuration, its parts included, that names another type of weights."""
    inner = {key: _cast(value, dtype) for key, value in config.items() if isinstance(value, dict)}
    named = {key: dtype for key in ("dtype", "torch_dtype") if key in config}
    return {**config, **inner, **(named or ({"dtype": dtype} if "model_type" in config else {}))}


def _check_weights(family: Family, folder: Path) -> None:
    """Compare names and shapes of a folder's weights with its network, as transformers itself would read them."""
    options = {"device_map": {"": "meta"}, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        _, found = family.load_model(str(folder), **options)
    except Exception as error:  # safetensors and transformers raise their own kinds
        raise BadInputError(f"the weights of {folder} are damaged ({str(error).splitlines()[0]})") from error
    if found["mismatched_keys"]:
        name, shape, wanted = min(found["mismatched_keys"])
        raise BadInputError(f"{name} has shape {tuple(shape)}, config.json asks for {tuple(wanted)}")
    if found["missing_keys"]:
        missing = found["missing_keys"]
        raise BadInputError(f"the weights of {folder} lack {min(missing)}, {len(missing)} in all")
    if found["unexpected_keys"]:
        name = min(found["unexpected_keys"])
        raise BadInputError(f"{folder} has a tensor {name} that the network of config.json does not have")
