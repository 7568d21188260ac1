"""FSDP2: what transformers leaves open is chosen before and after it sets up the ranks, what cannot work is refused."""

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from internvl_mpo.errors import BadInputError
from internvl_mpo.programs import run_file


def uses_fsdp(args: Any) -> bool:
    """Say whether TrainingArguments ask for FSDP."""
    return bool(args.fsdp)


def read_fsdp_config(config: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """Return `fsdp_config`, given itself or as a JSON file, with the short names of its keys.

    Raises:
        BadInputError: the file cannot be read.
    """
    if isinstance(config, str):
        try:
            config = json.loads(run_file(config).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise BadInputError(f"cannot read fsdp_config '{config}': {error}; give a JSON file") from error
    return {name.removeprefix("fsdp_"): value for name, value in (config or {}).items()}


def prepare_fsdp(args: Any) -> None:
    """Choose what transformers leaves open, before it sets up the ranks.

    Args:
        args: TrainingArguments, `fsdp` among them; `fsdp_config` and `ddp_backend` are set.

    Raises:
        BadInputError: the file `fsdp_config` cannot be read.
    """
    args.fsdp_config = read_fsdp_config(args.fsdp_config)
    # shards that any number of ranks reads
    args.fsdp_config.setdefault("state_dict_type", "SHARDED_STATE_DICT")
    if args.fsdp_config.get("cpu_offload") and torch.cuda.is_available() and not args.use_cpu:
        args.ddp_backend = args.ddp_backend or "cuda:nccl,cpu:gloo"  # NCCL alone adds up no gradients of the host


def check_fsdp(settings: Any) -> None:
    """Refuse what does not go with FSDP2, and choose its precision, after transformers has set up the ranks.

    Args:
        settings: of `train_mpo.py`; `fsdp_plugin_args` and `accelerator_config` are set.

    Raises:
        BadInputError: naming the setting and what to give instead.
    """
    if not uses_fsdp(settings):
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise BadInputError("accelerate launch asks for FSDP; give --fsdp true as well, or launch without it")
        return
    if settings.deepspeed:
        raise BadInputError("fsdp and deepspeed both cut the weights in pieces; leave one of them out")
    if settings.fsdp_plugin_args["fsdp_version"] != 2:
        raise BadInputError("fsdp_config asks for version 1, which torch has given up; leave version out, or give 2")
    if settings.reference_pass != "ahead":
        raise BadInputError(
            f"reference_pass {settings.reference_pass} runs the start model whole on each device; with fsdp use ahead"
        )
    for name in ("load_in_4bit", "reference_sync_steps", "reference_model"):
        if getattr(settings, name):
            raise BadInputError(f"{name} does not work with fsdp, which cuts every weight in pieces; use DDP or ZeRO-2")
    if settings.world_size == 1:
        raise BadInputError("fsdp shares weights out over ranks; start several with torchrun, or leave it out")
    if settings.bf16 or settings.fp16:
        # Left to itself accelerate rounds what each module returns, log-probs among it, and sums of gradients.
        narrow = torch.bfloat16 if settings.bf16 else torch.float16
        policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32)
        settings.fsdp_plugin_args["mixed_precision_policy"] = policy
    given = settings.accelerator_config.gradient_accumulation_kwargs or {}
    # else every rank keeps whole gradients from the first pack of a step to the last
    settings.accelerator_config.gradient_accumulation_kwargs = {"sync_each_batch": True, **given}


def layer_names(model: nn.Module) -> list[str]:
    """Return the classes of a model's layers, each of which FSDP2 gathers alone.

    A class of ours names the layers of all language models it may hold; accelerate refuses one that is not there.
    """
    return sorted(set(model._no_split_modules) & {type(module).__name__ for module in model.modules()})


def allow_fsdp_on_cpu(accelerator: Any, args: Any) -> None:
    """Let accelerate shard weights on CPUs too: torch's FSDP2 runs there, accelerate's list of devices leaves them out.

    Without this a run on CPUs that asks for FSDP would be trained by DDP without a word.

    Args:
        accelerator: as the Trainer has made it.
        args: TrainingArguments.
    """
    from accelerate import DistributedType
    from accelerate.utils import FullyShardedDataParallelPlugin

    if not uses_fsdp(args) or accelerator.distributed_type != DistributedType.MULTI_CPU:
        return
    plugin = FullyShardedDataParallelPlugin(**args.fsdp_plugin_args)
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # pages are pinned for a GPU
    accelerator.state._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
