"""Tokens looked up word by word: those of the whole text, and no cut where a tokenizer may look over a space.

pytest tests/test_word_tokens.py
"""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from internvl_mpo import word_tokens
from internvl_mpo.encoding import token_ids
from internvl_mpo.word_tokens import WordTokens, cuts_at_spaces

GPT2, QWEN, LLAMA3 = word_tokens._PATTERNS
PARTS = (
    *(" ", "  ", "\n", "\n\n", "\r\n", "\t", "\0", "\x1c", "\u0085", "\u00a0", "\u2003", "\u200b", "\u3000"),
    *("a", "ab", "the", "The", "I'll", "it's", "'S", "ü", "u\u0308", "\u0301", "汉字", "नि", "👩\u200d🔬", "ﬁ", "Å"),
    *(
        "7",
        "12",
        "3.14",
        "1000000",
        "²",
        "½",
        ".",
        ",",
        "...",
        "\\frac{1}{2}",
        "$x$",
        "-",
        "_",
        "(",
        "\ud7a3",
        "\u1100",
    ),
    *("<|im_start|>", "<|im_end|>", "<image>", "<|im", "Final answer:", "\u2581", "Ġ", "Ċ"),
)
TEXTS = st.lists(st.lists(st.one_of(st.sampled_from(PARTS), st.text(max_size=3)), max_size=12).map("".join), max_size=4)
CORPUS = [
    "the cat is in the hat, it's 12 o'clock.  The answer is 3.14 (or so)\n\nFinal answer: 7",
    "of the sum of 1000000 and 24, the half is ..\n then\tthe\u00a0rest; \\frac{1}{2} of it's",
]


def trained(pre_tokenizer, *, spanning: bool = False, **parts) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with merges of CORPUS.

    Args:
        pre_tokenizer: of the tokenizer.
        spanning: learn merges on whole texts, so that tokens go on over spaces.
        **parts: of the tokenizer, such as `normalizer`.
    """
    tokenizer = Tokenizer(models.BPE())
    learner = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not spanning)
    tokenizer.pre_tokenizer, tokenizer.decoder = learner, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS * 3, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.pre_tokenizer = pre_tokenizer
    for name, value in parts.items():
        setattr(tokenizer, name, value)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<image>", normalized=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_level(use_regex: bool = False, add_prefix_space: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=use_regex)


def split(pattern: str, behavior: str = "isolated", invert: bool = False) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior, invert), byte_level()])


def qwen2() -> PreTrainedTokenizerFast:
    folder = Path(__file__).parent.parent / "../shared/tokenizers/qwen2"
    if not folder.exists():
        pytest.skip(f"{folder} is absent")
    return AutoTokenizer.from_pretrained(folder)


DIGITS = pre_tokenizers.Digits(individual_digits=True)
CUT = {
    "bytes": tiny_tokenizer,
    "merges within words": lambda: trained(byte_level()),
    "GPT-2": lambda: trained(byte_level(use_regex=True)),
    "digits first": lambda: trained(pre_tokenizers.Sequence([DIGITS, byte_level(use_regex=True)])),
    "digits last": lambda: trained(pre_tokenizers.Sequence([byte_level(use_regex=True), DIGITS])),
    "digits, then pieces": lambda: trained(pre_tokenizers.Sequence([DIGITS, *split(QWEN)])),
    "pattern of GPT-2": lambda: trained(split(GPT2)),
    "pattern of Qwen": lambda: trained(split(QWEN), normalizer=normalizers.NFC()),
    "pattern of Llama 3": lambda: trained(split(LLAMA3)),
    "marks taken as text": lambda: trained(split(LLAMA3), encode_special_tokens=True),
    "Qwen2": qwen2,
}


@pytest.mark.parametrize("name", CUT)
def test_a_text_in_words_has_the_tokens_of_the_whole(name):
    tokenizer = CUT[name]()
    assert cuts_at_spaces(tokenizer)
    words = WordTokens(tokenizer)  # one for all examples: what it knows of earlier words must not change later ones

    @settings(max_examples=150, deadline=None, derandomize=True, database=None)
    @given(TEXTS)
    def check(texts):
        whole = [token_ids(tokenizer, [text], add_special_tokens=False)[0] for text in texts]
        assert list(map(list, words.ids(texts))) == whole

    check()
    assert list(map(list, words.ids(CORPUS))) == token_ids(tokenizer, CORPUS, add_special_tokens=False)


def changed(**parts) -> PreTrainedTokenizerFast:
    return trained(byte_level(use_regex=True), **parts)


def with_mark(text: str = "<mark>", **options) -> PreTrainedTokenizerFast:
    tokenizer = changed()
    tokenizer.backend_tokenizer.add_tokens([AddedToken(text, **options)])
    return tokenizer


def padded() -> PreTrainedTokenizerFast:
    tokenizer = changed()
    tokenizer.backend_tokenizer.enable_padding(length=9)
    return tokenizer


def truncated() -> PreTrainedTokenizerFast:
    tokenizer = changed()
    tokenizer.backend_tokenizer.enable_truncation(2)
    return tokenizer


def random_merges() -> PreTrainedTokenizerFast:
    tokenizer = changed()
    tokenizer.backend_tokenizer.model.dropout = 0.5
    return tokenizer


def of_model(model: models.Model) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = byte_level()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


MERGED = {"vocab": {"a": 0, "Ġ": 1}, "merges": []}
# Each of these, or one of its kind, gives other tokens for a text in words; those of one call are equal to the whole's.
WHOLE = {
    "merges over spaces": lambda: trained(byte_level(), spanning=True),
    "a space before the text": lambda: trained(byte_level(use_regex=True, add_prefix_space=True)),
    "another pattern": lambda: trained(split(r"\w+ \w+")),
    "a known pattern, its matches joined": lambda: trained(split(QWEN, "contiguous")),
    "a known pattern, its matches left out": lambda: trained(split(QWEN, "removed")),
    "two patterns": lambda: trained(pre_tokenizers.Sequence([split(r" \w"), *split(QWEN)])),
    "words of SentencePiece": lambda: trained(pre_tokenizers.Metaspace()),
    "digits alone": lambda: trained(DIGITS),
    "a sequence of nothing": lambda: trained(pre_tokenizers.Sequence([])),
    "nothing that cuts": lambda: trained(None),
    "a normalizer that takes spaces away": lambda: changed(normalizer=normalizers.Strip()),
    "several normalizers": lambda: changed(normalizer=normalizers.Sequence([normalizers.NFC()])),
    "a mark that takes the space before it": lambda: with_mark(lstrip=True),
    "a mark that takes the space after it": lambda: with_mark(rstrip=True),
    "a mark that stands alone": lambda: with_mark(single_word=True),
    "a mark with a space in it": lambda: with_mark("the cat"),
    "padding": padded,
    "truncation": truncated,
    "merges left out at random": random_merges,
    "a mark at the end of words": lambda: of_model(models.BPE(**MERGED, end_of_word_suffix="</w>")),
    "a mark within words": lambda: of_model(models.BPE(**MERGED, continuing_subword_prefix="##")),
    "unknown letters in one": lambda: of_model(models.BPE(**MERGED, unk_token="a", fuse_unk=True)),
    "whole words": lambda: of_model(models.WordLevel({"a": 0, "Ġ": 1}, unk_token="a")),
    "a unigram model": lambda: of_model(models.Unigram([("a", 0.0), ("Ġ", 0.0)], 0)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_text_is_not_cut_where_a_tokenizer_may_look_over_a_space(name):
    tokenizer = WHOLE[name]()
    assert not cuts_at_spaces(tokenizer)
    texts = ["the cat <mark> in a", "a"]
    if name != "merges left out at random":
        assert WordTokens(tokenizer).ids(texts) == token_ids(tokenizer, texts, add_special_tokens=False)


def test_a_slow_tokenizer_is_given_whole_texts():
    class Slow:
        def __call__(self, texts, **options):
            return {"input_ids": [[len(text)] for text in texts]}

    assert WordTokens(Slow()).ids(["a b", "c"]) == [[3], [1]]


def test_a_word_is_tokenized_once_and_lists_belong_to_the_caller(monkeypatch):
    given_texts = []
    monkeypatch.setattr(
        word_tokens,
        "token_ids",
        lambda tokenizer, texts, **more: given_texts.extend(texts) or token_ids(tokenizer, texts, **more),
    )
    words = WordTokens(tiny_tokenizer())
    (first,) = words.ids(["a b a"])
    first.append(-1)
    assert list(map(list, words.ids(["a", "a b"]))) == [[first[0]], [*first[:3]]]
    assert sorted(given_texts) == [" a", " b", "a"]


def test_words_are_forgotten_before_they_fill_the_memory(monkeypatch):
    monkeypatch.setattr(word_tokens, "_MOST", 4)
    words = WordTokens(tiny_tokenizer())
    for number in range(20):
        words.ids([f"{number} more"])
        assert len(words._known) <= 4
