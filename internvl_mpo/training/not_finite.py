"""A step whose loss or gradient is not finite: what is kept of it, and the error that stops the run."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from internvl_mpo.errors import BadInputError
from internvl_mpo.files import atomic_writer
from internvl_mpo.mmpr.pairs import PairRow
from internvl_mpo.training.arguments import MPOArguments
from internvl_mpo.training.distributed import from_all_ranks
from internvl_mpo.training.pairs import TrainingPairs
from internvl_mpo.training.policy import own_share

_NUM_NAMED = 5  # pairs spelled out in the message


class PackRecord(NamedTuple):
    """One pack of the step that runs.

    Attributes:
        pair_ids: its pairs.
        reference_chosen: reference log-probs. Shape: (P,)
        reference_rejected: the same of the rejected responses. Shape: (P,)
        loss: its part in the loss of the step. Shape: ()
    """

    pair_ids: list[str]
    reference_chosen: Tensor
    reference_rejected: Tensor
    loss: Tensor


def stop_step(
    what: str,
    pair_ids: Sequence[str],
    packs: Sequence[PackRecord],
    *,
    step: int,
    model: nn.Module,
    args: MPOArguments,
    pairs: TrainingPairs,
    reward_shift: float,
) -> BadInputError:
    """Write down the step so far and return the error to raise, the same on all ranks; a collective.

    Args:
        what: "loss" or "gradient".
        pair_ids: pairs of this rank that it may come from.
        packs: of the step, on this rank.
        step: its number.
        model: the policy, not wrapped.
        args: settings; dumps go to `output_dir`.
        pairs: of the run.
        reward_shift: delta of the quality term.
    """
    found = from_all_ranks((list(pair_ids), weights_not_finite(model, args.process_index)), args)
    broken = list(dict.fromkeys(name for _, names in found for name in names))
    folder = Path(args.output_dir)
    paths = {rank: folder / f"not_finite_step{step}_rank{rank}.json" for rank, (ids, _) in enumerate(found) if ids}
    references = {
        pair_id: (chosen, rejected)
        for pack in packs
        for pair_id, chosen, rejected in zip(
            pack.pair_ids, pack.reference_chosen.tolist(), pack.reference_rejected.tolist(), strict=True
        )
    }
    header = {
        "what": what,
        "step": step,
        "model": getattr(args, "model", None),
        "output_dir": args.output_dir,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "autocast": "bfloat16" if args.bf16 else "float16" if args.fp16 else None,
        "reward_shift": reward_shift,
        **args.objective,
        **{name: getattr(args, name) for name in ("max_tiles", "max_length", "wpo")},
        "token_weights": asdict(args.token_weights),
        "pair_ids": list(pair_ids),
        "packs": [pack.pair_ids for pack in packs],
        "weights_not_finite": broken,
    }
    if pair_ids:
        dump_step(paths[args.process_index], header, pairs.rows_of(references), references)
    from_all_ranks(None, args)  # a launcher kills the others when the first one ends: all dumps must be written
    suspects = [pair_id for ids, _ in found for pair_id in ids]
    shown = ", ".join(suspects[:_NUM_NAMED]) + (", ..." if len(suspects) > _NUM_NAMED else "")
    weights = f"{len(broken)} tensors of weights are not finite, the step before broke them; " if broken else ""
    first, files = next(iter(paths.values())), ", ".join(map(str, paths.values()))
    return BadInputError(
        f"the {what} is not finite at step {step}; the pairs are {shown} (all in {files}); {weights}look at "
        f"them with python -m internvl_mpo.replay --dump {first}, then lower learning_rate or leave pairs out"
    )


def weights_not_finite(model: nn.Module, rank: int) -> list[str]:
    """Return the names of the weights that are not finite any more, or whose share on this rank is not.

    Args:
        model: the policy as it is now.
        rank: this rank.
    """
    broken = []
    for name, weight in model.named_parameters():
        own = own_share(weight.detach())
        if hasattr(weight, "ds_tensor"):  # the parameter itself is an empty placeholder; the last share is padded
            share = weight.ds_tensor.numel()
            own = weight.ds_tensor[: max(0, weight.ds_numel - rank * share)]
        if not bool(torch.isfinite(own).all()):
            broken.append(name)
    return broken


def dump_step(path: Path, header: Mapping[str, Any], rows: Sequence[PairRow], logps: Mapping[str, Any]) -> None:
    """Write what `internvl_mpo.replay` needs to repeat a step.

    Pictures in archives or Parquet rows are copied beside the file, so that the dump needs nothing else; `image` then
    names the copies.

    Args:
        path: file to write.
        header: settings of the run that the numbers depend on.
        rows: the pairs.
        logps: reference log-probs of the chosen and of the rejected response, by pair id.
    """
    pairs = []
    for row in rows:
        pair, root = row.pair, row.image_root
        if not isinstance(root, (str, Path)):
            root = path.with_suffix("")
            pair = replace(pair, images=tuple(_copy(row.image_root.read(name), name, root) for name in pair.images))
        place = {"where": row.where, "image_root": str(Path(root).resolve()), "max_tiles": row.max_tiles}
        pairs.append({**pair.to_json(), **place, "reference_logps": logps[pair.id]})
    with atomic_writer(path) as out:
        json.dump({**header, "pairs": pairs}, out, indent=1, ensure_ascii=False)


def _copy(picture: bytes, name: str, folder: Path) -> str:
    """Write a picture under a name of its content, since pictures of several folders meet here, and return it."""
    copy = hashlib.sha256(picture).hexdigest()[:16] + PurePosixPath(name).suffix
    folder.mkdir(parents=True, exist_ok=True)
    (folder / copy).write_bytes(picture)
    return copy
