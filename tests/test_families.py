"""Every family: a pack scores what the family's own processor and model score, one sequence at a time.

The plain twin here takes nothing of this package: text from the chat template, tensors from the processor, logits from
the model's own forward. Run: pytest tests/test_families.py
"""

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_families import FAMILIES, tiny_internvl, tiny_qwen3_vl
from torch.utils.flop_counter import FlopCounterMode

from internvl_mpo.encoding import encode_group, measure_group
from internvl_mpo.errors import BadInputError
from internvl_mpo.families.registry import FAMILIES as KNOWN
from internvl_mpo.families.registry import family_of_model, family_of_processor, family_of_source
from internvl_mpo.logps import attach_scoring, response_logps, twin_logps
from internvl_mpo.memory_estimate import estimate_memory
from internvl_mpo.packing import pack_groups, unpack_groups
from internvl_mpo.records import PreferencePair, RowError
from internvl_mpo.training import throughput
from internvl_mpo.training.fake_pass import Setup, fake_pack, peak_of_a_pass
from internvl_mpo.training.policy import add_adapters, freeze
from internvl_mpo.training.throughput import FlopModel

BUILDERS = {
    **FAMILIES,
    "internvl (InternLM2)": lambda folder: tiny_internvl(folder, "internlm2"),
    "internvl (experts)": lambda folder: tiny_internvl(folder, "qwen3_moe"),
    "internvl (gpt-oss)": lambda folder: tiny_internvl(folder, "gpt_oss"),
    "qwen3_vl (experts)": lambda folder: tiny_qwen3_vl(folder, experts=True),
}
SIZES = {"a.png": (61, 29), "b.png": (28, 28), "c.jpg": (31, 97), "d.png": (120, 45), "e.png": (60, 58)}
WORDS = ("red", "two", "a dot", "on the left", "7", "because", "none", "it is")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture(scope="module", params=BUILDERS)
def folder(request, tmp_path_factory) -> Path:
    return BUILDERS[request.param](tmp_path_factory.mktemp("family") / "model")


@pytest.fixture(scope="module")
def processor(folder) -> Any:
    return family_of_source(str(folder)).load_processor(str(folder))


def load(folder: Path, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    # the fast form of experts is not made for float64
    return family_of_source(str(folder)).load_model(str(folder), dtype=dtype, experts_implementation="eager").eval()


def questions() -> list[list[PreferencePair]]:
    """Pairs of six questions with 0 to 3 pictures and 1 to 6 distinct responses."""
    rng = random.Random(3)
    groups = []
    for num_images, num_responses in ((0, 2), (1, 6), (2, 3), (3, 4), (1, 2), (0, 5)):
        images = tuple(rng.choices(list(SIZES), k=num_images))
        marks = ["<image>\n"] * num_images
        question = f"{''.join(marks[:1])}Which {'of <image> and ' * max(0, num_images - 1)}is it?"
        responses = [" ".join(rng.choices(WORDS, k=rng.randint(1, 5))) + f" {i}" for i in range(num_responses)]
        groups.append(
            [
                PreferencePair(images=images, question=question, chosen=responses[0], rejected=response)
                for response in responses[1:]
            ]
        )
    return groups


def parts(question: str) -> list[dict[str, str]]:
    """The question as content parts, written down here once more."""
    content: list[dict[str, str]] = []
    for number, piece in enumerate(question.split("<image>")):
        content += [{"type": "image"}] if number else []
        text = piece.strip("\n") if "<image>" in question else piece
        content += [{"type": "text", "text": text}] if text else []
    return content


def plain_logps(model: Any, processor: Any, pairs: list[PreferencePair], root: Path) -> torch.Tensor:
    """Log-probs of the distinct responses of one question through processor and model alone. Shape: (R,)"""
    message = {"role": "user", "content": parts(pairs[0].question)}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    images = [Image.open(root / name).convert("RGB") for name in pairs[0].images] or None
    end = "<|im_end|>"
    rows = []
    for response in dict.fromkeys(text for pair in pairs for text in (pair.chosen, pair.rejected)):
        sizes = [
            processor(text=[text], images=[images] if images else None, return_tensors="pt")
            for text in (prompt, prompt + response + end)
        ]
        inputs = dict(sizes[1].items())
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        logps = model(**inputs, use_cache=False).logits[0, :-1].log_softmax(-1)
        targets = inputs["input_ids"][0, 1:]
        before = sizes[0]["input_ids"].shape[1] - 1
        rows.append(logps.gather(1, targets[:, None])[before:, 0].sum())
    return torch.stack(rows)


def gradient(model: torch.nn.Module, logps: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    (logps * torch.linspace(-1, 1, len(logps), dtype=logps.dtype)).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_a_pack_scores_what_the_familys_own_model_scores(folder, processor, root):
    groups = questions()
    plain = load(folder)
    with torch.no_grad():
        expected = torch.cat([plain_logps(plain, processor, pairs, root) for pairs in groups])
    encoded = [encode_group(processor, pairs, root) for pairs in groups]
    model = attach_scoring(load(folder))
    with torch.no_grad():
        packed = response_logps(model, pack_groups(encoded))
        alone = torch.cat([response_logps(model, pack_groups([group])) for group in encoded])
        twin = twin_logps(model, encoded)
    assert (packed - expected).abs().max() < 1e-10
    assert (alone - expected).abs().max() < 1e-10
    assert (twin - expected).abs().max() < 1e-10
    single = attach_scoring(load(folder, torch.float32))
    with torch.no_grad():
        packed = response_logps(single, pack_groups(encoded))
    assert ((packed - expected).abs() / expected.abs().clamp(min=1)).max() < 1e-5


def test_gradients_of_a_pack_are_those_of_the_familys_own_model(folder, processor, root):
    groups = questions()[1:4]
    plain = load(folder, torch.float32).train()
    expected = gradient(plain, torch.cat([plain_logps(plain, processor, pairs, root) for pairs in groups]))
    model = attach_scoring(load(folder, torch.float32)).train()
    pack = pack_groups([encode_group(processor, pairs, root) for pairs in groups])
    packed = gradient(model, response_logps(model, pack))
    assert (packed - expected).norm() < 5e-5 * expected.norm()


@pytest.mark.parametrize("max_tiles", [12, 2])
def test_measured_size_is_the_encoded_one_and_packs_come_apart_again(processor, root, max_tiles):
    encoded = []
    for pairs in questions():
        limits = {"max_tiles": max_tiles, "max_length": 500}
        size = measure_group(processor, pairs, root, **limits)
        group = encode_group(processor, pairs, root, **limits)
        assert size.prompt_tokens == len(group.prompt_ids)
        assert size.num_tokens == group.num_tokens
        assert size.tiles == (0 if group.tiles is None else len(group.tiles))
        encoded.append(group)
    for group, again in zip(encoded, unpack_groups(pack_groups(encoded)), strict=True):
        assert again.prompt_ids == group.prompt_ids
        assert again.image_inputs.keys() == group.image_inputs.keys()
        assert all(torch.equal(again.image_inputs[name], rows) for name, rows in group.image_inputs.items())
        assert group.tiles is None or torch.equal(again.tiles, group.tiles)
        assert group.positions is None or torch.equal(again.positions, group.positions)


def test_a_question_or_an_answer_that_spells_out_a_picture_token_is_refused_alike(processor, root):
    token = family_of_processor(processor).reserved(processor)[0]
    good = {"images": ("b.png",), "question": "Which?", "chosen": "this", "rejected": "that"}
    for field in ("question", "chosen"):
        if (field, token) == ("question", "<image>"):
            continue  # one too many is told by their number
        pair = PreferencePair(**{**good, field: f"a {token} b"})
        for act in (encode_group, measure_group):
            with pytest.raises(RowError, match="spells out"):
                act(processor, [pair], root)


def test_every_parameter_belongs_to_a_part_and_adapters_go_where_they_are_asked(folder):
    model = load(folder, torch.float32)
    family = family_of_model(model)
    parts = {name: family.part_of(name) for name, _ in model.named_parameters()}
    assert None not in parts.values()
    assert set(parts.values()) == {"vision tower", "projector", "language model"}
    for part in ("vision tower", "language model"):
        pattern = re.compile(family.lora_targets(model, part))
        layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        adapted = [name for name in layers if pattern.fullmatch(name)]
        assert adapted and {parts[f"{name}.weight"] for name in adapted} == {part}
        left = {name for name in layers if name not in adapted and parts[f"{name}.weight"] == part}
        unread = {layer for module in family.unread(model) for layer in module.modules()}
        assert left - {"lm_head"} == {name for name in left if model.get_submodule(name) in unread}


def test_every_weight_that_is_trained_has_a_gradient_adapters_included(folder, processor, root):
    pack = pack_groups([encode_group(processor, pairs, root) for pairs in questions()])
    for adapted in (False, True):
        model = attach_scoring(load(folder, torch.float32)).train()
        freeze(model)
        if adapted:
            model = add_adapters(model, rank=2, on="both", base="none")
        response_logps(model, pack).sum().backward()
        assert not [name for name, weight in model.named_parameters() if weight.requires_grad and weight.grad is None]


def test_4_bits_are_for_the_language_model_alone(folder):
    from transformers.quantizers.quantizers_utils import should_convert_module

    model = load(folder, torch.float32)
    family = family_of_model(model)
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    narrowed = {name for name in layers if should_convert_module(name, list(family.keep_wide))}
    language = {name for name in layers if family.part_of(f"{name}.weight") == "language model"}
    assert narrowed == language - {"lm_head"}


def test_counted_arithmetic_is_that_of_the_matrix_products(folder, processor, root):
    model = attach_scoring(load(folder, torch.float32)).train()
    for name, weight in model.named_parameters():  # where sinks are trained, attention is made of matrix products
        weight.requires_grad_(not name.endswith(".sinks"))
    pack = pack_groups([encode_group(processor, pairs, root) for pairs in questions()])
    with FlopCounterMode(display=False) as counter:
        response_logps(model, pack).sum().backward()
    matrices = counter.get_total_flops()  # attention runs in kernels that torch's table does not know
    flops = FlopModel(model)
    assert flops.vision.attention_width and flops.language.attention_width
    for name in ("vision", "language", "scored"):
        part = getattr(flops, name)
        setattr(flops, name, throughput._Part(part.num_weights, part.num_trained, 0))
    logits_again = 2 * len(pack.target_ids_S) * flops.head.num_weights  # which the method does not need
    assert flops.of(pack) == pytest.approx(matrices - logits_again, rel=0.05)  # routers, line breaks, padding


def test_the_memory_estimate_is_what_a_real_pass_takes(folder):
    config = family_of_source(str(folder)).load_config(str(folder))
    small = {"max_tokens_per_pack": 900, "response_tokens": 40, "optim": "adamw_torch", "gradient_checkpointing": False}
    setup = Setup(dtype="float32", attention="segments", **small)
    expected = estimate_memory(config, setup)
    model = family_of_source(str(folder)).load_model(str(folder), dtype=torch.float32)  # experts in their fast form
    model = attach_scoring(model, attention="segments").train()
    assert expected.num_weights == sum(p.numel() for p in model.parameters())
    assert peak_of_a_pass(model, fake_pack(config, setup), setup) == pytest.approx(expected.activations, rel=0.06)


def test_a_template_without_a_mark_after_answers_gets_the_end_of_text_token(tmp_path, root):
    folder = FAMILIES["llava"](tmp_path / "model")
    family = family_of_source(str(folder))
    processor = family.load_processor(str(folder))
    processor.chat_template = (  # as LLaVA 1.5's
        "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% for part in message['content'] %}"
        "{{ '<image>\n' if part['type'] == 'image' else part['text'] + ' ' }}{% endfor %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
    )
    assert family.turn(processor) == (" ", processor.tokenizer.eos_token_id)
    pair = PreferencePair(images=("b.png",), question="Which?", chosen="this", rejected="that")
    group = encode_group(processor, [pair], root)
    whole = processor.tokenizer.decode(group.prompt_ids + group.responses[0])
    assert whole.endswith(f"Which? ASSISTANT: this{processor.tokenizer.eos_token}")


def test_smolvlm_reads_pictures_as_its_own_processor_does_without_what_that_one_needs_for_videos(tmp_path, monkeypatch):
    from transformers.models.smolvlm import processing_smolvlm

    folder = FAMILIES["smolvlm"](tmp_path / "model")
    family = family_of_source(str(folder))
    ours = family.load_processor(str(folder))
    monkeypatch.setattr(processing_smolvlm, "num2words", str)  # which is asked for before any video is
    images, tokenizer = ours.image_processor, ours.tokenizer

    class Own(processing_smolvlm.SmolVLMProcessor):
        get_attributes = classmethod(lambda cls: ["image_processor", "tokenizer"])

    monkeypatch.setattr(Own, "check_argument_for_proper_class", lambda *_: None)
    own = Own(images, tokenizer, None, image_seq_len=ours.image_seq_len, chat_template=ours.chat_template)
    pictures = [Image.effect_noise(size, 90).convert("RGB") for size in ((28, 28), (61, 29))]
    for shown in (pictures, pictures[:1]):
        asked = {"text": ["<image>" * len(shown) + "Which?"], "images": [shown], "return_tensors": "pt"}
        expected, found = own(**asked), ours(**asked)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    ours.save_pretrained(tmp_path / "again")
    saved, first = (json.loads((path / "processor_config.json").read_text()) for path in (tmp_path / "again", folder))
    assert saved["processor_class"] == "SmolVLMProcessor"
    assert saved["video_processor"] == first["video_processor"]


def test_every_family_has_a_tiny_model_here():
    types = {model_type for family in KNOWN for model_type in family.model_types}
    assert types - {"internvl_chat", "qwen3_vl_moe"} == set(FAMILIES)  # the two have tests of their own


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "blip_2"}, "model_type 'blip_2', expected one of 'internvl_chat', 'internvl'"),
        ({"model_type": "internvl", "text_config": {"model_type": "gemma2"}}, "language model of type 'gemma2'"),
        (
            {"model_type": "gemma3"},
            "'gemma3' .its attention goes in both directions.*, expected one of 'internvl_chat'",
        ),
        (
            {"model_type": "internvl_chat", "llm_config": {"architectures": ["Qwen3MoeForCausalLM"]}},
            "language model Qwen3MoeForCausalLM is not supported.*checkpoint in the -hf layout",
        ),
        ({"model_type": "llava_qwen"}, "'llava_qwen' .that is the layout of its authors' own code.* under llava-hf"),
        (
            {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "mm_hidden_size": 1024},
            "class LlavaLlamaForCausalLM is its authors",
        ),
        ({"model_type": "llava", "vision_config": {"model_type": "pixtral"}}, "vision tower of type 'pixtral'"),
    ],
)
def test_what_a_pack_cannot_serve_is_refused_by_name_from_config_json(tmp_path, config, words):
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(BadInputError, match=words):
        family_of_source(str(tmp_path))
