"""The one door: which family a checkpoint, a model or a processor belongs to."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from internvl_mpo.errors import BadInputError
from internvl_mpo.families.contract import Family
from internvl_mpo.families.idefics3 import Idefics3
from internvl_mpo.families.internvl import InternVL
from internvl_mpo.families.internvl_chat import InternVLChat
from internvl_mpo.families.llava import Llava
from internvl_mpo.families.llava_next import LlavaNext
from internvl_mpo.families.llava_onevision import LlavaOnevision
from internvl_mpo.families.qwen2_vl import Qwen2VL
from internvl_mpo.families.qwen3_vl import Qwen3VL

FAMILIES: tuple[Family, ...] = (
    *(InternVLChat(), InternVL(), Qwen2VL(), Qwen3VL()),
    *(Llava(), LlavaNext(), LlavaOnevision(), Idefics3()),
)

_BOTH_WAYS = "its attention goes in both directions over picture tokens, and a pack's goes in one"
_OWN_CODE = "that is the layout of its authors' own code; the one of transformers is mostly published under llava-hf"
# What is asked for often and cannot be packed, or not as it is: model_type -> the reason.
REFUSED = {
    **dict.fromkeys(("gemma3", "gemma3n", "paligemma"), _BOTH_WAYS),
    **dict.fromkeys(("llava_llama", "llava_mistral", "llava_qwen"), _OWN_CODE),
    "mllama": "its pictures enter by cross-attention, beside the tokens of a pack",
    "pixtral": "its pictures keep their shape, and no family here has such a tower",
    "mistral3": "its pictures keep their shape, and no family here has such a tower",
}

_BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}
_BY_PROCESSOR = {processor: family for family in FAMILIES for processor in family.processors}


def family_of_model(model: nn.Module) -> Family:
    """Return the family of a loaded model, with or without adapters.

    Raises:
        BadInputError: there is none for it.
    """
    return family_of_type(model.config.model_type, "the model")


def family_of_processor(processor: Any) -> Family:
    """Return the family whose prompts a processor makes.

    Raises:
        BadInputError: there is none for it.
    """
    names = [kind.__name__ for kind in type(processor).__mro__]
    family = next((_BY_PROCESSOR[name] for name in names if name in _BY_PROCESSOR), None)
    if family is None:
        raise BadInputError(f"no family makes prompts with a {names[0]}; {_KNOWN}")
    return family


def family_of_type(model_type: str | None, where: str) -> Family:
    """Return the family of a `model_type`.

    Args:
        model_type: from config.json.
        where: how the message begins.

    Raises:
        BadInputError: there is none for it, naming those there are.
    """
    if model_type not in _BY_TYPE:
        reason = f" ({REFUSED[model_type]})" if model_type in REFUSED else ""
        raise BadInputError(f"{where} is of model_type '{model_type}'{reason}, {_KNOWN}")
    return _BY_TYPE[model_type]


def family_of_source(source: str) -> Family:
    """Return the family of a folder or Hub id, from config.json alone.

    Raises:
        BadInputError: there is no such folder or repository, it holds adapters alone, or no family takes it.
    """
    config = read_config(source)
    where = str(Path(source) / "config.json") if Path(source).is_dir() else f"'{source}'"
    family = family_of_type(config.get("model_type"), where)
    family.check_config(config)
    return family


def read_config(source: str) -> Mapping[str, Any]:
    """Return config.json of a folder or Hub id as it is written.

    Raises:
        BadInputError: it is not there, or is no JSON object.
    """
    if not Path(source).is_dir():
        return _hub_config(source)
    path = Path(source) / "config.json"
    if not path.is_file():
        if (Path(source) / "adapter_config.json").is_file():
            raise BadInputError(
                f"model folder '{source}' holds LoRA adapters alone; give the merged model folder of that run "
                "(save_merged), or the model it started from"
            )
        raise BadInputError(f"model folder '{source}' has no config.json")
    return _parsed(path, str(path))


def _hub_config(source: str) -> Mapping[str, Any]:
    from transformers.utils import cached_file

    if source.startswith((".", "/")) or source.count("/") > 1:
        raise BadInputError(f"model folder '{source}' does not exist")
    try:
        path = cached_file(source, "config.json")
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise BadInputError(f"'{source}' is no folder here, and the Hub does not give it: {reason}") from error
    return _parsed(Path(path), f"config.json of '{source}'")


def _parsed(path: Path, where: str) -> Mapping[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInputError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise BadInputError(f"{where} is not valid JSON: no object")
    return config


_KNOWN = f"expected one of {', '.join(repr(name) for name in _BY_TYPE)}"
