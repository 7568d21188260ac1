"""The formulas that can stand in the preference place of the objective: which of two responses is better.

    loss_P = preference_term("dpo", Pairs(chosen_logratios, rejected_logratios, beta=0.1))

Letters of the formulas, one number per pair:

    D_c, D_r   log-ratios, logp_policy - logp_reference of chosen and rejected      c, r     logp_policy of them
    x          beta (D_c - D_r), the margin of the implicit rewards                 |c|, |r| their scored tokens
    s          logsigmoid                                                           eps      label_smoothing

A formula is a function from `Pairs` to one loss per pair. All but the two AOT forms look at one pair at a time, so they
do not depend on how a step is split.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# fmt: off
Preference = Literal[
    "dpo", "dpo_norm", "cdpo", "robust_dpo", "dpop", "discopop", "exo", "ipo", "rso", "hinge",
    "nca", "sppo", "apo_zero", "apo_down", "aot", "aot_unpaired", "simpo", "orpo", "none",
]
# fmt: on
REFERENCE_FREE = ("simpo", "orpo", "none")
SORTED = ("aot", "aot_unpaired")
SMOOTHED = ("cdpo", "robust_dpo", "exo")
DISCOPOP_TAU = 0.05  # as in the paper


@dataclass(frozen=True)
class Pairs:
    """What a preference term is made of.

    Attributes:
        chosen_logratios: D_c. Shape: (P,)
        rejected_logratios: D_r. Shape: (P,)
        beta: strength of the pull towards the reference.
        label_smoothing: share of pairs believed to be labelled the wrong way round (cdpo, robust_dpo, exo).
        policy_logps: summed log-probs of chosen and rejected under the policy (aot, simpo, orpo). Shape: 2 x (P,)
        lengths: scored tokens of chosen and rejected (dpo_norm, ipo, simpo, orpo). Shape: 2 x (P,)
        simpo_gamma: target margin of simpo, in the units of x.
        dpop_lambda: weight of the penalty of dpop.
    """

    chosen_logratios: Tensor
    rejected_logratios: Tensor
    beta: float
    label_smoothing: float = 0.0
    policy_logps: tuple[Tensor, Tensor] | None = None
    lengths: tuple[Tensor, Tensor | None] | None = None
    simpo_gamma: float = 1.0
    dpop_lambda: float = 50.0

    @property
    def margins(self) -> Tensor:
        """The x of the formulas. Shape: (P,)"""
        return self.beta * (self.chosen_logratios - self.rejected_logratios)

    @property
    def rewards(self) -> tuple[Tensor, Tensor]:
        """(beta D_c, beta D_r). Shape: 2 x (P,)"""
        return self.beta * self.chosen_logratios, self.beta * self.rejected_logratios

    def logratios_per_token(self) -> tuple[Tensor, Tensor]:
        """(D_c / |c|, D_r / |r|). Shape: 2 x (P,)"""
        return self.chosen_logratios / self.lengths[0], self.rejected_logratios / self.lengths[1]

    def logps_per_token(self) -> tuple[Tensor, Tensor]:
        """(c / |c|, r / |r|). Shape: 2 x (P,)"""
        return self.policy_logps[0] / self.lengths[0], self.policy_logps[1] / self.lengths[1]


def preference_term(kind: Preference, pairs: Pairs) -> Tensor:
    """Return the preference loss of each pair. Shape: (P,)

    Args:
        kind: name of a formula of this file; "none" is not one.
        pairs: what it is made of.

    Raises:
        ValueError: unknown kind, something it needs is missing, or `label_smoothing` has no meaning for it.
    """
    if kind not in TERMS:
        raise ValueError(f"unknown preference '{kind}', expected one of {', '.join(TERMS)}")
    if kind in _NEEDS_LENGTHS and (pairs.lengths is None or pairs.lengths[1] is None):
        raise ValueError(f"preference '{kind}' needs the lengths of both responses")
    if kind in _NEEDS_POLICY and pairs.policy_logps is None:
        raise ValueError(f"preference '{kind}' needs the log-probs of both responses under the policy")
    smoothing = pairs.label_smoothing
    if kind == "robust_dpo" and not 0 <= smoothing < 0.5:
        raise ValueError(f"robust_dpo divides by 1 - 2 * label_smoothing, so {smoothing} must be below 0.5")
    if kind == "exo" and not 0 < smoothing < 1:
        raise ValueError(f"exo takes the logarithm of label_smoothing, so {smoothing} must be above 0, as 0.001")
    return TERMS[kind](pairs)


# --- one margin per pair ----------------------------------------------------------------------------------------------


def dpo(pairs: Pairs) -> Tensor:
    """-s(x) (arXiv 2305.18290)."""
    return -F.logsigmoid(pairs.margins)


def dpo_norm(pairs: Pairs) -> Tensor:
    """-s(beta (D_c/|c| - D_r/|r|)): length-normalised DPO (Tulu 3, arXiv 2411.15124)."""
    chosen, rejected = pairs.logratios_per_token()
    return -F.logsigmoid(pairs.beta * (chosen - rejected))


def cdpo(pairs: Pairs) -> Tensor:
    """-(1-eps) s(x) - eps s(-x) (Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO")."""
    kept, flipped = F.logsigmoid(pairs.margins), F.logsigmoid(-pairs.margins)
    return -(1 - pairs.label_smoothing) * kept - pairs.label_smoothing * flipped


def robust_dpo(pairs: Pairs) -> Tensor:
    """[-(1-eps) s(x) + eps s(-x)] / (1 - 2 eps) (arXiv 2403.00409)."""
    kept, flipped = F.logsigmoid(pairs.margins), F.logsigmoid(-pairs.margins)
    smoothing = pairs.label_smoothing
    return (-(1 - smoothing) * kept + smoothing * flipped) / (1 - 2 * smoothing)


def dpop(pairs: Pairs) -> Tensor:
    """-s(x - beta lambda max(0, -D_c)): chosen responses may not become less likely (Smaug, arXiv 2402.13228)."""
    penalties = pairs.dpop_lambda * F.relu(-pairs.chosen_logratios)
    return -F.logsigmoid(pairs.margins - pairs.beta * penalties)


def discopop(pairs: Pairs) -> Tensor:
    """-(1-m) s(x) + m exp(-x) with m = sigmoid(x / 0.05): the loss a language model found (arXiv 2406.08414)."""
    margins = pairs.margins
    modulations = margins / DISCOPOP_TAU
    exponential = torch.exp(F.logsigmoid(modulations) - margins)  # exp(-x) alone overflows where m is 0
    return exponential - torch.sigmoid(-modulations) * F.logsigmoid(margins)


def exo(pairs: Pairs) -> Tensor:
    """KL([sigmoid(x), sigmoid(-x)] || [1-eps, eps]): DPO's KL, the other way round (arXiv 2402.00856, eq. 16)."""
    kept, flipped = F.logsigmoid(pairs.margins), F.logsigmoid(-pairs.margins)
    smoothing = torch.as_tensor(pairs.label_smoothing, dtype=kept.dtype, device=kept.device)
    return kept.exp() * (kept - torch.log1p(-smoothing)) + flipped.exp() * (flipped - smoothing.log())


def ipo(pairs: Pairs) -> Tensor:
    """(D_c/|c| - D_r/|r| - 1/(2 beta))^2, log-ratios per token as in TRL (arXiv 2310.12036)."""
    chosen, rejected = pairs.logratios_per_token()
    return (chosen - rejected - 1 / (2 * pairs.beta)) ** 2


def hinge(pairs: Pairs) -> Tensor:
    """max(0, 1 - x): RSO's loss (arXiv 2309.06657), SLiC's (arXiv 2305.10425) with a reference; "hinge" in TRL."""
    return F.relu(1 - pairs.margins)


# --- each response by itself ------------------------------------------------------------------------------------------


def nca(pairs: Pairs) -> Tensor:
    """-s(beta D_c) - [s(-beta D_c) + s(-beta D_r)] / 2: rewards by noise contrast (arXiv 2402.05369)."""
    chosen, rejected = pairs.rewards
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def sppo(pairs: Pairs) -> Tensor:
    """(D_c - 1/(2 beta))^2 + (D_r + 1/(2 beta))^2 (arXiv 2405.00675, hard labels)."""
    target = 1 / (2 * pairs.beta)
    return (pairs.chosen_logratios - target) ** 2 + (pairs.rejected_logratios + target) ** 2


def apo_zero(pairs: Pairs) -> Tensor:
    """sigmoid(-beta D_c) + sigmoid(beta D_r): chosen up, rejected down (arXiv 2408.06266, eq. 7)."""
    chosen, rejected = pairs.rewards
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(pairs: Pairs) -> Tensor:
    """sigmoid(beta D_c) + sigmoid(-x): both down, rejected further (arXiv 2408.06266, eq. 8)."""
    return torch.sigmoid(pairs.rewards[0]) + torch.sigmoid(-pairs.margins)


# --- the pairs of one call together -----------------------------------------------------------------------------------


def aot(pairs: Pairs) -> Tensor:
    """DPO between the sorted policy margins c - r and the sorted reference margins (arXiv 2406.05882, paired).

    The sort runs over the pairs of one call, so the result depends on how a step is split.
    """
    policy_margins = pairs.policy_logps[0] - pairs.policy_logps[1]
    reference_margins = policy_margins - (pairs.chosen_logratios - pairs.rejected_logratios)
    gaps = policy_margins.sort().values - reference_margins.detach().sort().values
    return -F.logsigmoid(pairs.beta * gaps)


def aot_unpaired(pairs: Pairs) -> Tensor:
    """DPO between the sorted D_c and the sorted D_r (arXiv 2406.05882, unpaired); depends on the split as `aot`."""
    gaps = pairs.chosen_logratios.sort().values - pairs.rejected_logratios.sort().values
    return -F.logsigmoid(pairs.beta * gaps)


# --- without a reference ----------------------------------------------------------------------------------------------


def simpo(pairs: Pairs) -> Tensor:
    """-s(beta (c/|c| - r/|r|) - gamma) (arXiv 2405.14734)."""
    chosen, rejected = pairs.logps_per_token()
    return -F.logsigmoid(pairs.beta * (chosen - rejected) - pairs.simpo_gamma)


def orpo(pairs: Pairs) -> Tensor:
    """-s(log odds ratio) of the per-token probabilities p = exp(c/|c|), odds p / (1 - p) (arXiv 2403.07691)."""
    chosen, rejected = pairs.logps_per_token()
    return -F.logsigmoid((chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected)))


def _log1mexp(values: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, accurate at both ends; exactly 0 is kept finite."""
    values = values.clamp(max=-torch.finfo(values.dtype).eps)
    near_zero = values > -0.6931  # log 2: where the two forms swap accuracy
    return torch.where(near_zero, torch.log(-torch.expm1(values)), torch.log1p(-torch.exp(values)))


_FORMULAS = (dpo, dpo_norm, cdpo, robust_dpo, dpop, discopop, exo, ipo, hinge, nca, sppo)
_FORMULAS += (apo_zero, apo_down, aot, aot_unpaired, simpo, orpo)
TERMS: dict[str, Callable[[Pairs], Tensor]] = {formula.__name__: formula for formula in _FORMULAS} | {"rso": hinge}
_NEEDS_LENGTHS = ("dpo_norm", "ipo", "simpo", "orpo")
_NEEDS_POLICY = ("aot", "simpo", "orpo")
