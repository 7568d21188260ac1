"""Which reference log-probs a run needs, in the order in which its steps come up.

    step 0   packs of the questions that its pairs belong to
    step 1   packs of the questions that come up for the first time
    ...

A question is computed whole when its first pair comes up, so that its prompt is run once. The packs of a step follow
from the data, the seed and the token budget alone: whoever computes them, before training or ahead of a step, on
whatever ranks or machines, gets the same numbers to the last bit.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from internvl_mpo.pack_plan import fill_packs, group_tokens
from internvl_mpo.steps import Rows, cut_group
from internvl_mpo.training.arguments import MPOArguments
from internvl_mpo.training.pairs import TrainingPairs


@dataclass(frozen=True)
class Window:
    """What some steps of a run need.

    Attributes:
        first: the first of the steps, 0 is the run's first.
        end: the step after the last of them.
        questions: for each step those that come up for the first time. Shapes: (Q,)
    """

    first: int
    end: int
    questions: list[np.ndarray]


class ReferencePlan:
    """Cuts a run into windows; see the top of this file."""

    def __init__(self, pairs: TrainingPairs, args: MPOArguments, *, num_steps: int):
        """Nothing is planned yet.

        Args:
            pairs: those that are trained on, then any others.
            args: seed, pairs of a step, token budget, steps of a window.
            num_steps: steps of the run that look at the start model; pairs of later ones are left out.
        """
        self.pairs, self.args, self.num_steps = pairs, args, num_steps
        self.digests = pairs.column("digest")
        self.questions = np.unique(pairs.column("key"), return_inverse=True)[1]
        order = np.argsort(self.questions, kind="stable")
        starts = np.searchsorted(self.questions[order], np.arange(self.questions.max(initial=-1) + 2))
        self._members, self._starts = order, starts

    def windows(self, trained: TrainingPairs) -> Iterator[Window]:
        """Yield the windows of the run: at most `reference_ahead_steps` steps and as many steps' worth of pairs each.

        A single step whose questions have more pairs than that is a window of its own.

        Args:
            trained: the pairs that are trained on, which come first in those of this plan.
        """
        limit = self.args.reference_ahead_steps
        window, rows = Window(0, 0, []), 0
        for step, questions in enumerate(self._first_seen(trained)):
            more = int((self._starts[questions + 1] - self._starts[questions]).sum())
            if window.end > window.first and (
                step - window.first == limit or rows + more > limit * self.args.pairs_per_step
            ):
                yield window
                window, rows = Window(step, step, []), 0
            window = Window(window.first, step + 1, [*window.questions, questions])
            rows += more
        if window.end > window.first:
            yield window

    def _first_seen(self, trained: TrainingPairs) -> Iterator[np.ndarray]:
        """Yield for each step the questions that come up for the first time; stops when all have. Shape: (Q,)"""
        seen = np.zeros(len(self._starts) - 1, bool)
        num_left = len(np.unique(self.questions[: len(trained)]))
        sampler = trained.sampler(self.args)
        done = 0
        for epoch in itertools.count():
            sampler.set_epoch(epoch)
            for step in sampler.steps():
                if done == self.num_steps or not num_left:
                    return
                rows = np.fromiter(itertools.chain.from_iterable(step), np.int64)
                new = np.unique(self.questions[rows])
                new = new[~seen[new]]
                seen[new] = True
                num_left -= len(new)
                done += 1
                yield new

    def rows(self, questions: np.ndarray) -> np.ndarray:
        """Return all pairs of some questions, as indices into the data. Shapes: (Q,) -> (P,)"""
        starts, counts = self._starts[questions], self._starts[questions + 1] - self._starts[questions]
        places = np.arange(counts.sum()) + np.repeat(
            starts - np.append(0, np.cumsum(counts)[:-1])[: len(counts)], counts
        )
        return self._members[places]

    def packs(self, steps: Iterable[np.ndarray]) -> list[list[Rows]]:
        """Return the packs, as groups of indices, that all pairs of the questions of some steps are computed in."""
        return [pack for questions in steps for pack in self._packs_of_step(questions)]

    def _packs_of_step(self, questions: np.ndarray) -> list[list[Rows]]:
        sizes = self.pairs.sizes
        groups = []
        for question in questions.tolist():
            rows = self._members[self._starts[question] : self._starts[question + 1]]
            _, firsts = np.unique(self.digests[rows], return_index=True)  # a pair that is there twice comes once
            groups.append(tuple(rows[np.sort(firsts)].tolist()))
        largest = max((sizes[row].num_tokens for group in groups for row in group), default=0)
        budget = max(self.args.max_tokens_per_pack, largest)
        parts = [part for group in groups for part in cut_group(group, sizes, budget)]
        packs = fill_packs([group_tokens([sizes[row] for row in part]) for part in parts], budget)
        return [[parts[number] for number in pack] for pack in packs]

    def others(self, trained: TrainingPairs) -> np.ndarray:
        """Return the questions of the pairs that are not trained on. Shape: (Q,)"""
        return np.unique(self.questions[len(trained) :])
