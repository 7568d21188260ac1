"""Pairs to token ids, literal where it matters. Run: pytest tests/test_encoding.py"""

import functools
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from tiny import tiny_config, tiny_model, tiny_processor, tiny_tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from internvl_mpo.encoding import Answers, _upright_size, encode_group, measure_group, pair_size, token_ids
from internvl_mpo.families.contract import Turn
from internvl_mpo.logps import attach_scoring, response_logps, twin_logps
from internvl_mpo.measuring import Asked, PairMeter
from internvl_mpo.mmpr.files import check_picture
from internvl_mpo.packing import pack_groups
from internvl_mpo.pictures import damage
from internvl_mpo.records import PreferencePair, RowError
from modeling_internvl_mpo import InternLM2Tokenizer, InternVLChatProcessor

SHARED = Path(__file__).parent.parent / "../shared/tokenizers"
SIZES = {"wide.png": (60, 28), "square.png": (28, 28), "tall.jpg": (30, 90)}
BACKBONES = ["internlm2", "phi3", "qwen2", "qwen3"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / name)
    return tmp_path


def pair(**changes) -> PreferencePair:
    return PreferencePair(
        **{"images": ("square.png",), "question": "How many?", "chosen": "two dots", "rejected": "one"} | changes
    )


def text_pair(**changes) -> PreferencePair:
    return pair(images=(), **changes)


def decode(processor, ids: list[int]) -> str:
    return processor.tokenizer.decode(ids)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_prompt_is_what_chat_renders_and_the_answer_ends_its_turn(root, backbone):
    model = tiny_model(backbone)
    processor = tiny_processor(model.config)
    group = encode_group(processor, [pair()], root)
    prompt = model._render([("<image>\nHow many?", None)])
    assert decode(processor, group.prompt_ids) == prompt.replace("<image>", "<img><IMG_CONTEXT></img>")
    end = "<|end|>" if backbone == "phi3" else "<|im_end|>"  # never the newline that internvl2_5 writes after it
    assert [decode(processor, response) for response in group.responses] == [f"two dots{end}", f"one{end}"]
    assert group.pairs == [(0, 1)]
    assert group.tiles.shape == (1, 3, 28, 28)


def test_equal_responses_of_several_pairs_are_one(root):
    pairs = [pair(), pair(rejected="three"), pair(chosen="three", rejected="one")]
    group = encode_group(tiny_processor(), pairs, root)
    assert len(group.responses) == 3
    assert group.pairs == [(0, 1), (0, 2), (2, 1)]
    assert group.pair_ids == [row.id for row in pairs]


def test_tiles_follow_the_original(root):
    processor = tiny_processor()  # tiles of 28 pixels
    num_tiles = {name: len(encode_group(processor, [pair(images=(name,))], root).tiles) for name in SIZES}
    assert num_tiles == {"wide.png": 2 + 1, "square.png": 1, "tall.jpg": 3 + 1}  # one thumbnail where there are several


def test_several_images_share_the_limit(root):
    row = pair(images=("tall.jpg", "wide.png"), question="<image> or <image>?")
    assert len(encode_group(tiny_processor(), [row], root, max_tiles=12).tiles) == 4 + 3
    assert len(encode_group(tiny_processor(), [row], root, max_tiles=5).tiles) == 3 + 3  # 5 // 2 tiles each
    assert len(encode_group(tiny_processor(), [row], root, max_tiles=1).tiles) == 2  # never less than one


GROUPS = {
    "text": [text_pair()],
    "one image": [pair(images=("wide.png",)), pair(images=("wide.png",), chosen="a much longer answer")],
    "placeholder in the middle": [pair(question="Look: <image> How many?")],
    "several images": [pair(images=tuple(SIZES), question="<image><image>\n<image> which?")],
    "cut": [pair(chosen="x" * 400)],
}


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_measured_size_equals_the_encoded_one(root, name, backbone):
    processor = tiny_processor(tiny_config(backbone))
    limits = {"max_tiles": 6, "max_length": 350}
    size = measure_group(processor, GROUPS[name], root, **limits)
    group = encode_group(processor, GROUPS[name], root, **limits)
    assert size.prompt_tokens == len(group.prompt_ids)
    assert size.response_tokens == tuple(len(response) for response in group.responses)
    assert size.tiles == (0 if group.tiles is None else len(group.tiles))
    assert size.num_tokens == group.num_tokens
    assert size.cut_responses == (name == "cut")


def test_a_photo_turned_by_exif_is_measured_upright(root):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (20, 29)).save(root / "turned.jpg", exif=exif)
    Image.new("RGB", (20, 29)).save(root / "upright.jpg")
    tiles = {}
    for name in ("turned.jpg", "upright.jpg"):
        size = measure_group(tiny_processor(), [pair(images=(name,))], root, max_tiles=2)
        assert size.tiles == len(encode_group(tiny_processor(), [pair(images=(name,))], root, max_tiles=2).tiles)
        tiles[name] = size.tiles
    # 29 / 20 is nearer to 1 than to 2, but 20 / 29 is nearer to 1 / 2 than to 1.
    assert tiles == {"turned.jpg": 1, "upright.jpg": 3}


@pytest.mark.parametrize("turn", range(1, 9))
def test_every_turn_of_a_photo_is_seen_in_its_header(root, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    for name in ("photo.jpg", "photo.png", "photo.webp"):
        Image.new("RGB", (20, 29)).save(root / name, exif=exif)
        with Image.open(root / name) as image:
            assert _upright_size(image) == ImageOps.exif_transpose(image).size
    Image.new("RGB", (20, 29)).save(root / "plain.png")
    with Image.open(root / "plain.png") as image:
        assert _upright_size(image) == (20, 29)


def test_limits_are_those_of_the_original_unless_others_are_given():
    for function in (encode_group, measure_group):
        given = {name: one.default for name, one in inspect.signature(function).parameters.items()}
        assert (given["max_tiles"], given["max_length"], given.get("decode", False)) == (12, 6144, False)


def test_every_kind_of_group_packs_and_equals_the_twin(root):
    model = attach_scoring(tiny_model("internlm2")).double()
    processor = tiny_processor(model.config)
    groups = [encode_group(processor, pairs, root, max_length=350) for pairs in GROUPS.values()]
    with torch.no_grad():
        assert (response_logps(model, pack_groups(groups)) - twin_logps(model, groups)).abs().max() < 1e-11


def test_a_long_response_is_cut_at_the_limit_and_loses_its_end(root):
    processor = tiny_processor()
    prompt = len(encode_group(processor, [text_pair()], root).prompt_ids)
    group = encode_group(processor, [text_pair(chosen="abcdefgh", rejected="ab")], root, max_length=prompt + 5)
    assert [decode(processor, response) for response in group.responses] == ["abcde", "ab<|im_end|>"]


@pytest.mark.parametrize(("room", "num_cut"), [(9, 0), (8, 1), (4, 1), (3, 1), (2, 2)])
def test_a_response_that_loses_no_more_than_its_end_counts_as_cut(root, room, num_cut):
    processor, row = tiny_processor(), text_pair(chosen="abcdefgh", rejected="wx")  # 9 and 3 tokens with their ends
    prompt = measure_group(processor, [row], root).prompt_tokens
    size = measure_group(processor, [row], root, max_length=prompt + room)
    assert size.cut_responses == num_cut
    assert size.response_tokens == (min(9, room), min(3, room))
    assert pair_size(size).num_cut == num_cut


def test_an_answer_goes_on_from_its_header_where_a_text_of_its_own_would_begin_with_a_space(root):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True, use_regex=False)
    processor = InternVLChatProcessor.from_config(tiny_config(), tokenizer)
    assert decode(processor, tokenizer("yes", add_special_tokens=False)["input_ids"]) == " yes"
    group = encode_group(processor, [text_pair(chosen="yes", rejected="no")], root)
    assert [decode(processor, response) for response in group.responses] == ["yes<|im_end|>", "no<|im_end|>"]
    assert measure_group(processor, [text_pair(chosen="yes", rejected="no")], root).response_tokens == (4, 3)


def test_what_a_pair_costs_is_what_its_two_branches_add(root):
    processor, row = tiny_processor(), text_pair(chosen="abcdef", rejected="abcxy")
    measured = measure_group(processor, [row], root)
    size, group = pair_size(measured), encode_group(processor, [row], root)
    assert (size.chosen, size.rejected, size.num_tiles) == (7, 6, 0)
    assert size.stem == 3  # abc, which both run alike
    assert size.num_tokens == group.num_tokens == measured.num_tokens
    assert (size.chosen_key, size.rejected_key) == measured.response_keys
    again = measure_group(processor, [text_pair(chosen="abcxy", rejected="abcdef")], root)
    assert again.response_keys == measured.response_keys[::-1]
    assert len({*measured.response_keys}) == 2


@pytest.mark.parametrize(("chosen", "rejected", "stem"), [("abc", "abcd", 3), ("abcd", "abc", 3), ("ab", "ba", 0)])
def test_a_response_that_goes_on_from_the_other_shares_all_that_is_run(root, chosen, rejected, stem):
    row = text_pair(chosen=chosen, rejected=rejected)
    (found,) = PairMeter(tiny_processor(), max_length=6144).measure([Asked(row, root, 12, "key")])
    assert found == pair_size(measure_group(tiny_processor(), [row], root))
    assert found.stem == stem


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("text", ["<|im_end|>", " \n<|im_end|> "])
def test_a_response_that_is_nothing_but_its_end_is_refused(root, side, text):
    """It would teach to say nothing, or not to."""
    assert refused(root, text_pair(**{side: text})) == [f"'{side}' is empty"] * 2


def test_spaces_around_a_response_are_not_scored(root):
    group = encode_group(tiny_processor(), [text_pair(chosen=" yes\n", rejected="no")], root)
    assert decode(tiny_processor(), group.responses[0]) == "yes<|im_end|>"


def real_processor(name: str) -> InternVLChatProcessor:
    if not (SHARED / name).is_dir():
        pytest.skip(f"the real {name} vocabulary is not here")
    loader = InternLM2Tokenizer if name == "internlm2" else AutoTokenizer
    tokenizer = loader.from_pretrained(SHARED / name)
    missing = [token for token in ("<img>", "</img>", "<IMG_CONTEXT>") if token not in tokenizer.get_vocab()]
    tokenizer.add_tokens(missing, special_tokens=True)
    template = "internlm2-chat" if name == "internlm2" else "Hermes-2"
    return InternVLChatProcessor(tiny_processor().image_processor, tokenizer, 1, template)


@pytest.mark.parametrize("name", ["internlm2", "qwen2"])
def test_real_vocabularies_go_on_from_the_header_as_generation_does(root, name):
    processor = real_processor(name)
    for text in ("The answer is 12.", "答案：十二", "A", "  Final answer: 3", "$x^2$\n\nso x", "- one\n- two 😀"):
        row = text_pair(chosen=text, rejected="Something else entirely")
        group = encode_group(processor, [row], root)
        rendered = processor.apply_chat_template(
            [{"role": "user", "content": row.question}, {"role": "assistant", "content": text.strip()}], tokenize=False
        )
        assert group.prompt_ids + group.responses[0] == processor.tokenizer(rendered)["input_ids"]
        assert measure_group(processor, [row], root).num_tokens == group.num_tokens


def refused(root: Any, row: PreferencePair, **limits) -> list[str]:
    """Return the reasons that measuring and encoding give; both must name the pair."""
    reasons = []
    for function in (measure_group, encode_group):
        with pytest.raises(RowError) as error:
            function(tiny_processor(), [row], root, **limits)
        assert f"pair {row.id}: " in str(error.value)
        reasons.append(error.value.reason)
    return reasons


def test_prompt_longer_than_the_limit_is_refused(root):
    assert all("no response fits below the limit of 40" in reason for reason in refused(root, pair(), max_length=40))


def test_a_prompt_as_long_as_the_limit_leaves_no_room_and_one_token_less_leaves_one(root):
    prompt = measure_group(tiny_processor(), [text_pair()], root).prompt_tokens
    assert all("no response fits" in reason for reason in refused(root, text_pair(), max_length=prompt))
    assert measure_group(tiny_processor(), [text_pair()], root, max_length=prompt + 1).response_tokens == (1, 1)


def test_a_template_that_drops_a_picture_is_refused(root):
    processor = tiny_processor()
    processor.chat_template = "{{ messages[-1]['content'] | replace('<image>', '') }}"
    for function in (measure_group, encode_group):
        with pytest.raises(RowError, match="does not keep every picture"):
            function(processor, [pair()], root)


def test_a_picture_of_too_many_pixels_is_refused(root, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert all("square.png' cannot be read" in reason for reason in refused(root, pair()))


def test_a_response_may_merge_with_what_follows_the_last_special_token():
    def header(prompt: str, *specials: str) -> str:
        return Answers.header(SimpleNamespace(specials=list(specials)), prompt)

    assert header("<s>a</s>b\n", "<s>", "</s>") == "</s>b\n"
    assert header("USER: a", "<s>") == header("USER: a") == "USER: a"


class Merging:
    """A tokenizer, without a fast form, in which a line end and a dash are one token."""

    def __call__(self, texts, *, add_special_tokens, return_attention_mask):
        assert not add_special_tokens
        return {"input_ids": [[999 if part == "\n-" else ord(part) for part in re.findall("\n-|.", text, re.DOTALL)]
                              for text in texts]}  # fmt: skip


def test_an_answer_that_would_merge_with_its_header_is_tokenized_by_itself():
    """The model starts after the header, which stands there with its line end as a token of its own."""
    answers = object.__new__(Answers)
    answers.ids, answers.turn = functools.partial(token_ids, Merging(), add_special_tokens=False), Turn("", 7)
    dash, x, y = map(ord, "-xy")
    assert answers.tokenize("a\n", ["-x", "y"]) == [[dash, x, 7], [y, 7]]


@pytest.mark.parametrize("setting", ["padding", "truncation"])
def test_a_tokenizer_that_pads_or_cuts_gives_all_ids_and_no_more(setting):
    tokenizer, plain = tiny_tokenizer(), tiny_tokenizer()
    if setting == "padding":
        tokenizer.backend_tokenizer.enable_padding(length=9)
    else:
        tokenizer.backend_tokenizer.enable_truncation(2)
    texts = ["abcd", "a"]
    ids = token_ids(tokenizer, texts, add_special_tokens=False)
    assert (
        ids
        == token_ids(plain, texts, add_special_tokens=False)
        == [plain.convert_tokens_to_ids([*text]) for text in texts]
    )


def test_responses_cut_to_the_same_are_refused(root):
    prompt = measure_group(tiny_processor(), [text_pair()], root).prompt_tokens
    row = text_pair(chosen="same start, one", rejected="same start, two")
    reasons = refused(root, row, max_length=prompt + 4)
    assert all("equal in the 4 tokens" in reason for reason in reasons)
    assert (
        list(PairMeter(tiny_processor(), max_length=prompt + 4).measure([Asked(row, root, 12, "key")])) == reasons[:1]
    )


def test_missing_and_broken_images_are_refused(root):
    assert all("gone.png' does not exist" in reason for reason in refused(root, pair(images=("gone.png",))))
    (root / "text.png").write_text("no image")
    assert all("text.png' cannot be read" in reason for reason in refused(root, pair(images=("text.png",))))
    assert all("cannot be read" in reason for reason in refused(root, pair(images=(".",))))


def test_what_is_wrong_with_a_picture_is_said_without_a_place_in_memory(root):
    """The same damage would have another reason at every look, and tables and lists of refused rows would differ."""
    pictures = SimpleNamespace(version="1", read=lambda name: b"no picture")
    reasons = {*refused(pictures, pair()), *refused(pictures, pair())}
    assert reasons == {"image 'square.png' cannot be read (cannot identify image file)"}
    with pytest.raises(RowError) as error:
        check_picture(b"no picture", "a.png", decode=False)
    assert error.value.reason == "image 'a.png' cannot be decoded (cannot identify image file)"
    assert damage(ValueError()) == "ValueError"
    assert damage(OSError("cannot identify image file 'a <b>.png'")) == "cannot identify image file 'a <b>.png'"


def test_an_image_cut_off_after_its_header_is_found_by_decoding(root):
    whole = (root / "tall.jpg").read_bytes()
    (root / "half.jpg").write_bytes(whole[: len(whole) // 2])
    row = pair(images=("half.jpg",))
    assert measure_group(tiny_processor(), [row], root).tiles == 4
    with pytest.raises(RowError, match=r"half\.jpg' cannot be decoded"):
        measure_group(tiny_processor(), [row], root, decode=True)
    with pytest.raises(RowError, match="cannot be decoded"):
        encode_group(tiny_processor(), [row], root)
    for decode, refuses in (({}, False), ({"decode": False}, False), ({"decode": True}, True)):
        (found,) = PairMeter(tiny_processor(), max_length=6144, **decode).measure([Asked(row, root, 12, "key")])
        assert ("cannot be decoded" in found) if refuses else found.num_tiles == 4


def test_placeholders_and_images_must_match(root):
    rows = [pair(images=("square.png", "tall.jpg")), pair(question="<image><image>"), text_pair(question="<image>?")]
    for row in rows:
        assert all("placeholders for" in reason for reason in refused(root, row))


def test_text_that_spells_out_image_tokens_is_refused(root):
    for row in (pair(question="How many <IMG_CONTEXT>?"), text_pair(question="<IMG_CONTEXT>?")):
        assert all("spell" in reason for reason in refused(root, row))
    assert all("'rejected' spells out" in reason for reason in refused(root, text_pair(rejected="<IMG_CONTEXT>")))


def test_responses_that_differ_in_spaces_only_are_refused(root):
    assert all("are equal" in reason for reason in refused(root, text_pair(chosen="one ")))


def test_pairs_of_two_questions_are_no_group(root):
    with pytest.raises(ValueError, match="same images and question"):
        encode_group(tiny_processor(), [pair(), pair(question="Why?")], root)
