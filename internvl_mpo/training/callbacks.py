"""Trainer callbacks: moving reference, recomputation, last evaluation, console lines."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from internvl_mpo.training.arguments import MPOArguments
from internvl_mpo.training.live_reference import MovingReference
from internvl_mpo.training.run_log import RunLog
from internvl_mpo.training.speed import no_input_gradients
from internvl_mpo.training.watch import Watch, expected_first_loss, expected_first_terms, rounding_noise


class MoveReference(TrainerCallback):
    """Moves the reference of TR-DPO every `reference_sync_steps`, before a checkpoint of the same step is written."""

    def __init__(self, reference: MovingReference):
        """Keep the reference."""
        self.reference = reference

    def on_train_begin(self, args: MPOArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the first copy; weights are where they are trained by now."""
        self.reference.start()

    def on_step_end(self, args: MPOArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Move if it is time."""
        if state.global_step % args.reference_sync_steps == 0:
            self.reference.move()


class NoInputGradients(TrainerCallback):
    """Takes back what transformers does to embeddings when it starts to recompute activations, see `speed`."""

    def on_train_begin(self, args: MPOArguments, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Do it, unless the reentrant form is asked for, which cannot do without."""
        if not (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            no_input_gradients(model)


class EvaluateAtTheEnd(TrainerCallback):
    """Evaluates after the last step, while trackers still listen."""

    def on_step_end(self, args: MPOArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for it."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = True


class ConsoleCallback(TrainerCallback):
    """A progress bar with rate and time left, the first loss explained, and a JSON line per log entry."""

    def __init__(self, output_dir: str | Path):
        """Write to `log.jsonl` in `output_dir`; `samples.jsonl` beside it is cut back with it."""
        self.run_log = RunLog(Path(output_dir) / "log.jsonl")
        self.samples = RunLog(Path(output_dir) / "samples.jsonl")
        self.watch = Watch()
        self.bar: Any = None

    def on_train_begin(self, args: MPOArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar; lines of steps that a resumed run repeats are dropped."""
        if not state.is_world_process_zero:
            return
        from tqdm import tqdm

        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")
        self.samples.keep_until(state.global_step)
        self.watch = Watch(noise=rounding_noise(args))
        for row in self.run_log.keep_until(state.global_step):
            self.watch.look(row["step"], row)  # what was seen before counts on, and what was said is not said again

    def on_log(self, args: MPOArguments, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        """Write the line; explain the first one."""
        if not state.is_world_process_zero or not logs:
            return
        warnings = self.watch.look(state.global_step, logs)
        lines = [logs, *({"warning": text} for text in warnings)]
        self.run_log.append({"step": state.global_step, **line} for line in lines)
        write = print if self.bar is None else self.bar.write
        for text in warnings:
            write(f"warning, {text}")
        if "loss" not in logs or self.bar is None:
            return
        self.bar.set_postfix(
            {"loss": f"{logs['loss']:.3f}", "accuracy": f"{logs['rewards/accuracy']:.2f}",
             "margin": f"{logs['rewards/margin']:+.2f}"}
        )  # fmt: skip
        if state.global_step == 1:
            self.bar.write(first_loss_line(args, logs))

    def on_step_end(self, args: MPOArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the bar."""
        if self.bar is not None:
            self.bar.update(1)

    def on_train_end(self, args: MPOArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Close the bar, so that an error stands on a line of its own."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def first_loss_line(args: MPOArguments, logs: Mapping[str, float]) -> str:
    """Return text that says whether the first loss and its terms are normal: policy and reference are one model yet."""
    line = f"step 1: loss {logs['loss']:.4f}"
    if args.reference_model:
        return f"{line}; policy and reference_model are two, so it has no fixed value"
    expected, words = expected_first_loss(args, logs["loss_generation"])
    terms = {name: value for name, (value, _) in expected_first_terms(args).items()}
    if terms:
        terms |= dict.fromkeys(("rewards/chosen", "rewards/rejected", "reward_shift"), 0.0)
    shown = "".join(f"\n  {name} {logs[name]:.4f}, expected {value:.4f}" for name, value in terms.items())
    if expected is None:
        return f"{line}; {words}{shown}"
    line += f", expected {expected:.4f} = {words} (policy = reference)"
    if abs(logs["loss"] - expected) > 0.02 * max(1.0, expected):
        line += (
            f"; they differ by {logs['loss'] - expected:+.4f}, so policy and reference are not the same model here: "
            "check dropout, adapters, and the precision of the reference log-probs"
        )
    return line + shown
