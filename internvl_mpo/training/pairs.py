"""Pairs of a run: checked, measured, planned into steps."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl_mpo.errors import BadInputError
from internvl_mpo.files import atomic_writer
from internvl_mpo.mmpr.pairs import PairRow, mixture_table, repeats
from internvl_mpo.records import RowError

if TYPE_CHECKING:
    from internvl_mpo.pack_plan import PairSize


def check_pairs(
    settings: Any, processor: Any, rows: list[PairRow], rejects: list[RowError]
) -> tuple[list[PairRow], list["PairSize"]]:
    """Look at every row; return the usable ones and their sizes.

    The first rank does the work, the others wait for what it leaves on disk.

    Raises:
        BadInputError: rows are unusable and may not be skipped.
    """
    from internvl_mpo.training.distributed import agree
    from internvl_mpo.training.lengths import length_report, show_lengths
    from internvl_mpo.training.preflight import Preflight, same_id_twice

    beside = settings.output_dir.rstrip("/")
    preflight = Preflight(
        processor,
        settings.preflight_cache or f"{beside}.preflight",
        max_tiles=settings.max_tiles,
        max_length=settings.max_length,
        verify_images=settings.verify_images,
        num_workers=settings.preflight_workers,
    )
    is_main = settings.process_index == 0
    token = agree(preflight.reopen() if is_main else None, settings)
    if is_main:
        results = preflight.run(rows)
        preflight.finish()
    else:
        results = preflight.wait(rows, token)
    for index, reason in same_id_twice(rows).items():
        results[index] = RowError(reason, rows[index].where)
    for index, size in enumerate(results):
        if not isinstance(size, RowError) and size.num_tokens > settings.max_tokens_per_pack:
            limit = f"more than max_tokens_per_pack {settings.max_tokens_per_pack}"
            results[index] = RowError(f"the pair has {size.num_tokens} tokens, {limit}", rows[index].where)

    bad = [result for result in results if isinstance(result, RowError)]
    good = [(row, size) for row, size in zip(rows, results, strict=True) if not isinstance(size, RowError)]
    stop_on_rejects(settings, rejects + bad, num_good=len(good))
    kept, sizes = [row for row, _ in good], [size for _, size in good]
    if is_main:
        report = length_report(sizes)
        print(show_lengths(report), flush=True)
        with atomic_writer(f"{beside}.preflight.json") as out:
            json.dump({**report, "num_rejected": len(rejects) + len(bad), "data": settings.data}, out, indent=2)
    return kept, sizes


def stop_on_rejects(settings: Any, rejects: list[RowError], num_good: int) -> None:
    """List unusable rows beside the run folder; stop unless they may be skipped.

    Raises:
        BadInputError: naming the first one.
    """
    if not rejects:
        return
    path = Path(f"{settings.output_dir.rstrip('/')}.rejects.jsonl")
    if settings.process_index == 0:
        with atomic_writer(path) as out:
            for error in rejects:
                out.write(json.dumps({"row": str(error), "reason": error.reason}, ensure_ascii=False) + "\n")
    if settings.on_bad_row == "stop" or not num_good:
        raise BadInputError(
            f"{rejects[0]} ({len(rejects)} of {len(rejects) + num_good} rows are unusable, listed in {path}); "
            "repair them, or leave them out with --on_bad_row skip"
        )
    if settings.process_index == 0:
        print(f"left out {len(rejects)} unusable rows, listed in {path}")


def plan(
    settings: Any, rows: list[PairRow], sizes: list["PairSize"]
) -> tuple[Any, list[PairRow], list[int], list["PairSize"]]:
    """Choose how often each pair is seen, and the gradient accumulation that keeps packs within the token budget.

    Returns:
        Settings, the rows that are seen at all, how often each is seen in an epoch, and their sizes.

    Raises:
        BadInputError: there are fewer pairs than one step needs, or ranks cannot share a step within the budget.
    """
    counts = repeats(rows, settings.seed, settings.resample)
    total = sum(counts)
    if settings.process_index == 0:
        print(mixture_table(rows, counts, [size.num_tokens for size in sizes]), flush=True)
    seen = [index for index, count in enumerate(counts) if count]
    rows, counts, sizes = ([values[index] for index in seen] for values in (rows, counts, sizes))
    if total < settings.pairs_per_step:
        raise BadInputError(
            f"one epoch has {total} pairs, fewer than the {settings.pairs_per_step} of one step; lower pairs_per_step"
        )
    from internvl_mpo.steps import StepSampler, fit_to_budget

    ranks = settings.world_size
    sampler = StepSampler(
        [row.key for row in rows],
        counts,
        sizes,
        pairs_per_step=settings.pairs_per_step,
        pairs_per_group=settings.pairs_per_group,
        max_tokens=settings.max_tokens_per_pack,
        num_ranks=ranks,
        rank=0,
        gradient_accumulation_steps=1,
        seed=settings.data_seed if settings.data_seed is not None else settings.seed,
    )
    try:
        fit_to_budget(sampler, num_epochs=settings.num_train_epochs, max_steps=settings.max_steps)
    except ValueError as error:
        raise BadInputError(f"{error}; raise max_tokens_per_pack or pairs_per_step") from error
    accumulation = sampler.gradient_accumulation_steps
    if settings.process_index == 0:
        print(
            f"{len(rows)} pairs ({total} a pass), {sampler.num_steps} steps a pass of {settings.pairs_per_step} pairs, "
            f"in {ranks} x {accumulation} packs of at most {settings.max_tokens_per_pack} tokens"
        )
        if settings.preference == "aot" and ranks * accumulation > 1:
            print(
                "note: aot compares the pairs of one pack, so this cutting is part of the result; see docs/training.md"
            )
    return replace(settings, gradient_accumulation_steps=accumulation), rows, counts, sizes
