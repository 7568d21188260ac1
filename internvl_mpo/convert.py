"""Converts checkpoints between the official InternVL layout and the HF-native one, in both directions.

python -m internvl_mpo.convert outputs/InternVL2-2B --output outputs/InternVL2-2B-hf
python -m internvl_mpo.convert InternVL3-1B-hf/ --output outputs/InternVL3-1B

The direction follows from the source. Official: `InternVLChatModel`, what serving engines and this project read.
Native: `InternVLForConditionalGeneration`, part of transformers; InternLM2 becomes Llama there, its fused `wqkv` three
matrices. Only names and the grouping of rows change, so both layouts give the same logits and a round trip the same
bytes. Phi3 backbones and `ps_version: v1` have no native form.
"""

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.files import replaced_folder
from internvl_mpo.publish import read_json, weight_files, write_companions
from internvl_mpo.settings import parse_settings, setting, show_settings

if TYPE_CHECKING:
    import torch
    from transformers import InternVLConfig

    from modeling_internvl_mpo import InternVLChatConfig, InternVLChatProcessor

# (official, native) parts of tensor names that differ only in spelling.
_VISION_NAMES = (
    ("vision_model.embeddings.class_embedding", "vision_tower.embeddings.cls_token"),
    ("vision_model.embeddings.position_embedding", "vision_tower.embeddings.position_embeddings"),
    ("vision_model.embeddings.patch_embedding.", "vision_tower.embeddings.patch_embeddings.projection."),
    ("vision_model.encoder.layers.", "vision_tower.encoder.layer."),
    ("mlp1.0.", "multi_modal_projector.layer_norm."),
    ("mlp1.1.", "multi_modal_projector.linear_1."),
    ("mlp1.3.", "multi_modal_projector.linear_2."),
)
_VISION_LAYER_NAMES = (
    (".ls1", ".lambda_1"),
    (".ls2", ".lambda_2"),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.projection_layer."),
    (".attn.q_norm.", ".attention.q_norm."),
    (".attn.k_norm.", ".attention.k_norm."),
)
_INTERNLM2_NAMES = (
    ("language_model.model.tok_embeddings.", "language_model.model.embed_tokens."),
    ("language_model.output.", "language_model.lm_head."),
    (".attention_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    (".attention.wo.", ".self_attn.o_proj."),
    (".feed_forward.w1.", ".mlp.gate_proj."),
    (".feed_forward.w3.", ".mlp.up_proj."),
    (".feed_forward.w2.", ".mlp.down_proj."),
)
# Fields of the official config.json that the native one has no place for; kept there under this key.
_KEPT = "internvl_chat"
_KEPT_FIELDS = (
    *("template", "system_message", "dynamic_image_size", "use_thumbnail", "min_dynamic_patch", "max_dynamic_patch"),
    *("pad2square", "force_image_size"),
)
# What the vendor's own native checkpoints (InternVL3 and later) stand for.
_DEFAULTS = {"template": "internvl2_5", "dynamic_image_size": True, "use_thumbnail": True, "max_dynamic_patch": 12}


@dataclass
class Settings:
    """Settings of `convert`."""

    source: str = setting(help="checkpoint folder in either layout; may be given without --source")
    output: str = setting(help="folder to write")


@dataclass
class Shapes:
    """What regrouping rows needs to know about the attention of both towers."""

    is_internlm2: bool
    num_heads: int
    num_key_value_heads: int

    def split_wqkv(self, rows: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
        """Take apart InternLM2's groups: (K, H / K + 2, D) rows to queries, keys and values."""
        groups = self.num_heads // self.num_key_value_heads
        head_dim = rows.shape[0] // (self.num_heads + 2 * self.num_key_value_heads)
        grouped = rows.reshape(self.num_key_value_heads, groups + 2, head_dim, *rows.shape[1:])
        parts = grouped.split((groups, 1, 1), dim=1)
        return tuple(part.flatten(0, 2) for part in parts)

    def join_wqkv(self, query: "torch.Tensor", key: "torch.Tensor", value: "torch.Tensor") -> "torch.Tensor":
        """Undo `split_wqkv`."""
        import torch

        heads = self.num_key_value_heads
        head_dim = key.shape[0] // heads
        parts = [part.reshape(heads, -1, head_dim, *part.shape[1:]) for part in (query, key, value)]
        return torch.cat(parts, dim=1).flatten(0, 2).contiguous()


def to_native(tensors: dict[str, "torch.Tensor"], shapes: Shapes) -> dict[str, "torch.Tensor"]:
    """Return official tensors under the native names, fused projections split."""
    converted = {}
    for name, value in tensors.items():
        for old, new in _VISION_NAMES + (_VISION_LAYER_NAMES if name.startswith("vision_model.") else ()):
            name = name.replace(old, new)
        if shapes.is_internlm2 and name.startswith("language_model."):
            for old, new in _INTERNLM2_NAMES:
                name = name.replace(old, new)
        stem, _, kind = name.rpartition(".")
        if stem.endswith(".attn.qkv"):
            parts, prefix = value.chunk(3), stem.removesuffix(".attn.qkv") + ".attention."
        elif shapes.is_internlm2 and stem.endswith(".attention.wqkv"):
            parts, prefix = shapes.split_wqkv(value), stem.removesuffix(".attention.wqkv") + ".self_attn."
        else:
            converted[name] = value
            continue
        for letter, part in zip("qkv", parts, strict=True):
            converted[f"{prefix}{letter}_proj.{kind}"] = part.clone()  # safetensors refuses views of one storage
    return converted


def to_official(tensors: dict[str, "torch.Tensor"], shapes: Shapes) -> dict[str, "torch.Tensor"]:
    """Undo `to_native`; needs all of the tensors, since projections are joined."""
    import torch

    converted = {}
    joined: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        # Transformers 5 spells the modules `model.vision_tower`, its files mostly still without `model.`
        name = re.sub(r"^model\.(vision_tower|multi_modal_projector)\.", r"\1.", name)
        name = re.sub(r"^model\.language_model\.", "language_model.model.", name)
        name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
        in_vision = name.startswith("vision_tower.")
        match = re.fullmatch(r"(.+)\.(attention|self_attn)\.([qkv])_proj\.(weight|bias)", name)
        if match and (in_vision or shapes.is_internlm2):
            target = "attn.qkv" if in_vision else "attention.wqkv"
            name = f"{match[1]}.{target}.{match[4]}"
            joined.setdefault(name, {})[match[3]] = value
            if len(joined[name]) < 3:
                continue
            parts = joined.pop(name)
            parts = [parts[letter] for letter in "qkv"]
            value = torch.cat(parts).contiguous() if in_vision else shapes.join_wqkv(*parts)
        for old, new in _VISION_NAMES + (_VISION_LAYER_NAMES if in_vision else ()):
            name = name.replace(new, old)
        if shapes.is_internlm2 and name.startswith("language_model."):
            for old, new in _INTERNLM2_NAMES:
                name = name.replace(new, old)
        converted[name] = value
    if joined:
        raise BadInputError(f"the weights lack the other projections of {next(iter(joined))}")
    return converted


def convert(source: str | Path, output: str | Path) -> Path:
    """Convert a checkpoint folder to the other layout.

    Args:
        source: an official or a native folder.
        output: made if absent; replaced if an earlier conversion wrote it.

    Returns:
        The folder written.

    Raises:
        BadInputError: another kind of model, one that has no form in the other layout, or an output that holds
            something else.
    """
    source, output = Path(source), Path(output)
    raw = read_json(source / "config.json")
    writers = {"internvl_chat": _write_native, "internvl": _write_official}
    if raw.get("model_type") not in writers:
        raise BadInputError(
            f"{source / 'config.json'} has model_type {raw.get('model_type')!r}; expected 'internvl_chat' or 'internvl'"
        )
    with replaced_folder(output, sources=[source]) as folder:
        writers[raw["model_type"]](source, raw, folder)
    return output


def _write_native(source: Path, raw: dict[str, Any], output: Path) -> None:
    from modeling_internvl_mpo import InternVLChatConfig, InternVLChatProcessor

    config = InternVLChatConfig(**raw)
    language = config.llm_config
    if config.ps_version != "v2" or language.model_type == "phi3":
        what = "a Phi3 language model" if language.model_type == "phi3" else f"ps_version {config.ps_version}"
        raise BadInputError(f"{source} has {what}, which the native layout cannot express; keep the official layout")
    processor = InternVLChatProcessor.from_pretrained(source)
    _native_config(config, processor.image_token_id).save_pretrained(output)
    shapes = _shapes(language.model_type, language)
    _save(to_native(dict(_tensors(source)), shapes), output)
    _write_native_processor(config, processor, output)


def _native_config(config: "InternVLChatConfig", image_token_id: int) -> "InternVLConfig":
    from transformers import InternVLConfig

    language, vision = config.llm_config, config.vision_config
    text_config = _llama_config(language) if language.model_type == "internlm2" else language.to_dict()
    kept = {name: getattr(config, name) for name in _KEPT_FIELDS}
    return InternVLConfig(
        architectures=["InternVLForConditionalGeneration"],
        text_config=text_config,
        vision_config={
            **{name: getattr(vision, name) for name in _SAME_VISION_FIELDS},
            "attention_bias": vision.qkv_bias,
            "use_qk_norm": vision.qk_normalization,
            "hidden_dropout_prob": vision.dropout,
            "layer_scale_init_value": vision.initializer_factor,
        },
        image_token_id=image_token_id,
        image_seq_length=config.num_image_token,
        downsample_ratio=config.downsample_ratio,
        vision_feature_layer=config.select_layer,
        tie_word_embeddings=config.tie_word_embeddings,
        dtype=config.dtype,
        **{_KEPT: {**kept, "llm_architecture": language.architectures[0]}},
    )


def _write_native_processor(config: "InternVLChatConfig", processor: "InternVLChatProcessor", output: Path) -> None:
    """Tokenizer, chat template, picture settings and generation settings as transformers' own classes read them."""
    from transformers import GenerationConfig

    from modeling_internvl_mpo import get_conversation

    tokenizer = processor.tokenizer
    tokenizer.save_pretrained(output)
    # The native processor has no `<image>`: its chat template writes the image token itself. It replaces the template
    # that comes with the tokenizer.
    template = get_conversation(config.template).chat_template(config.system_message)
    (output / "chat_template.jinja").write_text(template.replace('"<image>"', '"<IMG_CONTEXT>"'), encoding="utf-8")
    settings = read_json(output / "tokenizer_config.json")
    settings["extra_special_tokens"] = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    _write_json(output / "tokenizer_config.json", settings)
    side = config.force_image_size
    images = {
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": config.dynamic_image_size,
        "min_patches": config.min_dynamic_patch,
        "max_patches": config.max_dynamic_patch,
        "size": {"height": side, "width": side},
        "image_mean": list(processor.image_processor.image_mean),
        "image_std": list(processor.image_processor.image_std),
        "resample": 3,
    }
    _write_json(output / "preprocessor_config.json", images)
    _write_json(
        output / "processor_config.json",
        {"processor_class": "InternVLProcessor", "image_seq_length": config.num_image_token, "image_processor": images},
    )
    GenerationConfig(eos_token_id=processor.end_of_turn_id, pad_token_id=tokenizer.pad_token_id).save_pretrained(output)


def _write_official(source: Path, raw: dict[str, Any], output: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig, InternVLConfig

    from modeling_internvl_mpo import InternLM2Config, InternVLChatConfig, InternVLChatProcessor

    native = InternVLConfig(**raw)
    kept = dict(raw.get(_KEPT, _DEFAULTS))
    text = native.text_config
    architecture = kept.pop("llm_architecture", f"{text.model_type.capitalize()}ForCausalLM")
    llm_config = text.to_dict()
    if architecture == "InternLM2ForCausalLM":
        rope = dict(text.rope_parameters)
        theta, kind = rope.pop("rope_theta"), rope.pop("rope_type", "default")
        names = InternLM2Config.__dataclass_fields__.keys() & llm_config.keys()
        scaling = None if kind == "default" else {"type": kind, "factor": rope["factor"]}
        llm_config = {name: llm_config[name] for name in names}
        llm_config |= {"bias": text.attention_bias, "rope_theta": theta, "rope_scaling": scaling}
    llm_config["architectures"] = [architecture]
    vision = native.vision_config
    try:
        config = InternVLChatConfig(
            vision_config={
                **{name: getattr(vision, name) for name in _SAME_VISION_FIELDS},
                "image_size": vision.image_size[0],
                "patch_size": vision.patch_size[0],
                "qkv_bias": vision.attention_bias,
                "qk_normalization": vision.use_qk_norm,
                "dropout": vision.hidden_dropout_prob,
                "initializer_factor": vision.layer_scale_init_value,
            },
            llm_config=llm_config,
            ps_version="v2",
            select_layer=native.vision_feature_layer,
            downsample_ratio=native.downsample_ratio,
            image_token_id=native.image_token_id,
            dtype=native.dtype,
            **kept,
        )
    except ValueError as error:
        raise BadInputError(f"{source / 'config.json'}: {error}") from error
    processor = InternVLChatProcessor.from_config(config, AutoTokenizer.from_pretrained(source))
    config.save_pretrained(output)
    shapes = _shapes("internlm2" if architecture == "InternLM2ForCausalLM" else text.model_type, text)
    tensors = to_official(dict(_tensors(source)), shapes)
    if native.tie_word_embeddings:  # the official layout always stores an output matrix
        tensors.setdefault("language_model.lm_head.weight", tensors["language_model.model.embed_tokens.weight"].clone())
    _save(tensors, output)
    write_companions(output, processor, GenerationConfig())


_SAME_VISION_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "norm_type"),
    *("layer_norm_eps", "image_size", "patch_size", "num_channels", "attention_dropout", "initializer_range"),
)


def _llama_config(config: Any) -> dict[str, Any]:
    """Describe an InternLM2 network as a Llama."""
    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
        *("use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings"),
    )
    scaling = config.rope_scaling or {}
    rope = {"rope_theta": config.rope_theta, "rope_type": scaling.get("type", "default")}
    if scaling:
        rope["factor"] = scaling["factor"]
    values = {name: getattr(config, name) for name in names}
    return {**values, "model_type": "llama", "attention_bias": config.bias, "rope_parameters": rope}


def _shapes(model_type: str, config: Any) -> Shapes:
    return Shapes(model_type == "internlm2", config.num_attention_heads, config.num_key_value_heads)


def _tensors(source: Path) -> Iterator[tuple[str, "torch.Tensor"]]:
    from safetensors.torch import load_file

    for path in weight_files(source):
        if path.suffix == ".bin":
            raise BadInputError(f"{path} is not safetensors; run `python -m internvl_mpo.publish model` on it first")
        yield from load_file(path).items()


def _save(tensors: dict[str, "torch.Tensor"], output: Path) -> None:
    """Write shards of at most 5 GB and their index."""
    from huggingface_hub import save_torch_state_dict

    save_torch_state_dict(tensors, output, max_shard_size="5GB", metadata={"format": "pt"})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main(argv: list[str]) -> int:
    """Convert a folder."""
    if argv and not argv[0].startswith("-"):
        argv = ["--source", *argv]
    settings = parse_settings(Settings, argv, program="-m internvl_mpo.convert", about=__doc__, config=False)
    print(show_settings(settings, "convert"))
    print(f"wrote {convert(settings.source, settings.output)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
