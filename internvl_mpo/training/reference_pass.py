"""The one pass of the start model over all pairs that fills the reference cache, on any number of ranks."""

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from internvl_mpo.logps import pair_logps
from internvl_mpo.pack_plan import fill_packs, group_tokens
from internvl_mpo.packing import pack_groups
from internvl_mpo.steps import cut_group
from internvl_mpo.training.arguments import MPOArguments
from internvl_mpo.training.data import GroupDataset
from internvl_mpo.training.distributed import inference_engine, zero_stage
from internvl_mpo.training.pairs import TrainingPairs
from internvl_mpo.training.policy import is_partitioned
from internvl_mpo.training.reference_cache import ReferenceCache
from internvl_mpo.training.speed import apply_speed_settings


def fill_cache(
    cache: ReferenceCache,
    missing: Collection[str],
    model: nn.Module,
    processor: Any,
    pairs: TrainingPairs,
    args: MPOArguments,
) -> None:
    """Compute log-probs of the pairs that have none; every rank takes a share and writes its own shards.

    Args:
        cache: takes the results.
        missing: ids of the pairs, the same on all ranks.
        model: the start model; left in evaluation mode, on the device of this rank.
        processor: encodes pairs.
        pairs: all pairs of the run, held-out ones too.
        args: budget, precision, ranks.
    """
    from tqdm import tqdm

    rows, sizes = pairs.rows, pairs.sizes
    left = set(missing)
    groups: dict[Any, list[int]] = {}
    for index, (pair_id, key) in enumerate(zip(pairs.digests, pairs.column("key").tolist(), strict=True)):
        if pair_id in left:
            left.discard(pair_id)  # a pair that appears twice is computed once
            groups.setdefault(key, []).append(index)
    # All pairs of a question share its prompt here, as far as the budget goes; the result does not depend on it.
    budget = max(args.max_tokens_per_pack, int(pairs.column("num_tokens").max()))
    members = [part for group in groups.values() for part in cut_group(tuple(group), sizes, budget)]
    packs = fill_packs([group_tokens([sizes[index] for index in part]) for part in members], budget)
    # With partitioned weights all ranks must call the model equally often: the last round is filled up.
    num_rounds = math.ceil(len(packs) / args.world_size)
    mine = packs[args.process_index :: args.world_size]
    data = GroupDataset(
        rows, processor, max_tiles=args.max_tiles, max_length=args.max_length, token_weights=args.token_weights
    )

    apply_speed_settings(model, args)
    if not is_partitioned(model):
        model.to(args.device)
    model.eval()
    device = args.device.type
    autocast = torch.bfloat16 if args.bf16 else torch.float16
    bar = tqdm(total=sum(len(members[g]) for pack in mine for g in pack), desc="reference log-probs", unit="pair",
               disable=args.process_index != 0)  # fmt: skip
    with (
        inference_engine(model, args) as engine,
        cache,
        bar,
        torch.no_grad(),
        torch.autocast(device, autocast, enabled=(args.bf16 or args.fp16) and zero_stage(args) is None),
    ):
        for turn in range(num_rounds if engine is not model else len(mine)):
            numbers = mine[turn] if turn < len(mine) else packs[0]
            pack = pack_groups([data[members[number]] for number in numbers]).to(args.device)
            logps = pair_logps(engine, pack)
            if turn < len(mine):
                cache.add(pack.pair_ids, *logps)
                bar.update(pack.num_pairs)
    if args.world_size > 1:
        torch.distributed.barrier()
        cache.refresh()
