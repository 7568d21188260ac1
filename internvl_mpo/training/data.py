"""Steps of pairs become packs: the dataset and the loader of the trainer."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset

from internvl_mpo.encoding import encode_group
from internvl_mpo.mmpr.pairs import PairRow
from internvl_mpo.packing import Group
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


class StepLoader(DataLoader):
    """A DataLoader over packs; the Trainer tells it the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the sampler."""
        self.batch_sampler.set_epoch(epoch)
