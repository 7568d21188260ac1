"""Where the two responses of a pair part, and how much they have in common: by source and rule, mergeable.

A loss that pushes a rejected response down takes along all that it shares with the chosen one. Pairs that differ in one
word are the ones by which a model unlearns its answers (arXiv 2402.13228).
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

from internvl_mpo.mmpr.statistics import split_words


class Difference(NamedTuple):
    """How two responses differ, in words.

    Attributes:
        place: share of the chosen response that lies before the first word that differs, 0 to 1.
        common: words that both have, whatever their order, as a share of the words of both (Dice), 0 to 1.
        one_word: whether a single word was changed, added or left out.
    """

    place: float
    common: float
    one_word: bool


def compare(chosen: str, rejected: str) -> Difference:
    """Return how the responses of a pair differ; Chinese and Japanese characters are words."""
    first, second = split_words(chosen), split_words(rejected)
    longest = max(len(first), len(second))
    beginning = _num_alike(first, second)
    rest = first[beginning:][::-1], second[beginning:][::-1]
    common = sum((Counter(first) & Counter(second)).values())
    return Difference(
        place=beginning / max(1, len(first)),
        common=2 * common / max(1, len(first) + len(second)),
        one_word=longest - beginning - _num_alike(*rest) <= 1,
    )


def _num_alike(first: list[str], second: list[str]) -> int:
    """Return how many first words are the same."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


class MeanDifference(NamedTuple):
    """Means over the pairs of a source and rule; `one_word` is a share."""

    pairs: int
    place: float
    common: float
    one_word: float


@dataclass
class Differences:
    """Sums of `Difference` by (source, rule)."""

    sums: dict[tuple[str, str], Counter] = field(default_factory=lambda: defaultdict(Counter))

    def add(self, key: tuple[str, str], difference: Difference) -> None:
        """Count one pair of a source and rule."""
        self.sums[key].update(pairs=1, **difference._asdict())

    def merge(self, other: "Differences") -> None:
        """Add all sums of another."""
        for key, counts in other.sums.items():
            self.sums[key].update(counts)

    def mean(self, key: tuple[str, str]) -> MeanDifference:
        """Return the means of a source and rule that was counted."""
        sums = self.sums[key]
        return MeanDifference(sums["pairs"], *(sums[name] / sums["pairs"] for name in Difference._fields))


class LikelihoodGap(NamedTuple):
    """Means over the pairs of a source and rule that a model scored, see `internvl_mpo.likelihood_gap`.

    Attributes:
        pairs: how many.
        chosen: log-prob a token of the chosen response, its end included.
        rejected: the same of the rejected one.
        chosen_likelier: share of the pairs whose chosen response is the likelier one a token.
    """

    pairs: int
    chosen: float
    rejected: float
    chosen_likelier: float

    @property
    def gap(self) -> float:
        """Chosen minus rejected, in nats a token."""
        return self.chosen - self.rejected
