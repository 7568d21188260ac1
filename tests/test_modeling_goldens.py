"""Our model files against outputs of the original code (tiny random models); see docs/model.md for the tolerances."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

import modeling_internvl_mpo  # noqa: F401 - registers the classes

ORACLE = Path(__file__).parent.parent / "../shared/oracle/model"
pytestmark = pytest.mark.skipif(not ORACLE.is_dir(), reason="outputs of the original code are not here")


def arguments(io: dict[str, torch.Tensor], case: str) -> dict[str, torch.Tensor]:
    names = ("input_ids", "attention_mask", "image_flags", "labels")
    pixels = io["three.pixel_values" if case == "long" else f"{case}.pixel_values"]
    return {"pixel_values": pixels, **{name: io[f"{case}.{name}"] for name in names}}


@pytest.fixture(scope="module", params=["internlm2-eager", "internlm2-sdpa", "qwen2-eager", "qwen2-sdpa"])
def golden(request: pytest.FixtureRequest) -> tuple:
    name, attention = request.param.split("-")
    model = AutoModel.from_pretrained(ORACLE / name, attn_implementation=attention).eval()
    model.img_context_token_id = 393
    return model, load_file(ORACLE / name / "io.safetensors")


def test_vision_features_equal_the_original(golden: tuple) -> None:
    model, io = golden
    outputs = model.vision_model(io["single.pixel_values"], output_hidden_states=True)
    torch.testing.assert_close(torch.stack(outputs.hidden_states), io["single.vit_hidden_states"], atol=5e-5, rtol=0)
    torch.testing.assert_close(outputs.pooler_output, io["single.vit_pooler_output"], atol=5e-5, rtol=0)
    features = model.extract_feature(io["three.pixel_values"])
    torch.testing.assert_close(features, io["three.vit_embeds"], atol=5e-5, rtol=0)


def test_larger_tiles_interpolate_position_embeddings(golden: tuple) -> None:
    model, io = golden
    hidden = model.vision_model(io["vit84.pixel_values"]).last_hidden_state
    torch.testing.assert_close(hidden, io["vit84.vit_last_hidden_state"], atol=5e-5, rtol=0)


def test_pixel_shuffle_v1_and_select_layer(golden: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    model, io = golden
    pixels = io["single.pixel_values"]
    monkeypatch.setattr(model, "ps_version", "v1")
    torch.testing.assert_close(model.extract_feature(pixels), io["single.vit_embeds_ps_v1"], atol=5e-5, rtol=0)
    monkeypatch.setattr(model, "ps_version", "v2")
    monkeypatch.setattr(model, "select_layer", -2)
    features = model.extract_feature(pixels)
    torch.testing.assert_close(features, io["single.vit_embeds_select_layer_-2"], atol=5e-5, rtol=0)


@pytest.mark.parametrize("case", ["single", "three", "long", "batch"])
def test_logits_hidden_states_and_loss_equal_the_original(golden: tuple, case: str) -> None:
    model, io = golden
    inputs = arguments(io, case)
    outputs = model(**inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(outputs.logits[real], io[f"{case}.logits"][real], atol=1e-4, rtol=0)
    torch.testing.assert_close(outputs.loss, io[f"{case}.loss"], atol=1e-5, rtol=0)
    inputs.pop("labels")
    hidden = model.base_model(**inputs).last_hidden_state
    torch.testing.assert_close(hidden[real], io[f"{case}.llm_last_hidden_state"][real], atol=1e-4, rtol=0)


def test_loss_weights(golden: tuple) -> None:
    model, io = golden
    loss = model(**arguments(io, "batch"), loss_weight=io["batch.loss_weight"]).loss
    torch.testing.assert_close(loss, io["batch.loss_weighted"], atol=1e-5, rtol=0)


def test_gradients_equal_the_original(golden: tuple) -> None:
    model, io = golden
    model.zero_grad()
    model(**arguments(io, "batch")).loss.backward()
    names = [name.removeprefix("grad.") for name in io if name.startswith("grad.")]
    parameters = dict(model.named_parameters())
    assert names
    for name in names:
        torch.testing.assert_close(parameters[name].grad, io[f"grad.{name}"], atol=1e-5, rtol=1e-4)
    total = torch.stack([parameter.grad.norm() for parameter in parameters.values()]).norm()
    torch.testing.assert_close(total, io["grad_norm.total"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", ["gen_image", "gen_text", "gen_long", "gen_leftpad"])
def test_greedy_tokens_equal_the_original(golden: tuple, case: str) -> None:
    model, io = golden
    source = {"gen_image": "three", "gen_long": "long"}.get(case, case)
    pixels = None if case == "gen_text" else io["three.pixel_values"]
    ids, mask = io[f"{source}.input_ids"], io[f"{source}.attention_mask"]
    settings = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    sequences = model.generate(pixel_values=pixels, input_ids=ids, attention_mask=mask, **settings)
    assert torch.equal(sequences[:, : ids.shape[1]], ids)
    assert torch.equal(sequences[:, ids.shape[1] :], io[f"{case}.sequences"])


@pytest.mark.parametrize("name", ["internlm2", "qwen2"])
def test_chat_equals_the_original(name: str) -> None:
    """Prompts, ids, answers and histories of the six recorded conversations."""
    model = AutoModel.from_pretrained(ORACLE / name).eval()
    tokenizer = AutoTokenizer.from_pretrained(ORACLE / "tokenizers" / name, config=model.config)
    io = load_file(ORACLE / name / "io.safetensors")

    def tiles(names: list[str] | None) -> torch.Tensor | None:
        if names is None:
            return None
        parts = [re.fullmatch(r"([\w.]+?)(?:\[(\d+):(\d+)\])?", part) for part in names]
        return torch.cat([io[part[1]][int(part[2]) : int(part[3])] if part[2] else io[part[1]] for part in parts])

    for record in json.loads((ORACLE / name / "chat.json").read_text()):
        pixels, counts = tiles(record["pixel_values"]), record["num_patches_list"]
        settings = dict(record["generation_config"])
        if record["kind"] == "batch_chat":
            answers = model.batch_chat(tokenizer, pixels, record["questions"], settings, num_patches_list=counts)
            assert answers == record["responses"]
            continue
        history = [tuple(turn) for turn in record["history"]] if record["history"] else None
        answer, history = model.chat(
            tokenizer, pixels, record["question"], settings, history, return_history=True, num_patches_list=counts
        )
        assert answer == record["response"], record["tag"]
        assert [list(turn) for turn in history] == record["returned_history"]
        assert settings["eos_token_id"] == record["eos_token_id"]
