"""Every formula of the preference term: by hand, against TRL, and where floats run out.

pytest tests/test_preference_terms.py
"""

import math
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from trl_losses import trl_dpo_loss

from internvl_mpo.objective import mpo_loss, wpo_weights
from internvl_mpo.preference_terms import SMOOTHED, SORTED, TERMS, Pairs, Preference, preference_term


def minus_logsigmoid(x):
    return math.log1p(math.exp(-x))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# D_c = 2, D_r = -1, beta = 0.5 -> x = 1.5; c = -6 of 4 tokens, r = -13 of 5; label_smoothing 0.1, gamma 0.2, lambda 3
BY_HAND = {
    "dpo": minus_logsigmoid(1.5),
    "dpo_norm": minus_logsigmoid(0.5 * (2 / 4 + 1 / 5)),
    "cdpo": 0.9 * minus_logsigmoid(1.5) + 0.1 * minus_logsigmoid(-1.5),
    "robust_dpo": (0.9 * minus_logsigmoid(1.5) - 0.1 * minus_logsigmoid(-1.5)) / 0.8,
    "dpop": minus_logsigmoid(1.5),  # the chosen response is likelier than before: no penalty
    "discopop": sigmoid(-30) * minus_logsigmoid(1.5) + sigmoid(30) * math.exp(-1.5),
    "exo": sigmoid(1.5) * math.log(sigmoid(1.5) / 0.9) + sigmoid(-1.5) * math.log(sigmoid(-1.5) / 0.1),
    "ipo": (2 / 4 - (-1) / 5 - 1) ** 2,
    "rso": 0.0,
    "hinge": 0.0,
    "nca": minus_logsigmoid(1) + 0.5 * minus_logsigmoid(-1) + 0.5 * minus_logsigmoid(0.5),
    "sppo": (2 - 1) ** 2 + (-1 + 1) ** 2,
    "apo_zero": sigmoid(-1) + sigmoid(-0.5),
    "apo_down": sigmoid(1) + sigmoid(-1.5),
    "aot": minus_logsigmoid(1.5),  # with one pair there is nothing to sort
    "aot_unpaired": minus_logsigmoid(1.5),
    "simpo": minus_logsigmoid(0.5 * (-6 / 4 + 13 / 5) - 0.2),
    "orpo": minus_logsigmoid((-1.5 + 2.6) - (math.log1p(-math.exp(-1.5)) - math.log1p(-math.exp(-2.6)))),
}


def pairs_of(chosen_logratios, rejected_logratios, dtype=torch.float64, **more) -> Pairs:
    chosen, rejected = torch.tensor(chosen_logratios, dtype=dtype), torch.tensor(rejected_logratios, dtype=dtype)
    return Pairs(chosen, rejected, **{"beta": 0.5, **more})


def test_every_formula_has_a_name_in_the_settings_and_a_value_by_hand():
    assert TERMS.keys() == BY_HAND.keys() == set(get_args(Preference)) - {"none"}


@pytest.mark.parametrize("kind", BY_HAND)
def test_preference_terms_by_hand(kind):
    pairs = pairs_of(
        [2.0], [-1.0], label_smoothing=0.1, simpo_gamma=0.2, dpop_lambda=3.0,
        policy_logps=(torch.tensor([-6.0]).double(), torch.tensor([-13.0]).double()),
        lengths=(torch.tensor([4]), torch.tensor([5])),
    )  # fmt: skip
    assert preference_term(kind, pairs).item() == pytest.approx(BY_HAND[kind], rel=1e-12)


def test_dpop_punishes_a_chosen_response_that_becomes_less_likely():
    pairs = pairs_of([-0.5], [-2.5], dpop_lambda=3.0)  # the margin alone is 1
    assert preference_term("dpop", pairs).item() == pytest.approx(minus_logsigmoid(1 - 0.5 * 3 * 0.5), rel=1e-12)


def test_aot_compares_quantiles_of_the_margins():
    # policy margins 3, 0 and reference margins 1, 2: sorted they differ by -1 and 1, pair by pair by 2 and -2
    policy = (torch.tensor([3.0, 0.0]), torch.tensor([0.0, 0.0]))
    loss = preference_term("aot", pairs_of([2.0, -2.0], [0.0, 0.0], beta=1.0, policy_logps=policy))
    assert loss.tolist() == pytest.approx([minus_logsigmoid(-1), minus_logsigmoid(1)])


def test_unpaired_aot_compares_quantiles_of_chosen_with_those_of_rejected():
    # sorted: -2, 2 and 0, 1; pair by pair the gaps would be 1 and -2
    loss = preference_term("aot_unpaired", pairs_of([2.0, -2.0], [1.0, 0.0], beta=1.0))
    assert loss.tolist() == pytest.approx([minus_logsigmoid(-2), minus_logsigmoid(1)])


@pytest.mark.parametrize("kind", sorted(TERMS))
def test_large_margins_of_either_sign_have_finite_losses_and_gradients(kind):
    leaves = [torch.tensor(values, requires_grad=True) for values in ([3e3, -3e3, 0.0], [-3e3, 3e3, 0.0])]
    policy = tuple(leaf - 4e3 for leaf in leaves)
    pairs = Pairs(*leaves, beta=0.5, label_smoothing=0.1, policy_logps=policy, lengths=(torch.tensor([9, 9, 9]),) * 2)
    loss = preference_term(kind, pairs)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert all(torch.isfinite(leaf.grad).all() for leaf in leaves if leaf.grad is not None)


def test_orpo_near_probability_one_has_a_finite_gradient():
    chosen = torch.tensor([-1e-9, 0.0, -50.0], requires_grad=True)
    lengths = torch.tensor([1, 1, 1])
    policy = (chosen, torch.tensor([-3.0, -1.0, 0.0]))
    loss = preference_term("orpo", pairs_of([0.0] * 3, [0.0] * 3, policy_logps=policy, lengths=(lengths, lengths)))
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(chosen.grad).all()


@pytest.mark.parametrize(
    ("kind", "more", "words"),
    [
        ("dop", {}, "unknown preference 'dop', expected one of dpo, dpo_norm"),
        ("none", {}, "unknown preference 'none'"),
        ("ipo", {}, "needs the lengths of both"),
        ("simpo", {"lengths": (torch.tensor([3]), None)}, "needs the lengths of both"),
        ("aot", {}, "under the policy"),
        ("robust_dpo", {"label_smoothing": 0.5}, "below 0.5"),
        ("exo", {}, "logarithm of label_smoothing, so 0.0"),
    ],
)
def test_what_a_formula_lacks_is_named(kind, more, words):
    with pytest.raises(ValueError, match=words):
        preference_term(kind, pairs_of([1.0], [0.0], **more))


# --- against TRL ------------------------------------------------------------------------------------------------------

TRL_NAMES = {
    "dpo": "sigmoid",
    "dpo_norm": "sigmoid_norm",
    "robust_dpo": "robust",
    "discopop": "discopop",
    "exo": "exo_pair",
    "ipo": "ipo",
    "hinge": "hinge",
    "nca": "nca_pair",
    "sppo": "sppo_hard",
    "apo_zero": "apo_zero",
    "apo_down": "apo_down",
    "aot": "aot",
    "aot_unpaired": "aot_unpaired",
}


def token_rows(num_pairs: int, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Log-probs of the tokens of chosen, then rejected responses, under a policy and under a reference near it."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (2 * num_pairs,), generator=generator).tolist()
    reference = [-3 * torch.rand(n, generator=generator, dtype=torch.float64) for n in lengths]
    policy = [row + torch.randn(len(row), generator=generator, dtype=torch.float64) for row in reference]
    return [row.requires_grad_() for row in policy], reference


def our_loss(policy: list[torch.Tensor], reference: list[torch.Tensor], kind: str, **more) -> torch.Tensor:
    num_pairs = len(policy) // 2
    sums, reference_sums = (torch.stack([row.sum() for row in rows]) for rows in (policy, reference))
    lengths = torch.tensor([len(row) for row in policy])
    return mpo_loss(
        *sums.split(num_pairs), *reference_sums.split(num_pairs), lengths[:num_pairs],
        weights=(1, 0, 0), preference=kind, quality="none", generation="none", rejected_lengths=lengths[num_pairs:],
        **more,
    ).loss  # fmt: skip


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor, policy: list[torch.Tensor], tolerance: float = 1e-12):
    """Compare losses and their gradients by the log-prob of every token."""
    assert ours.item() == pytest.approx(theirs.item(), rel=tolerance)
    gradients = (torch.autograd.grad(loss, policy) for loss in (ours, theirs))
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("kind", TRL_NAMES)
def test_loss_and_gradient_equal_trl(kind, beta):
    pytest.importorskip("trl")
    smoothing = 0.1 if kind in SMOOTHED else 0.0
    policy, reference = token_rows(6, seed=1)
    theirs = trl_dpo_loss(policy, reference, TRL_NAMES[kind], beta=beta, label_smoothing=smoothing)
    ours = our_loss(policy, reference, kind, beta=beta, label_smoothing=smoothing)
    # TRL takes the logarithm of label_smoothing in float32
    assert_equal(ours, theirs, policy, tolerance=1e-6 if kind == "exo" else 1e-12)


def test_simpo_equals_trl():
    cpo = pytest.importorskip("trl.experimental.cpo.cpo_trainer")
    policy, reference = token_rows(6, seed=2)
    means = torch.stack([row.mean() for row in policy]).split(6)
    owner = SimpleNamespace(
        loss_type="simpo", alpha=0.0, beta=2.0, simpo_gamma=0.7, label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    theirs, *_ = cpo.CPOTrainer.cpo_loss(owner, *means)
    assert_equal(our_loss(policy, reference, "simpo", beta=2.0, simpo_gamma=0.7), theirs.mean(), policy)


def test_orpo_equals_trl():
    orpo = pytest.importorskip("trl.experimental.orpo.orpo_trainer")
    policy, reference = token_rows(6, seed=3)
    policy = [(-row.detach().abs() - 0.1).requires_grad_() for row in policy]  # probabilities
    means = torch.stack([row.mean() for row in policy]).split(6)
    owner = SimpleNamespace(beta=1.0, accelerator=SimpleNamespace(device="cpu"))
    theirs = -orpo.ORPOTrainer.odds_ratio_loss(owner, *means)[0].mean()
    assert_equal(our_loss(policy, reference, "orpo"), theirs, policy, tolerance=1e-5)  # theirs is float32


@pytest.mark.parametrize("kind", ["dpo", "apo_zero"])
def test_wpo_weights_equal_trl(kind):
    pytest.importorskip("trl")
    policy, reference = token_rows(6, seed=4)
    generator = torch.Generator().manual_seed(5)
    squares = [-torch.rand(len(row), generator=generator, dtype=torch.float64) for row in policy]
    means = torch.stack([(row - square).mean() for row, square in zip(policy, squares, strict=True)])
    weights = wpo_weights(*means.split(6))
    assert not weights.requires_grad
    theirs = trl_dpo_loss(policy, reference, TRL_NAMES[kind], log_squares=squares)
    assert_equal(our_loss(policy, reference, kind, pair_weights=weights), theirs, policy)


# --- weights of pairs -------------------------------------------------------------------------------------------------


def test_pair_weights_leave_the_generation_term_alone():
    logps, zeros, lengths = torch.tensor([-4.0, -6.0]), torch.zeros(2), torch.tensor([2, 3])
    out = mpo_loss(logps, logps, logps, logps, lengths, weights=(1, 1, 1), pair_weights=torch.tensor([0.5, zeros[0]]))
    assert out.preference.tolist() == pytest.approx([0.5 * math.log(2), 0.0])
    assert out.quality.tolist() == pytest.approx([math.log(2), 0.0])
    assert out.generation.tolist() == [2.0, 2.0]
    assert out.loss.item() == pytest.approx((1.5 * math.log(2) + 4.0) / 2)


@pytest.mark.parametrize("kind", SORTED)
def test_a_weight_of_a_pair_is_refused_where_pairs_are_sorted(kind):
    logps = torch.tensor([-4.0])
    with pytest.raises(ValueError, match="sorts the pairs"):
        mpo_loss(*(logps,) * 4, torch.tensor([2]), preference=kind, pair_weights=torch.ones(1))


def test_the_generation_term_takes_its_own_log_probs_where_they_are_given():
    logps = torch.tensor([-4.0])
    out = mpo_loss(*(logps,) * 4, torch.tensor([2]), generation_logps=torch.tensor([-10.0]))
    assert out.generation.tolist() == [5.0]
    assert out.preference.tolist() == pytest.approx([math.log(2)])
