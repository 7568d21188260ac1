"""Shapes of models without their weights: of the official checkpoints by name, and of any config.json."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from internvl_mpo.errors import BadInputError
from internvl_mpo.families.registry import family_of_type
from modeling_internvl_mpo import InternVLChatConfig

_VISION_300M = {
    **{"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    **{"norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True, "image_size": 448},
}
_VISION_6B = {
    **{"hidden_size": 3200, "num_hidden_layers": 45, "num_attention_heads": 25, "intermediate_size": 12800},
    **{"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False, "image_size": 448},
}
# The official InternVL2 checkpoints: tower; language model; its width, layers, heads, key heads, inner width, words.
SHAPES: dict[str, tuple[dict[str, Any], str, tuple[int, int, int, int, int, int]]] = {
    "1b": (_VISION_300M, "Qwen2ForCausalLM", (896, 24, 14, 2, 4864, 151655)),
    "2b": (_VISION_300M, "InternLM2ForCausalLM", (2048, 24, 16, 8, 8192, 92553)),
    "4b": (_VISION_300M, "Phi3ForCausalLM", (3072, 32, 32, 32, 8192, 32020)),
    "8b": (_VISION_300M, "InternLM2ForCausalLM", (4096, 32, 32, 8, 14336, 92553)),
    "26b": (_VISION_6B, "InternLM2ForCausalLM", (6144, 48, 48, 8, 16384, 92553)),
    "40b": (_VISION_6B, "LlamaForCausalLM", (7168, 60, 56, 8, 20480, 64009)),
    "76b": (_VISION_6B, "LlamaForCausalLM", (8192, 80, 64, 8, 28672, 128265)),
}

_NATIVE_300M = {
    **{"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    **{"norm_type": "layer_norm", "use_qk_norm": False, "attention_bias": True, "image_size": [448, 448]},
}
_QWEN25_7B = {
    **{"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
    **{"intermediate_size": 18944, "tie_word_embeddings": False},
}
_QWEN3_8B = {
    **{"hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8},
    **{"intermediate_size": 12288, "head_dim": 128, "tie_word_embeddings": False},
}
# config.json, as far as memory depends on it, of the checkpoints in configs/ that are in transformers' own layout.
NATIVE_SHAPES: dict[str, dict[str, Any]] = {
    "internvl3-8b-hf": {
        "model_type": "internvl",
        "vision_config": _NATIVE_300M,
        "text_config": {"model_type": "qwen2", "vocab_size": 151674, **_QWEN25_7B},
        "tie_word_embeddings": False,
    },
    "internvl3_5-8b-hf": {
        "model_type": "internvl",
        "vision_config": _NATIVE_300M,
        "text_config": {"model_type": "qwen3", "vocab_size": 151936, **_QWEN3_8B},
        "tie_word_embeddings": False,
    },
    "qwen2.5-vl-7b-instruct": {
        "model_type": "qwen2_5_vl",
        "vision_config": {"depth": 32, "hidden_size": 1280, "out_hidden_size": 3584, "intermediate_size": 3420},
        "text_config": {"vocab_size": 152064, **_QWEN25_7B},
        "tie_word_embeddings": False,
    },
}


def config_of(values: Mapping[str, Any]) -> Any:
    """Return the configuration that config.json holds, of any family."""
    return AutoConfig.for_model(**values)


def read_shape(source: str) -> Any:
    """Return the configuration of a size ("8b", "OpenGVLab/InternVL2-8B"), a model folder or a config.json.

    Raises:
        BadInputError: there is none, or no family takes it.
    """
    path = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
    if path.is_file():
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise BadInputError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict):
            raise BadInputError(f"{path} is not valid JSON: no object")
        family_of_type(values.get("model_type"), str(path)).check_config(values)
        return config_of(values)
    if (known := source.lower().rpartition("/")[2]) in NATIVE_SHAPES:
        return config_of(NATIVE_SHAPES[known])
    found = re.search(r"(?:^|internvl2-(?:llama3-)?)(\d+b)(?:-mpo)?$", source.lower())
    if not found or found.group(1) not in SHAPES:
        known = ", ".join((*SHAPES, *NATIVE_SHAPES))
        raise BadInputError(f"'{source}' is no config.json, no model folder and none of {known}")
    vision, architecture, (width, layers, heads, key_heads, inner, vocabulary) = SHAPES[found.group(1)]
    language = {
        **{"architectures": [architecture], "hidden_size": width, "num_hidden_layers": layers},
        **{"num_attention_heads": heads, "num_key_value_heads": key_heads, "intermediate_size": inner},
        **{"vocab_size": vocabulary, "pad_token_id": 0},
        **({"bias": False} if architecture == "InternLM2ForCausalLM" else {}),
    }
    return InternVLChatConfig(vision_config=vision, llm_config=language, force_image_size=448, ps_version="v2")
