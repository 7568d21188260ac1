"""Tokens of prompts counted by pieces: the same numbers as of whole prompts, whatever the tokenizer does at borders.

pytest tests/test_measuring.py
"""

import itertools

import pytest
from tiny import tiny_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from internvl_mpo.encoding import token_ids
from internvl_mpo.measuring import TokenCounter
from internvl_mpo.word_tokens import WordTokens

MARK, END = "<|im_start|>", "<|im_end|>"
PARTS = (MARK, END, "user\n", " a b", "ab ", "\n", "  ", "a", "b", "ü", "<", "")
TEXTS = ["".join(parts) for parts in itertools.product(PARTS, repeat=3)]


def words(**changes) -> PreTrainedTokenizerFast:
    """A tokenizer of a few merges, with changes to its parts; `mark` changes what is special about MARK."""
    alphabet = ["<unk>", "<s>", *"▁abuser<ü\n", "ab", "▁a", "▁b", "▁ab"]
    vocabulary = {text: index for index, text in enumerate(alphabet)}
    merges = [("a", "b"), ("▁", "a"), ("▁", "b"), ("▁", "ab")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True))
    mark = changes.pop("mark", {})
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.add_special_tokens([AddedToken(MARK, special=True, normalized=False, **mark), END, "<s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


PREFIX = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
FIRST = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
TOKENIZERS = {
    "bytes": tiny_tokenizer,
    "a space before every piece": lambda: words(normalizer=PREFIX, post_processor=FIRST),
    "a space before the text": lambda: words(pre_tokenizer=pre_tokenizers.Metaspace(prepend_scheme="first")),
    "a mark that takes spaces after it": lambda: words(normalizer=PREFIX, mark={"rstrip": True}),
    "a mark that takes spaces before it": lambda: words(normalizer=PREFIX, mark={"lstrip": True}),
    "a mark that stands alone": lambda: words(normalizer=PREFIX, mark={"single_word": True}),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("add_special_tokens", [False, True])
def test_pieces_have_as_many_tokens_as_the_whole(name, add_special_tokens):
    tokenizer = TOKENIZERS[name]()
    whole = token_ids(tokenizer, TEXTS, add_special_tokens=add_special_tokens)
    counter = TokenCounter(WordTokens(tokenizer))
    half = len(TEXTS) // 2
    found = [counter.count(texts, add_special_tokens=add_special_tokens) for texts in (TEXTS[:half], TEXTS[half:])]
    assert [*found[0], *found[1]] == list(map(len, whole))
    assert len(set(map(len, whole))) > 5


@pytest.mark.parametrize("setting", ["padding", "truncation", "words"])
def test_a_tokenizer_that_changes_whole_texts_is_given_whole_texts(setting):
    tokenizer = tiny_tokenizer()
    if setting == "padding":
        tokenizer.backend_tokenizer.enable_padding(length=9)
    elif setting == "truncation":
        tokenizer.backend_tokenizer.enable_truncation(2)
    else:
        tokenizer.backend_tokenizer.encode_special_tokens = True
    whole = token_ids(tokenizer, TEXTS[:300], add_special_tokens=False)
    assert TokenCounter(WordTokens(tokenizer)).count(TEXTS[:300], add_special_tokens=False) == list(map(len, whole))


def test_what_prompts_have_in_common_is_tokenized_once(monkeypatch):
    words, given = WordTokens(tiny_tokenizer()), []
    counter, ids = TokenCounter(words), words.ids
    monkeypatch.setattr(words, "ids", lambda texts: given.extend(texts) or ids(texts))
    for batch in (["a", "b"], ["c", "a"]):
        counter.count(
            [f"{MARK}system\nBe brief.{END}{MARK}user\n{text}{END}" for text in batch], add_special_tokens=False
        )
    assert sorted(filter(None, given)) == sorted(
        [f"{MARK}system\nBe brief.", END, *(f"{MARK}user\n{one}" for one in "abc")]
    )
    counter.forget()
    counter.count([END], add_special_tokens=False)
    assert given.count(END) == 2
