"""Token ids of many texts, each word tokenized once.

Most tokenizers cut a text before its spaces and look at each word for itself. Where that is certain, words that were
met before are looked up, which is faster; any other text is given to the tokenizer as it stands.
"""

import json
import re
from array import array
from collections.abc import MutableSequence, Sequence
from itertools import chain
from typing import Any

from internvl_mpo.encoding import token_ids

_MOST = 1 << 19  # characters of the words that are known at a time
# A space after white space may belong to what stands before it; "\0" marks where texts are cut.
_WHOLE = re.compile(r"\s |\0")
# What GPT-2, Qwen and Llama 3 cut texts with: no match that begins before a space after a word goes on beyond it.
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_PATTERNS = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    rf"{_LETTERS}|\p{{N}}{_REST}",
    rf"{_LETTERS}|\p{{N}}{{1,3}}{_REST}",
)
_JOINED = re.compile("[^Ġ]Ġ")  # a token that holds a space, written as byte-level vocabularies do, after something else


class WordTokens:
    """Tokenizes texts, no special tokens added; what is known of words is kept from call to call."""

    def __init__(self, tokenizer: Any):
        """Find out where `tokenizer` cuts."""
        self.tokenizer, self.cuts = tokenizer, cuts_at_spaces(tokenizer)
        self._known: dict[str, bytes] = {}  # as in an array: faster to join and to hash than lists
        self._size = 0

    def ids(self, texts: Sequence[str]) -> list[MutableSequence[int]]:
        """Return what `encoding.token_ids` gives for each text, in lists or arrays that are the caller's."""
        if not self.cuts:
            return token_ids(self.tokenizer, texts, add_special_tokens=False)
        if self._size > _MOST:
            self._known.clear()
            self._size = 0
        known = self._known
        cut = [[text] if _WHOLE.search(text) else text.replace(" ", "\0 ").split("\0") for text in texts]
        new = list(set(chain.from_iterable(cut)).difference(known))
        found = token_ids(self.tokenizer, new, add_special_tokens=False)
        known.update((word, array("q", ids).tobytes()) for word, ids in zip(new, found, strict=True))
        self._size += sum(map(len, new))
        return [array("q", b"".join(map(known.__getitem__, words))) for words in cut]


def cuts_at_spaces(tokenizer: Any) -> bool:
    """Return whether the tokens of a text are those of its parts, cut before each space that follows no white space."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.padding or backend.truncation or backend.pre_tokenizer is None:
        return False
    if getattr(backend.model, "dropout", None):  # tokens at random
        return False
    if backend.normalizer is not None and _state(backend.normalizer)["type"] != "NFC":
        return False
    added = backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip or token.single_word or " " in token.content for token in added):
        return False
    return _pre_tokenizer_cuts(_state(backend.pre_tokenizer), backend)


def _pre_tokenizer_cuts(state: dict[str, Any], backend: Any) -> bool:
    """Return whether what cuts a text before its words are looked at cuts before spaces."""
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    steps = [step for step in steps if step["type"] != "Digits"]  # which leave spaces as they are
    if not steps or steps[-1]["type"] != "ByteLevel" or steps[-1]["add_prefix_space"]:
        return False
    if len(steps) == 1:
        return steps[0]["use_regex"] or not _joins_words(backend)  # the regex is GPT-2's
    return any(steps[:-1] == [_split(pattern)] for pattern in _PATTERNS)


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _joins_words(backend: Any) -> bool:
    """Return whether a model that is given whole texts has tokens that go on over a space between words."""
    model = backend.model
    marks = [getattr(model, name, "?") for name in ("continuing_subword_prefix", "end_of_word_suffix", "fuse_unk")]
    return any(marks) or any(map(_JOINED.search, backend.get_vocab(with_added_tokens=False)))


def _state(part: Any) -> dict[str, Any]:
    return json.loads(part.__getstate__())
