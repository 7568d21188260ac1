"""Configuration of InternVL chat models, in the schema of the official `config.json` files.

Reads every published `config.json` of the InternVL2 family (and of 2.5, 3 and 3.5, which share the class) as it is,
stale keys included, and writes the same schema back, so that serving engines and older readers accept the folder.
"""

import copy
from collections.abc import Set
from typing import Any, ClassVar

from transformers import CONFIG_MAPPING, PreTrainedConfig

# Left behind in `llm_config` and `vision_config` by the dump of a 4.37 configuration. None of them describes the
# network; `max_length: 20` and a stored `flash_attention_2` would do harm if they were obeyed.
STALE_KEYS = {
    *("_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "add_cross_attention"),
    *("attn_implementation", "auto_map", "chunk_size_feed_forward", "cross_attention_hidden_size", "finetuning_task"),
    *("id2label", "is_decoder", "is_encoder_decoder", "label2id", "max_length", "output_attentions"),
    *("output_hidden_states", "prefix", "problem_type", "pruned_heads", "return_dict", "sep_token_id"),
    *("task_specific_params", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class", "torchscript"),
    *("transformers_version", "use_bfloat16", "use_flash_attn"),
}

# `llm_config.architectures[0]` decides which language model is built; the value is the transformers model type.
LANGUAGE_MODELS = {
    "InternLM2ForCausalLM": "internlm2",
    "LlamaForCausalLM": "llama",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

# Linear layers of the language model that adapters go to, by model type; `target_modules` of a peft LoraConfig.
LORA_TARGETS = {
    "internlm2": ["attention.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen3": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


class InternVisionConfig(PreTrainedConfig):
    """InternViT: the defaults are those of the 6B tower, as in the official class.

    Attributes:
        norm_type: "layer_norm" (300M) or "rms_norm" (6B).
        qk_normalization: RMS-normalise queries and keys over all heads together (6B).
        qkv_bias: bias of the fused query-key-value projection (300M).
        initializer_factor: start value of the layer scales.
        drop_path_rate: of the last layer; it grows linearly from 0 at the first.
    """

    model_type = "intern_vit_6b"
    base_config_key = "vision_config"

    num_channels: int = 3
    patch_size: int = 14
    image_size: int = 224
    qkv_bias: bool = False
    hidden_size: int = 3200
    num_attention_heads: int = 25
    intermediate_size: int = 12800
    qk_normalization: bool = True
    num_hidden_layers: int = 48
    hidden_act: str = "gelu"
    norm_type: str = "rms_norm"
    layer_norm_eps: float = 1e-6
    dropout: float = 0.0
    drop_path_rate: float = 0.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**_without_stale_keys(kwargs))
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"vision hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}; correct one of them in vision_config"
            )
        if self.norm_type not in ("layer_norm", "rms_norm"):
            raise ValueError(f"vision norm_type is {self.norm_type!r}; expected 'layer_norm' or 'rms_norm'")


class InternLM2Config(PreTrainedConfig):
    """InternLM2 with its published schema: `rope_theta` and `rope_scaling` stay as they are in the file.

    Attributes:
        bias: biases of the fused `wqkv` and of `wo` (false in all published InternVL files).
        rope_scaling: None, or `{"type": "dynamic" | "linear", "factor": float}`.
    """

    model_type = "internlm2"
    base_config_key = "llm_config"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 103168
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    bias: bool = True
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        super().__post_init__(**_without_stale_keys(kwargs))
        if self.rope_scaling is not None:
            kind = self.rope_scaling.get("type", self.rope_scaling.get("rope_type"))
            factor = self.rope_scaling.get("factor")
            if kind not in ("linear", "dynamic") or not isinstance(factor, (int, float)) or factor < 1:
                raise ValueError(
                    f"rope_scaling of InternLM2 is {self.rope_scaling}; expected type 'linear' or 'dynamic' "
                    "and a factor of at least 1"
                )


class InternVLChatConfig(PreTrainedConfig):
    """Vision tower, language model, and how images become tokens.

    Attributes:
        template: name of the conversation template, see `conversation_internvl_mpo`.
        system_message: replaces the template's system message in `chat` and in the processor; None keeps it.
        force_image_size: side of a tile in pixels; None means the vision tower's image size.
        downsample_ratio: of the patch grid's side by pixel shuffle.
        ps_version: "v2" keeps the patch grid's orientation, "v1" transposes it.
        select_layer: vision layer whose output is used; -1 is the last.
        min_dynamic_patch, max_dynamic_patch: fewest and most tiles of one image, thumbnail not counted.
        dynamic_image_size: cut images into tiles; otherwise one tile per image.
        use_thumbnail: append the whole image as a last tile when there is more than one.
        image_token_id: id of `<IMG_CONTEXT>`; absent from official files, found in the tokenizer files at load.
    """

    model_type = "internvl_chat"
    sub_configs: ClassVar[dict[str, type]] = {"vision_config": InternVisionConfig, "llm_config": PreTrainedConfig}
    attribute_map: ClassVar[dict[str, str]] = {"text_config": "llm_config"}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vision_config: dict[str, Any] | PreTrainedConfig | None = None
    llm_config: dict[str, Any] | PreTrainedConfig | None = None
    use_backbone_lora: int = 0
    use_llm_lora: int = 0
    pad2square: bool = False
    select_layer: int = -1
    force_image_size: int | None = None
    downsample_ratio: float = 0.5
    template: str | None = None
    dynamic_image_size: bool = False
    use_thumbnail: bool = False
    ps_version: str = "v1"
    min_dynamic_patch: int = 1
    max_dynamic_patch: int = 6
    system_message: str | None = None
    image_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = _vision_config(self.vision_config)
        self.llm_config = _language_config(self.llm_config)
        super().__post_init__(**_without_stale_keys(kwargs, keep={"auto_map"}))
        # Later official files store the width on top as well; libraries that size optimizer buckets look for it there.
        self.hidden_size = self.llm_config.hidden_size
        # 1B's base model ties its embeddings, its checkpoint does not; every file stores an output matrix.
        self.tie_word_embeddings = bool(self.llm_config.tie_word_embeddings)
        if self.ps_version not in ("v1", "v2"):
            raise ValueError(f"ps_version is {self.ps_version!r}; expected 'v1' or 'v2'")
        if self.force_image_size is None:
            self.force_image_size = self.vision_config.image_size
        grid = self.force_image_size / self.vision_config.patch_size * self.downsample_ratio
        if not grid.is_integer():
            raise ValueError(
                f"force_image_size {self.force_image_size}, patch_size {self.vision_config.patch_size} and "
                f"downsample_ratio {self.downsample_ratio} give {grid} image tokens per side; it must be a whole number"
            )

    @property
    def num_image_token(self) -> int:
        """Image tokens per tile."""
        return int(self.force_image_size / self.vision_config.patch_size * self.downsample_ratio) ** 2

    def to_dict(self) -> dict[str, Any]:
        """Return the official schema: `llm_config` with `rope_theta` and `rope_scaling`, nothing left out."""
        output = _official(super().to_dict(), keep={"auto_map", "transformers_version"})
        for name in ("vision_config", "llm_config"):
            output[name] = _official(output[name])
            output[name].pop("torch_dtype", None)  # said once, on top
        for name in ("system_message", "image_token_id"):
            if output[name] is None:
                del output[name]
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the whole schema: engines that read the file themselves do not know our defaults."""
        return self.to_dict()


def _without_stale_keys(values: dict[str, Any], keep: Set[str] = frozenset()) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in STALE_KEYS or key in keep}


def _vision_config(given: dict[str, Any] | PreTrainedConfig | None) -> PreTrainedConfig:
    if isinstance(given, PreTrainedConfig):
        return given
    config = InternVisionConfig(**_without_stale_keys(given or {}))
    config.architectures = config.architectures or ["InternVisionModel"]
    return config


def _language_config(given: dict[str, Any] | PreTrainedConfig | None) -> PreTrainedConfig:
    """Build the configuration that `architectures[0]` asks for; `model_type` decides only where that is absent."""
    if isinstance(given, PreTrainedConfig):
        if not given.architectures:
            given.architectures = [_architecture(given.model_type)]
        return given
    values = _without_stale_keys(copy.deepcopy(given or {}))
    model_type = values.pop("model_type", "internlm2")
    architectures = values.pop("architectures", None) or [_architecture(model_type)]
    if architectures[0] not in LANGUAGE_MODELS:
        raise ValueError(
            f"llm_config.architectures is {architectures}; the language models known here are "
            f"{', '.join(sorted(LANGUAGE_MODELS))}"
        )
    scaling = values.get("rope_scaling")
    if scaling and scaling.get("type") == "su":  # the name before transformers 4.44
        scaling["type"] = "longrope"
    kind = LANGUAGE_MODELS[architectures[0]]
    config_class = InternLM2Config if kind == "internlm2" else CONFIG_MAPPING[kind]
    return config_class(architectures=architectures, **values)


def _architecture(model_type: str) -> str:
    for name, kind in LANGUAGE_MODELS.items():
        if kind == model_type:
            return name
    raise ValueError(
        f"llm_config has model_type {model_type!r} and no architectures; expected one of "
        f"{', '.join(sorted(LANGUAGE_MODELS.values()))}"
    )


def _official(values: dict[str, Any], keep: Set[str] = frozenset()) -> dict[str, Any]:
    """Spell transformers 5's names as the official files do, and leave out what says nothing about the network."""
    values = _without_stale_keys(values, keep)
    dtype = values.pop("dtype", None)
    if dtype is not None:
        values["torch_dtype"] = dtype
    parameters = values.pop("rope_parameters", None)
    if parameters is not None:
        scaling = dict(parameters)
        values["rope_theta"] = scaling.pop("rope_theta")
        kind = scaling.pop("rope_type", scaling.pop("type", "default"))
        for name in ("type", "partial_rotary_factor", "original_max_position_embeddings"):
            scaling.pop(name, None)
        values["rope_scaling"] = None if kind == "default" else {"type": kind, **scaling}
    return values
