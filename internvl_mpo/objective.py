"""Mixed Preference Optimization (arXiv 2411.10442): three terms on a few small tensors.

    loss = mean over pairs of  w_p * preference + w_q * quality + w_g * generation        (section 4.1 of the paper)

    preference   which of two responses is better    DPO  -logsigmoid(beta (D_c - D_r))
    quality      how good each one is by itself      BCO  -logsigmoid(beta D_c - shift) - logsigmoid(shift - beta D_r)
    generation   how to write the chosen one         SFT  -logp_policy(chosen) / number of its scored tokens

with D = logp_policy - logp_reference of one response. Log-probs are **sums** over the scored tokens of a response: its
text and its end-of-turn token, some of them weighted where token weights are asked for (`token_weights.py`). Other
published losses are other formulas in the first place (`preference_terms.py`), or a weight of a whole pair.

Nothing here knows of models, files, trainers or ranks. P is the number of pairs.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from internvl_mpo.preference_terms import REFERENCE_FREE, SORTED, Pairs, Preference, preference_term

Quality = Literal["bco", "none"]
Generation = Literal["sft", "sft_token", "none"]
ShiftMode = Literal["previous", "inclusive", "ema", "none"]


class MPOLoss(NamedTuple):
    """What `mpo_loss` returns; w_p, w_q and w_g are not in the terms, rewards are detached.

    Attributes:
        loss: scalar to differentiate.
        preference: (P,) preference term of each pair, times its pair weight.
        quality: (P,) quality term of each pair, times its pair weight.
        generation: (P,) generation term of each pair.
        chosen_rewards: (P,) beta * D_c.
        rejected_rewards: (P,) beta * D_r.
    """

    loss: Tensor
    preference: Tensor
    quality: Tensor
    generation: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


def mpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None,
    reference_rejected_logps: Tensor | None,
    chosen_lengths: Tensor,
    *,
    beta: float = 0.1,
    weights: tuple[float, float, float] = (0.8, 0.2, 1.0),
    shift: float | Tensor = 0.0,
    preference: Preference = "dpo",
    quality: Quality = "bco",
    generation: Generation = "sft",
    label_smoothing: float = 0.0,
    simpo_gamma: float = 1.0,
    dpop_lambda: float = 50.0,
    rejected_lengths: Tensor | None = None,
    generation_logps: Tensor | None = None,
    pair_weights: Tensor | None = None,
    num_pairs: int | Tensor | None = None,
    num_chosen_tokens: int | Tensor | None = None,
) -> MPOLoss:
    """Return the MPO loss of some pairs, its terms and the implicit rewards.

    `num_pairs` and `num_chosen_tokens` describe the whole optimizer step of which these pairs are a part. The losses of
    the parts then add up to the loss of the step, so that loss and gradient do not depend on how it is split.

    Args:
        policy_chosen_logps: summed log-probs of the chosen responses under the policy. Shape: (P,)
        policy_rejected_logps: the same for the rejected responses. Shape: (P,)
        reference_chosen_logps: the same under the frozen reference; None if no term needs it. Shape: (P,)
        reference_rejected_logps: the same for the rejected responses. Shape: (P,)
        chosen_lengths: scored tokens of each chosen response. Shape: (P,)
        beta: strength of the pull towards the reference; as beta -> 0 the reference stops to matter.
        weights: (w_p, w_q, w_g).
        shift: delta of the quality term, see `RewardShift`.
        preference: formula of the preference term, see `preference_terms.py`.
        quality: "bco" or "none".
        generation: "sft" is the paper's mean per response; "sft_token" is one mean over all chosen tokens of the step,
            as in the original program; "none" leaves it out.
        label_smoothing: share of pairs believed to be labelled the wrong way round (cdpo, robust_dpo, exo).
        simpo_gamma: target margin of simpo.
        dpop_lambda: weight of the penalty of dpop.
        rejected_lengths: scored tokens of each rejected response, for formulas per token. Shape: (P,)
        generation_logps: summed log-probs of the chosen responses for the generation term, where token weights make
            `policy_chosen_logps` something else; None means that. Shape: (P,)
        pair_weights: constants that preference and quality of each pair are multiplied by, see `wpo_weights`; the
            generation term imitates every chosen response alike. Shape: (P,)
        num_pairs: pairs in the whole step; None means P.
        num_chosen_tokens: chosen tokens in the whole step (sft_token); None means the sum of `chosen_lengths`.

    Raises:
        ValueError: unknown variant, missing reference or lengths, a response without scored tokens, or pair weights for
            a formula that sorts the pairs.
    """
    has_reference = reference_chosen_logps is not None and reference_rejected_logps is not None
    _check(preference, quality, generation, chosen_lengths, pair_weights, has_reference)
    policy_chosen, policy_rejected = _wide(policy_chosen_logps), _wide(policy_rejected_logps)
    zeros = torch.zeros_like(policy_chosen)
    chosen_logratios = _log_ratio(policy_chosen, reference_chosen_logps)  # D_c
    rejected_logratios = _log_ratio(policy_rejected, reference_rejected_logps)  # D_r
    chosen_rewards, rejected_rewards = beta * chosen_logratios, beta * rejected_logratios
    preference_losses = zeros
    if preference != "none":
        pairs = Pairs(
            chosen_logratios,
            rejected_logratios,
            beta,
            label_smoothing=label_smoothing,
            policy_logps=(policy_chosen, policy_rejected),
            lengths=(chosen_lengths, rejected_lengths),
            simpo_gamma=simpo_gamma,
            dpop_lambda=dpop_lambda,
        )
        preference_losses = preference_term(preference, pairs)
    quality_losses = quality_term(chosen_rewards, rejected_rewards, shift) if quality == "bco" else zeros
    if pair_weights is not None:
        preference_losses, quality_losses = pair_weights * preference_losses, pair_weights * quality_losses

    imitated = policy_chosen if generation_logps is None else _wide(generation_logps)
    step_pairs = len(policy_chosen) if num_pairs is None else num_pairs
    step_tokens = chosen_lengths.sum() if num_chosen_tokens is None else num_chosen_tokens
    generation_losses = generation_term(generation, imitated, chosen_lengths, step_pairs, step_tokens)
    w_p, w_q, w_g = weights
    per_pair = w_p * preference_losses + w_q * quality_losses + w_g * generation_losses
    return MPOLoss(
        loss=per_pair.sum() / step_pairs,
        preference=preference_losses,
        quality=quality_losses,
        generation=generation_losses,
        chosen_rewards=chosen_rewards.detach(),
        rejected_rewards=rejected_rewards.detach(),
    )


def needs_reference(preference: Preference, quality: Quality) -> bool:
    """Say whether a mix of terms compares the policy with a reference; SimPO, ORPO and plain SFT do not."""
    return preference not in REFERENCE_FREE or quality != "none"


def _check(
    preference: Preference,
    quality: Quality,
    generation: Generation,
    lengths: Tensor,
    pair_weights: Tensor | None,
    has_reference: bool,
) -> None:
    _check_choice("preference", preference, Preference)
    _check_choice("quality", quality, Quality)
    _check_choice("generation", generation, Generation)
    if bool((lengths < 1).any()):
        raise ValueError("a chosen response has no scored token; every response must keep at least one")
    if pair_weights is not None and preference in SORTED:
        raise ValueError(f"preference '{preference}' sorts the pairs, so a weight would meet the wrong one")
    if not has_reference and needs_reference(preference, quality):
        raise ValueError(f"preference '{preference}' with quality '{quality}' needs reference log-probs")


def _log_ratio(policy_logps: Tensor, reference_logps: Tensor | None) -> Tensor:
    """Return policy minus reference; zero where no term needs a reference. Shape: (P,)"""
    return torch.zeros_like(policy_logps) if reference_logps is None else policy_logps - _wide(reference_logps)


def generation_term(
    generation: Generation,
    imitated_logps: Tensor,
    lengths: Tensor,
    num_pairs: int | Tensor,
    num_tokens: int | Tensor,
) -> Tensor:
    """Return -log pi(y_c) of every pair, divided so that the mean over a step's pairs is what `generation` asks for.

    Args:
        generation: "sft": by the response's tokens, as in the paper; "sft_token": by the step's; "none": zero.
        imitated_logps: summed log-probs of the chosen responses. Shape: (P,)
        lengths: their scored tokens. Shape: (P,)
        num_pairs: pairs of the step.
        num_tokens: chosen tokens of the step.
    """
    if generation == "sft":
        return -imitated_logps / lengths
    if generation == "sft_token":
        return -imitated_logps * num_pairs / num_tokens
    return torch.zeros_like(imitated_logps)


def quality_term(chosen_rewards: Tensor, rejected_rewards: Tensor, shift: float | Tensor) -> Tensor:
    """Return the BCO loss of each pair (arXiv 2404.04656): a classifier of good and bad around `shift`. Shape: (P,)"""
    return -F.logsigmoid(chosen_rewards - shift) - F.logsigmoid(-(rejected_rewards - shift))


def wpo_weights(chosen_likeness: Tensor, rejected_likeness: Tensor) -> Tensor:
    """Return the weight of each pair in WPO (arXiv 2406.11827, eq. 2): how much it looks like the policy's own samples.

    w = w(chosen) w(rejected) with w(y) = exp(mean over tokens of [log p(y_t) - log sum over words v of p(v)^2]). A
    response that the policy would sample itself weighs about 1, one that it would never write about 0. Constants: no
    gradient goes through them.

    Args:
        chosen_likeness: the mean of the brackets over each chosen response, see `logps.PairScores`. Shape: (P,)
        rejected_likeness: the same of the rejected ones. Shape: (P,)
    """
    return (chosen_likeness + rejected_likeness).detach().exp()


class RewardShift:
    """delta of the quality term: a running mean of rewards that goes into the loss as a constant.

    Modes:

    - previous (default, the paper's "moving average of previous rewards"): mean over the rewards of all pairs of
      earlier optimizer steps. Call `update` once after each optimizer step, with the rewards of the step.
    - inclusive (the original program): each micro-batch contributes the mean of its rewards with equal weight, however
      many pairs it has. Call `update` with each micro-batch **before** its loss is computed.
    - ema (as in NeMo-RL): exponential moving average of the mean reward of earlier steps, starting at the first one.
    - none (TRL since 0.29): always 0.

    Where a step is shared out, add up the `sums` of all shares before `update`; every share then has the same
    value.
    """

    def __init__(self, mode: ShiftMode = "previous", momentum: float = 0.99):
        """Start at 0.

        Args:
            mode: see the class.
            momentum: weight of the past in mode ema.

        Raises:
            ValueError: unknown mode, or a momentum outside [0, 1).
        """
        _check_choice("reward shift", mode, ShiftMode)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}, expected 0 <= momentum < 1")
        self.mode = mode
        self.momentum = momentum
        self.total = 0.0  # sum of contributions (previous, inclusive) or the average itself (ema)
        self.count = 0.0

    @property
    def value(self) -> float:
        """The shift to use now."""
        if self.count == 0:
            return 0.0
        return self.total if self.mode == "ema" else self.total / self.count

    def sums(self, rewards: Tensor) -> Tensor:
        """Return what rewards add to the shift, float64; the caller adds it up over the ranks. Shape: (2,)

        Args:
            rewards: rewards of chosen and rejected responses, in any order; may be empty except in mode inclusive. Any
                shape.
        """
        rewards = to_float64(rewards)
        if self.mode == "inclusive":
            return torch.stack([rewards.mean(), rewards.new_ones(())])
        return torch.stack([rewards.sum(), rewards.new_tensor(rewards.numel())])

    def update(self, sums: Tensor) -> float:
        """Take rewards in and return the new value.

        Args:
            sums: see `sums`. Shape: (2,)
        """
        total, count = sums.tolist()
        if count == 0 or self.mode == "none":
            return self.value
        if self.mode == "ema":
            mean = total / count
            self.total = mean if self.count == 0 else self.momentum * self.total + (1 - self.momentum) * mean
        else:
            self.total += total
        self.count += count
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs; JSON-able, and exact to the last bit after a round trip."""
        return {"mode": self.mode, "momentum": self.momentum, "total": self.total, "count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`.

        Raises:
            ValueError: the state is of another mode.
        """
        if state["mode"] != self.mode:
            raise ValueError(f"the saved reward shift is of mode '{state['mode']}', this run uses '{self.mode}'")
        self.momentum, self.total, self.count = state["momentum"], state["total"], state["count"]


def to_float64(values: Tensor) -> Tensor:
    """Return values for sums, detached, on their device; on the CPU where that is MPS, which has no float64."""
    values = values.detach()
    return (values.cpu() if values.device.type == "mps" else values).double()


def _wide(values: Tensor) -> Tensor:
    """Half precision to float32; wider types stay."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _check_choice(what: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ValueError(f"unknown {what} '{value}', expected one of {', '.join(get_args(choices))}")


def sequence_kl(policy_logps: Tensor, reference_logps: Tensor, lengths: Tensor) -> Tensor:
    """Return an estimate of KL(reference || policy) in nats a token, one per response.

    The estimator: k3 = exp(d) - 1 - d (Schulman 2020, "Approximating KL Divergence") with d the mean log-ratio a token,
    (log policy - log reference) / length. It is never negative and 0 for equal models. Responses must be samples of the
    reference for k3 to estimate this direction: true of pairs that were sampled from the start model, as MMPR's are for
    their own models, and approximate for any other data. Averaging d over a response before the exponential makes it a
    lower bound of the token-wise k3 (Jensen).

    Args:
        policy_logps: summed log-probs of responses. Shape: (P,)
        reference_logps: Shape: (P,)
        lengths: scored tokens. Shape: (P,)
    """
    mean_ratio = (policy_logps - reference_logps) / lengths
    return torch.expm1(mean_ratio) - mean_ratio
