"""Settings of `train_mpo.py`: read, checked against each other, refused where they would have no effect."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from internvl_mpo.errors import BadInputError, need_package
from internvl_mpo.mmpr.pairs import Resample
from internvl_mpo.objective import needs_reference
from internvl_mpo.programs import run_file
from internvl_mpo.settings import parse_settings, plain, setting
from internvl_mpo.training.arguments import MPOArguments
from internvl_mpo.training.distributed import take_launchers_deepspeed, take_local_rank, zero_stage
from internvl_mpo.training.fsdp import check_fsdp, prepare_fsdp
from internvl_mpo.training.policy import Part
from internvl_mpo.training.preflight import VerifyImages

# Settings that decide what a step computes: a run cannot go on exactly with another value. Those of optimizer and
# schedule are among them because a checkpoint brings their states, and with them the old values.
EXACT = (
    *("pairs_per_step", "pairs_per_group", "seed", "data_seed", "beta", "preference", "quality", "generation"),
    *("preference_weight", "quality_weight", "generation_weight", "label_smoothing", "simpo_gamma", "dpop_lambda"),
    *("ld_alpha", "after_difference_weight", "difference_tokens", "wpo", "reward_shift"),
    *("reward_shift_momentum", "reference", "reference_sync_steps", "reference_mixup_alpha", "lora_rank", "lora_alpha"),
    *("lora_dropout", "lora_on", "freeze_vision", "freeze_projector", "freeze_language", "freeze_language_layers"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon"),
)
# Those that a checkpoint of version 0.2 does not know; it was made with what are their defaults.
ADDED = ("simpo_gamma", "dpop_lambda", "ld_alpha", "after_difference_weight", "difference_tokens", "wpo")

# Settings of TrainingArguments that packs leave without effect, and what to set instead. (dataloader_pin_memory is not
# among them: packs are never pinned, but transformers itself sets it to false on a CPU.)
WITHOUT_EFFECT = {
    "gradient_accumulation_steps": "pairs_per_step and max_tokens_per_pack decide how many packs a step has",
    "per_device_train_batch_size": "pairs_per_step counts over all ranks, max_tokens_per_pack limits a forward pass",
    "per_device_eval_batch_size": "max_tokens_per_pack limits a forward pass",
    "dataloader_drop_last": "every step holds exactly pairs_per_step pairs",
    "dataloader_prefetch_factor": "packs are loaded by dataloader_num_workers processes, two ahead each",
}


@dataclass(kw_only=True)
class TrainSettings(MPOArguments):
    """Settings of `train_mpo.py`."""

    model: str = setting(help="start model: folder or Hub id; it is also the reference, without reference_model")
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
    reference_pass: Literal["ahead", "before", "only"] = setting(
        "ahead",
        help="reference log-probs: ahead of the steps (with reference_model: before), before all of them, or only "
        "these and no training",
    )
    reference_shard: str | None = setting(None, help="with reference_pass only: i/n, share i (from 0) of n jobs")
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
    fsdp: bool = setting(False, help="FSDP2: cut weights and optimizer over the ranks, instead of DeepSpeed")

    def __post_init__(self) -> None:
        """Refuse values that cannot work, alone or together.

        Raises:
            BadInputError: naming the setting and what to give instead.
        """
        take_launchers_deepspeed(self)
        if isinstance(self.deepspeed, str):
            self.deepspeed = str(run_file(self.deepspeed))
        if self.per_device_train_batch_size not in (1, TrainSettings.per_device_train_batch_size):
            refuse_without_effect(self, "per_device_train_batch_size")  # MPOArguments sets it to 1
        if self.deepspeed:
            need_package("deepspeed", "setting 'deepspeed'")
        if self.fsdp:
            prepare_fsdp(self)
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
        check_reference_pass(self)
        check_fsdp(self)
        check_trackers(self.report_to)
        check_lora_settings(self)

    @property
    def reference_share(self) -> tuple[int, int]:
        """i and n of `reference_shard`."""
        number, _, count = (self.reference_shard or "0/1").partition("/")
        return int(number), int(count)

    def exact(self) -> dict[str, Any]:
        """Return the settings that a checkpoint is compared by; adapters leave nothing to freeze."""
        names = [name for name in EXACT if not (self.lora_rank and name.startswith("freeze_"))]
        return {name: plain(getattr(self, name)) for name in names}

    @classmethod
    def before_added(cls) -> dict[str, Any]:
        """Return what a checkpoint was made with whose version did not know the settings of `ADDED`."""
        return {name: plain(getattr(cls, name)) for name in ADDED}


def parse_train_settings(argv: Sequence[str], *, program: str, about: str | None) -> TrainSettings:
    """Return the settings of a command line, see `parse_settings`.

    Raises:
        BadInputError: also for a setting of transformers that has no effect here.
    """
    settings = parse_settings(TrainSettings, take_local_rank(argv), program=program, about=about)
    for name in WITHOUT_EFFECT:  # not in __post_init__: the program itself sets gradient_accumulation_steps later
        if name != "per_device_train_batch_size" and getattr(settings, name) != getattr(TrainSettings, name):
            refuse_without_effect(settings, name)
    return settings


def refuse_without_effect(settings: Any, name: str) -> NoReturn:
    """Raise a `BadInputError` that says what to set instead."""
    raise BadInputError(f"{name} is {getattr(settings, name)}, which has no effect here: {WITHOUT_EFFECT[name]}")


def check_reference_pass(settings: TrainSettings) -> None:
    """Refuse a reference pass that has nothing to do, and a share that is none.

    Raises:
        BadInputError: naming the setting and what to give instead.
    """
    shard, is_only = settings.reference_shard, settings.reference_pass == "only"
    if shard is not None and not is_only:
        raise BadInputError(f"reference_shard {shard} is a share of a job of its own; add --reference_pass only")
    found = re.fullmatch(r"(\d+)/(\d+)", shard or "0/1")
    if not found or int(found[1]) >= int(found[2]):
        raise BadInputError(f"reference_shard is '{shard}', expected i/n with i from 0 to n - 1, as 0/8")
    if settings.reference_model and (settings.reference == "adapter_off" or settings.reference_sync_steps):
        other = "reference adapter_off" if settings.reference == "adapter_off" else "reference_sync_steps"
        raise BadInputError(f"reference_model stands still and {other} is another reference; leave one of them out")
    if is_only and settings.reference == "adapter_off":
        raise BadInputError("reference adapter_off stores nothing, so reference_pass only would have nothing to do")
    if is_only and not needs_reference(settings.preference, settings.quality):
        raise BadInputError(
            f"reference_pass is only, but preference '{settings.preference}' with quality '{settings.quality}' needs "
            "no reference"
        )


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
            callback = INTEGRATION_TO_CALLBACK[name]
            # without its __del__, which MLflow's fails in if it never began, with a traceback of its own
            type(callback.__name__, (callback,), {"__del__": lambda self: None})()
        except (ImportError, RuntimeError) as error:
            reason = " ".join(str(error).split()).rstrip(".")
            way_out = "" if "pip install" in reason else f"; pip install {name}"
            raise BadInputError(f"report_to names '{name}': {reason}{way_out}, or leave it out") from error


def check_lora_settings(settings: TrainSettings) -> None:
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
    if zero_stage(settings) == 3 and (settings.load_in_4bit or settings.reference_sync_steps):
        name = "load_in_4bit" if settings.load_in_4bit else "reference_sync_steps"
        raise BadInputError(f"{name} does not work with ZeRO-3, which cuts every weight in pieces; use ZeRO-2 or 1")
