"""What follows each step: a checkpoint when it is time for one, and the end of the run when a signal has come.

On several ranks they agree after each step, so a signal that reaches one of them stops all at the same step. A rank
whose launcher is gone stops, too.
"""

import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from internvl_mpo.training.arguments import MPOArguments
from internvl_mpo.training.checkpoint import is_whole
from internvl_mpo.training.signals import StopSignals


class StopOrSave(TrainerCallback):
    """Saves when `save_minutes` have passed, saves and stops when a signal has come; the same step on all ranks."""

    def __init__(self, signals: StopSignals):
        """Keep the signals."""
        self.signals = signals
        self.stopped_at: int | None = None
        self._last_save = time.monotonic()

    def on_train_begin(self, args: MPOArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """From now on a signal waits for the end of its step."""
        self._last_save = time.monotonic()
        self.signals.deferred = True

    def on_step_end(self, args: MPOArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Agree with the other ranks."""
        minutes = (time.monotonic() - self._last_save) / 60
        is_time = bool(args.save_minutes) and minutes >= args.save_minutes
        stop, save = self._any_rank(args, self.signals.wants_to_stop(), is_time)
        control.should_save |= stop or save
        if stop:
            self._stop(args, state, control)

    def on_save(self, args: MPOArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Do not begin another step if the signal came while a checkpoint was written."""
        self._last_save = time.monotonic()
        if self.is_wanted(args):
            self._stop(args, state, control)

    def on_train_end(self, args: MPOArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Signals stop at once again."""
        self.signals.deferred = False

    def message(self, output_dir: str) -> str:
        """Return what is said at the end of a run that was stopped."""
        signal = self.signals.received or "a signal to another rank"
        if not self.stopped_at:
            return f"stopped by {signal} before step 1; finished work is kept, the same command goes on from it"
        folder = f"{output_dir}/checkpoint-{self.stopped_at}"
        return f"stopped by {signal} after step {self.stopped_at}; {folder} is whole, the same command goes on from it"

    def is_wanted(self, args: MPOArguments) -> bool:
        """Say whether to stop, the same on all ranks; a collective."""
        return self._any_rank(args, self.signals.wants_to_stop())[0]

    def stop_between_steps(self, args: MPOArguments, state: Any, control: Any) -> None:
        """Stop before a step, with a checkpoint of the one before it unless there is one."""
        self._stop(args, state, control)
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        control.should_save = state.global_step > 0 and not is_whole(folder)

    def _stop(self, args: MPOArguments, state: Any, control: Any) -> None:
        control.should_training_stop = True
        args.load_best_model_at_end = False  # a run that is not over has no best checkpoint yet
        self.stopped_at = state.global_step

    @staticmethod
    def _any_rank(args: MPOArguments, *flags: bool) -> tuple[bool, ...]:
        """Say of each flag whether it is set on any rank; a collective."""
        if args.world_size == 1:
            return flags
        box = torch.tensor(flags, dtype=torch.int32, device=args.device)
        torch.distributed.all_reduce(box, op=torch.distributed.ReduceOp.MAX)
        return tuple(bool(flag) for flag in box.tolist())
