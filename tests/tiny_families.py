"""Tiny random models of other families, saved as folders that `AutoModelForImageTextToText` loads."""

import json
from pathlib import Path
from typing import Any

import torch
from tiny import tiny_model, tiny_processor, tiny_tokenizer
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPVisionConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from internvl_mpo.convert import convert

_TURNS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}MARK{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
_OTHER_TEXT = {
    "qwen3_moe": _EXPERTS,
    "gpt_oss": {
        **_TEXT,
        **{"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "num_key_value_heads": 1},
        **{"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        **{"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    },
}
_QWEN_MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def tiny_internvl(folder: Path, backbone: str = "qwen2") -> Path:
    """InternVL in transformers' layout: tiles of 28 pixels, one token each; `qwen3_moe` and `gpt_oss` have experts."""
    official = folder.with_name(folder.name + "_official")
    model = tiny_model("qwen3" if backbone in _OTHER_TEXT else backbone)
    model.save_pretrained(official)
    tiny_processor(model.config).save_pretrained(official)
    convert(official, folder)
    if backbone in _OTHER_TEXT:
        config = InternVLConfig.from_pretrained(folder)
        kept = config.text_config.to_dict()
        if backbone == "gpt_oss":
            kept = {name: kept[name] for name in ("vocab_size", "pad_token_id", "eos_token_id")}
        text = {**kept, **_OTHER_TEXT[backbone], "model_type": backbone}
        config = InternVLConfig(**{**config.to_dict(), "text_config": text})
        tokenizer = AutoProcessor.from_pretrained(official).tokenizer
        for path in folder.glob("*.safetensors*"):
            path.unlink()
        _save_model(folder, InternVLForConditionalGeneration, config, tokenizer)
    return folder


def tiny_llava(folder: Path) -> Path:
    """LLaVA: one picture of 28 pixels is 4 tokens."""
    tokenizer = _tokenizer("<image>")
    config = LlavaConfig(
        vision_config=_clip(),
        text_config=LlamaConfig(vocab_size=len(tokenizer), **_TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, do_center_crop=True
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TURNS.replace("MARK", "<image>"),
    )
    return _save(folder, LlavaForConditionalGeneration, config, tokenizer, processor)


def tiny_llava_next(folder: Path) -> Path:
    """LLaVA-NeXT: up to four tiles of 28 pixels and a small copy of the whole."""
    tokenizer = _tokenizer("<image>")
    grids = [[28, 56], [56, 28], [56, 56], [28, 84]]
    config = LlavaNextConfig(
        vision_config=_clip(),
        text_config=LlamaConfig(vocab_size=len(tokenizer), **_TEXT),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=grids,
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=grids
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TURNS.replace("MARK", "<image>"),
    )
    return _save(folder, LlavaNextForConditionalGeneration, config, tokenizer, processor)


def tiny_llava_onevision(folder: Path) -> Path:
    """LLaVA-OneVision: tiles of 28 pixels for a single picture, one tile each for several."""
    tokenizer = _tokenizer("<image>", "<video>")
    grids = [[28 * rows, 28 * columns] for rows in range(1, 5) for columns in range(1, 5)]
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
            vision_use_head=False,
        ),
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer), **_TEXT},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=grids,
        vision_aspect_ratio="anyres_max_2",
        vision_feature_layer=-1,
    )
    images = LlavaOnevisionImageProcessorPil(size={"height": 28, "width": 28}, image_grid_pinpoints=grids)
    _save(folder, LlavaOnevisionForConditionalGeneration, config, tokenizer, images)
    (folder / "chat_template.jinja").write_text(_TURNS.replace("MARK", "<image>"), encoding="utf-8")
    settings = {
        "processor_class": "LlavaOnevisionProcessor",
        "num_image_tokens": 4,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_2",
    }
    (folder / "processor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def tiny_qwen2_vl(folder: Path) -> Path:
    """Qwen2-VL: pictures keep their shape, one token per 28 x 28 pixels."""
    tokenizer = _tokenizer(*_QWEN_MARKS)
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(text_config=_qwen_text(tokenizer), vision_config=vision, **_qwen_ids(tokenizer))
    return _save_qwen(folder, Qwen2VLForConditionalGeneration, config, tokenizer)


def tiny_qwen2_5_vl(folder: Path) -> Path:
    """Qwen2.5-VL: as Qwen2-VL, the first tower layer sees windows of 56 pixels."""
    tokenizer = _tokenizer(*_QWEN_MARKS)
    vision = {
        **{"depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "num_heads": 2},
        **{"window_size": 56, "fullatt_block_indexes": [1]},
    }
    config = Qwen2_5_VLConfig(text_config=_qwen_text(tokenizer), vision_config=vision, **_qwen_ids(tokenizer))
    return _save_qwen(folder, Qwen2_5_VLForConditionalGeneration, config, tokenizer)


def tiny_qwen3_vl(folder: Path, *, experts: bool = False) -> Path:
    """Qwen3-VL: features of both tower layers enter the decoder; 28 pixels a token as the others here."""
    tokenizer = _tokenizer(*_QWEN_MARKS)
    vision = {
        **{"depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "num_heads": 2},
        **{"patch_size": 14, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    }
    text = {**_qwen_text(tokenizer), "num_hidden_layers": 3, "head_dim": 16}
    if experts:
        config = Qwen3VLMoeConfig(
            text_config={**text, **_EXPERTS}, vision_config=vision, **_qwen_ids(tokenizer), tie_word_embeddings=False
        )
        return _save_qwen(folder, Qwen3VLMoeForConditionalGeneration, config, tokenizer)
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **_qwen_ids(tokenizer))
    return _save_qwen(folder, Qwen3VLForConditionalGeneration, config, tokenizer)


def tiny_idefics3(folder: Path) -> Path:
    """Idefics3: tiles of 28 pixels, one token each, named by row and column."""
    return _tiled_by_name(folder, Idefics3Config, Idefics3ForConditionalGeneration)


def tiny_smolvlm(folder: Path) -> Path:
    """SmolVLM: as Idefics3, with the settings for videos that its folders have."""
    _tiled_by_name(folder, SmolVLMConfig, SmolVLMForConditionalGeneration)
    settings = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))
    settings["image_processor"]["image_processor_type"] = "SmolVLMImageProcessor"
    videos = {"video_processor_type": "SmolVLMVideoProcessor", "num_frames": 4, "fps": 1}
    settings = {**settings, "processor_class": "SmolVLMProcessor", "video_processor": videos}
    (folder / "processor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def _tiled_by_name(folder: Path, config_class: type, kind: type) -> Path:
    rows = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    tokenizer = _tokenizer("<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>", *rows)
    config = config_class(
        vision_config={
            **{"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
            **{"image_size": 28, "patch_size": 14},
        },
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": 0, **_TEXT},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
    )
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(size={"longest_edge": 84}, max_image_size={"longest_edge": 28}),
        tokenizer=tokenizer,
        image_seq_len=1,
        chat_template=_TURNS.replace("MARK", "<image>"),
    )
    return _save(folder, kind, config, tokenizer, processor)


FAMILIES = {
    "internvl": tiny_internvl,
    "qwen2_vl": tiny_qwen2_vl,
    "qwen2_5_vl": tiny_qwen2_5_vl,
    "qwen3_vl": tiny_qwen3_vl,
    "llava": tiny_llava,
    "llava_next": tiny_llava_next,
    "llava_onevision": tiny_llava_onevision,
    "idefics3": tiny_idefics3,
    "smolvlm": tiny_smolvlm,
}


def widen_for_4_bits(folder: Path) -> None:
    """Make a saved model anew with a language model of whole blocks of 64 weights, see `tiny_world`."""
    config = AutoConfig.from_pretrained(folder)
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_attention_heads, text.head_dim = 64, 128, 4, 16
    if hasattr(vision, "out_hidden_size"):
        vision.out_hidden_size = 64
    elif config.model_type == "qwen2_vl":
        vision.hidden_size = 64
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    _save_model(folder, AutoModelForImageTextToText.from_config, config, AutoTokenizer.from_pretrained(folder))


def _clip() -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=16,
    )


def _qwen_text(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    return {"vocab_size": len(tokenizer), **_TEXT, "rope_parameters": rope}


def _qwen_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = ("vision_start", "vision_end", "image", "video")
    ids = tokenizer.convert_tokens_to_ids(list(_QWEN_MARKS))
    return {f"{name}_token_id": number for name, number in zip(names, ids, strict=True)}


def _save_qwen(folder: Path, kind: type, config: object, tokenizer: PreTrainedTokenizerFast) -> Path:
    images = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=9 * 28 * 28)
    _save(folder, kind, config, tokenizer, images)
    (folder / "chat_template.jinja").write_text(_TURNS.replace("MARK", _QWEN_PICTURE), encoding="utf-8")
    return folder


def _tokenizer(*marks: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)}, replace_extra_special_tokens=False)
    return tokenizer


def _save(folder: Path, kind: type, config: object, tokenizer: PreTrainedTokenizerFast, processor: object) -> Path:
    _save_model(folder, kind, config, tokenizer)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _save_model(folder: Path, kind: type, config: object, tokenizer: PreTrainedTokenizerFast) -> None:
    torch.manual_seed(0)
    model = kind(config).float()
    with torch.no_grad():  # large enough to tell inputs apart
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
