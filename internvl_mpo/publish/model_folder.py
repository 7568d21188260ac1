"""Model folders: official weights get this project's code, a fast tokenizer, a processor and a chat template."""

import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl_mpo.errors import BadInputError
from internvl_mpo.families.registry import family_of_model
from internvl_mpo.files import read_json, update_json
from internvl_mpo.publish.card import CardFacts, write_card
from internvl_mpo.publish.family_folder import build_family_folder
from internvl_mpo.publish.weights import check_weights, place_weights

CODE_FOLDER = Path(__file__).parents[2] / "modeling_internvl_mpo"
AUTO_MAP = {
    "AutoConfig": "configuration_internvl_mpo.InternVLChatConfig",
    "AutoModel": "modeling_internvl_mpo.InternVLChatModel",
    "AutoModelForCausalLM": "modeling_internvl_mpo.InternVLChatModel",
    "AutoModelForImageTextToText": "modeling_internvl_mpo.InternVLChatModel",
    "AutoModelForMultimodalLM": "modeling_internvl_mpo.InternVLChatModel",
    "AutoProcessor": "processing_internvl_mpo.InternVLChatProcessor",
    "AutoImageProcessor": "image_processing_internvl_mpo.InternVLImageProcessor",
}


def write_model_folder(
    model: Any,
    processor: Any,
    output_dir: str | Path,
    *,
    weights: Mapping[str, Any] | None = None,
    max_shard_size: int = 5 * 10**9,
) -> Path:
    """Save a model so that the folder works by itself with `trust_remote_code=True`.

    Writes safetensors weights under the official keys, config.json with its `auto_map`, the flat code files,
    tokenizer, processor, chat template, generation_config.json and a model card. A model of transformers' own families
    is written as transformers writes it: its folder needs no code, and gets no card.

    Args:
        model: an `InternVLChatModel`, or one of another family; adapters must have been merged.
        processor: its processor.
        output_dir: made if absent.
        weights: tensors to save instead of the model's own, under its keys.
        max_shard_size: of a file of weights, in bytes.

    Returns:
        The folder.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if family_of_model(model).name != "internvl_chat":
        model.save_pretrained(output_dir, state_dict=weights, max_shard_size=max_shard_size)
        processor.save_pretrained(output_dir)
        return output_dir
    model.config.image_token_id = processor.image_token_id
    model.save_pretrained(output_dir, state_dict=weights, max_shard_size=max_shard_size)
    write_companions(output_dir, processor, model.generation_config)
    return output_dir


def build_model_folder(
    source: str | Path, output_dir: str | Path, *, max_shard_size: int = 5 * 10**9, dtype: str | None = None
) -> Path:
    """Put code, tokenizer and processor beside the weights of an InternVL folder in the official layout.

    Weights are checked against the configuration by their headers, then linked (copied where the file system cannot);
    `.bin` files are read with `weights_only=True` and become safetensors. A folder of another family keeps its own
    files, see `build_family_folder`.

    Args:
        source: folder with config.json, weights and tokenizer files.
        output_dir: made if absent.
        max_shard_size: in bytes; larger files of weights are cut anew.
        dtype: cast the weights to "bfloat16", "float16" or "float32"; None leaves them as they are.

    Returns:
        The folder that was built.

    Raises:
        BadInputError: of no family, a missing shard, or weights that do not fit the configuration.
    """
    from transformers import GenerationConfig

    from modeling_internvl_mpo import InternVLChatConfig, InternVLChatProcessor

    source, output_dir = Path(source), Path(output_dir)
    if source.resolve() == output_dir.resolve():
        raise BadInputError(f"output is the source folder {source}; give another folder")
    raw = read_json(source / "config.json")
    if raw.get("model_type") != "internvl_chat":
        return build_family_folder(source, output_dir, max_shard_size=max_shard_size, dtype=dtype)
    try:
        config = InternVLChatConfig(**raw)
        processor = InternVLChatProcessor.from_pretrained(source)
    except (ValueError, OSError, KeyError) as error:
        raise BadInputError(f"{source}: {str(error).splitlines()[0]}") from error
    config.image_token_id = processor.image_token_id
    output_dir.mkdir(parents=True, exist_ok=True)
    check = functools.partial(check_weights, config)
    place_weights(source, output_dir, check=check, max_shard_size=max_shard_size, dtype=dtype)
    if dtype:
        config.dtype = dtype
    config.save_pretrained(output_dir)
    generation_config = GenerationConfig()
    if (source / "generation_config.json").exists():
        generation_config = GenerationConfig.from_pretrained(source)
    write_companions(output_dir, processor, generation_config)
    for name in ("README.md", "LICENSE"):
        if (source / name).exists():
            shutil.copyfile(source / name, output_dir / name)
    return output_dir


def copy_code(folder: Path) -> None:
    """Copy the code that `trust_remote_code` runs: flat files, each able to import its neighbours there."""
    for path in sorted(CODE_FOLDER.glob("*.py")):
        if path.name != "__init__.py":  # registers with the Auto classes, which remote code must not do
            shutil.copyfile(path, folder / path.name)


def write_companions(output_dir: Path, processor: Any, generation_config: Any) -> None:
    """Write everything but weights: code, `auto_map`, tokenizer, processor, generation settings, card."""
    processor.save_pretrained(output_dir)
    copy_code(output_dir)
    update_json(output_dir / "config.json", {"architectures": ["InternVLChatModel"], "auto_map": AUTO_MAP})
    # Readers differ in which of the two files they open, so both say everything.
    image_settings = processor.image_processor.to_dict()
    image_settings["auto_map"] = {name: AUTO_MAP[name] for name in ("AutoImageProcessor", "AutoProcessor")}
    update_json(output_dir / "preprocessor_config.json", image_settings)
    auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
    update_json(output_dir / "processor_config.json", {"auto_map": auto_map, "image_processor": image_settings})
    # Base models end a text with another token than chats end a turn with.
    known = generation_config.eos_token_id
    ends = [processor.end_of_turn_id, *(known if isinstance(known, list) else [known])]
    generation_config.eos_token_id = sorted({end for end in ends if end is not None})
    if generation_config.pad_token_id is None:
        generation_config.pad_token_id = processor.tokenizer.pad_token_id
    generation_config.save_pretrained(output_dir)
    if not (output_dir / "README.md").exists():  # a folder may be written under the name .NAME.part and renamed
        write_card(output_dir, CardFacts(name=output_dir.name.removeprefix(".").removesuffix(".part")))
