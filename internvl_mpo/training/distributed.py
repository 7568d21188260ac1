"""DeepSpeed and ranks beside transformers' Trainer: what must happen earlier or otherwise than it does it.

The Trainer builds the training engine and accelerate its optimizer: torch's AdamW, or DeepSpeed's for the CPU where
the optimizer is offloaded. Here: ranks that are known before the weights are read, an engine for the reference pass
when ZeRO-3 has partitioned the weights. What FSDP2 needs is in fsdp.py.
"""

import contextlib
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from internvl_mpo.errors import BadInputError
from internvl_mpo.training.fsdp import uses_fsdp
from internvl_mpo.training.policy import is_partitioned


def take_local_rank(argv: Sequence[str]) -> list[str]:
    """Return the arguments without `--local_rank=N`, which the `deepspeed` launcher adds; N goes to LOCAL_RANK."""
    rest = []
    words = iter(argv)
    for word in words:
        key, equals, value = word.partition("=")
        if key in ("--local_rank", "--local-rank"):
            os.environ.setdefault("LOCAL_RANK", value if equals else next(words, "0"))
        else:
            rest.append(word)
    return rest


def take_launchers_deepspeed(args: Any) -> None:
    """Make the DeepSpeed file of `accelerate launch` the setting `deepspeed`, before TrainingArguments look at it.

    transformers would let the setting win without a word; and a file that only the launcher knows would take another
    path through transformers, on which ZeRO-3 has no engine for the reference pass.

    Args:
        args: TrainingArguments; `deepspeed` is set.

    Raises:
        BadInputError: the setting names another file, or the launcher none.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if file != "none":
        same = isinstance(args.deepspeed, str) and Path(args.deepspeed).resolve() == Path(file).resolve()
        if args.deepspeed and not same:
            raise BadInputError(
                f"accelerate launch brings the DeepSpeed file {file}, and setting 'deepspeed' is {args.deepspeed}; "
                "give --deepspeed none to take the launcher's, or launch without DeepSpeed"
            )
        args.deepspeed = file
    elif "ACCELERATE_DEEPSPEED_ZERO_STAGE" in os.environ:
        raise BadInputError(
            "accelerate launch asks for DeepSpeed without a file; give it a deepspeed_config_file, as those in "
            "configs/accelerate do"
        )


def zero_stage(args: Any) -> int | None:
    """Return the ZeRO stage of TrainingArguments, from `deepspeed` or from `accelerate launch`; None without it."""
    plugin = getattr(args, "deepspeed_plugin", None)
    return None if plugin is None else int(plugin.hf_ds_config.config.get("zero_optimization", {}).get("stage", 0))


def engine_name(args: Any) -> str:
    """Return what trains: "ZeRO-2", "FSDP2", or "no DeepSpeed"."""
    if uses_fsdp(args):
        return "FSDP2"
    stage = zero_stage(args)
    return "no DeepSpeed" if stage is None else f"ZeRO-{stage}"


def release_stale_locks() -> list[Path]:
    """Delete locks of DeepSpeed's compiled operators that nobody holds, and return them.

    A process that is killed while it compiles or loads an operator leaves its lock behind, and every later run would
    wait for it forever. Whoever holds a lock has it open, so `/proc` tells. On several machines the holder may be
    elsewhere: there only locks older than ten minutes go.
    """
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    several = os.environ.get("WORLD_SIZE", "1") != os.environ.get("LOCAL_WORLD_SIZE", "1")
    locks = [lock for lock in root.glob("**/lock") if not several or time.time() - lock.stat().st_mtime > 600]
    if not locks or not Path("/proc/self/fd").is_dir():
        return []
    opened = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # a process of somebody else, or one that has just ended
            opened.add(os.readlink(link))
    stale = [lock for lock in locks if str(lock.resolve()) not in opened]
    for lock in stale:
        lock.unlink(missing_ok=True)
    return stale


def start_ranks(args: Any) -> None:
    """Join the process group of DeepSpeed before the weights are read.

    `zero.Init` of ZeRO-3 asks for the world size while the model is being built; it takes 1 where nobody has joined.
    """
    if zero_stage(args) is None:
        return
    import deepspeed

    for lock in release_stale_locks():
        print(f"{lock} was left by a killed process and was removed", flush=True)

    # DeepSpeed calls collectives by names that torch renames, once a call.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
    if args.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed.init_distributed(dist_backend="gloo" if args.device.type == "cpu" else None)


@contextlib.contextmanager
def inference_engine(model: nn.Module, args: Any) -> Iterator[nn.Module]:
    """Give a model that can be called before training: itself, or an engine without optimizer under ZeRO-3."""
    if not is_partitioned(model):
        yield model
        return
    import copy

    import deepspeed

    config = copy.deepcopy(args.deepspeed_plugin.hf_ds_config)
    config.trainer_config_finalize(args, model, 1)
    for key in ("optimizer", "scheduler"):
        config.del_config_sub_tree(key)
    engine, *_ = deepspeed.initialize(model=model, config=config.config)
    try:
        yield engine
    finally:
        engine.destroy()  # takes its hooks off the modules; the training engine brings its own


def agree(value: Any, args: Any) -> Any:
    """Return rank 0's value on all ranks; JSON-able values of this run only."""
    if args.world_size == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]


def from_all_ranks(value: Any, args: Any) -> list[Any]:
    """Return the values of all ranks, in their order; a barrier as well. JSON-able values of this run only."""
    if args.world_size == 1:
        return [value]
    values = [None] * args.world_size
    torch.distributed.all_gather_object(values, value)
    return values
