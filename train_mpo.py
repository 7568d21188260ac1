"""Train a vision-language model with Mixed Preference Optimization.

    one CPU, a tiny real task     python train_mpo.py --config configs/mini.yaml
    one GPU, LoRA                 python train_mpo.py --config configs/internvl2_8b_lora.yaml --data MMPR/meta.json
    eight GPUs                    torchrun --nproc_per_node 8 train_mpo.py --config configs/internvl2_8b.yaml

Reads pairs (a meta.json in MMPR's layout, JSONL, or MMPR as Parquet, here or on the Hub), checks every row, computes
the reference log-probs once with the start model, trains, and writes a model folder that the Auto classes load. A run
that was killed goes on with the same command. Every field of transformers' TrainingArguments is accepted beside the
options below.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.mmpr import PairRow, Resample, iter_pairs, mixture_table, repeats
from internvl_mpo.records import RowError, atomic_writer
from internvl_mpo.settings import parse_settings, setting, show_settings, write_settings

if TYPE_CHECKING:
    from internvl_mpo.packing import PairSize
    from internvl_mpo.reference_cache import ReferenceCache
    from internvl_mpo.trainer import MPOTrainer

PROGRAM = "train_mpo.py"


def main(argv: list[str]) -> int:
    """Run the chapters below in order."""
    settings = read_settings(argv)
    is_main = settings.process_index == 0
    if is_main:
        print(show_settings(settings, f"{PROGRAM}: settings"), flush=True)

    rows, held_out, rejects = read_pairs(settings)
    processor = load_processor(settings)
    rows, sizes, held_out, held_out_sizes = check_pairs(settings, processor, rows, held_out, rejects)
    settings, rows, counts, sizes = plan(settings, rows, sizes)

    model = load_policy(settings)
    reference = reference_logps(settings, model, processor, rows + held_out, sizes + held_out_sizes)
    model = add_lora(settings, model)
    trainer = build_trainer(settings, model, processor, rows, counts, sizes, held_out, held_out_sizes, reference)
    train(settings, trainer)
    save(settings, trainer, processor)
    return 0


# --- settings ---------------------------------------------------------------------------------------------------------


def read_settings(argv: list[str]) -> Any:
    """Return the checked settings; without arguments, or with --help, only the usage is printed."""
    if argv and not {"-h", "--help"} & set(argv):
        _check_paths_cheaply(argv)
    from internvl_mpo.trainer import MPOArguments  # imports transformers, some seconds

    @dataclass(kw_only=True)
    class TrainSettings(MPOArguments):
        """Settings of `train_mpo.py`."""

        model: str = setting(help="start model: folder or Hub id; it is also the reference")
        data: list[str] = setting(
            help="pairs: MMPR's meta.json, JSONL, Parquet folder, hub:OWNER/NAME; several with commas"
        )
        output_dir: str = setting(help="run folder: settings, log, checkpoints")
        model_dir: str | None = setting(None, help="folder of the trained model; none = model/ in output_dir")
        image_root: str | None = setting(None, help="folder of the images of a JSONL file; none = that of the file")
        held_out_share: float = setting(0.0, help="share of the questions kept apart to measure reward accuracy")
        reference_cache: str | None = setting(None, help="folder of reference log-probs; none = inside output_dir")
        resample: Resample = setting("none", help="sqrt evens out subsets by the square root of their size")
        preflight_workers: int | None = setting(None, help="processes that check pairs; none = one per core, 0 = none")
        preflight_cache: str | None = setting(None, help="folder of what the check found; none = beside output_dir")
        verify_images: Literal["header", "full"] = setting("header", help="full decodes every image before training")
        on_bad_row: Literal["stop", "skip"] = setting("stop", help="what to do when rows are unusable: stop or skip")
        resume: Literal["auto", "never"] = setting("auto", help="go on from the last whole checkpoint: auto or never")
        dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", help="type of the weights")
        lora_rank: int = setting(0, help="rank of LoRA adapters on the language model; 0 trains all weights")
        lora_alpha: int | None = setting(None, help="scale of LoRA; none = twice the rank")
        freeze_vision: bool = setting(False, help="do not train the vision tower")

        def __post_init__(self) -> None:
            super().__post_init__()
            if self.preflight_workers is not None and self.preflight_workers < 0:
                raise BadInputError(f"preflight_workers is {self.preflight_workers}, expected 0 or more, or none")
            if not 0 <= self.held_out_share < 1:
                raise BadInputError(f"held_out_share is {self.held_out_share}, expected 0 or more and below 1")

    return parse_settings(TrainSettings, argv, program=PROGRAM, about=__doc__)


def _check_paths_cheaply(argv: list[str]) -> None:
    """Refuse a config file that is not there before transformers is imported."""
    for position, word in enumerate(argv):
        path = word.partition("=")[2] or (argv[position + 1] if position + 1 < len(argv) else "")
        if word.split("=")[0] == "--config" and not Path(path).is_file():
            raise BadInputError(f"config file '{path}' does not exist")


# --- pairs ------------------------------------------------------------------------------------------------------------


def read_pairs(settings: Any) -> tuple[list[PairRow], list[PairRow], list[RowError]]:
    """Return training rows, held-out rows and the rows that could not be read."""
    rows, rejects = [], []
    for path in settings.data:
        for row in iter_pairs(path, settings.image_root):
            (rejects if isinstance(row, RowError) else rows).append(row)
    if not rows and not rejects:
        raise BadInputError(f"{', '.join(settings.data)} holds no preference pair")
    held_out = [row for row in rows if _share_of(row.pair.group_key) < settings.held_out_share]
    kept = [row for row in rows if _share_of(row.pair.group_key) >= settings.held_out_share]
    return kept, held_out, rejects


def _share_of(key: str) -> float:
    """A number in [0, 1) that depends on the question only, so that its pairs stay on one side."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big") / 2**56


def check_pairs(
    settings: Any, processor: Any, rows: list[PairRow], held_out: list[PairRow], rejects: list[RowError]
) -> tuple[list[PairRow], list["PairSize"], list[PairRow], list["PairSize"]]:
    """Look at every row; return usable training rows, their sizes, usable held-out rows, and theirs.

    The first rank does the work, the others wait for what it leaves on disk.

    Raises:
        BadInputError: rows are unusable and may not be skipped.
    """
    from internvl_mpo.preflight import Preflight, length_report, same_id_twice, show_lengths

    beside = settings.output_dir.rstrip("/")
    preflight = Preflight(
        processor,
        settings.preflight_cache or f"{beside}.preflight",
        max_tiles=settings.max_tiles,
        max_length=settings.max_length,
        verify_images=settings.verify_images,
        num_workers=settings.preflight_workers,
    )
    everything = rows + held_out
    is_main = settings.process_index == 0
    if is_main:
        preflight.reopen()
    wait_for_everyone(settings)
    if is_main:
        results = preflight.run(everything)
        preflight.finish()
    else:
        results = preflight.wait(everything)
    clashes = same_id_twice(everything)
    for index, reason in clashes.items():
        results[index] = RowError(reason, everything[index].where)

    bad = [result for result in results if isinstance(result, RowError)]
    good = [(row, size) for row, size in zip(everything, results, strict=True) if not isinstance(size, RowError)]
    stop_on_rejects(settings, rejects + bad, num_good=len(good))
    if is_main:
        report = length_report([size for _, size in good])
        print(show_lengths(report), flush=True)
        with atomic_writer(f"{beside}.preflight.json") as out:
            json.dump({**report, "num_rejected": len(rejects) + len(bad), "data": settings.data}, out, indent=2)
    num_usable = sum(not isinstance(result, RowError) for result in results[: len(rows)])
    kept, sizes = [row for row, _ in good], [size for _, size in good]
    return kept[:num_usable], sizes[:num_usable], kept[num_usable:], sizes[num_usable:]


def wait_for_everyone(settings: Any) -> None:
    """A barrier where there are several ranks."""
    if settings.world_size > 1:
        import torch

        torch.distributed.barrier()


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
        BadInputError: one pair alone is over the budget, or there are fewer pairs than one step needs.
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
    longest = max(range(len(rows)), key=lambda index: sizes[index].num_tokens)
    if sizes[longest].num_tokens > settings.max_tokens_per_pack:
        raise BadInputError(
            f"pair {rows[longest].pair.id} ({rows[longest].where}) has {sizes[longest].num_tokens} tokens, more than "
            f"max_tokens_per_pack {settings.max_tokens_per_pack}; raise it, or lower max_tiles or max_length"
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
    return replace(settings, gradient_accumulation_steps=accumulation), rows, counts, sizes


# --- policy -----------------------------------------------------------------------------------------------------------


def load_processor(settings: Any) -> Any:
    """Return the processor of the start model; weights are read only after all pairs have been checked.

    Raises:
        BadInputError: the folder holds something else.
    """
    from transformers import AutoProcessor

    import modeling_internvl_mpo  # noqa: F401 - registers the classes, so official folders load without remote code

    source = settings.model
    if Path(source).is_dir():
        config_path = Path(source) / "config.json"
        if not config_path.is_file():
            raise BadInputError(f"model folder '{source}' has no config.json")
        try:
            kind = json.loads(config_path.read_text(encoding="utf-8")).get("model_type")
        except ValueError as error:
            raise BadInputError(f"{config_path} is not valid JSON: {error}") from error
        if kind != "internvl_chat":
            raise BadInputError(f"{config_path} is of model_type '{kind}', expected 'internvl_chat' (InternVL2)")
    elif (os.sep in source.rstrip("/") and source.startswith((".", "/"))) or source.count("/") > 1:
        raise BadInputError(f"model folder '{source}' does not exist")
    try:
        return AutoProcessor.from_pretrained(source, trust_remote_code=True)
    except (OSError, ValueError) as error:
        raise _cannot_load(source, error) from error


def load_policy(settings: Any) -> Any:
    """Return the start model.

    Raises:
        BadInputError: its weights cannot be loaded.
    """
    import torch
    from transformers import AutoModel

    try:
        model = AutoModel.from_pretrained(settings.model, trust_remote_code=True, dtype=getattr(torch, settings.dtype))
    except (OSError, ValueError) as error:
        raise _cannot_load(settings.model, error) from error
    if settings.freeze_vision:
        model.vision_model.requires_grad_(False)
    return model


def _cannot_load(source: str, error: Exception) -> BadInputError:
    reason = " ".join(str(error).split())
    if not Path(source).is_dir():
        return BadInputError(f"'{source}' is no folder here, and the Hub does not give it: {reason}")
    return BadInputError(f"cannot load the start model '{source}': {reason}")


def add_lora(settings: Any, model: Any) -> Any:
    """Wrap the language model with LoRA adapters if a rank is given."""
    if not settings.lora_rank:
        return model
    from peft import LoraConfig, get_peft_model

    from modeling_internvl_mpo.configuration_internvl_mpo import LORA_TARGETS

    kind = model.config.llm_config.model_type
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha or 2 * settings.lora_rank,
        target_modules=rf".*language_model.*\.({'|'.join(LORA_TARGETS[kind])})",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    if settings.process_index == 0:
        trained, everything = model.get_nb_trainable_parameters()
        print(f"LoRA of rank {settings.lora_rank}: {trained:,} of {everything:,} weights are trained")
    return model


# --- reference log-probs ----------------------------------------------------------------------------------------------


def reference_logps(
    settings: Any, model: Any, processor: Any, rows: Sequence[PairRow], sizes: Sequence["PairSize"]
) -> "ReferenceCache":
    """Return the log-probs of the start model, computing those that no earlier run left on disk.

    Every rank computes a share and writes its own shards; a killed run goes on where it stopped.
    """
    import torch
    from tqdm import tqdm

    from internvl_mpo.logps import attach_scoring, pair_logps
    from internvl_mpo.packing import fill_packs, group_tokens, pack_groups
    from internvl_mpo.reference_cache import ReferenceCache, model_digest, pair_digest
    from internvl_mpo.steps import cut_group
    from internvl_mpo.trainer import GroupDataset

    source = settings.model
    cache = ReferenceCache(
        settings.reference_cache or Path(settings.output_dir) / "reference",
        {
            "model": model_digest(source) if Path(source).is_dir() else f"{source}@{model.config._commit_hash}",
            "template": processor.chat_template,
            "max_tiles": settings.max_tiles,
            "max_length": settings.max_length,
            "dtype": settings.dtype,
            "autocast": "bfloat16" if settings.bf16 else "float16" if settings.fp16 else None,
        },
        {row.pair.id: pair_digest(row.pair, row.max_tiles) for row in rows},
    )
    attach_scoring(model)
    missing = set(cache.missing())
    if settings.world_size > 1:  # nobody writes before all have read, so that all agree on what is missing
        torch.distributed.barrier()
    if not missing:
        return cache

    groups: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        if row.pair.id in missing:
            missing.discard(row.pair.id)  # a pair that appears twice is computed once
            groups.setdefault(row.key, []).append(index)
    # All pairs of a question share its prompt here, as far as the budget goes; the result does not depend on it.
    budget = max(settings.max_tokens_per_pack, max(size.num_tokens for size in sizes))
    members = [part for group in groups.values() for part in cut_group(tuple(group), sizes, budget)]
    tokens = [group_tokens([sizes[index] for index in part]) for part in members]
    packs = fill_packs(tokens, budget)[settings.process_index :: settings.world_size]
    data = GroupDataset(rows, processor, max_tiles=settings.max_tiles, max_length=settings.max_length)
    device = settings.device
    model.to(device).eval()
    precision = torch.bfloat16 if settings.bf16 else torch.float16
    bar = tqdm(total=sum(len(members[g]) for pack in packs for g in pack), desc="reference log-probs", unit="pair",
               disable=settings.process_index != 0)  # fmt: skip
    with cache, bar, torch.inference_mode(), torch.autocast(
        device.type, precision, enabled=settings.bf16 or settings.fp16
    ):  # fmt: skip
        for numbers in packs:
            pack = pack_groups([data[members[number]] for number in numbers]).to(device)
            cache.add(pack.pair_ids, *pair_logps(model, pack))
            bar.update(pack.num_pairs)
    if settings.world_size > 1:
        torch.distributed.barrier()
        cache.refresh()
    return cache


# --- train ------------------------------------------------------------------------------------------------------------


def build_trainer(
    settings: Any,
    model: Any,
    processor: Any,
    rows: list[PairRow],
    counts: list[int],
    sizes: list["PairSize"],
    held_out: list[PairRow],
    held_out_sizes: list["PairSize"],
    reference: "ReferenceCache",
) -> "MPOTrainer":
    """Return the trainer; this is the first thing that touches the run folder."""
    from internvl_mpo.trainer import ConsoleCallback, MPOTrainer

    digest = hashlib.sha256()
    for row in rows:
        digest.update(row.pair.id.encode())
    return MPOTrainer(
        model,
        settings,
        processor=processor,
        rows=rows,
        counts=counts,
        sizes=sizes,
        reference=reference,
        held_out=held_out,
        held_out_sizes=held_out_sizes,
        fingerprint={"data": digest.hexdigest()[:16], "reference": reference.name},
        callbacks=[ConsoleCallback(settings.output_dir)],
    )


def train(settings: Any, trainer: "MPOTrainer") -> None:
    """Train to the end, from the last whole checkpoint if there is one."""
    import torch

    from internvl_mpo.trainer import last_checkpoint, remove_half_written

    write_settings(settings, Path(settings.output_dir) / "settings.yaml")
    checkpoint = last_checkpoint(settings.output_dir) if settings.resume == "auto" else None
    if settings.process_index == 0:
        for name in remove_half_written(settings.output_dir):
            print(f"{name} is half-written and was removed")
    if checkpoint is not None:
        trainer.check_resumable(checkpoint)
        if settings.process_index == 0:
            print(f"going on from {checkpoint}")
    if settings.device.type == "cpu":
        # several threads add gradients of one token in any order otherwise, and no two runs are equal to the last bit
        torch.use_deterministic_algorithms(True, warn_only=True)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    evaluations = [row for row in trainer.state.log_history if "eval_rewards/accuracy" in row]
    if evaluations and settings.process_index == 0:
        print(f"held-out pairs: reward accuracy {evaluations[-1]['eval_rewards/accuracy']:.3f}")


def save(settings: Any, trainer: "MPOTrainer", processor: Any) -> None:
    """Write the model folder under a temporary name and rename it, so that it is there whole or not at all."""
    from internvl_mpo.publish import write_model_folder

    model = trainer.accelerator.unwrap_model(trainer.model)
    if settings.lora_rank:
        model = model.merge_and_unload()
    if settings.process_index != 0:
        return
    target = Path(settings.model_dir or Path(settings.output_dir) / "model")
    temporary = target.with_name(f".{target.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    write_model_folder(model, processor, temporary)
    write_settings(settings, temporary / "training_settings.yaml")
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    print(f"the trained model is in {target}")


if __name__ == "__main__":
    sys.exit(run_program(main))
