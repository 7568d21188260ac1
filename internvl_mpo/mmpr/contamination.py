"""Is a benchmark's question or picture among training data? By n-grams of words, and by a perceptual hash of pictures.

A picture is found when its hash (signs of the 63 lowest cosine frequencies) differs in few bits and its thumbnail is
nearly the same. On 478 drawings, photographs and handwritten digits, scaled by 0.33 to 1.7 and saved as JPEG of quality
30 to 60: at most 12 bits (99 % at most 8) and a correlation of 0.984 or more; unrelated pictures: 6 bits or more,
correlation 0.935 or less. A question is found when eight of its words in a row (all words of a shorter
one, at least five) stand in a training question; word runs that many questions of a benchmark share are its
instructions and count for nothing.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from internvl_mpo.benchmarks import load_benchmark
from internvl_mpo.benchmarks.common import open_image
from internvl_mpo.errors import BadInputError

NUM_WORDS = 8
MIN_WORDS = 5
MAX_SHARED = 10  # a run of words in this many questions of one benchmark is an instruction
MAX_BITS = 8  # of 63, see above
MIN_CORRELATION = 0.97
MIN_CONTRAST = 4.0  # standard deviation of grey values; an empty page looks like every other
_SIDE, _KEPT, _THUMBNAIL = 32, 8, 16
_COSINES = np.array(
    [[math.cos(math.pi * (2 * x + 1) * u / (2 * _SIDE)) for x in range(_SIDE)] for u in range(_KEPT)], dtype=np.float32
)
_WORD = re.compile(r"\w+")


class Signature(NamedTuple):
    """What a picture looks like: `bits` is the hash, `thumbnail` a unit vector of 16 x 16 grey values."""

    bits: np.uint64
    thumbnail: np.ndarray


def signature(image: Image.Image) -> Signature | None:
    """Return the signature of a picture, or None where it shows nothing."""
    grey = image.convert("L")
    small = np.asarray(grey.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), dtype=np.float32)
    if small.std() < MIN_CONTRAST:
        return None
    waves = (_COSINES @ small @ _COSINES.T).ravel()
    bits = waves > np.median(waves[1:])
    bits[0] = False  # the mean is brightness, not content
    tiny = np.asarray(grey.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BICUBIC), dtype=np.float32).ravel()
    tiny = tiny - tiny.mean()
    return Signature(np.packbits(bits).view(np.uint64)[0], tiny / max(1e-6, np.linalg.norm(tiny)))


def word_runs(text: str, lengths: Iterable[int] = (NUM_WORDS,)) -> set[str]:
    """Return all runs of so many words, in lower case without punctuation."""
    words = _WORD.findall(text.lower())
    return {" ".join(words[start : start + length]) for length in lengths for start in range(len(words) - length + 1)}


@dataclass
class BenchmarkIndex:
    """What is looked for.

    Attributes:
        examples: (benchmark, id of the question) of every example.
        questions: their texts, for reports.
        runs: run of words -> examples.
        lengths: lengths of these runs.
        hashes: hashes of their pictures. Shape: (num_pictures,)
        thumbnails: Shape: (num_pictures, 256)
        owners: example of every picture.
        num_unreadable: pictures that could not be read, by benchmark.
    """

    examples: list[tuple[str, str]] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    runs: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    lengths: set[int] = field(default_factory=set)
    hashes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64))
    thumbnails: np.ndarray = field(default_factory=lambda: np.zeros((0, _THUMBNAIL**2), np.float32))
    owners: list[int] = field(default_factory=list)
    num_unreadable: Counter = field(default_factory=Counter)

    def of_text(self, text: str) -> set[int]:
        """Return the examples whose question is found in a text."""
        return {example for run in word_runs(text, self.lengths) for example in self.runs.get(run, ())}

    def of_picture(self, image: Image.Image) -> set[int]:
        """Return the examples with a picture that looks the same."""
        found = signature(image) if len(self.hashes) else None
        if found is None:
            return set()
        near = np.flatnonzero(np.bitwise_count(self.hashes ^ found.bits) <= MAX_BITS)
        same = near[self.thumbnails[near] @ found.thumbnail >= MIN_CORRELATION]
        return {self.owners[index] for index in same}


def build_index(folders: Mapping[str, str], image_roots: Mapping[str, str] | None = None) -> BenchmarkIndex:
    """Read benchmarks.

    Args:
        folders: name of a benchmark -> its local copy (or `hub:OWNER/NAME`), see `internvl_mpo.benchmarks.sources`.
        image_roots: name -> folder of its pictures, where they do not lie beside the questions.

    Raises:
        BadInputError: no such benchmark or copy.
    """
    from tqdm import tqdm

    index = BenchmarkIndex()
    signatures: list[Signature] = []
    for name, folder in folders.items():
        examples = load_benchmark(name).examples(folder, (image_roots or {}).get(name))
        counts: Counter = Counter()
        runs: list[tuple[int, set[str]]] = []
        known: dict[Any, Signature | None] = {}
        for example in tqdm(examples, desc=f"reading {name}", unit="question"):
            number = len(index.examples)
            index.examples.append((name, example.id))
            index.questions.append(example.question)
            length = min(NUM_WORDS, len(_WORD.findall(example.question)))
            if length >= MIN_WORDS:
                found = word_runs(example.question, (length,))
                counts.update(found)
                runs.append((number, found))
                index.lengths.add(length)
            for picture in example.images:
                if picture not in known:
                    try:
                        known[picture] = signature(open_image(picture))
                    except BadInputError:
                        known[picture] = None
                        index.num_unreadable[name] += 1
                if known[picture] is not None:
                    signatures.append(known[picture])
                    index.owners.append(number)
        for number, found in runs:
            for run in found:
                if counts[run] < MAX_SHARED:
                    index.runs[run].append(number)
    if signatures:
        index.hashes = np.array([one.bits for one in signatures])
        index.thumbnails = np.stack([one.thumbnail for one in signatures])
    return index
