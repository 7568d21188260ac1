"""Train a vision-language model with Mixed Preference Optimization.

    one CPU, a tiny real task     python train_mpo.py --config configs/mini.yaml
    one GPU, LoRA                 python train_mpo.py --config configs/internvl2_8b_lora.yaml --data MMPR/meta.json
    eight GPUs                    torchrun --nproc_per_node 8 train_mpo.py --config configs/internvl2_8b.yaml

Reads pairs (a meta.json in MMPR's layout, JSONL, or MMPR as Parquet, here or on the Hub), checks every row, computes
the reference log-probs once with the start model, trains, and writes a model folder that the Auto classes load. A run
that was killed goes on with the same command. Every field of transformers' TrainingArguments is accepted beside the
options below.
"""

import contextlib
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from internvl_mpo.errors import BadInputError, need_package, run_program
from internvl_mpo.mmpr import PairRow, Resample, iter_pairs, mixture_table, repeats
from internvl_mpo.records import RowError, atomic_writer, content_id
from internvl_mpo.settings import parse_settings, plain, setting, show_settings, write_settings

if TYPE_CHECKING:
    from internvl_mpo.packing import PairSize
    from internvl_mpo.reference_cache import ReferenceCache
    from internvl_mpo.trainer import MPOTrainer

PROGRAM = "train_mpo.py"
# Settings that decide what a step computes: a run cannot go on exactly with another value. Those of optimizer and
# schedule are among them because a checkpoint brings their states, and with them the old values.
EXACT = (
    *("pairs_per_step", "pairs_per_group", "seed", "data_seed", "beta", "preference", "quality", "generation"),
    *("preference_weight", "quality_weight", "generation_weight", "label_smoothing", "reward_shift"),
    *("reward_shift_momentum", "reference", "reference_sync_steps", "reference_mixup_alpha", "lora_rank", "lora_alpha"),
    *("lora_dropout", "lora_on", "freeze_vision", "freeze_projector", "freeze_language", "freeze_language_layers"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"),
)
# Settings of TrainingArguments that packs leave without effect, and what to set instead. (dataloader_pin_memory is not
# among them: packs are never pinned, but transformers itself sets it to false on a CPU.)
WITHOUT_EFFECT = {
    "gradient_accumulation_steps": "pairs_per_step and max_tokens_per_pack decide how many packs a step has",
    "per_device_train_batch_size": "pairs_per_step counts over all ranks, max_tokens_per_pack limits a forward pass",
    "per_device_eval_batch_size": "max_tokens_per_pack limits a forward pass",
    "dataloader_drop_last": "every step holds exactly pairs_per_step pairs",
    "dataloader_prefetch_factor": "packs are loaded by dataloader_num_workers processes, two ahead each",
}
# Found by `plan`, so that a saved run does not give it back.
FOUND = ("gradient_accumulation_steps",)


def main(argv: list[str]) -> int:
    """Run the chapters below in order."""
    settings = read_settings(argv)
    is_main = settings.process_index == 0
    if is_main:
        print(show_settings(settings, f"{PROGRAM}: settings"), flush=True)

    checkpoint = choose_checkpoint(settings)
    rows, rejects = read_pairs(settings)
    processor = load_processor(settings)
    rows, sizes = check_pairs(settings, processor, rows, rejects)
    rows, sizes, held_out, held_out_sizes = hold_out(settings, rows, sizes)
    settings, rows, counts, sizes = plan(settings, rows, sizes)
    if is_main:
        show_memory(settings, sizes)

    model = load_policy(settings)
    identity = identify(settings, model, processor)
    reference = reference_logps(settings, identity, model, processor, rows + held_out, sizes + held_out_sizes)
    model = choose_weights(settings, model)
    trainer = build_trainer(
        settings, identity, model, processor, rows, counts, sizes, held_out, held_out_sizes, reference
    )
    train(settings, trainer, checkpoint)
    save(settings, trainer, processor)
    return 0


# --- settings ---------------------------------------------------------------------------------------------------------


def read_settings(argv: list[str]) -> Any:
    """Return the checked settings; without arguments, or with --help, only the usage is printed."""
    if argv and not {"-h", "--help"} & set(argv):
        _check_paths_cheaply(argv)
    from internvl_mpo.distributed import take_launchers_deepspeed, take_local_rank
    from internvl_mpo.policy import Part
    from internvl_mpo.preflight import VerifyImages
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
        held_out_share: float = setting(
            0.0, help="share of the questions kept apart to measure reward accuracy; above 0 at least one"
        )
        reference_cache: str | None = setting(None, help="folder of reference log-probs; none = inside output_dir")
        resample: Resample = setting("none", help="sqrt evens out subsets by the square root of their size")
        preflight_workers: int | None = setting(None, help="processes that check pairs; none = one per core, 0 = none")
        preflight_cache: str | None = setting(None, help="folder of what the check found; none = beside output_dir")
        verify_images: VerifyImages = setting("header", help="full decodes every image before training")
        on_bad_row: Literal["stop", "skip"] = setting("stop", help="what to do when rows are unusable: stop or skip")
        resume: str = setting("auto", help="go on from: auto (the last whole checkpoint), never, a checkpoint folder")
        dtype: Literal["float32", "bfloat16", "float16"] = setting("float32", help="type of the weights")
        reference: Literal["cache", "adapter_off"] = setting(
            "cache", help="reference log-probs: cache (computed once), or adapter_off (each step, LoRA only)"
        )
        lora_rank: int = setting(0, help="rank of LoRA adapters; 0 trains the weights themselves")
        lora_alpha: int | None = setting(None, help="scale of LoRA; none = twice the rank")
        lora_dropout: float = setting(0.0, help="dropout of LoRA; above 0 policy and reference differ from the start")
        lora_on: Part = setting("language", help="which tower gets LoRA: language vision both")
        load_in_4bit: bool = setting(False, help="QLoRA: language model in 4 bits (bitsandbytes); needs lora_rank")
        save_adapter: bool = setting(False, help="also write the adapters alone, to adapter/ in output_dir")
        save_merged: bool = setting(True, help="write the whole model, adapters merged; false needs save_adapter")
        freeze_vision: bool = setting(False, help="do not train the vision tower")
        freeze_projector: bool = setting(False, help="do not train the projector")
        freeze_language: bool = setting(False, help="do not train the language model")
        freeze_language_layers: int = setting(0, help="do not train embeddings and so many first language layers")

        def __post_init__(self) -> None:
            take_launchers_deepspeed(self)
            if self.per_device_train_batch_size not in (1, TrainSettings.per_device_train_batch_size):
                refuse_without_effect(self, "per_device_train_batch_size")  # MPOArguments sets it to 1
            if self.deepspeed:
                need_package("deepspeed", "setting 'deepspeed'")
            super().__post_init__()
            if self.preflight_workers is not None and self.preflight_workers < 0:
                raise BadInputError(f"preflight_workers is {self.preflight_workers}, expected 0 or more, or none")
            if not 0 <= self.held_out_share < 1:
                raise BadInputError(f"held_out_share is {self.held_out_share}, expected 0 or more and below 1")
            if not self.held_out_share and (self.eval_strategy != "no" or self.eval_on_start):
                raise BadInputError(
                    "an evaluation is asked for (eval_steps, eval_strategy or eval_on_start), but held_out_share is 0: "
                    "give --held_out_share 0.01, or --eval_steps none --eval_strategy no --eval_on_start false"
                )
            check_trackers(self.report_to)
            check_lora_settings(self)

    settings = parse_settings(TrainSettings, take_local_rank(argv), program=PROGRAM, about=__doc__)
    for name in WITHOUT_EFFECT:
        if name != "per_device_train_batch_size" and getattr(settings, name) != getattr(TrainSettings, name):
            refuse_without_effect(settings, name)
    return settings


def refuse_without_effect(settings: Any, name: str) -> NoReturn:
    """Raise a `BadInputError` that says what to set instead."""
    raise BadInputError(f"{name} is {getattr(settings, name)}, which has no effect here: {WITHOUT_EFFECT[name]}")


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that transformers does not know or that are not installed; the Trainer would, but only later.

    Raises:
        BadInputError: naming the tracker.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise BadInputError(
                f"report_to names '{name}', which is no tracker; expected none, or of: "
                + ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            )
        try:
            INTEGRATION_TO_CALLBACK[name]()
        except (ImportError, RuntimeError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            way_out = "" if "pip install" in reason else f"; pip install {name}"
            raise BadInputError(f"report_to names '{name}': {reason}{way_out}, or leave it out") from error


def check_lora_settings(settings: Any) -> None:
    """Refuse combinations that cannot work.

    Raises:
        BadInputError: naming the setting to change.
    """
    if settings.lora_rank < 0 or not 0 <= settings.lora_dropout < 1 or settings.freeze_language_layers < 0:
        raise BadInputError("lora_rank and freeze_language_layers must be 0 or more, lora_dropout from 0 to below 1")
    if settings.lora_alpha is not None and settings.lora_alpha <= 0:
        raise BadInputError(f"lora_alpha is {settings.lora_alpha}, expected more than 0, or none for twice the rank")
    frozen = [name for name in EXACT if name.startswith("freeze_") and getattr(settings, name)]
    if settings.lora_rank and frozen:
        raise BadInputError(
            f"{frozen[0]} has no effect with lora_rank, since only adapters are trained; leave it out, and say with "
            "lora_on which tower gets them"
        )
    if not settings.lora_rank:
        for name in ("load_in_4bit", "save_adapter"):
            if getattr(settings, name):
                raise BadInputError(f"{name} needs adapters; set lora_rank above 0")
        if settings.reference == "adapter_off":
            raise BadInputError("reference adapter_off needs adapters; set lora_rank above 0, or use reference cache")
        if not settings.save_merged:
            raise BadInputError("save_merged is false and there are no adapters, so nothing would be saved")
    else:
        need_package("peft", "lora_rank")
        if settings.load_in_4bit:
            need_package("bitsandbytes", "load_in_4bit")
        if not settings.save_merged and not settings.save_adapter:
            raise BadInputError("save_merged and save_adapter are both false, so nothing would be saved")
    if settings.reference == "adapter_off" and settings.reference_sync_steps:
        raise BadInputError("reference adapter_off is the start model and cannot move; use reference cache")
    from internvl_mpo.distributed import zero_stage

    if zero_stage(settings) == 3 and (settings.load_in_4bit or settings.reference_sync_steps):
        name = "load_in_4bit" if settings.load_in_4bit else "reference_sync_steps"
        raise BadInputError(f"{name} does not work with ZeRO-3, which cuts every weight in pieces; use ZeRO-2 or 1")


def _check_paths_cheaply(argv: list[str]) -> None:
    """Refuse a config or DeepSpeed file that is not there before transformers is imported."""
    for position, word in enumerate(argv):
        path = word.partition("=")[2] or (argv[position + 1] if position + 1 < len(argv) else "")
        if word.split("=")[0] == "--config" and not Path(path).is_file():
            raise BadInputError(f"config file '{path}' does not exist")
        # none leaves out what a run file names
        is_file_name = path.lower() not in ("", "none", "null") and not path.lstrip().startswith("{")
        if word.split("=")[0] == "--deepspeed" and is_file_name and not Path(path).is_file():
            raise BadInputError(
                f"DeepSpeed file '{path}' does not exist; configs/deepspeed/ holds zero1, zero2, zero3 and offload"
            )


def choose_checkpoint(settings: Any) -> str | None:
    """Return the checkpoint to go on from, the same on all ranks; None starts at step 0.

    Raises:
        BadInputError: there is none where one was named, or it was made with other settings.
    """
    from internvl_mpo.checkpoint import check_fingerprint, find_checkpoint
    from internvl_mpo.distributed import agree

    found = find_checkpoint(settings.resume, settings.output_dir)
    checkpoint = agree(None if found is None else str(found), settings)
    if checkpoint is None:
        return None
    unknown = check_fingerprint(checkpoint, exact_settings(settings))
    if unknown and settings.process_index == 0:
        print(
            f"note: {checkpoint} was written by an earlier version and does not say its {', '.join(unknown)}; the "
            "optimizer and the schedule go on as they were saved, whatever is given now"
        )
    return checkpoint


def exact_settings(settings: Any) -> dict[str, Any]:
    """Return the settings that a checkpoint is compared by; adapters leave nothing to freeze."""
    names = [name for name in EXACT if not (settings.lora_rank and name.startswith("freeze_"))]
    return {name: plain(getattr(settings, name)) for name in names}


# --- pairs ------------------------------------------------------------------------------------------------------------


def read_pairs(settings: Any) -> tuple[list[PairRow], list[RowError]]:
    """Return the rows and those that could not be read."""
    from tqdm import tqdm

    rows, rejects = [], []
    with tqdm(desc="reading pairs", unit="pair", delay=1, disable=settings.process_index != 0) as bar:
        for path in settings.data:
            for row in iter_pairs(path, settings.image_root):
                (rejects if isinstance(row, RowError) else rows).append(row)
                bar.update()
    if not rows and not rejects:
        raise BadInputError(f"{', '.join(settings.data)} holds no preference pair")
    return rows, rejects


def check_pairs(
    settings: Any, processor: Any, rows: list[PairRow], rejects: list[RowError]
) -> tuple[list[PairRow], list["PairSize"]]:
    """Look at every row; return the usable ones and their sizes.

    The first rank does the work, the others wait for what it leaves on disk.

    Raises:
        BadInputError: rows are unusable and may not be skipped.
    """
    from internvl_mpo.distributed import agree
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


def hold_out(
    settings: Any, rows: list[PairRow], sizes: list["PairSize"]
) -> tuple[list[PairRow], list["PairSize"], list[PairRow], list["PairSize"]]:
    """Return training rows, their sizes, held-out rows, and theirs.

    A question is held out by a number that depends on it alone, so that all its pairs stay on one side and other data
    beside it change nothing. Where the share comes to no question, the one with the smallest number is held out: an
    evaluation that was asked for needs one.

    Raises:
        BadInputError: that would be the only one.
    """
    if not settings.held_out_share:
        return rows, sizes, [], []
    shares = [_share_of(row.pair.group_key) for row in rows]
    border = max(settings.held_out_share, math.nextafter(min(shares), 1))
    kept = [index for index, share in enumerate(shares) if share >= border]
    held_out = [index for index, share in enumerate(shares) if share < border]
    if not kept:
        raise BadInputError(
            f"held_out_share {settings.held_out_share} leaves no question to train on; lower it, or give more data"
        )
    return (*([values[index] for index in part] for part in (kept, held_out) for values in (rows, sizes)),)


def _share_of(key: str) -> float:
    """A number in [0, 1) that depends on the question only, so that its pairs stay on one side."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big") / 2**56


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


def show_memory(settings: Any, sizes: list["PairSize"]) -> None:
    """Print what a device is expected to need, and what to change where that is more than it has."""
    from transformers import AutoConfig

    from internvl_mpo.memory_estimate import Setup, advise, device_bytes, estimate_memory, setup_of_run, show_estimate

    run = {**vars(settings), "optim": str(getattr(settings.optim, "value", settings.optim))}
    plugin = settings.deepspeed_plugin
    run["deepspeed"] = plugin and plugin.hf_ds_config.config
    longest = max(size.num_tokens for size in sizes)
    tokens = min(settings.max_tokens_per_pack, settings.pairs_per_step * longest)
    densest = max(size.num_tiles / size.num_tokens for size in sizes)  # a pack of the pairs with most pictures
    setup = Setup(
        **{
            **setup_of_run(run),
            "num_gpus": settings.world_size,
            "max_tokens_per_pack": tokens,
            "num_tiles": int(densest * tokens),
            "attention": "fused" if settings.device.type == "cuda" else "segments",
        }
    )
    try:
        config = AutoConfig.from_pretrained(settings.model, trust_remote_code=True)
        print(show_estimate(estimate_memory(config, setup), setup, device_bytes()), flush=True)
        advice = device_bytes() and advise(config, setup, device_bytes(), longest_pair=longest)
    except BadInputError:
        raise
    except Exception as error:  # torch's fake tensors are young: a run must not depend on them
        print(f"no memory estimate: {' '.join(str(error).split())}")
        return
    if advice:
        print(f"warning, {advice}", flush=True)


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
        if (Path(source) / "adapter_config.json").is_file() and not config_path.is_file():
            raise BadInputError(
                f"model folder '{source}' holds LoRA adapters alone; give the merged model folder of that run "
                "(save_merged), or the model it started from"
            )
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
    """Return the start model, cut in pieces already where ZeRO-3 trains it.

    Raises:
        BadInputError: its weights cannot be loaded.
    """
    from internvl_mpo.distributed import start_ranks
    from internvl_mpo.logps import attach_scoring
    from internvl_mpo.policy import load_model

    start_ranks(settings)
    try:
        # Scoring is attached before any adapter, whether or not reference log-probs are still missing: a resumed run
        # must take the very same path through the model.
        return attach_scoring(load_model(settings.model, weights_dtype(settings), in_4bit=settings.load_in_4bit))
    except (OSError, ValueError) as error:
        if isinstance(error, BadInputError):
            raise
        raise _cannot_load(settings.model, error) from error


def weights_dtype(settings: Any) -> Any:
    """Return the type the weights compute in: DeepSpeed casts them, and keeps a float32 master copy of its share."""
    import torch

    from internvl_mpo.distributed import zero_stage

    in_engine = zero_stage(settings) is not None
    name = "bfloat16" if in_engine and settings.bf16 else "float16" if in_engine and settings.fp16 else settings.dtype
    return getattr(torch, name)


def _cannot_load(source: str, error: Exception) -> BadInputError:
    reason = " ".join(str(error).split())
    if not Path(source).is_dir():
        return BadInputError(f"'{source}' is no folder here, and the Hub does not give it: {reason}")
    return BadInputError(f"cannot load the start model '{source}': {reason}")


def choose_weights(settings: Any, model: Any) -> Any:
    """Freeze parts or add adapters, and print what is trained."""
    from transformers import set_seed

    from internvl_mpo.distributed import zero_stage
    from internvl_mpo.policy import add_adapters, freeze, trainable_table

    freeze(
        model,
        vision=settings.freeze_vision,
        projector=settings.freeze_projector,
        language=settings.freeze_language,
        num_language_layers=settings.freeze_language_layers,
    )
    if settings.lora_rank:
        set_seed(settings.seed)  # adapters start from random numbers
        model = add_adapters(
            model,
            rank=settings.lora_rank,
            alpha=settings.lora_alpha,
            dropout=settings.lora_dropout,
            on=settings.lora_on,
            base=settings.model,
        )
    table = trainable_table(model)
    if settings.process_index == 0:
        print(table)
        if settings.dtype != "float32" and not settings.lora_rank and zero_stage(settings) is None:
            print(
                f"note: {settings.dtype} weights are trained without a float32 copy, so small updates are rounded "
                "away; use DeepSpeed with bf16, or dtype float32 with bf16"
            )
    return model


def identify(settings: Any, model: Any, processor: Any) -> dict[str, Any]:
    """Return what reference log-probs depend on besides the pairs."""
    from internvl_mpo.distributed import agree, zero_stage
    from internvl_mpo.engines.transformers_engine import model_revision
    from internvl_mpo.reference_cache import model_digest

    source, dtype = settings.model, weights_dtype(settings)
    in_engine = zero_stage(settings) is not None
    digest = None
    if settings.process_index == 0:  # every byte of the weights is read, once
        digest = model_digest(source) if Path(source).is_dir() else f"{source}@{model_revision(source)}"
    return {
        "start model": agree(digest, settings),
        "chat template": content_id(processor.chat_template),
        "max_tiles": settings.max_tiles,
        "max_length": settings.max_length,
        "dtype": str(dtype).removeprefix("torch."),
        "autocast": None if in_engine else "bfloat16" if settings.bf16 else "float16" if settings.fp16 else None,
        "load_in_4bit": settings.load_in_4bit,
    }


# --- reference log-probs ----------------------------------------------------------------------------------------------


def reference_logps(
    settings: Any, identity: dict, model: Any, processor: Any, rows: Sequence[PairRow], sizes: Sequence["PairSize"]
) -> "ReferenceCache | None":
    """Return the log-probs of the start model, computing those that no earlier run left on disk; None for adapter_off.

    Every rank computes a share and writes its own shards; a killed run goes on where it stopped.
    """
    if settings.reference == "adapter_off":
        return None
    import torch

    from internvl_mpo.reference_cache import ReferenceCache
    from internvl_mpo.reference_pass import fill_cache

    cache = ReferenceCache(
        settings.reference_cache or Path(settings.output_dir) / "reference",
        identity,
        {row.pair.id: row.digest for row in rows},
    )
    missing = set(cache.missing())
    if settings.world_size > 1:  # nobody writes before all have read, so that all agree on what is missing
        torch.distributed.barrier()
    if missing:
        fill_cache(cache, missing, model, processor, rows, sizes, settings)
    return cache


# --- train ------------------------------------------------------------------------------------------------------------


def build_trainer(
    settings: Any,
    identity: dict,
    model: Any,
    processor: Any,
    rows: list[PairRow],
    counts: list[int],
    sizes: list["PairSize"],
    held_out: list[PairRow],
    held_out_sizes: list["PairSize"],
    reference: "ReferenceCache | None",
) -> "MPOTrainer":
    """Return the trainer; this is the first thing that touches the run folder."""
    from internvl_mpo.trainer import ConsoleCallback, MPOTrainer

    data = hashlib.sha256()
    for row, count in zip(rows, counts, strict=True):
        data.update(f"{row.digest} {count}\n".encode())
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
        fingerprint={"data": data.hexdigest()[:16], **identity, **exact_settings(settings)},
        callbacks=[ConsoleCallback(settings.output_dir)],
    )


def train(settings: Any, trainer: "MPOTrainer", checkpoint: str | None) -> None:
    """Train to the end, from a checkpoint if there is one."""
    import torch

    from internvl_mpo.checkpoint import remove_half_written

    if checkpoint is not None:
        trainer.check_resumable(checkpoint)
    if settings.world_size > 1:
        torch.distributed.barrier()  # all ranks have looked before anything is removed
    if settings.process_index == 0:
        write_settings(settings, Path(settings.output_dir) / "settings.yaml", leave_out=FOUND)
        for name in remove_half_written(settings.output_dir):
            print(f"{name} is half-written and was removed")
        print(f"going on from {checkpoint}" if checkpoint else "starting at step 0")
    if settings.device.type == "cpu":
        # several threads add gradients of one token in any order otherwise, and no two runs are equal to the last bit
        torch.use_deterministic_algorithms(True, warn_only=True)
    trainer.train(resume_from_checkpoint=checkpoint)
    evaluations = [row for row in trainer.state.log_history if "eval_rewards/accuracy" in row]
    if evaluations and settings.process_index == 0:
        print(f"held-out pairs: reward accuracy {evaluations[-1]['eval_rewards/accuracy']:.3f}")


def save(settings: Any, trainer: "MPOTrainer", processor: Any) -> None:
    """Write the folders under a temporary name and rename them, so that each is there whole or not at all."""
    from internvl_mpo.policy import check_saved_weights, plain_base, whole_weights, write_adapter
    from internvl_mpo.publish import write_model_folder

    model = trainer.accelerator.unwrap_model(trainer.model)
    is_main = settings.process_index == 0
    if settings.save_adapter:
        with whole_folder(Path(settings.output_dir) / "adapter", is_main) as folder:
            write_adapter(model, processor, folder, keep=is_main)
            if is_main:
                check_saved_weights(folder, {})
                write_settings(settings, folder / "training_settings.yaml", leave_out=FOUND)
    if settings.save_merged:
        weights = whole_weights(model, keep=is_main)
        with whole_folder(Path(settings.model_dir or Path(settings.output_dir) / "model"), is_main) as folder:
            if is_main:
                write_model_folder(plain_base(model), processor, folder, weights=weights)
                check_saved_weights(folder, weights)
                write_settings(settings, folder / "training_settings.yaml", leave_out=FOUND)


@contextlib.contextmanager
def whole_folder(target: Path, is_main: bool) -> Iterator[Path]:
    """Give a temporary folder that takes the place of `target` when the block succeeds; only rank 0 touches disk."""
    temporary = target.with_name(f".{target.name}.part")
    if is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    yield temporary
    if is_main:
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        print(f"the trained {target.name} is in {target}")


if __name__ == "__main__":
    sys.exit(run_program(main))
