"""InternLM2 is Llama with other names: checked against transformers' own, inside and beyond the rope limit."""

from typing import Any

import pytest
import torch
from tiny import tiny_config
from transformers import LlamaConfig, LlamaForCausalLM

from internvl_mpo.convert import Shapes, to_native, to_official
from modeling_internvl_mpo import InternLM2Config, InternLM2ForCausalLM


def twins(**rope: Any) -> tuple[InternLM2ForCausalLM, LlamaForCausalLM]:
    torch.manual_seed(0)
    config = tiny_config("internlm2", llm_config={"max_position_embeddings": 32, **rope}).llm_config
    model = InternLM2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
    scaling = config.rope_scaling or {"type": "default"}
    parameters = {"rope_type": scaling["type"], "rope_theta": config.rope_theta}
    if "factor" in scaling:
        parameters["factor"] = scaling["factor"]
    names = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "max_position_embeddings", "rms_norm_eps"),
    )
    llama = LlamaForCausalLM(
        LlamaConfig(**{name: getattr(config, name) for name in names}, rope_parameters=parameters)
    ).eval()
    shapes = Shapes(True, config.num_attention_heads, config.num_key_value_heads)
    official = {f"language_model.{name}": value for name, value in model.state_dict().items()}
    native = {name.removeprefix("language_model."): value for name, value in to_native(official, shapes).items()}
    llama.load_state_dict(native)
    back = to_official({f"language_model.{name}": value for name, value in native.items()}, shapes)
    assert all(torch.equal(back[name], official[name]) for name in official)
    return model, llama


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": None},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 3.0}},
    ],
    ids=["plain", "linear", "dynamic"],
)
@pytest.mark.parametrize("length", [20, 50])
def test_logits_equal_llama_inside_and_beyond_the_limit(rope: dict, length: int) -> None:
    model, llama = twins(**rope)
    ids = torch.randint(0, 200, (2, length))
    torch.testing.assert_close(model(ids).logits, llama(ids).logits, atol=2e-5, rtol=0)


def test_decoding_past_the_limit_equals_llama() -> None:
    """Cached keys keep the rotation they got while the base grows with every new token."""
    model, llama = twins(rope_scaling={"type": "dynamic", "factor": 2.0})
    ids = torch.randint(0, 200, (1, 25))
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "output_logits": True}
    settings["return_dict_in_generate"] = True
    ours, theirs = model.generate(ids, **settings), llama.generate(ids, **settings)
    assert torch.equal(ours.sequences, theirs.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(theirs.logits), atol=2e-5, rtol=0)


def test_a_long_text_leaves_no_trace() -> None:
    model, _ = twins(rope_scaling={"type": "dynamic", "factor": 2.0})
    short, long = torch.randint(0, 200, (1, 40)), torch.randint(0, 200, (1, 200))
    before = model(short).logits
    model(long)
    assert torch.equal(model(short).logits, before)


def test_a_long_pack_of_short_texts_is_not_stretched() -> None:
    """The limit is about positions: packed rows restart theirs."""
    model, _ = twins(rope_scaling={"type": "dynamic", "factor": 2.0})
    texts = [torch.randint(0, 200, (1, 20)) for _ in range(4)]
    block = torch.block_diag(*[torch.ones(20, 20)] * 4).tril().bool()
    mask = torch.zeros(80, 80).masked_fill(~block, torch.finfo(torch.float32).min)[None, None]
    positions = torch.arange(20).repeat(4).unsqueeze(0)
    packed = model(torch.cat(texts, dim=1), attention_mask=mask, position_ids=positions).logits
    apart = torch.cat([model(text).logits for text in texts], dim=1)
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=0)


def test_linear_scaling_needs_a_sane_factor() -> None:
    for scaling in ({"type": "yarn", "factor": 2.0}, {"type": "dynamic"}, {"type": "dynamic", "factor": 0.5}):
        with pytest.raises(ValueError, match="rope_scaling"):
            InternLM2Config(rope_scaling=scaling)


def test_loading_through_the_meta_device_keeps_the_rotation(tmp_path: Any) -> None:
    """The published code loads without an error here and then multiplies by uninitialised memory."""
    model, _ = twins(rope_scaling={"type": "dynamic", "factor": 2.0})
    ids = torch.randint(0, 200, (1, 20))
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded = InternLM2ForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, expected)
    assert not list(loaded.buffers())


def test_hidden_states_and_attentions_are_recorded() -> None:
    model, llama = twins(rope_scaling=None)
    model.set_attn_implementation("eager")
    llama.set_attn_implementation("eager")
    ids = torch.randint(0, 200, (1, 12))
    ours = model(ids, output_hidden_states=True, output_attentions=True)
    theirs = llama(ids, output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(torch.stack(ours.hidden_states), torch.stack(theirs.hidden_states), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.stack(ours.attentions), torch.stack(theirs.attentions), atol=1e-5, rtol=0)


def test_biases_of_the_fused_projection() -> None:
    config = tiny_config("internlm2", llm_config={"bias": True}).llm_config
    model = InternLM2ForCausalLM(config)
    attention = model.model.layers[0].attention
    assert attention.wqkv.bias.shape == (8 * (4 + 2 * 2),)
    assert attention.wo.bias.shape == (32,)
    assert attention.wqkv.bias.abs().sum() == 0
