"""The engine for other families: LLaVA, Qwen2-VL and native InternVL answer as transformers itself would."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model, tiny_processor
from tiny_families import tiny_llava, tiny_qwen2_vl
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

import evaluate_mpo
from internvl_mpo.convert import convert
from internvl_mpo.engines import Request, Sampling
from internvl_mpo.engines.image_text_engine import ImageTextEngine
from internvl_mpo.engines.loading import load_model_engine
from internvl_mpo.errors import BadInputError

GREEDY = Sampling(max_new_tokens=8)
DRAWN = Sampling(temperature=1.0, top_k=40, top_p=0.9, max_new_tokens=8)


def picture(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    official = root / "official"
    model = tiny_model("internlm2")
    model.save_pretrained(official)
    tiny_processor(model.config).save_pretrained(official)
    convert(official, root / "native")
    return {
        "llava": tiny_llava(root / "llava"),
        "qwen2_vl": tiny_qwen2_vl(root / "qwen2_vl"),
        "native": root / "native",
        "official": official,
    }


@pytest.fixture(scope="module", params=["llava", "qwen2_vl", "native"])
def engine(request, folders) -> ImageTextEngine:
    return load_model_engine(str(folders[request.param]))


def requests() -> list[Request]:
    return [
        Request(
            id=str(number),
            question="What is it? " * (1 + number % 3),
            images=tuple(picture(number + k) for k in range(number % 3)),
            sampling=DRAWN if number > 2 else GREEDY,
            seed=number,
        )
        for number in range(6)
    ]


def test_replies_do_not_depend_on_the_batch(engine):
    together = {reply.id: reply for reply in engine.generate(requests())}
    alone = {request.id: next(engine.generate([request])) for request in requests()}
    assert together == alone
    assert not any(reply.error for reply in together.values())


def test_greedy_reply_is_what_generate_gives(engine):
    request = Request(id="1", question="What is it?", images=(picture(3),), sampling=GREEDY)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    text = engine.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = engine.processor(text=[text], images=[[picture(3)]], return_tensors="pt")
    model = AutoModelForImageTextToText.from_pretrained(engine.model_id, dtype=torch.float32)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    (reply,) = engine.generate([request])
    assert reply.text == engine.tokenizer.decode(output, skip_special_tokens=True).strip()
    other = next(engine.generate([Request(id="2", question="What is it?", images=(picture(4),), sampling=GREEDY)]))
    assert other.text != reply.text  # the picture is seen


def test_native_internvl_answers_like_the_official_folder_it_was_made_from(folders):
    replies = []
    for name in ("official", "native"):
        asked = [
            Request(id="0", question="<image>\nWhich is this?", images=(picture(5, (56, 28)),), sampling=GREEDY),
            Request(id="1", question="Is it?", sampling=GREEDY),
            Request(id="2", question="Is it?", prefix="It is", images=(picture(6),), sampling=GREEDY),
        ]
        engine = load_model_engine(str(folders[name]), max_tiles=2)
        replies.append({reply.id: reply.text for reply in engine.generate(asked)})
    assert replies[0] == replies[1]


def test_prefix_is_continued_and_not_repeated(engine):
    whole = next(engine.generate([Request(id="1", question="Q", sampling=GREEDY)]))
    text = engine.render("Q", 0, prefix="The answer")
    assert text.endswith("assistant\nThe answer")
    (reply,) = engine.generate([Request(id="1", question="Q", prefix="The answer", sampling=GREEDY)])
    assert not reply.text.startswith("The answer") and reply.text != whole.text


def test_broken_request_costs_only_itself(engine, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    asked = [
        Request(id="bad", question="?", images=(tmp_path / "bad.png",), sampling=GREEDY),
        Request(id="marks", question="<image> <image>", images=(picture(1),), sampling=GREEDY),
        Request(id="good", question="?", images=(picture(1),), sampling=GREEDY),
    ]
    replies = {reply.id: reply for reply in engine.generate(asked)}
    assert "2 <image> placeholders for 1 pictures" in replies["marks"].error
    assert replies["bad"].error and not replies["good"].error


def test_what_is_no_chat_model_is_refused_in_one_sentence(folders, tmp_path):
    LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path / "text")
    with pytest.raises(BadInputError, match="cannot load an image-text model from"):
        load_model_engine(str(tmp_path / "text"))
    with pytest.raises(BadInputError, match="cannot load a model from"):
        load_model_engine(str(tmp_path / "nothing"))
    silent = tmp_path / "silent"
    silent.mkdir()
    for file in folders["llava"].iterdir():
        if file.name != "chat_template.jinja":
            (silent / file.name).write_bytes(file.read_bytes())
    with pytest.raises(BadInputError, match="has no chat template"):
        load_model_engine(str(silent))


def test_evaluation_of_another_family_from_start_to_report(folders, tmp_path):
    picture(1).save(tmp_path / "a.png")
    rows = [
        {"question_id": i, "text": f"Is there a {thing}?", "label": "yes", "image": "a.png", "category": "random"}
        for i, thing in enumerate(("cat", "dog", "hat"))
    ]
    (tmp_path / "pope.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    settings = {"model": folders["llava"], "data": tmp_path / "pope.jsonl", "output": tmp_path / "run"}
    arguments = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    assert evaluate_mpo.main([*arguments, "--benchmarks", "pope", "--max_new_tokens", "4"]) == 0
    scores = json.loads((tmp_path / "run" / "scores.json").read_text(encoding="utf-8"))
    assert scores["pope"]["direct"]["num_examples"] == 3 and scores["pope"]["direct"]["num_unscored"] == 0
