"""Models of transformers' own families in the demo, in this process: streamed, with adapters, and what pictures cost.

pytest tests/test_demo_families.py
"""

import json
from pathlib import Path

import pytest
import torch
from demo_world import finish
from tiny_families import FAMILIES

from internvl_mpo.demo import show
from internvl_mpo.demo.conversation import SIDES, Message
from internvl_mpo.demo.family_model import load_chat_model, load_cutter
from internvl_mpo.demo.local_models import LocalModels
from internvl_mpo.demo.streaming import VisitorQuestion
from internvl_mpo.engines import Request, Sampling
from internvl_mpo.engines.image_text_engine import ImageTextEngine
from internvl_mpo.errors import BadInputError
from internvl_mpo.families.registry import family_of_source
from tests.test_demo import picture


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("families")
    return {name: str(FAMILIES[name](root / name)) for name in ("qwen2_5_vl", "llava_next", "internvl")}


def ask(text: str = "What is this?", images=(), **sampling) -> VisitorQuestion:
    message = Message("user", "<image>\n" * len(images) + text, tuple(images))
    return VisitorQuestion({side: [message] for side in SIDES}, Sampling(max_new_tokens=8, **sampling), seed=5)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_next", "internvl"])
def test_streamed_answers_are_those_of_the_engine_that_evaluates(folders, name):
    images = [picture(width=90, height=40), picture(width=33, height=50)]
    engine, backend = ImageTextEngine(folders[name]), LocalModels(folders[name], folders[name])
    for temperature in (0.0, 1.0):
        question = ask(images=images, temperature=temperature)
        frames = [pair[1] for pair in backend.stream(question)]
        request = Request(
            id="1",
            question="What is this?",
            images=tuple(image.open() for image in images),
            seed=5,
            sampling=question.sampling,
        )
        (reply,) = engine.generate([request])
        assert (frames[-1].text, frames[-1].num_tokens) == (reply.text, reply.num_tokens)
        assert frames[-1].finish_reason == reply.finish_reason


def test_a_conversation_goes_on_and_a_mark_in_an_answer_is_no_picture(folders):
    backend, image = LocalModels(folders["qwen2_5_vl"], folders["qwen2_5_vl"]), picture(width=60, height=40)
    first = ask(images=[image])
    again = [Message("assistant", "an <image> there"), Message("user", "And then?")]
    answers = finish(
        backend.stream(
            VisitorQuestion({side: [*first.chats[side], *again] for side in SIDES}, Sampling(max_new_tokens=8))
        )
    )
    assert {answer.error for answer in answers.values()} == {""}
    assert answers["base"].text != finish(backend.stream(ask("And then?")))["base"].text


@pytest.mark.slow
def test_one_mixed_batch_answers_as_base_and_as_merged_model(folders, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = folders["qwen2_5_vl"]
    family = family_of_source(base)
    for part in ("language model", "vision tower"):
        model = family.load_model(base)
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=family.lora_targets(model, part)))
        torch.manual_seed(1)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        adapted.save_pretrained(tmp_path / part)
        if part == "language model":
            adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
            family.load_processor(base).save_pretrained(tmp_path / "merged")
    question = ask(images=[picture(width=90, height=40)])
    mixed = finish(LocalModels(base, adapter=str(tmp_path / "language model")).stream(question))
    apart = finish(LocalModels(base, str(tmp_path / "merged")).stream(question))
    assert {side: mixed[side].text for side in SIDES} == {side: apart[side].text for side in SIDES}
    assert mixed["base"].text != mixed["mpo"].text
    with pytest.raises(BadInputError, match="merge it"):
        LocalModels(base, adapter=str(tmp_path / "vision tower")).load()


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava_next", "internvl"])
def test_the_cost_of_pictures_is_what_the_model_gets(folders, name):
    images = [picture(width=90, height=40), picture(width=33, height=50)]
    cutter, model = load_cutter(folders[name]), load_chat_model(folders[name])
    for max_tiles in (1, 12):
        ids = model.inputs([ask(images=images).chats["base"]], max_tiles, None)["input_ids"]
        num_tokens = int((ids == model.model.config.image_token_id).sum())
        drawn = show.tiles_html(cutter, images, max_tiles)
        assert f"{num_tokens:,} image tokens together" in drawn
        assert "cut by the model's own processor" in drawn


def test_a_control_token_of_the_family_is_named_and_not_read_as_one(folders):
    answers = finish(LocalModels(folders["qwen2_5_vl"], folders["qwen2_5_vl"]).stream(ask("a <|image_pad|> b")))
    assert "spells out the control token <|image_pad|>" in answers["mpo"].error


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "blip_2"}, "model_type 'blip_2', expected one of 'internvl_chat', 'internvl'"),
        ({"model_type": "llava", "vision_config": {"model_type": "pixtral"}}, "vision tower of type 'pixtral'"),
    ],
)
def test_what_no_family_takes_is_refused_before_anything_is_loaded(folders, tmp_path: Path, config, words):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInputError, match=words) as caught:
        LocalModels(folders["llava_next"], str(tmp_path))
    assert "give its address as base_url or mpo_url" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_four_bit_weights_are_those_of_the_language_model(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="4-bit weights need bitsandbytes")
    import tiny_families

    wide = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    monkeypatch.setattr(tiny_families, "_TEXT", {**tiny_families._TEXT, **wide})  # blocks of 64 weights are quantised
    folder = str(FAMILIES["llava_next"](tmp_path / "model"))
    backend = LocalModels(folder, folder, four_bit=True)
    assert finish(backend.stream(ask(images=[picture()])))["mpo"].num_tokens > 0
    model = backend._models.get()[0].model

    def kinds(part):
        return {type(module).__name__ for module in part.modules() if "Linear" in type(module).__name__}

    assert kinds(model.model.language_model) == {"Linear4bit"}
    assert kinds(model.model.vision_tower) == {"Linear"}
