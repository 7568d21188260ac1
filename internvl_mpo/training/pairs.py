"""Pairs of a run: checked, measured, planned into steps."""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl_mpo.errors import BadInputError
from internvl_mpo.files import atomic_writer
from internvl_mpo.jsonl import write_jsonl
from internvl_mpo.mmpr.pairs import PairRow, mixture_table, repeats
from internvl_mpo.pack_plan import PairSize
from internvl_mpo.records import RowError
from internvl_mpo.steps import StepSampler, fit_to_budget

if TYPE_CHECKING:
    from internvl_mpo.training.arguments import MPOArguments
    from internvl_mpo.training.settings import TrainSettings


@dataclass(frozen=True)
class TrainingPairs:
    """Pairs of a run and what is known of each, in the same order.

    Attributes:
        rows: the pairs and where they come from.
        sizes: their tokens and tiles.
        counts: how often each is seen in an epoch.
    """

    rows: Sequence[PairRow]
    sizes: Sequence[PairSize]
    counts: Sequence[int]

    def __post_init__(self) -> None:
        if not len(self.rows) == len(self.sizes) == len(self.counts):
            raise ValueError(f"{len(self.rows)} rows, {len(self.sizes)} sizes, {len(self.counts)} counts")

    def __len__(self) -> int:
        return len(self.rows)

    def __add__(self, other: "TrainingPairs") -> "TrainingPairs":
        columns = ((self.rows, other.rows), (self.sizes, other.sizes), (self.counts, other.counts))
        return TrainingPairs(*([*mine, *more] for mine, more in columns))

    def select(self, indices: Iterable[int]) -> "TrainingPairs":
        """Return some of the pairs, in the order given."""
        indices = list(indices)
        columns = (self.rows, self.sizes, self.counts)
        return TrainingPairs(*([column[index] for index in indices] for column in columns))

    @property
    def num_seen(self) -> int:
        """Pairs of an epoch, repeated ones counted each time."""
        return sum(self.counts)

    def digest(self) -> str:
        """Return a digest of the pairs, their order, and how often each is seen."""
        data = hashlib.sha256()
        for row, count in zip(self.rows, self.counts, strict=True):
            data.update(f"{row.digest} {count}\n".encode())
        return data.hexdigest()[:16]

    def sampler(self, args: "MPOArguments") -> StepSampler:
        """Return the sampler of this rank."""
        return StepSampler(
            [row.key for row in self.rows],
            self.counts,
            self.sizes,
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


def check_pairs(
    settings: "TrainSettings", processor: Any, rows: list[PairRow], rejects: list[RowError]
) -> TrainingPairs:
    """Look at every row; return the usable ones, each to be seen once.

    The first rank does the work, the others wait for what it leaves on disk.

    Raises:
        BadInputError: rows are unusable and may not be skipped.
    """
    from internvl_mpo.training.distributed import agree
    from internvl_mpo.training.lengths import length_report, show_lengths
    from internvl_mpo.training.preflight import Preflight, same_id_twice

    beside = settings.output_dir.rstrip("/")
    preflight = Preflight(
        processor,
        settings.preflight_cache or f"{beside}.preflight",
        max_tiles=settings.max_tiles,
        max_length=settings.max_length,
        verify_images=settings.verify_images,
        num_workers=settings.preflight_workers,
    )
    is_main = settings.process_index == 0
    token = agree(preflight.reopen() if is_main else None, settings)
    if is_main:
        results = preflight.run(rows)
        preflight.finish()
    else:
        results = preflight.wait(rows, token)
    for index, reason in same_id_twice(rows).items():
        results[index] = RowError(reason, rows[index].where)
    for index, size in enumerate(results):
        if not isinstance(size, RowError) and size.num_tokens > settings.max_tokens_per_pack:
            limit = f"more than max_tokens_per_pack {settings.max_tokens_per_pack}"
            results[index] = RowError(f"the pair has {size.num_tokens} tokens, {limit}", rows[index].where)

    bad = [result for result in results if isinstance(result, RowError)]
    good = [(row, size) for row, size in zip(rows, results, strict=True) if not isinstance(size, RowError)]
    stop_on_rejects(settings, rejects + bad, num_good=len(good))
    pairs = TrainingPairs([row for row, _ in good], [size for _, size in good], [1] * len(good))
    if is_main:
        report = length_report(pairs.sizes)
        print(show_lengths(report), flush=True)
        with atomic_writer(f"{beside}.preflight.json") as out:
            json.dump({**report, "num_rejected": len(rejects) + len(bad), "data": settings.data}, out, indent=2)
    return pairs


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
        return pairs, pairs.select(())
    numbers = [_share_of(row.pair.group_key) for row in pairs.rows]
    border = max(share, math.nextafter(min(numbers), 1))
    kept = pairs.select(index for index, number in enumerate(numbers) if number >= border)
    if not kept.rows:
        raise BadInputError(f"held_out_share {share} leaves no question to train on; lower it, or give more data")
    return kept, pairs.select(index for index, number in enumerate(numbers) if number < border)


def _share_of(key: str) -> float:
    """A number in [0, 1) that depends on the question only, so that its pairs stay on one side."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big") / 2**56


def plan(settings: "TrainSettings", pairs: TrainingPairs) -> tuple["TrainSettings", TrainingPairs]:
    """Choose how often each pair is seen, and the gradient accumulation that keeps packs within the token budget.

    Returns:
        Settings, and the pairs that are seen at all.

    Raises:
        BadInputError: there are fewer pairs than one step needs, or ranks cannot share a step within the budget.
    """
    from internvl_mpo.preference_terms import SORTED  # imports torch, which the cheap refusals do without

    counts = repeats(pairs.rows, settings.seed, settings.resample)
    is_main = settings.process_index == 0
    if is_main:
        print(mixture_table(pairs.rows, counts, [size.num_tokens for size in pairs.sizes]), flush=True)
    pairs = replace(pairs, counts=counts).select(index for index, count in enumerate(counts) if count)
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
