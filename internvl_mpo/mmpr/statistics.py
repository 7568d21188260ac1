"""Counts and histograms of preference pairs, by source and rule: mergeable, so that every shard counts for itself."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from internvl_mpo.records import PreferencePair

# Groups of Table 1 of the paper and of MMPR-v1.2; a source belongs to the first group with a name it starts with.
FAMILIES = {
    "general_vqa": ("vqav2", "gqa", "okvqa", "iconqa", "tallyqa", "vsr", "cocorem", "nlvr2", "koniq", "inat", "coco"),
    "science": ("ai2d", "scienceqa", "m3cot"),
    "chart": ("chartqa", "figureqa", "mapqa", "dvqa", "tabmwp", "plotqa"),
    "mathematics": ("clevr", "super_clevr", "geo", "unigeo", "mathv360k", "mavis"),
    "ocr": ("ocrvqa", "infographics", "infovqa", "sroie", "textvqa", "stvqa"),
    "document": ("docvqa",),
    "preference": ("rlaif",),
}
SIDES = ("question", "chosen", "rejected")
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")
_BINS_PER_OCTAVE = 2


def family_of(source: str) -> str:
    """Return the group a source belongs to; "other" where none is known."""
    name = source.lower()
    return next((family for family, names in FAMILIES.items() if name.startswith(names)), "other")


def split_words(text: str) -> list[str]:
    """Return the words of a text; Chinese and Japanese characters are words of their own."""
    return text.split() if text.isascii() else _WORD.findall(text)


def count_words(text: str) -> int:
    """Return the number of words, see `split_words`."""
    return len(split_words(text))


@dataclass
class ReleaseStatistics:
    """What a dataset card shows.

    Attributes:
        rows: (source, rule) -> pairs.
        subsets: subset -> pairs.
        lengths: (source, rule, side) -> histogram of the length of every text, see `bin_of`.
        sums: (source, rule, side) -> texts, words; (source, rule, "pair") -> pairs whose chosen is longer, log ratio.
        tokens: side -> histogram of tokens, over a sample, where a tokenizer is given.
        images_per_row: number of pictures -> rows.
        image_sides: (bin of width, bin of height) -> distinct pictures.
        image_formats: format -> distinct pictures.
        image_bytes: bytes of distinct pictures.
    """

    rows: Counter = field(default_factory=Counter)
    subsets: Counter = field(default_factory=Counter)
    lengths: dict[tuple, Counter] = field(default_factory=lambda: defaultdict(Counter))
    sums: dict[tuple, Counter] = field(default_factory=lambda: defaultdict(Counter))
    tokens: dict[tuple, Counter] = field(default_factory=lambda: defaultdict(Counter))
    images_per_row: Counter = field(default_factory=Counter)
    image_sides: Counter = field(default_factory=Counter)
    image_formats: Counter = field(default_factory=Counter)
    image_bytes: int = 0

    def add(self, pair: PreferencePair, subset: str, count_tokens: Callable[[str], int] | None = None) -> None:
        """Count one pair; its pictures are counted by `add_image`."""
        key = (pair.source, pair.rule)
        self.rows[key] += 1
        self.subsets[subset] += 1
        self.images_per_row[len(pair.images)] += 1
        words = []
        for side in SIDES:
            text = getattr(pair, side)
            words.append(max(1, count_words(text)))
            self.lengths[*key, side][bin_of(words[-1])] += 1
            self.sums[*key, side].update(texts=1, words=words[-1])
            if count_tokens is not None:
                number = count_tokens(text)
                self.tokens[(side,)][bin_of(number)] += 1
                self.sums["tokens", side].update(texts=1, tokens=number)
        self.sums[*key, "pair"].update(longer=words[1] > words[2], log_ratio=math.log(words[1] / words[2]))

    def add_image(self, width: int, height: int, format: str, num_bytes: int) -> None:
        """Count one picture, once however many pairs show it."""
        self.image_sides[bin_of(width), bin_of(height)] += 1
        self.image_formats[format] += 1
        self.image_bytes += num_bytes

    def merge(self, other: "ReleaseStatistics") -> None:
        """Add all counts of another."""
        for name in ("rows", "subsets", "images_per_row", "image_sides", "image_formats"):
            getattr(self, name).update(getattr(other, name))
        for name in ("lengths", "sums", "tokens"):
            for key, counts in getattr(other, name).items():
                getattr(self, name)[key].update(counts)
        self.image_bytes += other.image_bytes

    def to_json(self) -> dict[str, Any]:
        """Return lists and numbers only; `from_json` of it gives equal statistics."""
        flat = {name: _pairs(getattr(self, name)) for name in _COUNTERS}
        nested = {name: [[list(key), _pairs(value)] for key, value in getattr(self, name).items()] for name in _NESTED}
        return {**flat, **nested, "image_bytes": self.image_bytes}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ReleaseStatistics":
        """Read what `to_json` wrote."""
        made = cls(image_bytes=values["image_bytes"])
        for name in _COUNTERS:
            getattr(made, name).update({_key(key): count for key, count in values[name]})
        for name in _NESTED:
            for key, counts in values[name]:
                getattr(made, name)[tuple(key)].update({_key(inner): count for inner, count in counts})
        return made


_COUNTERS = ("rows", "subsets", "images_per_row", "image_sides", "image_formats")
_NESTED = ("lengths", "sums", "tokens")


def bin_of(value: int) -> int:
    """Return the number of the bin of a value, two bins per doubling; 0 has bin -1."""
    return -1 if value < 1 else math.floor(_BINS_PER_OCTAVE * math.log2(value) + 1e-9)


def bin_start(number: int) -> float:
    """Return the smallest value of a bin."""
    return 0.0 if number < 0 else 2 ** (number / _BINS_PER_OCTAVE)


def _pairs(counter: Mapping) -> list:
    return [[list(key) if isinstance(key, tuple) else key, count] for key, count in counter.items()]


def _key(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key
