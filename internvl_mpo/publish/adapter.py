"""Adapter-only folders: LoRA weights, the name of their base, and what loads both; or both merged into one model."""

import re
from pathlib import Path
from typing import Any

from internvl_mpo.errors import BadInputError
from internvl_mpo.families.registry import family_of_processor, family_of_source
from internvl_mpo.files import link, read_json, update_json
from internvl_mpo.publish.card import CardFacts, write_card
from internvl_mpo.publish.model_folder import copy_code, write_model_folder

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds an adapter and no model."""
    return (folder / ADAPTER_CONFIG).exists() and not (folder / "config.json").exists()


def find_base(adapter: Path, given: str | None) -> Path:
    """Return the local folder of the model an adapter belongs to.

    Args:
        adapter: folder with adapter_config.json.
        given: the folder, if the user names it.

    Raises:
        BadInputError: it is not to be found here.
    """
    named = given or read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not named or not (Path(named) / "config.json").exists():
        raise BadInputError(f"the base model of {adapter} ('{named}') is not here; give its folder with --base")
    return Path(named)


def build_adapter_folder(source: Path, output: Path, *, base: Path, base_model: str) -> None:
    """Copy an adapter, let it name its base model by Hub id, and put beside it what its base may lack.

    Args:
        source: folder that peft saved.
        output: folder to fill.
        base: folder of the model the adapter was trained on.
        base_model: owner/name of the model the adapter was trained on.

    Raises:
        BadInputError: the weights are missing or are not safetensors.
    """
    if not (source / ADAPTER_WEIGHTS).exists():
        raise BadInputError(f"{source} has no {ADAPTER_WEIGHTS}; save the adapter with peft's save_pretrained")
    link(source / ADAPTER_WEIGHTS, output)
    config = read_json(source / ADAPTER_CONFIG)
    # peft notes the class it wrapped, which lives in a module cache that nobody else has
    config |= {"base_model_name_or_path": base_model, "auto_mapping": None, "task_type": "CAUSAL_LM", "revision": None}
    update_json(output / ADAPTER_CONFIG, config)
    family = family_of_source(str(base))
    if family.name == "internvl_chat":  # the others' bases bring all that is needed
        write_adapter_companions(output, family.load_processor(str(base)))


def write_adapter_companions(folder: Path, processor: Any) -> None:
    """Put beside adapter weights what loads them on their base: the processor and, for InternVL chat, the code.

    The code comes along because the base may hold none, or the official one, which is of an older transformers.
    """
    processor.save_pretrained(folder)
    if family_of_processor(processor).name == "internvl_chat":
        copy_code(folder)


def write_adapter_card(folder: Path, *, name: str, model_type: str, base: str) -> None:
    """Write the page of an adapter that comes out of training, with code that loads it.

    Args:
        folder: that of the adapter; peft's template there is replaced.
        name: of the folder when it is in its place.
        model_type: of the base model.
        base: folder or Hub id of the base model, as adapter_config.json has it.
    """
    is_on_hub = bool(re.fullmatch(r"[\w.-]+/[\w.-]+", base)) and not Path(base).exists()
    named = {"base_model": base, "relation": "adapter"} if is_on_hub else {"base_folder": base}
    write_card(folder, CardFacts(name=name, kind="adapter", model_type=model_type, **named))


def merge_adapter(base: Path, adapter: Path, output: Path, *, max_shard_size: int, dtype: str | None) -> None:
    """Add an adapter's weights to its base model and write the model folder."""
    import torch
    from peft import PeftModel

    family = family_of_source(str(base))
    model: Any = family.load_model(str(base), dtype="auto")
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    if dtype:
        model = model.to(getattr(torch, dtype))
    write_model_folder(model, family.load_processor(str(base)), output, max_shard_size=max_shard_size)
