"""The objective against hand-made sums, a float64 closed form, and losses that other trainers computed.

pytest tests/test_objective.py
"""

import dataclasses
import inspect
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from internvl_mpo.objective import RewardShift, mpo_loss, needs_reference, wpo_weights
from internvl_mpo.preference_terms import Preference
from internvl_mpo.training.arguments import MPOArguments
from internvl_mpo.training.meters import MeanMeter

GOLDENS = Path(__file__).resolve().parent.parent.parent / "shared" / "oracle" / "mpo" / "mpo_losses.json"


def closed_form(policy_chosen, policy_rejected, reference_chosen, reference_rejected, lengths, beta, weights, shift):
    """MPO with Python floats, one pair at a time: (loss, gradient by chosen logp, gradient by rejected logp)."""

    def softplus(x):  # -logsigmoid(-x)
        return max(x, 0.0) + math.log1p(math.exp(-abs(x)))

    def sigmoid(x):
        return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))

    w_p, w_q, w_g = weights
    count, loss, chosen_gradient, rejected_gradient = len(lengths), 0.0, [], []
    for pc, pr, rc, rr, length in zip(
        policy_chosen, policy_rejected, reference_chosen, reference_rejected, lengths, strict=True
    ):
        margin, chosen, rejected = beta * ((pc - rc) - (pr - rr)), beta * (pc - rc) - shift, beta * (pr - rr) - shift
        loss += w_p * softplus(-margin) + w_q * (softplus(-chosen) + softplus(rejected)) - w_g * pc / length
        chosen_gradient.append((-beta * (w_p * sigmoid(-margin) + w_q * sigmoid(-chosen)) - w_g / length) / count)
        rejected_gradient.append(beta * (w_p * sigmoid(-margin) + w_q * sigmoid(rejected)) / count)
    return loss / count, chosen_gradient, rejected_gradient


def random_pairs(num_pairs: int, seed: int, spread: float = 5.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 400, (num_pairs,), generator=generator)
    reference = [-lengths.double() * torch.rand(num_pairs, generator=generator, dtype=torch.float64) for _ in range(2)]
    policy = [r + spread * torch.randn(num_pairs, generator=generator, dtype=torch.float64) for r in reference]
    return policy[0], policy[1], reference[0], reference[1], lengths


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [0.1, 5.0, 3000.0])
@pytest.mark.parametrize("weights", [(0.8, 0.2, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.5)])
def test_loss_and_gradient_equal_the_closed_form(seed, spread, weights):
    pc, pr, rc, rr, lengths = random_pairs(7, seed, spread)
    pc.requires_grad_(), pr.requires_grad_()
    out = mpo_loss(pc, pr, rc, rr, lengths, beta=0.1, weights=weights, shift=-0.3)
    out.loss.backward()
    columns = [t.tolist() for t in (pc, pr, rc, rr, lengths)]
    loss, chosen_gradient, rejected_gradient = closed_form(*columns, 0.1, weights, -0.3)
    assert out.loss.item() == pytest.approx(loss, rel=1e-12)
    assert torch.equal(out.chosen_rewards, 0.1 * (pc - rc).detach())
    assert torch.equal(out.rejected_rewards, 0.1 * (pr - rr).detach())
    assert pc.grad.tolist() == pytest.approx(chosen_gradient, rel=1e-9, abs=1e-15)
    assert pr.grad.tolist() == pytest.approx(rejected_gradient, rel=1e-9, abs=1e-15)


def test_first_loss_is_0_832_plus_nll():
    logps = torch.tensor([-30.0, -60.0])
    out = mpo_loss(logps, logps, logps, logps, torch.tensor([30, 30]), beta=0.1, weights=(0.8, 0.2, 1.0), shift=0.0)
    assert out.loss.item() == pytest.approx(1.2 * math.log(2) + 1.5)  # 0.8 ln 2 + 0.2 * 2 ln 2, and NLL (1 + 2) / 2
    assert out.chosen_rewards.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("num_parts", [1, 2, 8])
@pytest.mark.parametrize("generation", ["sft", "sft_token"])
def test_splitting_a_step_leaves_loss_and_gradient_unchanged(num_parts, generation):
    pc, pr, rc, rr, lengths = random_pairs(24, seed=3)
    kinds = {"beta": 0.1, "weights": (0.8, 0.2, 1.0), "shift": 0.2, "generation": generation}
    whole = [t.clone().requires_grad_() for t in (pc, pr)]
    expected = mpo_loss(*whole, rc, rr, lengths, **kinds).loss
    expected.backward()

    parts = [t.clone().requires_grad_() for t in (pc, pr)]
    total = 0.0
    # uneven on purpose: 24 pairs in 8 parts of 1, 5, 1, 5, ... pairs
    sizes = [24] if num_parts == 1 else [24 // num_parts + (-2 if i % 2 == 0 else 2) for i in range(num_parts)]
    start = 0
    for size in sizes:
        cut = slice(start, start + size)
        loss = mpo_loss(
            *(t[cut] for t in (*parts, rc, rr, lengths)), num_pairs=24, num_chosen_tokens=int(lengths.sum()), **kinds
        ).loss
        loss.backward()
        total += loss.item()
        start += size
    assert start == 24
    assert total == pytest.approx(expected.item(), rel=1e-12)
    for part, reference in zip(parts, whole, strict=True):
        torch.testing.assert_close(part.grad, reference.grad, rtol=1e-12, atol=1e-15)


def test_sft_is_a_mean_over_responses_and_sft_token_a_mean_over_tokens():
    logps, lengths = torch.tensor([-10.0, -90.0]), torch.tensor([10, 30])
    zeros = torch.zeros(2)
    common = {"beta": 0.1, "weights": (0.0, 0.0, 1.0), "shift": 0.0}
    assert mpo_loss(logps, zeros, zeros, zeros, lengths, generation="sft", **common).loss.item() == pytest.approx(2.0)
    token = mpo_loss(logps, zeros, zeros, zeros, lengths, generation="sft_token", **common)
    assert token.loss.item() == pytest.approx(2.5)
    assert token.generation.mean().item() == pytest.approx(2.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logps_are_compared_in_float32(dtype):
    policy, reference = [torch.tensor([-1000.0, -7.0]).to(dtype)] * 2, [torch.tensor([-1001.0, -7.25]).to(dtype)] * 2
    out = mpo_loss(*policy, *reference, torch.tensor([500, 3]), weights=(1, 0, 1))
    assert out.loss.dtype == out.chosen_rewards.dtype == out.generation.dtype == torch.float32
    assert out.chosen_rewards.tolist() == pytest.approx([0.1 * (p - r) for p, r in zip(*map(torch.Tensor.tolist, (
        policy[0].float(), reference[0].float())), strict=True)], rel=1e-6)  # fmt: skip
    imitated = mpo_loss(*policy, *reference, torch.tensor([500, 3]), generation_logps=policy[0] * 2)
    assert imitated.generation.dtype == torch.float32


def test_the_settings_are_those_of_the_paper_unless_others_are_given():
    given = {name: one.default for name, one in inspect.signature(mpo_loss).parameters.items()}
    assert {name: value for name, value in given.items() if value not in (None, inspect.Parameter.empty)} == {
        "beta": 0.1, "weights": (0.8, 0.2, 1.0), "shift": 0.0, "preference": "dpo", "quality": "bco",
        "generation": "sft", "label_smoothing": 0.0, "simpo_gamma": 1.0, "dpop_lambda": 50.0,
    }  # fmt: skip
    assert (RewardShift().mode, RewardShift().momentum) == ("previous", 0.99)


def test_each_term_can_be_left_out_and_nothing_else_changes():
    pc, pr, rc, rr, lengths = random_pairs(4, seed=1)
    whole = mpo_loss(pc, pr, rc, rr, lengths, shift=0.3)
    for name, weight in (("preference", 0.8), ("quality", 0.2), ("generation", 1.0)):
        out = mpo_loss(pc, pr, rc, rr, lengths, shift=0.3, **{name: "none"})
        assert getattr(out, name).tolist() == [0.0] * 4
        assert out.loss.item() == pytest.approx(whole.loss.item() - weight * getattr(whole, name).mean().item())
    nothing = mpo_loss(pc, pr, None, None, lengths, preference="none", quality="none", generation="none")
    assert nothing.loss == 0
    assert nothing.chosen_rewards.tolist() == nothing.rejected_rewards.tolist() == [0.0] * 4


def test_the_generation_term_imitates_the_log_probs_that_are_meant_for_it():
    pc, pr, rc, rr, lengths = random_pairs(3, seed=2)
    plain, other = (mpo_loss(pc, pr, rc, rr, lengths, generation_logps=logps) for logps in (None, pc - 30.0))
    assert (other.generation - plain.generation - 30 / lengths.double()).abs().max() < 1e-12
    assert torch.equal(other.preference, plain.preference)
    assert torch.equal(other.chosen_rewards, plain.chosen_rewards)


def test_rewards_and_weights_are_constants():
    pc, pr, rc, rr, lengths = random_pairs(3, seed=2)
    pc.requires_grad_(), pr.requires_grad_()
    out = mpo_loss(pc, pr, rc, rr, lengths)
    assert out.loss.requires_grad
    assert not out.chosen_rewards.requires_grad and not out.rejected_rewards.requires_grad
    assert not wpo_weights(pc, pr).requires_grad
    assert not RewardShift().sums(pc).requires_grad


def test_only_what_compares_needs_a_reference():
    free = {"none", "simpo", "orpo"}
    for preference in get_args(Preference):
        assert needs_reference(preference, "bco")
        assert needs_reference(preference, "none") == (preference not in free)
    lengths, logps = torch.tensor([3]), torch.tensor([-3.0])
    out = mpo_loss(logps, logps, None, None, lengths, rejected_lengths=lengths, preference="orpo", quality="none")
    assert torch.isfinite(out.loss)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preference": "dop"}, "unknown preference 'dop'"),
        ({"preference": "ipo"}, "needs the lengths of both"),
        ({"chosen_lengths": torch.tensor([0])}, "no scored token"),
        ({"reference_chosen_logps": None}, "needs reference"),
        ({"reference_rejected_logps": None}, "needs reference"),
        ({"quality": "boc"}, "unknown quality 'boc'"),
        ({"generation": "stf"}, "unknown generation 'stf', expected one of sft, sft_token, none"),
    ],
)
def test_what_cannot_be_computed_is_refused_by_name(changes, words):
    logps = torch.tensor([-3.0])
    arguments = {
        "policy_chosen_logps": logps,
        "policy_rejected_logps": logps,
        "reference_chosen_logps": logps,
        "reference_rejected_logps": logps,
        "chosen_lengths": torch.tensor([3]),
    }
    with pytest.raises(ValueError, match=words):
        mpo_loss(**{**arguments, **changes})
    assert torch.isfinite(mpo_loss(**arguments, num_pairs=1).loss)
    assert torch.isfinite(mpo_loss(**{**arguments, "chosen_lengths": torch.tensor([1])}).loss)


# --- the reward shift -------------------------------------------------------------------------------------------------


def add(shift: RewardShift, *rewards: float) -> float:
    return shift.update(shift.sums(torch.tensor(rewards)))


def test_previous_shift_never_contains_the_current_step():
    shift = RewardShift("previous")
    assert shift.value == 0.0
    add(shift, 1.0, 3.0)
    assert shift.value == 2.0
    add(shift, 5.0, 5.0, 5.0, 5.0)
    assert shift.value == pytest.approx(4.0)  # all six rewards count the same


def test_inclusive_shift_weighs_micro_batches_equally():
    shift = RewardShift("inclusive")
    add(shift, 1.0, 3.0)
    assert add(shift, 5.0, 5.0, 5.0, 5.0) == pytest.approx(3.5)


def test_ema_shift_starts_at_the_first_step_and_forgets():
    shift = RewardShift("ema", momentum=0.9)
    add(shift, 1.0)
    assert shift.value == 1.0
    add(shift, 2.0)
    assert shift.value == pytest.approx(1.1)


def test_no_shift_stays_zero():
    shift = RewardShift("none")
    assert add(shift, 7.0) == shift.value == 0.0
    assert shift.state_dict()["count"] == 0


@pytest.mark.parametrize("momentum", [-0.01, 1.0])
def test_a_momentum_that_forgets_nothing_or_grows_is_refused(momentum):
    with pytest.raises(ValueError, match="expected 0 <= momentum < 1"):
        RewardShift("ema", momentum)
    with pytest.raises(ValueError, match="unknown reward shift 'mean'"):
        RewardShift("mean")


def test_a_shift_that_goes_on_keeps_the_momentum_it_began_with():
    first = RewardShift("ema", momentum=0.5)
    add(first, 2.0)
    resumed = RewardShift("ema", momentum=0.9)
    resumed.load_state_dict(first.state_dict())
    assert add(resumed, 4.0) == 3.0


@pytest.mark.parametrize("mode", ["previous", "inclusive", "ema"])
def test_shift_is_exact_after_a_json_round_trip(mode):
    generator = torch.Generator().manual_seed(0)
    rewards = [torch.randn(3, generator=generator) for _ in range(20)]
    unbroken, first = RewardShift(mode), RewardShift(mode)
    for r in rewards[:10]:
        unbroken.update(unbroken.sums(r)), first.update(first.sums(r))
    resumed = RewardShift(mode)
    resumed.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for r in rewards[10:]:
        assert unbroken.update(unbroken.sums(r)) == resumed.update(resumed.sums(r))


def test_shift_of_another_mode_is_not_loaded():
    with pytest.raises(ValueError, match="mode 'ema'"):
        RewardShift("previous").load_state_dict(RewardShift("ema").state_dict())


def test_ranks_are_summed_before_the_mean():
    shift = RewardShift("previous")
    sums = shift.sums(torch.tensor([4.0, 4.0])) + shift.sums(torch.full((4,), 10.0))
    assert shift.update(sums) == pytest.approx(48 / 6)


def test_a_step_without_rewards_leaves_the_shift_as_it_is():
    shift = RewardShift("previous")
    add(shift, 3.0)
    assert add(shift) == 3.0


def golden_scenarios():
    if not GOLDENS.exists():
        pytest.skip("no stored losses of other trainers (../shared/oracle/mpo) beside this checkout")
    return json.loads(GOLDENS.read_text())


@pytest.mark.parametrize("name", ["one_pair_per_step", "four_pairs_per_step", "two_ranks"])
@pytest.mark.parametrize(
    ("key", "mode", "tolerance"),
    [
        ("trl_1_16", "none", 1e-9),
        ("original", "inclusive", 1e-6),
        ("alt_pair_weighted_delta", "pairs", 1e-9),
        ("alt_delta_before_update", "previous", 1e-9),
        ("alt_sequence_mean_sft", "inclusive", 1e-9),
    ],
)
def test_losses_and_gradients_of_other_trainers(name, key, mode, tolerance):
    data = golden_scenarios()
    scenario = next(s for s in data["scenarios"] if s["name"] == name)
    shift = RewardShift("previous" if mode == "pairs" else mode)
    generation = "sft" if key == "alt_sequence_mean_sft" else "sft_token"
    for step, ranks in enumerate(scenario["steps"]):
        columns = []
        for rank in ranks:
            keys = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
            columns.append([torch.tensor(rank[k], dtype=torch.float64) for k in keys])
        rewards = [0.1 * torch.cat([pc - rc, pr - rr]) for pc, pr, rc, rr in columns]
        if mode == "inclusive":
            shift.update(sum(map(shift.sums, rewards)))
        elif mode == "pairs":
            shift.update(shift.sums(torch.cat(rewards)))
        for number, (pc, pr, rc, rr) in enumerate(columns):
            pc.requires_grad_(), pr.requires_grad_()
            lengths = torch.tensor(ranks[number]["chosen_len"])
            out = mpo_loss(
                pc, pr, rc, rr, lengths,
                beta=0.1, weights=(0.8, 0.2, 1.0), shift=shift.value, generation=generation,
            )  # fmt: skip
            out.loss.backward()
            expected = scenario["expected"][key][step]["per_rank"][number]
            assert out.preference.mean().item() == pytest.approx(expected["dpo"], rel=tolerance)
            assert out.quality.mean().item() == pytest.approx(expected["bco"], rel=tolerance)
            assert out.generation.mean().item() == pytest.approx(expected["sft"], rel=tolerance)
            assert out.loss.item() == pytest.approx(expected["total"], rel=tolerance)
            for tensor, side in ((pc, "policy_chosen_logps"), (pr, "policy_rejected_logps")):
                assert tensor.grad.tolist() == pytest.approx(expected["grad"]["total"][side], rel=1e-5, abs=1e-9)
        if mode == "previous":
            shift.update(shift.sums(torch.cat(rewards)))


class OnMPS(torch.Tensor):
    """A tensor that behaves as on a device of type mps: float64 is refused, `cpu` leads away from there."""

    device = torch.device("mps")

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_rewards_and_means_are_summed_in_float64_off_a_device_that_has_none():
    rewards = torch.tensor([0.1, 0.3]).as_subclass(OnMPS)
    shift = RewardShift("previous")
    assert shift.update(shift.sums(rewards)) == pytest.approx(0.2)
    meter = MeanMeter()
    meter.add(2, {"rewards/chosen": rewards, "rewards/accuracy": rewards > 0.2})
    means = meter.reduce(SimpleNamespace(device=torch.device("mps"), reduce=lambda values, reduction: values))
    assert means["rewards/chosen"] == pytest.approx(0.2)
    assert means["rewards/accuracy"] == 0.5


# float32 has 24 bits: it drops the ones that the large values stand around
LARGE_AND_ONES = torch.tensor([2.0**25, 1.0, 1.0, -(2.0**25)])


@pytest.mark.parametrize("mode", ["previous", "inclusive", "ema"])
def test_a_shift_loses_no_small_reward_beside_a_large_one(mode):
    assert add(RewardShift(mode), *LARGE_AND_ONES.tolist()) == 0.5
    shift = RewardShift(mode, momentum=0.0)
    for value in LARGE_AND_ONES.tolist():
        add(shift, value)
    assert shift.value == (-(2.0**25) if mode == "ema" else 0.5)


def test_a_mean_over_pairs_loses_no_small_value_beside_a_large_one():
    whole, pairwise = MeanMeter(), MeanMeter()
    whole.add(4, {"x": LARGE_AND_ONES})
    for value in LARGE_AND_ONES:
        pairwise.add(1, {"x": value[None]})
    for meter in (whole, pairwise):
        accelerator = SimpleNamespace(device=torch.device("cpu"), reduce=lambda values, reduction: values)
        assert meter.reduce(accelerator)["x"] == 0.5


def test_what_the_loss_takes_for_granted_is_the_recipe_of_the_settings():
    defaults = {name: value.default for name, value in inspect.signature(mpo_loss).parameters.items()}
    fields = {field.name: field.default for field in dataclasses.fields(MPOArguments)}
    shared = {name: value for name, value in defaults.items() if name in fields}
    assert shared == {name: fields[name] for name in shared}
    assert set(shared) > {"beta", "preference", "quality", "generation", "simpo_gamma", "dpop_lambda"}
    assert defaults["weights"] == tuple(fields[f"{term}_weight"] for term in ("preference", "quality", "generation"))
    assert (defaults["beta"], defaults["weights"], defaults["simpo_gamma"]) == (0.1, (0.8, 0.2, 1.0), 1.0)
    assert (defaults["dpop_lambda"], defaults["shift"]) == (50.0, 0.0)
    logps = torch.tensor([-9.0]), torch.tensor([-7.0]), torch.tensor([-5.0]), torch.tensor([-6.0])
    lengths = {"chosen_lengths": torch.tensor([3]), "rejected_lengths": torch.tensor([4])}
    for preference in ("dpop", "simpo", "dpo"):
        given = {**shared, "preference": preference, "weights": defaults["weights"], "shift": 0.0}
        explicit = mpo_loss(*logps, **lengths, **given)
        assert mpo_loss(*logps, **lengths, preference=preference).loss.item() == explicit.loss.item()
