"""The fast InternLM2 tokenizer gives the ids of the official slow one, which is sentencepiece underneath."""

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from modeling_internvl_mpo import InternLM2Tokenizer, InternVLChatConfig
from modeling_internvl_mpo.tokenization_internvl_mpo import decode_answers, read_pieces

SHARED = Path(__file__).parent.parent / "../shared"
GOLDENS, REAL = SHARED / "oracle/model", SHARED / "tokenizers/internlm2"
needs_goldens = pytest.mark.skipif(not GOLDENS.is_dir(), reason="outputs of the original code are not here")
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="the real InternLM2 vocabulary is not here")


@pytest.fixture(scope="module")
def real() -> tuple:
    sentencepiece = pytest.importorskip("sentencepiece")
    slow = sentencepiece.SentencePieceProcessor(model_file=str(REAL / "tokenizer.model"))
    return InternLM2Tokenizer.from_pretrained(REAL), slow


@needs_goldens
@pytest.mark.parametrize("name", ["internlm2", "qwen2"])
def test_ids_and_texts_equal_the_original(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(GOLDENS / "tokenizers" / name, config=InternVLChatConfig())
    cases = json.loads((GOLDENS / "tokenizer_goldens.json").read_text())
    for case in (case for case in cases if case["tokenizer"] == name):
        if "text" in case:
            assert tokenizer(case["text"])["input_ids"] == case["ids"]
            assert tokenizer(case["text"], add_special_tokens=False)["input_ids"] == case["ids_no_special"]
            assert tokenizer.decode(case["ids"], skip_special_tokens=True) == case["decoded_skip_special"]
        elif "batch" in case:
            tokenizer.padding_side = case["padding_side"]
            outputs = tokenizer(case["batch"], padding=True)
            assert outputs["input_ids"] == case["input_ids"]
            assert outputs["attention_mask"] == case["attention_mask"]
        else:
            assert len(tokenizer) == case["len"]
            names = ("bos", "eos", "pad", "unk")
            assert [getattr(tokenizer, f"{name}_token_id") for name in names] == [case[name] for name in names]
            for token, token_id in case["special_ids"].items():
                assert tokenizer.convert_tokens_to_ids(token) == token_id


@needs_real
def test_real_vocabulary_has_its_published_ids(real: tuple) -> None:
    fast, _ = real
    assert type(fast) is PreTrainedTokenizerFast
    assert len(fast) == 92553
    expected = {"<s>": 1, "</s>": 2, "<|im_end|>": 92542, "<|im_start|>": 92543, "<img>": 92544, "</img>": 92545}
    expected |= {"<IMG_CONTEXT>": 92546, "</box>": 92552, "<|plugin|>": 92538}
    assert {token: fast.convert_tokens_to_ids(token) for token in expected} == expected
    assert fast("<|im_start|>user\nhi<|im_end|>")["input_ids"][:2] == [1, 92543]


TRICKY = (
    *("a", "aa", " ", "  ", "\n", "\n\n", "\t", "1", "12", "你", "好", "世界", "😀", "é", ".", "...", "—", "——", "……"),
    *("Ｅ", "==", "--", "the ", "The", "\u2581", "\x00", "\u200b", "[UNUSED_TOKEN_3]", "\U00020000", "def f(x):\n    "),
)


@needs_real
def test_real_vocabulary_equals_sentencepiece(real: tuple) -> None:
    fast, slow = real
    chooser = random.Random(0)
    pieces = [slow.id_to_piece(index).replace("\u2581", " ") for index in range(259, 92397)]
    texts = ["".join(chooser.choices(pieces, k=chooser.randint(1, 30))) for _ in range(400)]
    texts += ["".join(chooser.choices(TRICKY, k=chooser.randint(1, 60))) for _ in range(400)]
    for text in texts:
        ids = slow.encode(text)
        assert fast(text, add_special_tokens=False)["input_ids"] == ids, text
        if "\u2581" not in text:  # sentencepiece writes a space that way, so the character itself is lost
            assert fast.decode(ids) == text


@needs_real
@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60).filter(lambda text: "<" not in text))  # the renamed tokens are not in the file
def test_any_text_equals_sentencepiece(real: tuple, text: str) -> None:
    fast, slow = real
    assert fast(text, add_special_tokens=False)["input_ids"] == slow.encode(text)


@needs_real
def test_half_a_character_at_the_end_spares_its_neighbours(real: tuple) -> None:
    fast, slow = real
    ids = slow.encode("\U0002070e\U0002070f")  # rare characters, four byte tokens each
    assert len(ids) >= 8
    cut = torch.tensor([ids[:-1]])
    assert fast.decode(cut[0]).count("\ufffd") > 3
    (answer,) = decode_answers(fast, cut)
    assert answer == "\U0002070e\ufffd\ufffd\ufffd" == slow.decode(ids[:-1])


@needs_real
def test_saved_tokenizer_is_a_stock_one(real: tuple, tmp_path: Path) -> None:
    fast, _ = real
    fast.save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    loaded = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "<|im_start|>user\n<img><IMG_CONTEXT></img>\n你好 world<|im_end|>"
    assert loaded(text)["input_ids"] == fast(text)["input_ids"]
    assert (loaded.bos_token_id, loaded.pad_token_id, loaded.model_max_length) == (1, 2, 8192)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff\x01 not a model")
    with pytest.raises(ValueError, match="is not a sentencepiece model"):
        read_pieces(tmp_path / "tokenizer.model")


@needs_goldens
def test_a_model_with_a_dummy_prefix_is_refused() -> None:
    with pytest.raises(ValueError, match="InternLM2 kind"):
        read_pieces(GOLDENS / "tokenizers/phi3/tokenizer.model")
