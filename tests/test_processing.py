"""Prompts, placeholders, labels: what chat sends is what the processor makes."""

import base64
import io
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import tiny_config, tiny_model, tiny_processor, tiny_tokenizer
from tokenizers import processors
from transformers import AutoProcessor

from modeling_internvl_mpo import CONVERSATIONS, InternVLChatProcessor, get_conversation

ORACLE = Path(__file__).parent.parent / "../shared/oracle/model"


@pytest.fixture(scope="module")
def processor() -> InternVLChatProcessor:
    return tiny_processor()


@pytest.mark.skipif(not ORACLE.is_dir(), reason="outputs of the original code are not here")
def test_prompts_equal_the_original_byte_for_byte() -> None:
    roles = {"u": "user", "a": "assistant"}
    for case in json.loads((ORACLE / "prompts.json").read_text())["renderings"]:
        if case["template"] not in CONVERSATIONS:
            continue  # a first-generation model without a system line
        conversation, system = get_conversation(case["template"]), case["system_message_override"]
        messages = [(roles[role], text) for role, text in case["messages"]]
        assert conversation.render(messages, system) == case["prompt"]
        asks = bool(messages) and messages[-1] == ("assistant", None)
        said = [{"role": role, "content": text} for role, text in (messages[:-1] if asks else messages)]
        processor = tiny_processor(tiny_config(template=case["template"], system_message=system))
        if said:
            assert processor.apply_chat_template(said, add_generation_prompt=asks) == case["prompt"]


def test_system_message_of_the_configuration_reaches_chat_and_processor() -> None:
    model = tiny_model(system_message="Be brief.")
    processor = tiny_processor(model.config)
    prompt = processor.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert prompt == model._render([("Hi", None)])
    assert prompt.startswith("<|im_start|>system\nBe brief.<|im_end|>")
    model.system_message = "Be long."
    assert "Be long." in model._render([("Hi", None)])
    said = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert processor.apply_chat_template(said).startswith("<|im_start|>system\nBe kind.<|im_end|>")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([{"type": "image"}, {"type": "text", "text": "Q"}], "<image>\nQ"),
        ([{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Q"}], "<image>\n<image>\nQ"),
        (
            [
                {"type": "text", "text": "Image-1: "},
                {"type": "image"},
                {"type": "text", "text": "\nImage-2: "},
                {"type": "image"},
                {"type": "text", "text": "\nQ"},
            ],
            "Image-1: <image>\nImage-2: <image>\nQ",
        ),
        ([{"type": "text", "text": "Q"}, {"type": "image"}], "Q<image>"),
        (
            [
                {"type": "text", "text": "First look at "},
                {"type": "image"},
                {"type": "text", "text": " and then at "},
                {"type": "image"},
                {"type": "text", "text": "."},
            ],
            "First look at <image> and then at <image>.",
        ),
        ([{"type": "image"}, {"type": "text", "text": "? What"}], "<image>\n? What"),
        ([{"type": "image", "text": None}, {"type": "image", "text": None}], "<image>\n<image>"),
        ("<image>\nQ", "<image>\nQ"),
    ],
)
def test_where_images_go_in_a_message(processor: InternVLChatProcessor, content: list, expected: str) -> None:
    prompt = processor.apply_chat_template([{"role": "user", "content": content}])
    assert prompt.endswith(f"<|im_start|>user\n{expected}<|im_end|>")


def test_serving_engines_find_that_content_may_be_a_list() -> None:
    """They look for a loop over `message.content`, where `message` is from a loop over `messages` or a part of it."""
    from jinja2 import nodes
    from transformers.utils.chat_template_utils import _compile_jinja_template

    def names_part_of(node: nodes.Node | None, variable: str, key: str | None = None) -> bool:
        while isinstance(node, (nodes.Filter, nodes.Test)) or (
            isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
        ):
            node = node.node
        if key is not None:
            if not (isinstance(node, nodes.Getattr) and node.attr == key):
                return False
            node = node.node
        return isinstance(node, nodes.Name) and node.name == variable

    for conversation in CONVERSATIONS.values():
        text = conversation.chat_template()
        tree = _compile_jinja_template(text).environment.parse(text)
        lists = {"messages"}
        for one in tree.find_all(nodes.Assign):
            if any(names_part_of(one.node, name) for name in lists):
                assert isinstance(one.target, nodes.Name)  # vLLM gives up where this is a namespace's attribute
                lists.add(one.target.name)
        loops = list(tree.find_all(nodes.For))
        turns = {loop.target.name for loop in loops if any(names_part_of(loop.iter, name) for name in lists)}
        assert turns == {"message"}
        assert any(names_part_of(loop.iter, name, "content") for loop in loops for name in turns)


@pytest.mark.parametrize("begins", [True, False])
def test_a_serving_engine_reads_the_tokens_that_the_processor_writes(begins: bool) -> None:
    """Serving engines render the template with the tokenizer and add no first token to it."""
    tokenizer = tiny_tokenizer()
    if begins:  # as InternLM2's does
        tokenizer.add_special_tokens({"bos_token": "<s>"})
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    processor = InternVLChatProcessor.from_config(tiny_config(), tokenizer)
    messages = [{"role": "user", "content": "Hi"}]
    served = processor.tokenizer.apply_chat_template(
        messages, chat_template=processor.chat_template, add_generation_prompt=True, tokenize=False
    )
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    ids = processor(text=prompt)["input_ids"][0]
    assert prompt.startswith("<|im_start|>system")
    assert (ids[0] == tokenizer.bos_token_id) == begins
    assert processor.tokenizer(served, add_special_tokens=False)["input_ids"] == ids
    tokenized = processor.apply_chat_template([messages, messages], add_generation_prompt=True, tokenize=True)
    assert tokenized == [ids, ids]
    assert processor.apply_chat_template([messages, messages], add_generation_prompt=True) == [prompt, prompt]


def test_a_first_token_that_opens_the_turn_stays() -> None:
    """SmolLM2's tokenizer calls `<|im_start|>` its first token and adds none, so the prompt began with "system"."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    processor = InternVLChatProcessor.from_config(tiny_config(), tokenizer)
    prompt = processor.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert prompt.startswith("<|im_start|>system\n") and prompt.count("<|im_start|>") == 3


def test_content_of_a_message_may_be_nothing(processor: InternVLChatProcessor) -> None:
    for nothing in ({}, {"content": None}, {"content": ""}, {"content": []}):
        assert processor.apply_chat_template([{"role": "user", **nothing}]).endswith("<|im_end|><|im_start|>user\n")
        silent = processor.apply_chat_template([{"role": "system", **nothing}, {"role": "user", "content": "Q"}])
        assert silent == "<|im_start|>system\n<|im_end|><|im_start|>user\nQ<|im_end|>"


def test_unknown_content_and_roles_are_refused(processor: InternVLChatProcessor) -> None:
    with pytest.raises(Exception, match="content type 'audio' is not known"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "audio"}]}])
    with pytest.raises(Exception, match="role 'tool' is not known"):
        processor.apply_chat_template([{"role": "tool", "content": "x"}])
    with pytest.raises(ValueError, match="role 'tool' is not known"):
        processor.encode_conversation([("tool", "x")])


def test_chat_and_processor_give_the_model_the_same_ids(processor: InternVLChatProcessor) -> None:
    model = tiny_model()
    tokenizer, image = processor.tokenizer, Image.new("RGB", (90, 30), "red")
    content = [{"type": "image", "image": image}, {"type": "text", "text": "How many?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    seen = []
    original = model.generate

    def generate(**kwargs: object) -> torch.Tensor:
        seen.append(kwargs["input_ids"])
        return original(**kwargs)

    model.generate = generate
    answer = model.chat(tokenizer, inputs["pixel_values"], "How many?", {"max_new_tokens": 4, "do_sample": False})
    assert torch.equal(seen[0], inputs["input_ids"])
    ids = original(**inputs, max_new_tokens=4, do_sample=False, eos_token_id=processor.end_of_turn_id)
    decoded = processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert decoded.strip() == answer


def test_images_in_messages_from_every_source(processor: InternVLChatProcessor, tmp_path: Path) -> None:
    image = Image.new("RGB", (60, 30), "green")
    image.save(tmp_path / "a.png")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    sources = [{"image": image}, {"path": str(tmp_path / "a.png")}, {"base64": encoded}]
    outputs = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image", **source}, {"type": "text", "text": "Q"}]}],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        for source in sources
    ]
    for output in outputs[1:]:
        assert torch.equal(output["input_ids"], outputs[0]["input_ids"])
        assert torch.equal(output["pixel_values"], outputs[0]["pixel_values"])


def test_batches_are_padded_on_the_left(processor: InternVLChatProcessor) -> None:
    image = Image.new("RGB", (30, 30))
    outputs = processor(text=["<image>a", "b"], images=[[image], []], padding=True, return_tensors="pt")
    assert outputs["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]
    assert set(outputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert set(processor(text="b", images=[])) == set(processor(text="b")) == {"input_ids", "attention_mask"}
    right = processor(text=["ab", "b"], padding=True, padding_side="right", return_tensors="pt")
    assert right["attention_mask"].tolist() == [[1, 1], [1, 0]]


def test_counts_that_do_not_fit_are_refused(processor: InternVLChatProcessor) -> None:
    image = Image.new("RGB", (30, 30))
    with pytest.raises(ValueError, match="2 <image> placeholders and there are 1 images"):
        processor(text="<image><image>", images=image)
    with pytest.raises(ValueError, match="0 <image> placeholders and there are 1 images; write <image> where"):
        processor(text="hello", images=[image])
    with pytest.raises(ValueError, match="text 0 has 0"):
        processor(text=["a", "<image><image>"], images=[[image], [image]])
    with pytest.raises(ValueError, match="1 lists for 2 texts"):
        processor(text=["<image>", "<image>"], images=[[image, image]])
    with pytest.raises(ValueError, match="spells out <IMG_CONTEXT>"):
        processor(text="<IMG_CONTEXT>")
    with pytest.raises(ValueError, match="videos is not taken"):
        processor(text="a", videos=[[image]])
    with pytest.raises(ValueError, match="give text"):
        processor(images=image)


def test_more_tiles_than_fit_are_refused(processor: InternVLChatProcessor) -> None:
    image = Image.new("RGB", (400, 100))
    with pytest.raises(ValueError, match=r"truncation cut 3 of 5 image tokens off"):
        processor(text="<image>\nQ", images=image, truncation=True, max_length=3)
    assert processor(text="<image>\nQ", images=image, truncation=True, max_length=8, return_tensors="pt")


def test_chat_refuses_tiles_without_a_place(processor: InternVLChatProcessor) -> None:
    model, tokenizer, tiles = tiny_model(), tiny_tokenizer(), torch.zeros(2, 3, 28, 28)
    with pytest.raises(ValueError, match="adds up to another number than the 2 tiles"):
        model.chat(tokenizer, tiles, "Q", {}, num_patches_list=[1])
    with pytest.raises(ValueError, match="2 images for 1 <image> placeholders"):
        model.chat(tokenizer, tiles, "<image>\nQ", {}, num_patches_list=[1, 1])
    with pytest.raises(ValueError, match="1 images for 0 <image> placeholders"):
        model.chat(tokenizer, tiles, "Q", {}, history=[("a", "b")])
    with pytest.raises(ValueError, match="3 entries for 1 questions"):
        model.batch_chat(tokenizer, tiles, ["Q"], {}, num_patches_list=[1, 1, 0])
    with pytest.raises(NotImplementedError, match="call chat"):
        model.batch_chat(tokenizer, tiles, ["Q"], {}, history=[])


def test_tokenizer_without_image_tokens_is_refused(processor: InternVLChatProcessor) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ValueError, match="no token <img>"):
        InternVLChatProcessor(processor.image_processor, bare)


@pytest.mark.parametrize("template", list(CONVERSATIONS))
def test_labels_score_answers_and_their_end_only(template: str) -> None:
    processor = tiny_processor(tiny_config(template=template))
    image = Image.new("RGB", (90, 30))
    messages = [("user", "<image>\nA?"), ("assistant", "one"), ("user", "<image>B?"), ("assistant", "two")]
    features = processor.encode_conversation(messages, [image, image])
    end = processor.tokenizer.decode([processor.end_of_turn_id])
    scored = features["labels"][0]
    assert processor.tokenizer.decode(scored[scored != -100]) == f"one{end}two{end}"
    prompt = get_conversation(template).render(messages)
    (expanded,) = processor.expand_images([prompt], [len(features["pixel_values"]) // 2] * 2)
    assert processor.tokenizer.decode(features["input_ids"][0]) == expanded
    unanswered = processor.encode_conversation([("user", "A?")])
    assert (unanswered["labels"] == -100).all()


def test_saved_processor_is_the_same(processor: InternVLChatProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    tiny_config().save_pretrained(tmp_path)
    loaded = InternVLChatProcessor.from_pretrained(tmp_path)
    assert loaded.chat_template == processor.chat_template
    assert loaded.num_image_token == processor.num_image_token == 1
    image = Image.new("RGB", (90, 30), "red")
    ours, theirs = (one(text="<image>Q", images=image, return_tensors="pt") for one in (processor, loaded))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    fewer = AutoProcessor.from_pretrained(tmp_path, max_dynamic_patch=1)
    assert len(fewer(text="<image>Q", images=image, return_tensors="pt")["pixel_values"]) == 1


TEXT = st.text(max_size=20).filter(lambda text: "<" not in text)
SIZES = st.lists(st.tuples(st.integers(1, 120), st.integers(1, 120)), max_size=3)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.tuples(TEXT, SIZES), min_size=1, max_size=3), max_tiles=st.integers(1, 6))
def test_image_tokens_always_equal_tile_features(rows: list, max_tiles: int) -> None:
    processor = tiny_processor()
    texts = ["<image>".join([text] * (len(sizes) + 1)) for text, sizes in rows]
    images = [[Image.new("RGB", size) for size in sizes] for _, sizes in rows]
    outputs = processor(
        text=texts, images=images, max_dynamic_patch=max_tiles, padding=True, return_tensors="pt", return_num_tiles=True
    )
    num_images = sum(len(sizes) for _, sizes in rows)
    num_tiles = len(outputs["pixel_values"]) if num_images else 0
    assert int((outputs["input_ids"] == processor.image_token_id).sum()) == num_tiles * processor.num_image_token
    assert len(outputs.get("num_tiles", [])) == num_images
