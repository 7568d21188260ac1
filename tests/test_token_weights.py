"""Weights of response tokens: which they are, and that packs, shared stems and shared responses get them right.

pytest tests/test_token_weights.py
"""

import random

import pytest
import torch
from test_logps import gradient, mixed_groups, model, random_group  # noqa: F401 - `model` is a fixture
from test_preference_terms import token_rows
from trl_losses import trl_dpo_loss

from internvl_mpo.logps import pair_logps, response_logps, twin_logps
from internvl_mpo.objective import mpo_loss
from internvl_mpo.packing import Group, pack_groups
from internvl_mpo.token_weights import TokenWeights

BOTH = TokenWeights(ld_alpha=0.25, after_difference=0.5, difference_tokens=2)


def test_weights_are_those_of_the_drawing():
    chosen, rejected = [*b"the2and.", 300], [*b"the3andmore", 300]
    assert TokenWeights(ld_alpha=0.25).of(chosen, rejected) == ([1.0] * 9, [1.0] * 9 + [0.25] * 3)
    step = TokenWeights(after_difference=0.5, difference_tokens=2)
    assert step.of(chosen, rejected) == ([1.0] * 5 + [0.5] * 4, [1.0] * 5 + [0.5] * 7)
    assert BOTH.of(chosen, rejected)[1] == [1.0] * 5 + [0.5] * 4 + [0.125] * 3


@pytest.mark.parametrize(
    ("chosen", "rejected", "weights"),
    [
        ([1, 2, 9], [1, 2, 3, 4, 9], ([1, 1, 1], [1, 1, 1, 0.25, 0.125])),  # they part at the end of the shorter one
        ([5, 9], [6, 9], ([1, 1], [1, 1])),  # the step is longer than the responses
        ([1, 2], [1, 2, 3, 4, 5, 6], ([1, 1], [1, 1, 0.25, 0.25, 0.125, 0.125])),  # cut off: one begins the other
    ],
)
def test_weights_at_the_edges(chosen, rejected, weights):
    assert BOTH.of(chosen, rejected) == weights
    assert BOTH.of(rejected, chosen) == weights[::-1]


def test_equal_weights_leave_groups_and_caches_as_they_are():
    group = Group([1], [[2, 3], [4]], [(0, 1)], ["a"])
    assert TokenWeights(difference_tokens=3).weigh(group) is group
    assert TokenWeights(difference_tokens=3).identity() == {}
    assert BOTH.identity() != TokenWeights(ld_alpha=0.25).identity() != {}


def weighted_twin(model, groups: list[Group], weights: TokenWeights) -> torch.Tensor:
    """Chosen, then rejected sums of every pair: each response by itself, one token after the other."""
    chosen, rejected = [], []
    for group in groups:
        for pair in group.pairs:
            ids = [group.responses[index] for index in pair]
            for sums, response, values in zip((chosen, rejected), ids, weights.of(*ids), strict=True):
                beginnings = [response[:count] for count in range(1, len(response) + 1)]
                logps = [twin_logps(model, [Group(group.prompt_ids, [ids], [], [], group.tiles)]) for ids in beginnings]
                tokens = torch.cat([logps[0], torch.cat(logps).diff()])
                sums.append((tokens * torch.tensor(values)).sum())
    return torch.stack(chosen + rejected)


@pytest.mark.parametrize("weights", [TokenWeights(ld_alpha=0.25), TokenWeights(1.0, 0.0, 1), BOTH])
def test_weighted_sums_of_a_pack_equal_the_twin_to_1e_12(model, weights):
    groups = mixed_groups(model)
    # a response that several pairs use, once as chosen and once as rejected, and a group of one pair
    groups.append(Group([5, 6], [[1, 2, 3], [1, 2, 4, 4, 4, 4], [1]], [(0, 1), (1, 2), (2, 0)], ["x", "y", "z"]))
    packed = torch.cat(pair_logps(model, pack_groups([weights.weigh(group) for group in groups])))
    plain = weighted_twin(model, groups, weights)
    assert (packed - plain).abs().max() < 1e-12
    packed_gradient, plain_gradient = gradient(model, packed), gradient(model, plain)
    assert (packed_gradient - plain_gradient).norm() / plain_gradient.norm() < 1e-6  # RMSNorm computes in float32


def test_weights_do_not_touch_the_plain_sums(model):
    groups = mixed_groups(model)
    with torch.no_grad():
        weighted = response_logps(model, pack_groups([BOTH.weigh(group) for group in groups]))
        assert torch.equal(weighted, response_logps(model, pack_groups(groups)))


def test_a_group_without_weights_beside_one_with_weights_counts_fully(model):
    rng = random.Random(3)
    plain, other = (random_group(rng, 0, 0, name) for name in "ab")
    with torch.no_grad():
        together = pair_logps(model, pack_groups([plain, BOTH.weigh(other)]))
        alone = [pair_logps(model, pack_groups([group])) for group in (plain, BOTH.weigh(other))]
    for side in (0, 1):
        assert (together[side] - torch.cat([logps[side] for logps in alone])).abs().max() < 1e-12


def test_sums_of_weights_are_lengths_where_all_are_1():
    group = Group([1], [[2, 3], [4]], [(0, 1), (1, 0)], ["a", "b"])
    assert [sums.tolist() for sums in pack_groups([group]).weight_sums] == [[2.0, 1.0], [1.0, 2.0]]
    assert [sums.tolist() for sums in pack_groups([BOTH.weigh(group)]).weight_sums] == [[1.25, 1.0], [1.0, 1.25]]


def test_a_pack_carries_its_weights_to_another_device():
    pack = pack_groups([BOTH.weigh(Group([1], [[2, 3], [4]], [(0, 1)], ["a"]))])
    assert pack.to("meta").pair_tokens.weight_W.device.type == "meta"
    assert pack.to("cpu").pair_tokens.weight_W.tolist() == [1.0, 0.25, 1.0]


def test_weights_of_another_length_are_refused():
    group = Group([1], [[2, 3], [4]], [(0, 1)], ["a"], token_weights=[([1.0], [1.0])])
    with pytest.raises(ValueError, match="group a has another number of token weights"):
        pack_groups([group])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_ld_dpo_equals_trl(alpha):
    pytest.importorskip("trl")
    policy, reference = token_rows(6, seed=7)
    theirs = trl_dpo_loss(policy, reference, "sigmoid", ld_alpha=alpha)
    sums = []
    for rows in (policy, reference):
        sides = ([], [])
        for chosen, rejected in zip(rows[:6], rows[6:], strict=True):
            values = TokenWeights(ld_alpha=alpha).of([1] * len(chosen), [2] * len(rejected))
            for side, row, weights in zip(sides, (chosen, rejected), values, strict=True):
                side.append((row * torch.tensor(weights)).sum())
        sums += map(torch.stack, sides)
    lengths = torch.tensor([len(row) for row in policy[:6]])
    ours = mpo_loss(*sums, lengths, weights=(1, 0, 0), quality="none", generation="none").loss
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for mine, other in zip(torch.autograd.grad(ours, policy), torch.autograd.grad(theirs, policy), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-12, atol=1e-12)
