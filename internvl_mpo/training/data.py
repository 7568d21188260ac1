"""Steps of pairs become packs: the dataset and the loader of the trainer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from internvl_mpo.encoding import encode_group
from internvl_mpo.mmpr.pairs import PairRow
from internvl_mpo.packing import Group, Pack
from internvl_mpo.steps import Rows
from internvl_mpo.token_weights import TokenWeights


class GroupDataset(Dataset):
    """Encodes the group of some pairs when it is asked for; an index is a tuple of pair numbers."""

    def __init__(
        self, rows: Sequence[PairRow], processor: Any, *, max_tiles: int, max_length: int, token_weights: TokenWeights
    ):
        """Keep the rows; see `encode_group` for the rest."""
        self.rows, self.processor = rows, processor
        self.max_tiles, self.max_length = max_tiles, max_length
        self.token_weights = token_weights

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, members: Rows) -> Group:
        """Return the encoded group of pairs that share a prompt."""
        rows = [self.rows[index] for index in members]
        group = encode_group(
            self.processor,
            [row.pair for row in rows],
            rows[0].image_root,
            max_tiles=rows[0].max_tiles or self.max_tiles,
            max_length=self.max_length,
        )
        return self.token_weights.weigh(group)


@dataclass(frozen=True)
class Micro:
    """What one forward pass gets: a pack and the reference log-probs of its pairs.

    Attributes:
        pack: tokens, tiles and pairs.
        reference_logps: those of the chosen and of the rejected responses, summed with the pack's token weights; None
            if they are computed live. Shape: 2 x (P,)
    """

    pack: Pack
    reference_logps: tuple[Tensor, Tensor] | None

    def to(self, device: torch.device | str) -> "Micro":
        """Return the same on another device."""
        logps = self.reference_logps and tuple(tensor.to(device) for tensor in self.reference_logps)
        return Micro(self.pack.to(device), logps)


class StepLoader(DataLoader):
    """A DataLoader over packs; the Trainer tells it the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the sampler."""
        self.batch_sampler.set_epoch(epoch)
