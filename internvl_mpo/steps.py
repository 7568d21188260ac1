"""Which pairs make up which optimizer step: epoch -> steps -> packs -> groups -> pairs.

    step 0   pack 0 (rank 0)   group (pairs 7, 3 of one question)  group (pair 12)
             pack 1 (rank 1)   group (pair 5)  group (pair 8)
    step 1   ...

A step holds exactly `pairs_per_step` pairs (the last one of an epoch may hold fewer), so what a step optimizes does not
depend on the number of ranks or packs. Everything is a function of the seed and the epoch: a resumed run, or one on
another number of ranks, sees the same steps.
"""

import math
import random
from collections.abc import Hashable, Iterator, Sequence

from internvl_mpo.pack_plan import PairSize, group_tokens, plan_packs

Rows = tuple[int, ...]  # pairs of one group, as indices into the data


def plan_steps(
    keys: Sequence[Hashable],
    counts: Sequence[int],
    *,
    pairs_per_step: int,
    pairs_per_group: int,
    seed: int,
    epoch: int,
) -> list[list[Rows]]:
    """Return the groups of every step of an epoch.

    Args:
        keys: pairs with equal keys share a prompt and may share a group.
        counts: how often each pair is seen in the epoch.
        pairs_per_step: pairs of one optimizer step, over all ranks.
        pairs_per_group: largest number of pairs of one question that share a prompt; 1 gives the batch statistics of
            the original program.
        seed: decides the order together with `epoch`.
        epoch: 0 for the first.
    """
    rng = random.Random(f"steps {seed} {epoch}")
    members: dict[Hashable, list[int]] = {}
    for index, (key, count) in enumerate(zip(keys, counts, strict=True)):
        for turn in range(count):  # a repeated pair belongs to another group each time
            members.setdefault((key, turn), []).append(index)
    groups: list[Rows] = []
    for rows in members.values():
        rng.shuffle(rows)
        groups += [tuple(rows[i : i + pairs_per_group]) for i in range(0, len(rows), pairs_per_group)]
    rng.shuffle(groups)

    steps: list[list[Rows]] = [[]]
    room = pairs_per_step
    for group in groups:
        while group:
            if room == 0:
                steps.append([])
                room = pairs_per_step
            steps[-1].append(group[:room])  # a group at the border of two steps is cut there
            room -= len(group[:room])
            group = group[len(steps[-1][-1]) :]
    return [step for step in steps if step]


def cut_group(rows: Rows, sizes: Sequence[PairSize], max_tokens: int) -> list[Rows]:
    """Return a group as parts of at most `max_tokens` tokens; a pair that is larger gets a part of its own."""
    parts: list[Rows] = [()]
    for row in rows:
        longer = (*parts[-1], row)
        if parts[-1] and group_tokens([sizes[index] for index in longer]) > max_tokens:
            parts.append((row,))
        else:
            parts[-1] = longer
    return parts


def split_step(step: Sequence[Rows], sizes: Sequence[PairSize], num_packs: int, max_tokens: int) -> list[list[Rows]]:
    """Return the groups of one step as exactly `num_packs` packs of nearly equal size; no pack is empty.

    Args:
        step: its groups.
        sizes: size of each pair of the data.
        num_packs: ranks times gradient accumulation steps.
        max_tokens: token budget of a pack; a larger group is cut. Packs may still be larger: raise `num_packs` then.

    Raises:
        ValueError: the step has fewer pairs than there are packs.
    """
    groups = [part for group in step for part in cut_group(group, sizes, max_tokens)]
    while len(groups) < num_packs:  # cut the largest group until every pack gets one
        largest = max(range(len(groups)), key=lambda i: (len(groups[i]), -i))
        rows = groups[largest]
        if len(rows) == 1:
            raise ValueError(f"a step of {sum(map(len, step))} pairs cannot fill {num_packs} packs")
        groups[largest : largest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    plan = plan_packs([group_tokens([sizes[row] for row in group]) for group in groups], num_packs)
    return [[groups[index] for index in pack] for pack in plan]


class StepSampler:
    """Batch sampler of a DataLoader: yields the packs of this rank, in the order of the steps.

    Every rank gets `gradient_accumulation_steps` packs of each step.
    """

    def __init__(
        self,
        keys: Sequence[Hashable],
        counts: Sequence[int],
        sizes: Sequence[PairSize],
        *,
        pairs_per_step: int,
        pairs_per_group: int,
        max_tokens: int,
        num_ranks: int,
        rank: int,
        gradient_accumulation_steps: int,
        seed: int,
    ):
        """See `plan_steps` and `split_step` for the arguments."""
        self.keys, self.counts, self.sizes = keys, counts, sizes
        self.pairs_per_step, self.pairs_per_group = pairs_per_step, pairs_per_group
        self.max_tokens = max_tokens
        self.num_ranks, self.rank = num_ranks, rank
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration yields."""
        self.epoch = epoch

    @property
    def num_packs(self) -> int:
        """Packs of one step over all ranks."""
        return self.num_ranks * self.gradient_accumulation_steps

    @property
    def num_steps(self) -> int:
        """Optimizer steps of an epoch; a last step with fewer pairs than packs is left out."""
        full, left = divmod(sum(self.counts), self.pairs_per_step)
        return full + (left >= self.num_packs)

    def steps(self) -> list[list[Rows]]:
        """Return the groups of every step of the current epoch."""
        planned = plan_steps(
            self.keys,
            self.counts,
            pairs_per_step=self.pairs_per_step,
            pairs_per_group=self.pairs_per_group,
            seed=self.seed,
            epoch=self.epoch,
        )
        return planned[: self.num_steps]

    def __len__(self) -> int:
        return self.num_steps * self.gradient_accumulation_steps

    def packs(self, step: Sequence[Rows]) -> list[list[Rows]]:
        """Return the packs of a step, for all ranks."""
        return split_step(step, self.sizes, self.num_packs, self.max_tokens)

    def largest_pack(self, step: Sequence[Rows]) -> int:
        """Return the tokens of the largest pack of a step."""
        return max(sum(group_tokens([self.sizes[row] for row in group]) for group in pack) for pack in self.packs(step))

    def __iter__(self) -> Iterator[list[Rows]]:
        for step in self.steps():
            yield from self.packs(step)[self.rank :: self.num_ranks]


def fit_to_budget(sampler: StepSampler, *, num_epochs: float, max_steps: int = 0) -> None:
    """Raise the sampler's gradient accumulation until every pack of the run keeps to its token budget.

    Args:
        sampler: starts at the fewest packs that may do.
        num_epochs: epochs of the run.
        max_steps: steps of the run, 0 for `num_epochs`.

    Raises:
        ValueError: not even the most packs that a step can fill are enough.
    """
    raised = True
    while raised:
        raised = False
        for epoch in range(math.ceil(max_steps / max(1, sampler.num_steps) if max_steps > 0 else num_epochs)):
            sampler.set_epoch(epoch)
            for step in sampler.steps():
                num_pairs = sum(map(len, step))
                while sampler.num_packs <= num_pairs and sampler.largest_pack(step) > sampler.max_tokens:
                    sampler.gradient_accumulation_steps += 1
                    raised = True
                if num_pairs == sampler.pairs_per_step < sampler.num_packs:
                    raise ValueError(
                        f"a step of {num_pairs} pairs cannot be cut for {sampler.num_ranks} ranks into packs "
                        f"of at most {sampler.max_tokens} tokens"
                    )
    sampler.set_epoch(0)
