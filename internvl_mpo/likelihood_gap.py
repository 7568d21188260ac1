"""How likely a model finds the two responses of a pair, over a sample of every source and rule.

    gaps = likelihood_gaps(iter_pairs("MMPR-v1.2"), "OpenGVLab/InternVL2-8B", num_pairs=64)

A gap near 0 with responses that are nearly equal says that the model does not tell them apart: a preference loss will
push down what both say.
"""

import contextlib
import heapq
from collections import defaultdict
from collections.abc import Iterable
from hashlib import blake2b
from typing import Any

import torch
from torch import nn

from internvl_mpo.encoding import encode_group
from internvl_mpo.errors import BadInputError
from internvl_mpo.families.registry import family_of_source
from internvl_mpo.logps import attach_scoring, pair_logps
from internvl_mpo.mmpr.differences import LikelihoodGap
from internvl_mpo.mmpr.pairs import PairRow
from internvl_mpo.packing import pack_groups
from internvl_mpo.records import RowError
from internvl_mpo.training.policy import load_model

MAX_TILES, MAX_LENGTH = 12, 6144  # the defaults of training


def likelihood_gaps(
    rows: Iterable[PairRow | RowError], model: str, *, num_pairs: int, device: str = "auto"
) -> dict[tuple[str, str], LikelihoodGap]:
    """Score a sample of pairs.

    Args:
        rows: all pairs; the sample depends on their contents, not on their order. Unusable rows are passed over, and
            so are pairs that training would refuse.
        model: folder or Hub id of a model of any family of `families/`.
        num_pairs: pairs of each source and rule, at most.
        device: cuda, cpu, mps; auto takes what is there. On a CPU in float32, else in bfloat16.

    Returns:
        By source and rule; those of which no pair could be scored are absent.

    Raises:
        BadInputError: the model cannot be loaded, or no family takes it.
    """
    from tqdm import tqdm

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    policy, processor = _load(model, device)
    scored: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    with torch.no_grad():
        for row in tqdm(_sample(rows, num_pairs), desc="scoring", unit="pair"):
            with contextlib.suppress(RowError):  # the number of scored pairs says so
                logps = _logps_per_token(policy, processor, row, device)
                scored[row.pair.source, row.pair.rule].append(logps)
    return {key: _mean(logps) for key, logps in scored.items()}


def _load(source: str, device: str) -> tuple[nn.Module, Any]:
    family = family_of_source(source)
    try:
        processor = family.load_processor(source)
        model = load_model(source, torch.float32 if device == "cpu" else torch.bfloat16)
        return attach_scoring(model.to(device).eval()), processor
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInputError(f"cannot load the model '{source}': {' '.join(str(error).split())}") from error


def _sample(rows: Iterable[PairRow | RowError], num_pairs: int) -> list[PairRow]:
    """The pairs of every source and rule whose contents have the smallest hashes."""
    kept: dict[tuple[str, str], list[tuple[int, int, PairRow]]] = defaultdict(list)
    for number, row in enumerate(rows):
        if isinstance(row, RowError):
            continue
        code = int.from_bytes(blake2b(row.digest.encode(), digest_size=8).digest(), "big")
        heap = kept[row.pair.source, row.pair.rule]
        (heapq.heappushpop if len(heap) == num_pairs else heapq.heappush)(heap, (-code, -number, row))
    return [row for key in sorted(kept) for *_, row in sorted(kept[key], reverse=True)]


def _logps_per_token(model: nn.Module, processor: Any, row: PairRow, device: str) -> tuple[float, float]:
    max_tiles = row.max_tiles or MAX_TILES
    group = encode_group(processor, [row.pair], row.image_root, max_tiles=max_tiles, max_length=MAX_LENGTH)
    pack = pack_groups([group]).to(device)
    chosen, rejected = pair_logps(model, pack)
    return (chosen / pack.chosen_lengths_P).item(), (rejected / pack.rejected_lengths_P).item()


def _mean(logps: list[tuple[float, float]]) -> LikelihoodGap:
    chosen, rejected = (sum(side) / len(logps) for side in zip(*logps, strict=True))
    return LikelihoodGap(len(logps), chosen, rejected, sum(c > r for c, r in logps) / len(logps))
