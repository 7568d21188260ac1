"""Means over the micro-batches and ranks of a logging interval."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from internvl_mpo.objective import to_float64


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
