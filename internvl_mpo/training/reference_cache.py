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
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pyarrow
import pyarrow.parquet
import torch
from torch import Tensor

from internvl_mpo.errors import BadInputError
from internvl_mpo.files import atomic_writer, write_parquet
from internvl_mpo.records import content_id

_NUM_NAMED = 3  # missing ids spelled out in a message
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
        self._logps: dict[str, tuple[float, float]] = {}
        self._added: list[tuple[str, float, float]] = []
        self._read: set[Path] = set()
        self.refresh()

    def refresh(self) -> None:
        """Read shards that other processes wrote since.

        Raises:
            BadInputError: a shard cannot be read.
        """
        for path in sorted(set(self.folder.glob("part-*.parquet")) - self._read):
            try:
                columns = pyarrow.parquet.read_table(path).to_pydict()
                rows = zip(columns["chosen_logps"], columns["rejected_logps"], strict=True)
                self._logps.update(zip(columns["digest"], rows, strict=True))
            except (OSError, KeyError, pyarrow.ArrowException) as error:
                raise BadInputError(
                    f"reference log-probs in {path} cannot be read ({error}); delete the file and start again"
                ) from error
            self._read.add(path)

    def missing(self, pair_ids: Sequence[str] | None = None) -> list[str]:
        """Return the ids that have no log-probs yet, in order; None asks for all pairs of the run."""
        pairs = self.digests.items() if pair_ids is None else ((pair_id, self._digest(pair_id)) for pair_id in pair_ids)
        return [pair_id for pair_id, digest in pairs if digest not in self._logps]

    def add(self, pair_ids: Sequence[str], chosen_logps: Tensor, rejected_logps: Tensor) -> None:
        """Take log-probs in; every `shard_size` pairs a shard reaches the disk, the rest with `flush`.

        Args:
            pair_ids: ids of the pairs.
            chosen_logps: Shape: (P,)
            rejected_logps: Shape: (P,)

        Raises:
            BadInputError: a value is not finite; the message names the pair.
        """
        for pair_id, chosen, rejected in zip(pair_ids, chosen_logps.tolist(), rejected_logps.tolist(), strict=True):
            if not torch.isfinite(torch.tensor([chosen, rejected])).all():
                raise BadInputError(
                    f"the start model gives pair {pair_id} log-probs of {chosen} and {rejected}; "
                    "check its weights and dtype, or leave the pair out"
                )
            digest = self._digest(pair_id)
            self._logps[digest] = (chosen, rejected)
            self._added.append((digest, chosen, rejected))
        if len(self._added) >= self.shard_size:
            self.flush()

    def lookup(self, pair_ids: Sequence[str], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return the reference log-probs of chosen and rejected responses. Shape: 2 x (P,)

        Raises:
            BadInputError: some pairs have none; the message names the first ones and what fills the gap.
        """
        missing = self.missing(pair_ids)
        if missing:
            named = ", ".join(missing[:_NUM_NAMED]) + (", ..." if len(missing) > _NUM_NAMED else "")
            raise BadInputError(
                f"{len(missing)} of {len(pair_ids)} pairs have no reference log-probs in {self.folder} ({named}); "
                f"run the training command again to fill the gap"
            )
        chosen, rejected = zip(*(self._logps[self._digest(pair_id)] for pair_id in pair_ids), strict=True)
        return torch.tensor(chosen, dtype=dtype), torch.tensor(rejected, dtype=dtype)

    def flush(self) -> None:
        """Write what was added as a shard."""
        if not self._added:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_writer(self.folder / "settings.json") as out:
            json.dump(self.settings, out, indent=2, ensure_ascii=False, sort_keys=True)
        names = ("digest", "chosen_logps", "rejected_logps")
        table = pyarrow.table(dict(zip(names, map(list, zip(*self._added, strict=True)), strict=True)))
        path = self.folder / f"part-{int(os.environ.get('RANK', 0)):05d}-{uuid.uuid4().hex[:8]}.parquet"
        write_parquet(table, path)
        self._read.add(path)
        self._added.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.flush()

    def _digest(self, pair_id: str) -> str:
        try:
            return self.digests[pair_id]
        except KeyError:
            raise BadInputError(f"pair {pair_id} is not among the {len(self.digests)} pairs of this run") from None


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
