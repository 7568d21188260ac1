"""Tokenizers of InternVL checkpoints as stock fast tokenizers, with the ids of the official slow ones.

InternLM2 (2B, 8B, 26B) ships a sentencepiece model and Python code that current transformers cannot use; its fast
class gives wrong ids. Here the sentencepiece file is read directly (it is a small protobuf message) and becomes a
`tokenizer.json`, so that a published folder needs neither sentencepiece nor remote code for its tokenizer.
"""

import codecs
import json
import os
import re
import struct
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import cached_file

# Grounding tags are special tokens of the vocabulary and ordinary words of questions and answers.
SPOKEN_TOKENS = frozenset(("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>"))
_CONTROL_SHAPE = re.compile(r"<\|.*\|>|</?img>|<IMG_CONTEXT>")
_patterns: "weakref.WeakKeyDictionary[Any, tuple[int, re.Pattern[str]]]" = weakref.WeakKeyDictionary()
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # SentencePiece.Type
_SPACE = "\u2581"  # how sentencepiece writes a space


class Piece(NamedTuple):
    """An entry of a sentencepiece vocabulary."""

    text: str
    score: float
    kind: int


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield (field number, value) of a protobuf message: integers, or the raw bytes of everything else."""

    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            byte = message[at]
            value |= (byte & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if byte < 0x80:
                return value, at

    at = 0
    while at < len(message):
        key, at = varint(at)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, at = varint(at)
            yield number, value
            continue
        if wire_type == 2:
            size, at = varint(at)
        else:
            size = {1: 8, 5: 4}[wire_type]
        yield number, message[at : at + size]
        at += size


def read_pieces(path: str | os.PathLike) -> list[Piece]:
    """Return the vocabulary of a sentencepiece BPE model without a dummy prefix and with an identity normaliser.

    Raises:
        ValueError: the file is not such a model.
    """
    pieces, trainer, normalizer = [], {}, {}
    try:
        for number, value in _fields(Path(path).read_bytes()):
            if number == 1:
                piece = dict(_fields(value))
                score = struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0
                pieces.append(Piece(piece[1].decode("utf-8"), score, piece.get(3, _NORMAL)))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                normalizer = dict(_fields(value))
    except (IndexError, KeyError, TypeError, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a sentencepiece model") from error
    is_bpe, adds_prefix, rewrites = trainer.get(3) == 2, normalizer.get(3, 1) == 1, bool(normalizer.get(2))
    if not is_bpe or adds_prefix or rewrites:
        raise ValueError(f"{path} is not a sentencepiece BPE model of the InternLM2 kind; load it with AutoTokenizer")
    return pieces


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Return the pairs of pieces that make up another piece, in the order in which sentencepiece prefers them."""
    ids = {piece.text: index for index, piece in enumerate(pieces) if piece.kind == _NORMAL}
    ranked = []
    for text, index in ids.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                ranked.append((-pieces[index].score, index, ids[left], ids[right], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def convert_internlm2(
    vocab_file: str | os.PathLike, added: dict[int, dict[str, Any]], **special: Any
) -> PreTrainedTokenizerFast:
    """Turn an InternLM2 sentencepiece model into a stock fast tokenizer with the same ids.

    Args:
        vocab_file: `tokenizer.model`.
        added: `added_tokens_decoder` of tokenizer_config.json by id. Ids inside the vocabulary rename a piece
            (`[UNUSED_TOKEN_145]` becomes `<|im_end|>`), the others extend it.
        **special: bos_token, eos_token, unk_token, pad_token, additional_special_tokens, model_max_length.
    """
    pieces = read_pieces(vocab_file)
    # Sentencepiece spells a NUL in the text as its byte although there is a piece for it: give that piece a key that
    # no text reaches.
    vocabulary = {"\0\0" if piece.text == "\0" else piece.text: index for index, piece in enumerate(pieces)}
    names = {index: entry["content"] for index, entry in added.items()}
    for index, name in names.items():
        if index < len(pieces) and pieces[index].text != name:
            del vocabulary[pieces[index].text]
            vocabulary[name] = index
    unknown = next(piece.text for piece in pieces if piece.kind == _UNKNOWN)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=_merges(pieces), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", _SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    # User-defined pieces are cut out of the text before merging, exactly what added tokens are.
    tokens = {index: piece.text for index, piece in enumerate(pieces) if piece.kind in (_CONTROL, _USER_DEFINED)}
    for index, name in sorted((tokens | names).items()):
        is_special = added[index].get("special", True) if index in added else pieces[index].kind == _CONTROL
        tokenizer.add_tokens([AddedToken(name, normalized=False, special=is_special)])
        if tokenizer.token_to_id(name) != index:
            raise ValueError(f"added token {name!r} got id {tokenizer.token_to_id(name)}, expected {index}")
    bos = special["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def hub_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return those of `from_pretrained`'s arguments that say where files come from."""
    names = ("revision", "cache_dir", "token", "local_files_only")
    return {name: arguments[name] for name in names if arguments.get(name) is not None}


def find_token_id(folder: str | os.PathLike, token: str, **where: Any) -> int | None:
    """Return the id of an added token from the tokenizer files of a folder or Hub repository, or None."""
    for name in ("added_tokens.json", "tokenizer_config.json", "tokenizer.json"):
        path = cached_file(folder, name, _raise_exceptions_for_missing_entries=False, **where)
        if path is None:
            continue
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        if name == "added_tokens.json" and token in content:
            return content[token]
        added = content.get("added_tokens_decoder", {}).items()
        added = [(int(key), value) for key, value in added] + [(v["id"], v) for v in content.get("added_tokens", [])]
        for token_id, value in added:
            if value["content"] == token:
                return token_id
    return None


def find_control_token(tokenizer: Any, text: str) -> str | None:
    """Return the first control token a text spells out, or None: the model would read it as one.

    Control tokens are the tokenizer's special tokens and added tokens like `<|im_end|>`; neither `<image>`, which marks
    a picture's place, nor grounding tags are.
    """
    size, (known_size, pattern) = len(tokenizer), _patterns.get(tokenizer, (None, None))
    if known_size != size:
        added = tokenizer.added_tokens_decoder.values()
        tokens = {token.content for token in added if token.special or _CONTROL_SHAPE.fullmatch(token.content)}
        tokens = (tokens | set(tokenizer.all_special_tokens)) - SPOKEN_TOKENS - {"<image>", ""}
        ordered = sorted(tokens, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, ordered)) or "(?!)")
        _patterns[tokenizer] = size, pattern
    found = pattern.search(text)
    return found and found[0]


def decode_answers(tokenizer: Any, sequences: torch.LongTensor) -> list[str]:
    """Decode rows of ids without special tokens, spelling broken UTF-8 as sentencepiece does.

    Fast tokenizers blank out a whole run of byte tokens when one character of it is incomplete, so half an emoji at
    the end of a cut answer would take its neighbours with it.
    """
    answers = tokenizer.batch_decode(sequences, skip_special_tokens=True)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return answers
    for row, ids in enumerate(sequences.tolist()):
        if "\ufffd" not in answers[row]:
            continue
        tokens = tokenizer.convert_ids_to_tokens(ids, skip_special_tokens=True)
        if any(_BYTE_TOKEN.fullmatch(token) for token in tokens):
            parts = (
                bytes([int(token[3:5], 16)]) if _BYTE_TOKEN.fullmatch(token) else token.replace(_SPACE, " ").encode()
                for token in tokens
            )
            answers[row] = b"".join(parts).decode("utf-8", errors=_ONE_PER_BYTE)
    return answers


_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")
_ONE_PER_BYTE = "internvl_one_per_byte"
codecs.register_error(_ONE_PER_BYTE, lambda error: ("\ufffd", error.start + 1))


class InternLM2Tokenizer(PreTrainedTokenizerFast):
    """Lets `AutoTokenizer` read official InternLM2 folders: the name is that of their `tokenizer_class`.

    Nothing is ever an instance of this class: loading returns the stock fast tokenizer, which also saves as one.
    """

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> PreTrainedTokenizerFast:
        """Load a folder or Hub repository that has the official `tokenizer.model` and `tokenizer_config.json`.

        Raises:
            OSError: a file is missing.
            ValueError: `tokenizer.model` is of another kind.
        """
        where = hub_arguments(kwargs)
        with open(
            cached_file(pretrained_model_name_or_path, "tokenizer_config.json", **where), encoding="utf-8"
        ) as file:
            config = json.load(file)
        added = {int(index): entry for index, entry in config.get("added_tokens_decoder", {}).items()}
        names = ("bos_token", "eos_token", "unk_token", "pad_token", "additional_special_tokens", "model_max_length")
        special = {name: kwargs.get(name, config.get(name)) for name in names}
        special = {name: value["content"] if isinstance(value, dict) else value for name, value in special.items()}
        special = {name: value for name, value in special.items() if value is not None}
        return convert_internlm2(
            cached_file(pretrained_model_name_or_path, "tokenizer.model", **where), added, **special
        )
