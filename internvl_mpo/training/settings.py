"""Settings of `train_mpo.py`: read, checked against each other, refused where they would have no effect."""

from collections.abc import Sequence
from typing import Any, NoReturn

from internvl_mpo.errors import BadInputError, need_package
from internvl_mpo.settings import plain

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
    from internvl_mpo.training.distributed import zero_stage

    if zero_stage(settings) == 3 and (settings.load_in_4bit or settings.reference_sync_steps):
        name = "load_in_4bit" if settings.load_in_4bit else "reference_sync_steps"
        raise BadInputError(f"{name} does not work with ZeRO-3, which cuts every weight in pieces; use ZeRO-2 or 1")


def exact_settings(settings: Any) -> dict[str, Any]:
    """Return the settings that a checkpoint is compared by; adapters leave nothing to freeze."""
    names = [name for name in EXACT if not (settings.lora_rank and name.startswith("freeze_"))]
    return {name: plain(getattr(settings, name)) for name in names}
