"""Which pairs make up which optimizer step: epoch -> steps -> packs -> groups -> pairs.

    step 0   pack 0 (rank 0)   group (pairs 7, 3 of one question)  group (pair 12)
             pack 1 (rank 1)   group (pair 5)  group (pair 8)
    step 1   ...

A step holds exactly `pairs_per_step` pairs (the last one of an epoch may hold fewer), so what a step optimizes does not
depend on the number of ranks or packs. Everything is a function of the seed and the epoch: a resumed run, or one on
another number of ranks, sees the same steps.
"""

import random
from collections.abc import Hashable, Iterator, Sequence

from internvl_mpo.packing import plan_packs

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


def split_step(step: Sequence[Rows], costs: Sequence[float], num_packs: int) -> list[list[Rows]]:
    """Return the groups of one step as exactly `num_packs` packs of nearly equal cost; no pack is empty.

    Args:
        step: its groups.
        costs: cost of each pair of the data, usually its tokens.
        num_packs: ranks times gradient accumulation steps.

    Raises:
        ValueError: the step has fewer pairs than there are packs.
    """
    groups = list(step)
    while len(groups) < num_packs:  # cut the largest group until every pack gets one
        largest = max(range(len(groups)), key=lambda i: (len(groups[i]), -i))
        rows = groups[largest]
        if len(rows) == 1:
            raise ValueError(f"a step of {sum(map(len, step))} pairs cannot fill {num_packs} packs")
        groups[largest : largest + 1] = [rows[: len(rows) // 2], rows[len(rows) // 2 :]]
    plan = plan_packs([sum(costs[row] for row in group) for group in groups], num_packs)
    return [[groups[index] for index in pack] for pack in plan]


class StepSampler:
    """Batch sampler of a DataLoader: yields the packs of this rank, in the order of the steps.

    Every rank gets `gradient_accumulation_steps` packs of each step.
    """

    def __init__(
        self,
        keys: Sequence[Hashable],
        counts: Sequence[int],
        costs: Sequence[float],
        *,
        pairs_per_step: int,
        pairs_per_group: int,
        num_ranks: int,
        rank: int,
        gradient_accumulation_steps: int,
        seed: int,
    ):
        """See `plan_steps` and `split_step` for the arguments."""
        self.keys, self.counts, self.costs = keys, counts, costs
        self.pairs_per_step, self.pairs_per_group = pairs_per_step, pairs_per_group
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

    def __iter__(self) -> Iterator[list[Rows]]:
        for step in self.steps():
            yield from split_step(step, self.costs, self.num_packs)[self.rank :: self.num_ranks]


def largest_pack(sampler: StepSampler, num_epochs: int) -> float:
    """Return the cost of the dearest pack in the first `num_epochs` epochs, over all ranks."""
    largest = 0.0
    for epoch in range(num_epochs):
        sampler.set_epoch(epoch)
        for step in sampler.steps():
            for pack in split_step(step, sampler.costs, sampler.num_packs):
                largest = max(largest, sum(sampler.costs[row] for group in pack for row in group))
    sampler.set_epoch(0)
    return largest
