"""ZeRO checkpoints for another number of ranks.

DeepSpeed writes a file for each rank's piece of the optimizer. Its universal format holds every weight and moment
whole, so that any number of ranks can take their pieces from it; it is made when a run goes on with another number, and
removed as soon as the ranks have read it.

    checkpoint-200/global_step200/              what DeepSpeed wrote
    checkpoint-200/global_step200_universal/    the same, whole, for the length of one start
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from internvl_mpo.errors import BadInputError
from internvl_mpo.training.checkpoint import read_state
from internvl_mpo.training.distributed import agree, zero_stage

LATEST = "latest_universal"  # names the folder, written last


def is_of_other_ranks(checkpoint: str | Path | None, args: Any) -> bool:
    """Say whether ZeRO has cut the optimizer of a checkpoint for another number of ranks than there are now."""
    return checkpoint is not None and bool(zero_stage(args)) and read_state(checkpoint)["num_ranks"] != args.world_size


def load_universal(engine: Any, checkpoint: str | Path, args: Any, *, strict: bool) -> None:
    """Load weights and optimizer of a checkpoint that another number of ranks has written; a collective.

    Args:
        engine: DeepSpeed's, as it was built.
        checkpoint: a whole checkpoint.
        args: TrainingArguments.
        strict: whether the checkpoint must hold every weight, as that of adapters does not.

    Raises:
        BadInputError: it cannot be converted.
    """
    from transformers.integrations.deepspeed import deepspeed_load_checkpoint

    folder = Path(checkpoint)
    optimizer = engine.optimizer.optimizer
    groups = [{name: value for name, value in group.items() if name not in ("params", "lr")}
              for group in optimizer.param_groups]  # fmt: skip
    try:
        failure = agree(_convert(folder, args.world_size) if args.process_index == 0 else None, args)
        if failure:
            raise BadInputError(failure)
        engine._config.load_universal_checkpoint = True  # it has read its settings; there is no other way to tell it
        deepspeed_load_checkpoint(engine, str(folder), load_module_strict=strict)
        engine._config.load_universal_checkpoint = False
        agree(None, args)  # all ranks have read it
    finally:
        if args.process_index == 0:
            _remove(folder)
    # Under ZeRO-3 DeepSpeed 0.19 gives all groups the settings of the first one, weight decay among them, and one
    # tensor as their count of steps, which then rises once a step for each of them.
    for group, own in zip(optimizer.param_groups, groups, strict=True):
        group.update(own)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()


def _convert(folder: Path, num_ranks: int) -> str | None:
    """Write the universal form; return what went wrong, or None. A process of its own gives the memory back."""
    _remove(folder)
    step = (folder / "latest").read_text(encoding="utf-8").strip()
    print(f"{folder} was written by another number of ranks; converting it for {num_ranks}", flush=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(folder / step), "--output_folder", str(folder / f"{step}_universal")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if not result.returncode and (folder / LATEST).is_file():
        return None
    said = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
    return (
        f"{folder} could not be converted for {num_ranks} ranks, {said}; go on with "
        f"{read_state(folder)['num_ranks']} ranks"
    )


def _remove(folder: Path) -> None:
    (folder / LATEST).unlink(missing_ok=True)
    for made in folder.glob("global_step*_universal"):
        shutil.rmtree(made)
