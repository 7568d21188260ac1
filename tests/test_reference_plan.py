"""Which reference log-probs a run needs and when, against plain loops over the steps.

pytest tests/test_reference_plan.py
"""

from types import SimpleNamespace

import numpy as np
import pytest
from test_reference_ahead import Pairs

from internvl_mpo.pack_plan import group_tokens
from internvl_mpo.training.reference_plan import ReferencePlan


class ManyPairs(Pairs):
    """Three questions with so many pairs that sorting them has a choice."""

    def column(self, name: str) -> np.ndarray:
        return self.indices * 7 % 3 if name == "key" else super().column(name)


def plan_of(pairs: Pairs, steps: int = 2, num_steps: int = 10**6, budget: int = 60) -> ReferencePlan:
    args = SimpleNamespace(reference_ahead_steps=steps, pairs_per_step=5, max_tokens_per_pack=budget)
    return ReferencePlan(pairs, args, num_steps=num_steps)


def questions_by_step(trained: Pairs, plan: ReferencePlan) -> list[list[int]]:
    """Questions that come up for the first time in each step, until all have."""
    seen, found, epoch = set(), [], 0
    sampler = trained.sampler(plan.args)
    wanted = set(plan.questions[: len(trained)].tolist())
    while True:
        sampler.set_epoch(epoch)
        for step in sampler.steps():
            if len(found) == plan.num_steps or seen == wanted:
                return found
            new = sorted({int(plan.questions[row]) for group in step for row in group} - seen)
            seen |= set(new)
            found.append(new)
        epoch += 1


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 50])
@pytest.mark.parametrize("num_steps", [0, 1, 3, 10**6])
def test_windows_are_as_long_as_their_steps_and_pairs_allow(steps, num_steps):
    trained = Pairs(np.arange(36))
    plan = plan_of(Pairs(np.arange(40)), steps, num_steps)
    sizes = np.bincount(plan.questions)
    expected, pairs = [], 0
    for number, questions in enumerate(questions_by_step(trained, plan)):
        more = int(sizes[questions].sum())
        if not expected or number - expected[-1][0] == steps or pairs + more > steps * 5:
            expected.append((number, []))
            pairs = 0
        expected[-1][1].append(questions)
        pairs += more
    found = [(window.first, [some.tolist() for some in window.questions]) for window in plan.windows(trained)]
    assert found == expected
    assert [window.end - window.first for window in plan.windows(trained)] == [len(some) for _, some in expected]


def test_a_run_of_several_epochs_needs_what_comes_up_late():
    trained = Pairs(np.arange(36))
    trained.sampler = lambda args: SimpleNamespace(  # steps of an epoch that leave pairs out
        set_epoch=lambda epoch: setattr(trained, "epoch", epoch),
        steps=lambda: [[(trained.epoch,), (trained.epoch + 1,)]],
    )
    plan = plan_of(trained, 50)
    (window,) = plan.windows(trained)
    assert [some.tolist() for some in window.questions] == [[0, 1], *([number] for number in range(2, 12))]


@pytest.mark.parametrize("questions", [[0], [2, 0], [0, 1, 2], []])
def test_the_pairs_of_a_question_come_in_the_order_of_the_data(questions):
    plan = plan_of(ManyPairs(np.arange(500)))
    rows = plan.rows(np.array(questions, np.int64)).tolist()
    assert rows == [row for question in questions for row in range(500) if plan.questions[row] == question]


def test_a_pair_that_is_there_twice_is_computed_once_and_one_over_the_budget_alone():
    pairs = Pairs(np.array([0, 12, 24, 12, 1, 0]))
    (first, second, *rest) = plan_of(pairs).packs([np.array([0]), np.array([1])])
    found = [row for pack in (first, second, *rest) for group in pack for row in group]
    assert sorted(found) == [0, 1, 2, 4], "the first of equal pairs"


def test_a_pack_keeps_to_the_budget_or_to_the_largest_pair():
    pairs = Pairs(np.arange(36))
    for number, size in enumerate(pairs.sizes):
        pairs.sizes[number] = size._replace(chosen_key=2 * number, rejected_key=2 * number + 1)  # no response is shared
    largest = max(size.num_tokens for size in pairs.sizes)
    for budget in (1, 30, 60):
        packs = plan_of(pairs, budget=budget).packs([np.arange(12)])
        tokens = [sum(group_tokens([pairs.sizes[row] for row in group]) for group in pack) for pack in packs]
        assert max(tokens) <= max(budget, largest)
        assert sorted(row for pack in packs for group in pack for row in group) == list(range(36))
        assert len(packs) <= 2 * sum(tokens) / max(budget, largest) + 1, "no more packs than it takes"


def test_what_is_held_out_are_the_questions_of_the_pairs_behind_those_trained_on():
    plan = plan_of(Pairs(np.arange(40)))
    held_out = plan.others(Pairs(np.arange(36)))
    assert held_out.tolist() == sorted(set(plan.questions[36:].tolist()))
    assert plan.rows(held_out).tolist() == [36, 37, 38, 39]
    assert plan.others(Pairs(np.arange(40))).tolist() == []
