"""What is logged of each pair, and its means over the micro-batches and ranks of a logging interval."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from internvl_mpo.logps import PairScores
from internvl_mpo.objective import MPOLoss, sequence_kl, to_float64
from internvl_mpo.packing import Pack


class MeanMeter:
    """Sums per-pair values without waiting for the device; `reduce` turns them into global means."""

    def __init__(self) -> None:
        """Start empty."""
        self.totals: dict[str, Tensor] = {}
        self.count = 0
        self.tokens = 0
        self.flop = 0.0

    def add(self, count: int, values: Mapping[str, Tensor]) -> None:
        """Add values of `count` pairs. Each value has shape (count,)."""
        self.count += count
        for name, value in values.items():
            total = to_float64(value).sum()
            self.totals[name] = self.totals[name] + total if name in self.totals else total

    def reduce(self, accelerator: Any) -> dict[str, float]:
        """Return the mean of every value over all ranks, with sums `num_pairs`, `num_tokens`, `flop`; a collective."""
        device = accelerator.device if accelerator.device.type != "mps" else "cpu"  # see `to_float64`
        values = [total.to(device) for total in self.totals.values()]
        counts = torch.tensor([self.count, self.tokens, self.flop], dtype=torch.float64, device=device)
        sums = accelerator.reduce(torch.cat([torch.stack(values), counts]), reduction="sum").tolist()
        *totals, num_pairs, num_tokens, flop = sums
        means = {name: total / num_pairs for name, total in zip(self.totals, totals, strict=True)}
        return {**means, "num_pairs": num_pairs, "num_tokens": num_tokens, "flop": flop}


def pair_numbers(
    pack: Pack, scores: PairScores, reference_logps: tuple[Tensor, Tensor] | None, out: MPOLoss
) -> dict[str, Tensor]:
    """Return what is logged of each pair of a pack, by its name in the log; see docs/training.md. Each of shape (P,)

    Args:
        pack: tokens, and their weights.
        scores: log-probs under the policy.
        reference_logps: those of chosen and rejected under the reference; None if there is none, then changes and
            distance are not logged. Shape: 2 x (P,)
        out: terms and rewards.
    """
    numbers = {
        "loss_preference": out.preference,
        "loss_quality": out.quality,
        "loss_generation": out.generation,
        "rewards/chosen": out.chosen_rewards,
        "rewards/rejected": out.rejected_rewards,
        "rewards/margin": out.chosen_rewards - out.rejected_rewards,
        "rewards/accuracy": out.chosen_rewards > out.rejected_rewards,
        "rewards/square": (out.chosen_rewards**2 + out.rejected_rewards**2) / 2,
        "logps/chosen": scores.whole_chosen,
        "logps/rejected": scores.whole_rejected,
        "length/chosen": pack.chosen_lengths_P,
        "length/rejected": pack.rejected_lengths_P,
    }
    if reference_logps is not None:
        reference_chosen, reference_rejected = reference_logps
        chosen_tokens, rejected_tokens = pack.weight_sums
        numbers["logps/chosen_change"] = (scores.chosen - reference_chosen) / chosen_tokens
        kl_chosen = sequence_kl(scores.chosen.detach(), reference_chosen, chosen_tokens)
        kl_rejected = sequence_kl(scores.rejected.detach(), reference_rejected, rejected_tokens)
        numbers["kl"] = (kl_chosen + kl_rejected) / 2
    return numbers
