"""What every backbone must do: one contract, all sizes."""

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import ARCHITECTURES, tiny_config, tiny_model, tiny_processor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModel, TextIteratorStreamer

from modeling_internvl_mpo import InternVLChatConfig, InternVLChatModel
from modeling_internvl_mpo.configuration_internvl_mpo import LORA_TARGETS

BACKBONES = sorted(ARCHITECTURES)


def inputs_for(model: InternVLChatModel, *, sizes: tuple[int, ...] = (30, 90), answer: str = "two") -> dict[str, Any]:
    """One row per image width; a width of 0 is a row of text."""
    processor = tiny_processor(model.config)
    texts, images = [], []
    for width in sizes:
        messages = [{"role": "user", "content": ("<image>\n" if width else "") + "How many?"}]
        texts.append(processor.apply_chat_template(messages, add_generation_prompt=True) + answer)
        generator = torch.Generator().manual_seed(width)  # the same picture whatever stands beside it
        pixels = torch.randint(0, 256, (30, max(width, 1), 3), generator=generator, dtype=torch.uint8).numpy()
        images.append([Image.fromarray(pixels)] if width else [])
    images = images if any(images) else None
    return dict(processor(text=texts, images=images, padding=True, return_tensors="pt"))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_image_changes_the_answer(backbone: str) -> None:
    model = tiny_model(backbone)
    inputs = inputs_for(model)
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1) + 1.0}
    assert not torch.allclose(model(**inputs).logits[:, -1], model(**other).logits[:, -1], atol=1e-3)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_save_and_load_give_equal_logits(backbone: str, tmp_path: Path) -> None:
    model = tiny_model(backbone)
    inputs = inputs_for(model)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(**inputs).logits, expected)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert (again / "config.json").read_text() == (tmp_path / "config.json").read_text()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_padding_on_the_left_changes_nothing(backbone: str) -> None:
    model = tiny_model(backbone)
    both = inputs_for(model, sizes=(30, 90))
    alone = inputs_for(model, sizes=(30,))
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    batched = model.generate(**both, **settings)[0, both["input_ids"].shape[1] :]
    single = model.generate(**alone, **settings)[0, alone["input_ids"].shape[1] :]
    assert torch.equal(batched, single)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_cached_decoding_equals_recomputing(backbone: str) -> None:
    model = tiny_model(backbone)
    inputs = inputs_for(model)
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    cached = model.generate(**inputs, **settings)
    whole = {**inputs, "input_ids": cached}
    whole["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(2, 8)], dim=1).long()
    positions = (whole["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    logits = model(**whole, position_ids=positions).logits
    assert torch.equal(logits[:, -9:-1].argmax(-1), cached[:, -8:])
    assert torch.equal(cached, model.generate(**inputs, cache_implementation="static", **settings))


def test_several_samples_and_beams_keep_tiles_with_their_rows() -> None:
    """Two rows with different numbers of tiles: copies of a row must see that row's tiles."""
    model = tiny_model("internlm2")
    inputs = inputs_for(model, sizes=(90, 30, 0))
    assert len(inputs["pixel_values"]) > 2
    width = inputs["input_ids"].shape[1]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    beams = model.generate(**inputs, num_beams=3, num_return_sequences=3, **settings)
    for row, size in enumerate((90, 30, 0)):
        alone = inputs_for(model, sizes=(size,))
        expected = model.generate(**alone, num_beams=3, num_return_sequences=3, **settings)
        assert torch.equal(beams[3 * row : 3 * row + 3, width:], expected[:, alone["input_ids"].shape[1] :])
    torch.manual_seed(0)
    sampled = model.generate(
        **inputs, do_sample=True, top_k=1, num_return_sequences=2, max_new_tokens=6, eos_token_id=None
    )
    greedy = model.generate(**inputs, **settings)
    assert torch.equal(sampled[0::2], greedy)
    assert torch.equal(sampled[1::2], greedy)


def test_image_tokens_can_be_suppressed() -> None:
    model = tiny_model()
    inputs = inputs_for(model, sizes=(0,))
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every token ties, the lowest id wins
    allowed = [index for index in range(model.config.llm_config.vocab_size) if index != model.img_context_token_id]
    only = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, suppress_tokens=allowed[:-1])
    assert (only[0, -3:] == model.img_context_token_id).all()
    banned = [*allowed[:-1], model.img_context_token_id]
    other = model.generate(**inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, suppress_tokens=banned)
    assert (other[0, -3:] == allowed[-1]).all()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_gradient_checkpointing_leaves_gradients_unchanged(backbone: str) -> None:
    model = tiny_model(backbone).train()
    inputs = inputs_for(model)
    labels = inputs["input_ids"]

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    plain = gradients()
    model.gradient_checkpointing_enable()
    assert model.vision_model.encoder.layers[0].gradient_checkpointing
    for before, after in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(after, before)
    assert all(gradient.abs().sum() > 0 for gradient in plain)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_lora_trains_the_named_projections(backbone: str) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model(backbone)
    inputs = inputs_for(model)
    before = model(**inputs).logits
    config = peft.LoraConfig(r=2, target_modules=LORA_TARGETS[backbone], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    layers = model.config.llm_config.num_hidden_layers
    wrapped = [name for name, module in adapted.named_modules() if hasattr(module, "lora_A") and "vision" not in name]
    assert len(wrapped) == layers * len(LORA_TARGETS[backbone])
    assert not torch.allclose(adapted(**inputs).logits, before)
    adapted(**inputs, labels=inputs["input_ids"]).loss.backward()
    adapted.generate(**inputs, max_new_tokens=2)
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(**inputs).logits, before)
    merged = adapted.merge_and_unload()
    assert isinstance(merged, InternVLChatModel)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_extra_keywords_reach_a_registered_attention(backbone: str) -> None:
    """A packing attention brings its own layout and makes no mask."""
    seen = []

    def layout_attention(module: Any, query: torch.Tensor, key: Any, value: Any, mask: Any, **kwargs: Any) -> tuple:
        seen.append((mask, kwargs["layout"]))
        return query.transpose(1, 2), None

    AttentionInterface.register("layout_test", layout_attention)
    AttentionMaskInterface.register("layout_test", lambda *args, **kwargs: None)
    model = tiny_model(backbone)
    inputs = inputs_for(model, sizes=(30,))
    model.language_model.config._attn_implementation = "layout_test"
    layout = object()
    hidden = model.base_model(**inputs, layout=layout).last_hidden_state
    assert hidden.shape[:2] == inputs["input_ids"].shape
    assert seen == [(None, layout)] * model.config.llm_config.num_hidden_layers
    assert model.vision_model.config._attn_implementation == "sdpa"
    model.set_attn_implementation({"llm_config": "eager"})
    assert model(**inputs, output_attentions=True).attentions[0].shape[0] == 1


def test_base_model_makes_no_logits() -> None:
    model = tiny_model()
    inputs = inputs_for(model)
    outputs = model.base_model(**inputs)
    torch.testing.assert_close(model.lm_head(outputs.last_hidden_state), model(**inputs).logits)
    assert "logits" not in outputs
    last = model(**inputs, logits_to_keep=1).logits
    torch.testing.assert_close(last, model(**inputs).logits[:, -1:])


def test_positions_and_a_prepared_mask_are_taken_as_they_are() -> None:
    """Two texts in one row, kept apart by a 4-D mask and restarted positions, equal the two by themselves."""
    for backbone in ("internlm2", "qwen2"):
        model = tiny_model(backbone)
        ids = torch.arange(10).unsqueeze(0)
        block = torch.block_diag(torch.ones(4, 4), torch.ones(6, 6)).tril().bool()
        mask = torch.zeros(10, 10).masked_fill(~block, torch.finfo(torch.float32).min)[None, None]
        positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
        packed = model(ids, attention_mask=mask, position_ids=positions).logits
        apart = torch.cat([model(ids[:, :4]).logits, model(ids[:, 4:]).logits], dim=1)
        torch.testing.assert_close(packed, apart)


def test_mismatch_of_image_tokens_raises_with_both_counts() -> None:
    model = tiny_model()
    inputs = inputs_for(model, sizes=(90,))
    tiles = inputs["pixel_values"]
    with pytest.raises(ValueError, match=rf"{len(tiles)} <IMG_CONTEXT> tokens, the tiles give {len(tiles) - 1}"):
        model(**{**inputs, "pixel_values": tiles[1:]})
    with pytest.raises(ValueError, match="the tiles give 0"):
        model(**{**inputs, "pixel_values": None})
    with pytest.raises(ValueError, match="the text has 0"):
        model.generate(input_ids=torch.tensor([[1, 2]]), pixel_values=tiles)


def test_flagged_out_tiles_are_left_out() -> None:
    model = tiny_model()
    inputs = inputs_for(model, sizes=(30,))
    blank = torch.zeros_like(inputs["pixel_values"][:1])
    padded = {**inputs, "pixel_values": torch.cat([inputs["pixel_values"], blank])}
    flags = torch.tensor([[1], [0]])
    torch.testing.assert_close(model(**padded, image_flags=flags).logits, model(**inputs).logits)


def test_text_rows_run_the_tower_before_the_language_model_under_distributed_training(tmp_path: Path) -> None:
    """ZeRO pairs collectives by order, so a rank without images must do what a rank with images does."""
    model = tiny_model().train()
    ids = torch.tensor([[1, 2, 3]])
    order: list[str] = []
    model.vision_model.register_forward_hook(lambda *_: order.append("vision"))
    model.language_model.model.register_forward_pre_hook(lambda *_: order.append("language"))
    expected = model(ids).logits
    assert order == ["language"]
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        order.clear()
        outputs = model(ids, labels=ids)
    finally:
        torch.distributed.destroy_process_group()
    assert order == ["vision", "language"]
    torch.testing.assert_close(outputs.logits, expected)
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in model.vision_model.encoder.parameters())


def test_random_start_trains() -> None:
    torch.manual_seed(0)
    model = InternVLChatModel(tiny_config()).train()
    inputs = inputs_for(model, sizes=(30,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(272.0).log().item(), rel=0.1)
    assert losses[-1] < 0.5 * losses[0]


def test_a_tower_without_gradients_keeps_no_layer_but_the_last() -> None:
    tower = tiny_model(vision_config={"num_hidden_layers": 5}).vision_model
    outputs, alive = [], []

    def count(_layer: Any, _inputs: Any, output: torch.Tensor) -> None:
        outputs.append(weakref.ref(output))
        alive.append(sum(found() is not None for found in outputs))

    for layer in tower.encoder.layers:
        layer.register_forward_hook(count)
    with torch.no_grad():
        assert tower(torch.randn(1, 3, 28, 28)).hidden_states is None
    assert max(alive) == 2  # the layer's output and what went into it


@pytest.mark.parametrize("side", [42, 56])  # of 42 the patches cannot even be folded
def test_tiles_of_another_side_are_named_as_that(side: int) -> None:
    model = tiny_model()
    inputs = inputs_for(model, sizes=(30, 0))
    tiles = torch.zeros(len(inputs["pixel_values"]), 3, side, side)
    with pytest.raises(ValueError, match=f"tiles are {side} x {side} pixels, this model takes 28 x 28"):
        model(**{**inputs, "pixel_values": tiles})
    tokenizer = tiny_processor(model.config).tokenizer
    with pytest.raises(ValueError, match="input_size=28"):
        model.chat(tokenizer, tiles, "What?", {"max_new_tokens": 1, "do_sample": False})


def test_a_text_written_for_larger_tiles_is_taken() -> None:
    model = tiny_model()
    image = [model.config.image_token_id] * 4
    ids = torch.tensor([[5, *image, 6]])
    assert model(input_ids=ids, pixel_values=torch.zeros(1, 3, 56, 56)).logits.shape[1] == 6


def test_drop_path_acts_in_training_only() -> None:
    model = tiny_model(vision_config={"drop_path_rate": 0.5})
    tiles = torch.ones(4, 3, 28, 28)
    assert torch.equal(model.extract_feature(tiles), model.extract_feature(tiles))
    rates = [layer.drop_path_rate for layer in model.vision_model.encoder.layers]
    assert rates == [0.0, 0.5]
    torch.manual_seed(0)
    features = model.train().extract_feature(tiles)
    assert len({round(float(tile.detach().sum()), 4) for tile in features}) > 1


def test_bfloat16_stays_near_float32() -> None:
    model = tiny_model("internlm2")
    inputs = inputs_for(model)
    expected = model(**inputs).logits
    half = copy.deepcopy(model).to(torch.bfloat16)
    logits = half(**inputs).logits
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected)[inputs["attention_mask"].bool()].abs().mean() < 0.02 * expected.std()


SIZES = {
    "1B": ("qwen2", {}, {"tie_word_embeddings": False, "_attn_implementation": "flash_attention_2"}),
    "2B": ("internlm2", {}, {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 1000000}),
    "4B": (
        "phi3",
        {},
        {
            "rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
            "original_max_position_embeddings": 512,
            "sliding_window": 262144,
        },
    ),
    "8B": ("internlm2", {}, {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 1000000}),
    "26B": (
        "internlm2",
        {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False, "initializer_range": 1e-10},
        {"rope_scaling": {"type": "dynamic", "factor": 3.0}},
    ),
    "40B": ("llama", {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False}, {"rope_theta": 5000000.0}),
    "76B": ("llama", {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False}, {"rope_theta": 500000.0}),
}
STALE = {
    **{"max_length": 20, "do_sample": False, "temperature": 1.0, "top_k": 50, "num_beams": 1, "torchscript": False},
    **{"use_bfloat16": True, "pruned_heads": {}, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
    **{"tie_encoder_decoder": False, "attn_implementation": "flash_attention_2", "torch_dtype": "float32"},
    **{"auto_map": {"AutoConfig": "configuration_internlm2.InternLM2Config"}, "bad_words_ids": None},
}


@pytest.mark.parametrize("size", SIZES)
def test_every_published_size(size: str, tmp_path: Path) -> None:
    """The official configuration, shrunk, stale keys and all: forward, backward, generate, LoRA, save, load."""
    backbone, vision, language = SIZES[size]
    model = tiny_model(backbone, vision_config=vision, llm_config={**STALE, **language})
    inputs = inputs_for(model)
    assert model.generation_config.max_length != 20
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert model.generate(**inputs, max_new_tokens=24, eos_token_id=None).shape[1] == inputs["input_ids"].shape[1] + 24
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(**inputs).logits, logits)


@pytest.mark.parametrize("backbone", ["internlm2", "qwen2"])
def test_tied_embeddings_survive(backbone: str, tmp_path: Path) -> None:
    model = tiny_model(backbone, llm_config={"tie_word_embeddings": True})
    assert model.lm_head.weight is model.get_input_embeddings().weight
    ids = torch.arange(6).unsqueeze(0)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_official_loading_arguments_and_device_map(tmp_path: Path) -> None:
    """What the vendor's examples pass, with and without `trust_remote_code`, on a folder that has no code."""
    model = tiny_model("internlm2")
    model.save_pretrained(tmp_path)
    ids = torch.arange(6).unsqueeze(0)
    for extra in ({"trust_remote_code": True}, {"device_map": "auto"}, {"attn_implementation": "eager"}):
        loaded = AutoModel.from_pretrained(
            tmp_path, dtype=torch.float32, low_cpu_mem_usage=True, use_flash_attn=True, **extra
        )
        torch.testing.assert_close(loaded.eval()(ids.to(loaded.device)).logits.cpu(), model(ids).logits)


def test_streamed_answer_is_the_answer() -> None:
    model = tiny_model()
    tokenizer = tiny_processor(model.config).tokenizer
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=10)
    tiles = torch.rand(2, 3, 28, 28)
    settings = {"max_new_tokens": 8, "do_sample": False}
    answer = model.chat(tokenizer, tiles, "How many?", {**settings, "streamer": streamer})
    assert "".join(streamer).split("<|im_end|>")[0].strip() == answer


def test_no_argument_configuration_and_unknown_parts() -> None:
    assert InternVLChatConfig().to_dict()["llm_config"]["architectures"] == ["InternLM2ForCausalLM"]
    with pytest.raises(ValueError, match="MambaForCausalLM"):
        InternVLChatConfig(llm_config={"architectures": ["MambaForCausalLM"]})
    with pytest.raises(ValueError, match="template 'alpaca' is not known"):
        InternVLChatModel(tiny_config(template="alpaca"))
    with pytest.raises(ValueError, match="ps_version"):
        tiny_config(ps_version="v3")
    with pytest.raises(ValueError, match="use_llm_lora"):
        InternVLChatModel(tiny_config(use_llm_lora=16))


def test_text_config_is_another_name_of_llm_config() -> None:
    config = tiny_config("internlm2")
    assert config.text_config is config.llm_config
    assert config.get_text_config() is config.llm_config
    assert "text_config" not in config.to_dict()
    newer = {
        **config.to_dict(),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "eos_token_id": 1,
        "output_attentions": False,
    }
    assert InternVLChatConfig(**newer).hidden_size == 32
    again = InternVLChatConfig(**config.to_dict())
    assert again.to_dict() == config.to_dict()
