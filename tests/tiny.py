"""Tiny random models and processors for tests; nothing is read or written."""

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from internvl_mpo.packing import Layout
from modeling_internvl_mpo import InternVLChatConfig, InternVLChatModel, InternVLChatProcessor

SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    *("<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>"),
]
TEMPLATES = {
    "internlm2": "internlm2-chat",
    "llama": "Hermes-2",
    "phi3": "phi3-chat",
    "qwen2": "Hermes-2",
    "qwen3": "internvl2_5",
}
ARCHITECTURES = {
    "internlm2": "InternLM2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, then the special tokens: 272 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    fast.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    return fast


def tiny_config(backbone: str = "qwen2", **overrides: Any) -> InternVLChatConfig:
    """Two layers of width 32 in each tower, tiles of 28 pixels, 1 image token per tile.

    Args:
        backbone: internlm2, llama, phi3, qwen2 or qwen3.
        **overrides: fields of `InternVLChatConfig`; `vision_config` and `llm_config` are merged into the defaults.
    """
    tokenizer = tiny_tokenizer()
    vision_config = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "image_size": 28,
        "patch_size": 14,
        "norm_type": "layer_norm",
        "qkv_bias": True,
        "qk_normalization": False,
        "initializer_factor": 1.0,
        **overrides.pop("vision_config", {}),
    }
    llm_config = {
        "architectures": [ARCHITECTURES[backbone]],
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **({"bias": False} if backbone == "internlm2" else {}),
        **({"head_dim": 8} if backbone == "qwen3" else {}),
        **overrides.pop("llm_config", {}),
    }
    fields = {
        "template": TEMPLATES[backbone],
        "ps_version": "v2",
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "max_dynamic_patch": 4,
        "image_token_id": tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        **overrides,
    }
    return InternVLChatConfig(vision_config=vision_config, llm_config=llm_config, **fields)


def tiny_model(backbone: str = "qwen2", seed: int = 0, **overrides: Any) -> InternVLChatModel:
    """Return a model in evaluation mode whose random weights are large enough to tell inputs apart."""
    torch.manual_seed(seed)
    model = InternVLChatModel(tiny_config(backbone, **overrides)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
    return model


def tiny_processor(config: InternVLChatConfig | None = None) -> InternVLChatProcessor:
    """Return the processor that goes with `tiny_config`."""
    return InternVLChatProcessor.from_config(config or tiny_config(), tiny_tokenizer())


def dense_mask(layout: Layout) -> torch.Tensor:
    """Return the whole mask of a pack, True where the row's token sees the column's token. Shape: (T, T)"""
    index_T = torch.arange(len(layout.visible_until_T))
    return (index_T[None, :] <= index_T[:, None]) & (index_T[:, None] < layout.visible_until_T[None, :])
