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
from array import array
from collections.abc import Hashable, Iterator, Sequence

import numpy as np

from internvl_mpo.pack_plan import PairSize, group_tokens, plan_packs

Rows = tuple[int, ...]  # pairs of one group, as indices into the data


class Steps(Sequence[list[Rows]]):
    """The steps of an epoch, each a list of its groups; made when it is asked for."""

    def __init__(self, order: np.ndarray, is_first: np.ndarray, pairs_per_step: int, num_steps: int | None = None):
        """Keep the plan.

        Args:
            order: pairs as they are seen. Shape: (S,)
            is_first: whether a pair begins a group. Shape: (S,)
            pairs_per_step: pairs of one step.
            num_steps: steps that are run; None runs all, of which the last may hold fewer pairs.
        """
        self.order, self.is_first, self.pairs_per_step = order, is_first, pairs_per_step
        self.num_steps = math.ceil(len(order) / pairs_per_step) if num_steps is None else num_steps

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> list[Rows]:
        if not 0 <= step < self.num_steps:
            raise IndexError(step)
        place = slice(step * self.pairs_per_step, (step + 1) * self.pairs_per_step)
        rows = self.order[place].tolist()
        starts = np.flatnonzero(self.is_first[place]).tolist()
        if starts[:1] != [0]:  # a group at the border of two steps is cut there
            starts.insert(0, 0)
        return [tuple(rows[start:end]) for start, end in zip(starts, [*starts[1:], len(rows)], strict=True)]


def plan_steps(
    keys: Sequence[Hashable] | np.ndarray,
    counts: Sequence[int] | np.ndarray,
    *,
    pairs_per_step: int,
    pairs_per_group: int,
    seed: int,
    epoch: int,
) -> Steps:
    """Return the groups of every step of an epoch.

    Args:
        keys: pairs with equal keys share a prompt and may share a group. Shape: (N,)
        counts: how often each pair is seen in the epoch. Shape: (N,)
        pairs_per_step: pairs of one optimizer step, over all ranks.
        pairs_per_group: largest number of pairs of one question that share a prompt; 1 gives the batch statistics of
            the original program.
        seed: decides the order together with `epoch`.
        epoch: 0 for the first.
    """
    rng = random.Random(f"steps {seed} {epoch}")
    rows, starts = _questions(keys, np.asarray(counts, np.int64))
    ends = np.append(starts[1:], len(rows))
    for start, end in zip(starts[ends - starts > 1].tolist(), ends[ends - starts > 1].tolist(), strict=True):
        members = rows[start:end].tolist()
        rng.shuffle(members)
        rows[start:end] = members
    # The groups: every `pairs_per_group` pairs of a question begin another one.
    is_first = (np.arange(len(rows)) - np.repeat(starts, ends - starts)) % pairs_per_group == 0
    firsts = np.flatnonzero(is_first)
    lengths = np.diff(np.append(firsts, len(rows)))
    shuffled = array("q", range(len(firsts)))
    rng.shuffle(shuffled)
    order = np.frombuffer(shuffled, np.int64)
    firsts, lengths = firsts[order], lengths[order]
    # Where each group begins in the new order; the pairs of a group stay behind one another.
    places = np.append(0, np.cumsum(lengths)[:-1])[: len(lengths)]
    order = np.repeat(firsts - places, lengths) + np.arange(len(rows))
    begins = np.zeros(len(rows), bool)
    begins[places] = True
    return Steps(rows[order], begins, pairs_per_step)


def _questions(keys: Sequence[Hashable] | np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the pairs question by question as the data has them, and where each question begins. Shapes: (S,), (Q,)

    A pair that is seen several times belongs to another question each time.
    """
    if not isinstance(keys, np.ndarray):
        numbers: dict[Hashable, int] = {}
        keys = np.array([numbers.setdefault(key, len(numbers)) for key in keys], np.int64)
    rows = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    turns = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts, counts)
    numbers = np.unique(keys, return_inverse=True)[1][rows] * len(rows) + turns
    _, firsts, numbers = np.unique(numbers, return_index=True, return_inverse=True)
    begins = firsts[numbers].astype(np.int32)  # what tells questions, in the order of the data
    order = np.argsort(begins, kind="stable")
    is_first = np.append(True, np.diff(begins[order]) != 0)[: len(rows)]
    return rows[order], np.flatnonzero(is_first)


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


def split_step(
    step: Sequence[Rows],
    sizes: Sequence[PairSize],
    num_packs: int,
    max_tokens: int,
    tokens: Sequence[int] | np.ndarray | None = None,
) -> list[list[Rows]]:
    """Return the groups of one step as exactly `num_packs` packs of nearly equal size; no pack is empty.

    Args:
        step: its groups.
        sizes: size of each pair of the data.
        num_packs: ranks times gradient accumulation steps.
        max_tokens: token budget of a pack; a larger group is cut. Packs may still be larger: raise `num_packs` then.
        tokens: `num_tokens` of the sizes, where they are at hand. Shape: (N,)

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
    plan = plan_packs([tokens_of(group, sizes, tokens) for group in groups], num_packs)
    return [[groups[index] for index in pack] for pack in plan]


def tokens_of(group: Rows, sizes: Sequence[PairSize], tokens: Sequence[int] | np.ndarray | None = None) -> int:
    """Return what a group adds to a pack; see `split_step` for the arguments."""
    if len(group) == 1 and tokens is not None:
        return int(tokens[group[0]])
    return group_tokens([sizes[row] for row in group])


class StepSampler:
    """Batch sampler of a DataLoader: yields the packs of this rank, in the order of the steps.

    Every rank gets `gradient_accumulation_steps` packs of each step.
    """

    def __init__(
        self,
        keys: Sequence[Hashable] | np.ndarray,
        counts: Sequence[int] | np.ndarray,
        sizes: Sequence[PairSize],
        *,
        tokens: Sequence[int] | np.ndarray | None = None,
        pairs_per_step: int,
        pairs_per_group: int,
        max_tokens: int,
        num_ranks: int,
        rank: int,
        gradient_accumulation_steps: int,
        seed: int,
    ):
        """See `plan_steps` and `split_step` for the arguments."""
        self.keys, self.counts, self.sizes, self.tokens = keys, counts, sizes, tokens
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
        full, left = divmod(int(np.sum(self.counts)), self.pairs_per_step)
        return full + (left >= self.num_packs)

    def steps(self) -> Steps:
        """Return the groups of every step of the current epoch."""
        planned = plan_steps(
            self.keys,
            self.counts,
            pairs_per_step=self.pairs_per_step,
            pairs_per_group=self.pairs_per_group,
            seed=self.seed,
            epoch=self.epoch,
        )
        return Steps(planned.order, planned.is_first, self.pairs_per_step, self.num_steps)

    def __len__(self) -> int:
        return self.num_steps * self.gradient_accumulation_steps

    def packs(self, step: Sequence[Rows]) -> list[list[Rows]]:
        """Return the packs of a step, for all ranks."""
        return split_step(step, self.sizes, self.num_packs, self.max_tokens, self.tokens)

    def largest_pack(self, step: Sequence[Rows]) -> int:
        """Return the tokens of the largest pack of a step."""
        return max(sum(tokens_of(group, self.sizes, self.tokens) for group in pack) for pack in self.packs(step))

    def is_over_budget(self, step: Sequence[Rows]) -> bool:
        """Return whether a pack of a step is larger than the budget."""
        fewest = sum(tokens_of(group, self.sizes, self.tokens) for group in step)
        return fewest > self.num_packs * self.max_tokens or self.largest_pack(step) > self.max_tokens

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
                while sampler.num_packs <= num_pairs and sampler.is_over_budget(step):
                    sampler.gradient_accumulation_steps += 1
                    raised = True
                if num_pairs == sampler.pairs_per_step < sampler.num_packs:
                    raise ValueError(
                        f"a step of {num_pairs} pairs cannot be cut for {sampler.num_ranks} ranks into packs "
                        f"of at most {sampler.max_tokens} tokens"
                    )
    sampler.set_epoch(0)
