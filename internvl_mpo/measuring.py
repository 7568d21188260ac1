"""Sizes of many pairs at once: what `encoding.measure_group` finds for each alone, several times as fast.

Pairs of one question share its prompt and its pictures, and a response stands in several of them, so each is looked at
once, and responses are tokenized together.
"""

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from internvl_mpo.encoding import (
    Answers,
    Pictures,
    check_places,
    check_room,
    picture_cost,
    prompt_messages,
    response_key,
    short_prompt,
    token_ids,
)
from internvl_mpo.families.contract import PictureCost
from internvl_mpo.families.registry import family_of_processor
from internvl_mpo.pack_plan import PairSize
from internvl_mpo.packing import num_common
from internvl_mpo.records import PreferencePair, RowError
from internvl_mpo.word_tokens import WordTokens

_BATCH = 256  # pairs whose responses are tokenized together


class Asked(NamedTuple):
    """A pair to be measured.

    Attributes:
        pair: the pair.
        image_root: what its image paths are relative to, see `encode_group`.
        max_tiles: cap on the tiles per image.
        key: equal for pairs that share pictures, prompt and tiling.
    """

    pair: PreferencePair
    image_root: str | Path | Pictures
    max_tiles: int
    key: Hashable


class _Prompt(NamedTuple):
    """What pairs of one question share: tokens, tiles, and the end that a response may merge with."""

    num_tokens: int
    num_tiles: int
    header: str


class _Rendered(NamedTuple):
    """A prompt before it is tokenized: its text, the end that a response may merge with, what its pictures cost."""

    text: str
    header: str
    costs: list[PictureCost]


class _Response(NamedTuple):
    ids: Sequence[int]
    is_cut: bool
    key: int


class TokenCounter:
    """Counts the tokens of prompts, which have long pieces in common, such as their system message.

    A fast tokenizer first cuts a text at its special tokens and takes each piece for itself, so that equal pieces are
    tokenized once.
    """

    def __init__(self, words: WordTokens):
        """Find out where the tokenizer of `words` cuts."""
        self.words, self.tokenizer, self._known = words, words.tokenizer, {}
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        added = [] if backend is None else list(backend.get_added_tokens_decoder().values())
        cuts = [re.escape(token.content) for token in added if not token.normalized]
        # a token that is another one after a space or a letter, and a text that is cut off, are more than their pieces
        is_whole = any(token.lstrip or token.single_word for token in added) or not cuts
        if is_whole or backend.padding or backend.truncation or backend.encode_special_tokens:
            self._cut = None
        else:
            self._cut = re.compile(f"({'|'.join(sorted(cuts, key=len, reverse=True))})")

    def count(self, texts: Sequence[str], *, add_special_tokens: bool) -> list[int]:
        """Return the length of `token_ids` of each text."""
        if self._cut is None:
            return list(map(len, token_ids(self.tokenizer, texts, add_special_tokens=add_special_tokens)))
        pieces = [self._pieces(text) for text in texts]
        new = list({piece: None for group in pieces for piece in group if piece not in self._known})
        lengths = map(len, self.words.ids(new))
        self._known.update(zip(new, lengths, strict=True))
        num_added = len(token_ids(self.tokenizer, [""], add_special_tokens=add_special_tokens)[0])
        return [num_added + sum(map(self._known.__getitem__, group)) for group in pieces]

    def forget(self) -> None:
        """Drop what is known of pieces."""
        self._known.clear()

    def _pieces(self, text: str) -> list[str]:
        """Return a text in pieces, each from a special token up to the next one."""
        first, *rest = self._cut.split(text)
        return [first, *map(str.__add__, rest[::2], rest[1::2])]


class PairMeter:
    """Measures pairs; one for each process."""

    def __init__(self, processor: Any, *, max_length: int, decode: bool = False):
        """Ask the processor what all pairs share.

        Args:
            processor: as in `encode_group`.
            max_length: as in `encode_group`.
            decode: as in `measure_group`.
        """
        self.processor, self.max_length, self.decode = processor, max_length, decode
        self.family = family_of_processor(processor)
        words = WordTokens(processor.tokenizer)
        self.answers = Answers(self.family, processor, words.ids)
        self.counter = TokenCounter(words)
        self._prompts: dict[Hashable, _Prompt | str] = {}
        self._pictures: dict[tuple[str, str, int, int], PictureCost | str] = {}
        self._plains: dict[str, str] = {}

    def measure(self, pairs: Sequence[Asked]) -> Iterator[PairSize | str]:
        """Yield the size of each pair, or the reason why `encode_group` would refuse it, in order."""
        for start in range(0, len(pairs), _BATCH):
            yield from self._batch(pairs[start : start + _BATCH])

    def forget(self) -> None:
        """Drop what is known of questions, pictures and responses; keys may then stand for others."""
        for known in (self._prompts, self._pictures, self._plains):
            known.clear()
        self.counter.forget()

    def _batch(self, pairs: Sequence[Asked]) -> list[PairSize | str]:
        self._measure_prompts(pairs)
        texts = [self._texts(asked) for asked in pairs]
        responses = self._responses(pairs, texts)
        return [
            both if isinstance(both, str) else self._size(asked.key, *(responses[asked.key, text] for text in both))
            for asked, both in zip(pairs, texts, strict=True)
        ]

    def _texts(self, asked: Asked) -> tuple[str, str] | str:
        """Return what is tokenized of a pair's responses, or why the pair is refused."""
        if isinstance(self._prompts[asked.key], str):
            return self._prompts[asked.key]
        try:
            return self._plain(asked.pair.chosen, "chosen"), self._plain(asked.pair.rejected, "rejected")
        except RowError as error:
            return error.reason

    def _measure_prompts(self, pairs: Sequence[Asked]) -> None:
        """Take in what pairs share with others of their question, or why it is refused."""
        rendered: dict[bool, dict[Hashable, _Rendered]] = {}
        for asked, prompt in self._render({asked.key: asked for asked in pairs if asked.key not in self._prompts}):
            try:
                one = self._with_pictures(asked, prompt)
            except RowError as error:
                self._prompts[asked.key] = error.reason
            else:
                rendered.setdefault(self.family.adds_specials(self.processor, one.text), {})[asked.key] = one
        for add_special_tokens, group in rendered.items():
            texts = [one.text for one in group.values()]
            counts = self.counter.count(texts, add_special_tokens=add_special_tokens)
            for (key, one), count in zip(group.items(), counts, strict=True):
                num_tokens = count + sum(cost.left_out for cost in one.costs)
                try:
                    check_room(num_tokens, self.max_length, "")
                except RowError as error:
                    self._prompts[key] = error.reason
                else:
                    self._prompts[key] = _Prompt(num_tokens, sum(cost.num_tiles for cost in one.costs), one.header)

    def _render(self, questions: Mapping[Hashable, Asked]) -> list[tuple[Asked, str]]:
        """Return the questions that can be rendered, each with its prompt, pictures not in place."""
        good, conversations = [], []
        for asked in questions.values():
            try:
                messages = prompt_messages(self.processor.tokenizer, self.answers.reserved, asked.pair, "")
            except RowError as error:
                self._prompts[asked.key] = error.reason
            else:
                good.append(asked)
                conversations.append(messages)
        prompts = self.family.render_all(self.processor, conversations, add_generation_prompt=True) if good else []
        return list(zip(good, prompts, strict=True))

    def _with_pictures(self, asked: Asked, prompt: str) -> _Rendered:
        check_places(prompt, self.family.placeholder(self.processor), asked.pair, "")
        costs = [self._picture(asked, name) for name in asked.pair.images]
        text = short_prompt(self.family, self.processor, prompt, costs)
        return _Rendered(text, self.answers.header(prompt), costs)

    def _picture(self, asked: Asked, name: str) -> PictureCost:
        num_images = len(asked.pair.images)
        key = str(asked.image_root), name, num_images, asked.max_tiles
        if key not in self._pictures:
            options = {"num_images": num_images, "max_tiles": asked.max_tiles, "decode": self.decode, "where": ""}
            try:
                found = picture_cost(self.family, self.processor, name, asked.image_root, **options)
            except RowError as error:
                found = error.reason
            self._pictures[key] = found
        if isinstance(self._pictures[key], str):
            raise RowError(self._pictures[key])
        return self._pictures[key]

    def _plain(self, text: str, side: str) -> str:
        if text not in self._plains:
            self._plains[text] = self.answers.plain(text, side, "")
        return self._plains[text]

    def _responses(
        self, pairs: Sequence[Asked], texts: Sequence[tuple[str, str] | str]
    ) -> dict[tuple[Hashable, str], _Response]:
        """Tokenize the responses of some pairs, each once for its question."""
        wanted: dict[str, dict[tuple[Hashable, str], None]] = {}
        for asked, both in zip(pairs, texts, strict=True):
            if not isinstance(both, str):
                group = wanted.setdefault(self._prompts[asked.key].header, {})
                group.update(((asked.key, text), None) for text in both)
        found = {}
        for header, group in wanted.items():
            tokens = self.answers.tokenize(header, [text for _, text in group])
            for (key, text), ids in zip(group, tokens, strict=True):
                room = self.max_length - self._prompts[key].num_tokens
                is_cut = len(ids) > room
                kept = ids[:room] if is_cut else ids
                found[key, text] = _Response(kept, is_cut, response_key(kept))
        return found

    def _size(self, key: Hashable, chosen: _Response, rejected: _Response) -> PairSize | str:
        prompt = self._prompts[key]
        if chosen.ids == rejected.ids:
            room = self.max_length - prompt.num_tokens
            return f"chosen and rejected are equal in the {room} tokens that the length limit leaves"
        last = min(len(chosen.ids), len(rejected.ids)) - 1  # the last token of a response is never run
        stem = min(num_common(chosen.ids, rejected.ids), last)
        num_cut = chosen.is_cut + rejected.is_cut
        lengths = (prompt.num_tokens, len(chosen.ids), len(rejected.ids))
        return PairSize(*lengths, prompt.num_tiles, num_cut, stem, chosen.key, rejected.key)
