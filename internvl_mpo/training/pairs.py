"""Pairs of a run: checked, measured, planned into steps."""

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from internvl_mpo.errors import BadInputError
from internvl_mpo.files import atomic_writer
from internvl_mpo.jsonl import write_jsonl
from internvl_mpo.mmpr.pairs import PairRow, mixture_table, repeats
from internvl_mpo.pack_plan import PairSize
from internvl_mpo.records import RowError
from internvl_mpo.steps import StepSampler, fit_to_budget
from internvl_mpo.training.pair_table import PairTable, text_hash

if TYPE_CHECKING:
    from internvl_mpo.training.arguments import MPOArguments
    from internvl_mpo.training.settings import TrainSettings

REPORTED = ("num_tokens", "prompt", "chosen", "rejected", "num_tiles", "num_cut")  # columns of the length report
_CHUNK = 1 << 16  # pairs that are Python objects at a time


class PairRows(Sequence[PairRow]):
    """Some pairs of a table, each read when it is asked for."""

    def __init__(self, table: PairTable, indices: np.ndarray):
        """Remember which; `indices` are rows of the table. Shape: (P,)"""
        self.table, self.indices = table, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> PairRow:
        return self.table.row(int(self.indices[index]))


class PairSizes(Sequence[PairSize]):
    """Sizes of some pairs of a table."""

    def __init__(self, table: PairTable, indices: np.ndarray):
        """Remember which; `indices` are rows of the table. Shape: (P,)"""
        self.table, self.indices = table, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> PairSize:
        return self.table.size(int(self.indices[index]))


class PairDigests(Mapping[str, str]):
    """`PairRow.digest` of some pairs of a table by their ids, in twelve bytes a pair."""

    def __init__(self, table: PairTable, indices: np.ndarray):
        """Sort them; `indices` are rows of the table. Shape: (P,)"""
        self.table, self.indices = table, indices
        hashes = table.columns["id_hash"][indices]
        self._order = np.argsort(hashes, kind="stable").astype(np.int32)
        self._hashes = hashes[self._order]

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[str]:
        return (pair_id for pair_id, _ in self.items())

    def __getitem__(self, pair_id: str) -> str:
        return f"{self.table.columns['digest'][self.index(pair_id)]:016x}"

    def index(self, pair_id: str) -> int:
        """Return the row of the table that has an id.

        Raises:
            KeyError: there is none.
        """
        wanted = text_hash(pair_id)
        place = int(np.searchsorted(self._hashes, np.uint64(wanted)))
        if place == len(self._hashes) or int(self._hashes[place]) != wanted:
            raise KeyError(pair_id)
        return int(self.indices[self._order[place]])

    def items(self) -> Iterator[tuple[str, str]]:
        """Yield (id, digest) of every pair, in order."""
        for start in range(0, len(self.indices), _CHUNK):
            indices = self.indices[start : start + _CHUNK]
            digests = self.table.columns["digest"][indices].tolist()
            for index, digest in zip(indices.tolist(), digests, strict=True):
                yield self.table.pair_id(index), f"{digest:016x}"


@dataclass(frozen=True)
class TrainingPairs:
    """Pairs of a run; P of the N pairs of a table, which stay on the disk.

    Attributes:
        table: the pairs of the data.
        indices: which of them. Shape: (P,)
        counts: how often each is seen in an epoch. Shape: (P,)
    """

    table: PairTable
    indices: np.ndarray
    counts: np.ndarray

    def __post_init__(self) -> None:
        if len(self.indices) != len(self.counts):
            raise ValueError(f"{len(self.indices)} pairs, {len(self.counts)} counts")

    def __len__(self) -> int:
        return len(self.indices)

    def __add__(self, other: "TrainingPairs") -> "TrainingPairs":
        joined = (np.concatenate(both) for both in ((self.indices, other.indices), (self.counts, other.counts)))
        return TrainingPairs(self.table, *joined)

    def select(self, chosen: np.ndarray) -> "TrainingPairs":
        """Return some of the pairs, by their numbers or as one truth value for each."""
        return TrainingPairs(self.table, self.indices[chosen], self.counts[chosen])

    @property
    def rows(self) -> PairRows:
        """The pairs and where they come from."""
        return PairRows(self.table, self.indices)

    @property
    def sizes(self) -> PairSizes:
        """Their tokens and tiles."""
        return PairSizes(self.table, self.indices)

    @functools.cached_property
    def digests(self) -> PairDigests:
        """`PairRow.digest` of each by its id."""
        return PairDigests(self.table, self.indices)

    def rows_of(self, pair_ids: Iterable[str]) -> list[PairRow]:
        """Return the pairs of some ids, in the order of the data."""
        return [self.table.row(index) for index in sorted({self.digests.index(pair_id) for pair_id in pair_ids})]

    def column(self, name: str) -> np.ndarray:
        """Return a column of `pair_table.NUMBERS`. Shape: (P,)"""
        return self.table.columns[name][self.indices]

    @property
    def num_seen(self) -> int:
        """Pairs of an epoch, repeated ones counted each time."""
        return int(self.counts.sum())

    def digest(self) -> str:
        """Return a digest of the pairs, their order, and how often each is seen."""
        data = hashlib.sha256()
        for start in range(0, len(self), _CHUNK):
            indices, counts = (column[start : start + _CHUNK] for column in (self.indices, self.counts))
            digests = self.table.columns["digest"][indices].tolist()
            lines = (f"{digest:016x} {count}\n" for digest, count in zip(digests, counts.tolist(), strict=True))
            data.update("".join(lines).encode())
        return data.hexdigest()[:16]

    def versions(self) -> dict[str, str]:
        """Return the hash of each file on the Hub that pairs come from; pictures count, which `digest` leaves out."""
        return {name: version for source in self.table.sources for name, version in source.versions().items()}

    def sampler(self, args: "MPOArguments") -> StepSampler:
        """Return the sampler of this rank."""
        return StepSampler(
            self.column("key"),
            self.counts,
            self.sizes,
            tokens=self.column("num_tokens"),
            pairs_per_step=args.pairs_per_step,
            pairs_per_group=args.pairs_per_group,
            max_tokens=args.max_tokens_per_pack,
            num_ranks=args.world_size,
            rank=args.process_index,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            seed=args.data_seed if args.data_seed is not None else args.seed,
        )

    def total_steps(self, args: "MPOArguments") -> int:
        """Return the optimizer steps of a whole run."""
        return args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * self.sampler(args).num_steps)


def read_pairs(settings: "TrainSettings", processor: Any) -> TrainingPairs:
    """Read and look at every row of the data; return the usable ones, each to be seen once.

    The first rank does the work, the others wait for what it leaves on disk.

    Raises:
        BadInputError: a file is missing, there is no row, or rows are unusable and may not be skipped.
    """
    from internvl_mpo.training.distributed import agree, from_all_ranks
    from internvl_mpo.training.lengths import length_report, show_lengths
    from internvl_mpo.training.preflight import Preflight

    beside = settings.output_dir.rstrip("/")
    preflight = Preflight(
        processor,
        settings.preflight_cache or f"{beside}.preflight",
        settings.data,
        image_root=settings.image_root,
        max_tiles=settings.max_tiles,
        max_length=settings.max_length,
        verify_images=settings.verify_images,
        num_workers=settings.preflight_workers,
    )
    is_main = settings.process_index == 0
    token = agree(preflight.reopen() if is_main else None, settings)
    if is_main:
        table = preflight.run()
        preflight.finish()
    else:
        table = preflight.wait(token)
    from_all_ranks(None, settings)  # each has met the mark before another call takes it away
    if not len(table) and not table.unusable:
        raise BadInputError(f"{', '.join(settings.data)} holds no preference pair")
    rejects, usable = rejects_of(table, settings.max_tokens_per_pack)
    stop_on_rejects(settings, rejects, num_good=len(usable))
    pairs = TrainingPairs(table, usable, np.ones(len(usable), np.int32))
    if is_main:
        report = length_report({name: pairs.column(name) for name in REPORTED})
        print(show_lengths(report), flush=True)
        with atomic_writer(f"{beside}.preflight.json") as out:
            json.dump({**report, "num_rejected": len(rejects), "data": settings.data}, out, indent=2)
    return pairs


def rejects_of(table: PairTable, max_tokens: int) -> tuple[list[RowError], np.ndarray]:
    """Return why rows of the data cannot be trained on, and the pairs that can. Shape: (P,)

    Args:
        table: the pairs of the data.
        max_tokens: token budget of a pack.
    """
    rejects = [RowError(reason, table.sources[source].where(number)) for source, number, reason in table.unusable]
    is_good = table.columns["num_tokens"] <= max_tokens
    for index in np.flatnonzero(~is_good).tolist():
        size = f"the pair has {table.columns['num_tokens'][index]} tokens"
        rejects.append(RowError(f"{size}, more than max_tokens_per_pack {max_tokens}", table.where(index)))
    for index, reason in table.clashes.items():
        if is_good[index]:
            rejects.append(RowError(reason, table.where(index)))
        is_good[index] = False
    return rejects, np.flatnonzero(is_good).astype(np.int32)


def stop_on_rejects(settings: "TrainSettings", rejects: list[RowError], num_good: int) -> None:
    """List unusable rows beside the run folder; stop unless they may be skipped.

    Raises:
        BadInputError: naming the first one.
    """
    if not rejects:
        return
    path = Path(f"{settings.output_dir.rstrip('/')}.rejects.jsonl")
    if settings.process_index == 0:
        write_jsonl(({"row": error.where, "reason": error.reason} for error in rejects), path)
    if settings.on_bad_row == "stop" or not num_good:
        raise BadInputError(
            f"{rejects[0]} ({len(rejects)} of {len(rejects) + num_good} rows are unusable, listed in {path}); "
            "repair them, or leave them out with --on_bad_row skip"
        )
    if settings.process_index == 0:
        print(f"left out {len(rejects)} unusable rows, listed in {path}")


def hold_out(share: float, pairs: TrainingPairs) -> tuple[TrainingPairs, TrainingPairs]:
    """Return the pairs to train on and those that are kept apart.

    A question is held out by a number that depends on it alone, so that all its pairs stay on one side and other data
    beside it change nothing. Where the share comes to no question, the one with the smallest number is held out: an
    evaluation that was asked for needs one.

    Args:
        share: of the questions, 0 holds out none.
        pairs: all pairs of the run.

    Raises:
        BadInputError: no question is left to train on.
    """
    if not share:
        return pairs, pairs.select(np.zeros(0, np.int32))
    numbers = pairs.column("share") / 2**56
    is_kept = numbers >= max(share, math.nextafter(float(numbers.min()), 1))
    kept = pairs.select(is_kept)
    if not len(kept):
        raise BadInputError(f"held_out_share {share} leaves no question to train on; lower it, or give more data")
    return kept, pairs.select(~is_kept)


def plan(settings: "TrainSettings", pairs: TrainingPairs) -> tuple["TrainSettings", TrainingPairs]:
    """Choose how often each pair is seen, and the gradient accumulation that keeps packs within the token budget.

    Returns:
        Settings, and the pairs that are seen at all.

    Raises:
        BadInputError: there are fewer pairs than one step needs, or ranks cannot share a step within the budget.
    """
    from internvl_mpo.preference_terms import SORTED  # imports torch, which the cheap refusals do without

    subsets = list(dict.fromkeys((kind.subset, kind.repeat_time) for kind in pairs.table.kinds))
    subset_of = np.array([subsets.index((kind.subset, kind.repeat_time)) for kind in pairs.table.kinds])
    members = subset_of[pairs.column("kind")]
    counts = repeats(subsets, members, settings.seed, settings.resample)
    is_main = settings.process_index == 0
    if is_main:
        print(mixture_table(subsets, members, counts, pairs.column("num_tokens")), flush=True)
    pairs = replace(pairs, counts=counts).select(counts > 0)
    if pairs.num_seen < settings.pairs_per_step:
        raise BadInputError(
            f"one epoch has {pairs.num_seen} pairs, fewer than the {settings.pairs_per_step} of one step; lower "
            "pairs_per_step"
        )
    sampler = pairs.sampler(settings)
    try:
        fit_to_budget(sampler, num_epochs=settings.num_train_epochs, max_steps=settings.max_steps)
    except ValueError as error:
        raise BadInputError(f"{error}; raise max_tokens_per_pack or pairs_per_step") from error
    accumulation, ranks = sampler.gradient_accumulation_steps, settings.world_size
    if is_main:
        print(
            f"{len(pairs)} pairs ({pairs.num_seen} a pass), {sampler.num_steps} steps a pass of "
            f"{settings.pairs_per_step} pairs, in {ranks} x {accumulation} packs of at most "
            f"{settings.max_tokens_per_pack} tokens"
        )
        if settings.preference in SORTED and ranks * accumulation > 1:
            print(
                f"note: {settings.preference} compares the pairs of one pack, so this cutting is part of the result; "
                "see docs/training.md"
            )
    return replace(settings, gradient_accumulation_steps=accumulation), pairs
