"""Log-probs of the frozen start model on disk, so that training never holds a second copy of the weights.

    folder/9f2c51d07ab3e640/        hash of all that the numbers depend on besides the pair itself
        settings.json               the same in readable form
        part-00000-1b9d4f7e.parquet digest, chosen_logps, rejected_logps; one row per pair

Shards appear whole or not at all, and each process writes its own, so an interrupted fill goes on where it stopped and
ranks need not talk. A row is found by a digest of the pair's content (`PairRow.digest`): editing a pair, or giving
another pair its id, makes it missing again. Image files are told apart by their paths in a folder, and folders by their
names; pixels changed in place go unnoticed.
"""

import hashlib
import json
import math
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor

from internvl_mpo.errors import BadInputError
from internvl_mpo.files import atomic_writer, remove_leftovers, write_parquet
from internvl_mpo.records import content_id

_NUM_NAMED = 3  # missing ids spelled out in a message
_RECENT = 1 << 16  # pairs that are Python objects; the others take 24 bytes each
_MODEL_FILES = ("*.safetensors", "*.bin", "*.json", "*.model", "*.txt")


class ReferenceCache:
    """Reference log-probs of the pairs of one run; use as a context manager while adding."""

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, Any],
        digests: Mapping[str, str],
        *,
        shard_size: int = 1024,
    ):
        """Open the cache and read the shards that are there.

        Args:
            folder: home of all caches.
            settings: all else the numbers depend on, JSON-able: digest or revision of the start model, template, image
                size and tiling, length limit, dtype, ...
            digests: `PairRow.digest` of every pair of the run, by pair id.
            shard_size: pairs that are collected before a shard is written.

        Raises:
            BadInputError: a shard cannot be read.
        """
        self.name = content_id(settings)
        self.folder = Path(folder) / self.name
        self.settings, self.digests = dict(settings), digests
        self.shard_size = shard_size
        self._digests = np.zeros(0, np.uint64)  # sorted
        self._values = np.zeros((0, 2))
        self._recent: dict[int, tuple[float, float]] = {}
        self._added: list[int] = []
        self._read: set[Path] = set()
        remove_leftovers(self.folder)
        self.refresh()

    def refresh(self) -> None:
        """Read shards that other processes wrote since.

        Raises:
            BadInputError: a shard cannot be read.
        """
        digests, values = [], []
        for path in sorted(set(self.folder.glob("part-*.parquet")) - self._read):
            try:
                table = pyarrow.parquet.read_table(path)
                digests += [int(digest, 16) for digest in table["digest"].to_pylist()]
                values.append(np.stack([table[name].to_numpy() for name in ("chosen_logps", "rejected_logps")], axis=1))
            except (OSError, KeyError, ValueError, pyarrow.ArrowException) as error:
                raise BadInputError(
                    f"reference log-probs in {path} cannot be read ({error}); delete the file and start again"
                ) from error
            self._read.add(path)
        if values:
            self._merge(np.array(digests, np.uint64), np.concatenate(values))

    def has(self, digests: np.ndarray) -> np.ndarray:
        """Say which digests have log-probs. Shapes: (N,) -> (N,)"""
        _, found = self._find(digests)
        if self._recent:
            found |= np.fromiter((digest in self._recent for digest in digests.tolist()), bool, len(digests))
        return found

    def values(self, digests: np.ndarray) -> np.ndarray:
        """Return log-probs of chosen and rejected responses, NaN where there are none. Shapes: (N,) -> (N, 2)"""
        places, found = self._find(digests)
        values = np.full((len(digests), 2), np.nan)
        values[found] = self._values[places[found]]
        for index, digest in enumerate(digests.tolist() if self._recent else ()):
            if digest in self._recent:
                values[index] = self._recent[digest]
        return values

    def take(self, digests: np.ndarray, values: np.ndarray) -> None:
        """Take in what another rank has found and written. Shapes: (N,), (N, 2)"""
        self._recent.update(zip(digests.tolist(), map(tuple, values.tolist()), strict=True))
        self._settle()

    def _settle(self) -> None:
        """Let pairs that are on the disk become numbers in arrays once there are many."""
        if len(self._recent) > _RECENT and not self._added:
            recent, self._recent = self._recent, {}
            self._merge(np.array(list(recent), np.uint64), np.array(list(recent.values())))

    def _find(self, digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places of digests in the sorted ones, and whether they are there."""
        places = np.searchsorted(self._digests, digests)
        places[places == len(self._digests)] = 0
        found = self._digests[places] == digests if len(self._digests) else np.zeros(len(digests), bool)
        return places, found

    def _merge(self, digests: np.ndarray, values: np.ndarray) -> None:
        """Sort new ones in; of several values for one pair the newest counts."""
        digests, values = np.concatenate([digests, self._digests]), np.concatenate([values, self._values])
        self._digests, firsts = np.unique(digests, return_index=True)
        self._values = values[firsts]

    def missing(self, pair_ids: Iterable[str] | None = None) -> list[str]:
        """Return the ids that have no log-probs yet, in order; None asks for all pairs of the run."""
        ids = list(self.digests if pair_ids is None else pair_ids)
        known = self.has(self._digests_of(ids))
        return [pair_id for pair_id, is_known in zip(ids, known.tolist(), strict=True) if not is_known]

    def add(
        self, pair_ids: Sequence[str], chosen_logps: Tensor, rejected_logps: Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        """Take log-probs in; every `shard_size` pairs a shard reaches the disk, the rest with `flush`.

        Args:
            pair_ids: ids of the pairs.
            chosen_logps: Shape: (P,)
            rejected_logps: Shape: (P,)

        Returns:
            Digests and log-probs, as `take` wants them elsewhere. Shapes: (P,), (P, 2)

        Raises:
            BadInputError: a value is not finite; the message names the pair.
        """
        values = torch.stack([chosen_logps, rejected_logps], dim=1).double().cpu().numpy()
        for pair_id, (chosen, rejected) in zip(pair_ids, values.tolist(), strict=True):
            if not (math.isfinite(chosen) and math.isfinite(rejected)):
                raise BadInputError(
                    f"the start model gives pair {pair_id} log-probs of {chosen} and {rejected}; "
                    "check its weights and dtype, or leave the pair out"
                )
        digests = self._digests_of(pair_ids)
        self._recent.update(zip(digests.tolist(), map(tuple, values.tolist()), strict=True))
        self._added += digests.tolist()
        if len(self._added) >= self.shard_size:
            self.flush()
        return digests, values

    def lookup(self, pair_ids: Sequence[str], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return the reference log-probs of chosen and rejected responses. Shape: 2 x (P,)

        Raises:
            BadInputError: some pairs have none; the message names the first ones and what fills the gap.
        """
        values = self.values(self._digests_of(pair_ids))
        if np.isnan(values).any():
            missing = self.missing(pair_ids)
            named = ", ".join(missing[:_NUM_NAMED]) + (", ..." if len(missing) > _NUM_NAMED else "")
            raise BadInputError(
                f"{len(missing)} of {len(pair_ids)} pairs have no reference log-probs in {self.folder} ({named}); "
                f"run the training command again to fill the gap"
            )
        chosen, rejected = torch.from_numpy(values).to(dtype).unbind(dim=1)
        return chosen, rejected

    def flush(self) -> None:
        """Write what was added as a shard."""
        if not self._added:
            return
        with atomic_writer(self.folder / "settings.json") as out:
            json.dump(self.settings, out, indent=2, ensure_ascii=False, sort_keys=True)
        values = np.array([self._recent[digest] for digest in self._added])
        table = pyarrow.table(
            {
                "digest": [f"{digest:016x}" for digest in self._added],
                "chosen_logps": values[:, 0],
                "rejected_logps": values[:, 1],
            }
        )
        path = self.folder / f"part-{int(os.environ.get('RANK', 0)):05d}-{uuid.uuid4().hex[:8]}.parquet"
        write_parquet(table, path)
        self._read.add(path)
        self._added.clear()
        self._settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.flush()

    def _digests_of(self, pair_ids: Sequence[str]) -> np.ndarray:
        try:
            return np.array([int(self.digests[pair_id], 16) for pair_id in pair_ids], np.uint64)
        except KeyError as error:
            raise BadInputError(
                f"pair {error.args[0]} is not among the {len(self.digests)} pairs of this run"
            ) from None


def model_digest(folder: str | Path) -> str:
    """Return a digest of weights, config, tokenizer and processor files of a model folder.

    All bytes are read: about ten seconds for 16 GB from a fast disk.

    Raises:
        BadInputError: the folder holds no weights.
    """
    folder = Path(folder)
    paths = sorted({path for pattern in _MODEL_FILES for path in folder.glob(pattern)})
    if not any(path.suffix in (".safetensors", ".bin") for path in paths):
        raise BadInputError(f"{folder} holds no weights (*.safetensors or *.bin)")
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            total.update(f"{path.name}\n{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return total.hexdigest()[:16]
