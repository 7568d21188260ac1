"""MPO on transformers' Trainer: packs in, the objective on top, global means out.

The Trainer brings DeepSpeed, DDP, mixed precision, trackers and the Hub. What this file adds: steps that hold a fixed
number of pairs however they are split, reference log-probs from a cache, the reward shift, checkpoints that are either
whole or passed over, and numbers a user needs.
"""

import functools
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from internvl_mpo.errors import BadInputError
from internvl_mpo.files import naming_full_disk
from internvl_mpo.logps import score_pairs
from internvl_mpo.objective import RewardShift, mpo_loss, needs_reference, wpo_weights
from internvl_mpo.packing import Pack, pack_groups
from internvl_mpo.training import checkpoint
from internvl_mpo.training.arguments import MPOArguments
from internvl_mpo.training.callbacks import EvaluateAtTheEnd, MoveReference, NoInputGradients
from internvl_mpo.training.data import GroupDataset
from internvl_mpo.training.distributed import engine_name
from internvl_mpo.training.feeding import FedTrainer
from internvl_mpo.training.fsdp import allow_fsdp_on_cpu, layer_names, uses_fsdp
from internvl_mpo.training.held_out import HeldOut, sample_means, send_samples
from internvl_mpo.training.live_reference import AdapterOff, MovingReference
from internvl_mpo.training.meters import MeanMeter, pair_numbers
from internvl_mpo.training.not_finite import PackRecord, stop_step
from internvl_mpo.training.pairs import TrainingPairs
from internvl_mpo.training.reference_pass import ReferencePass
from internvl_mpo.training.reshard import is_of_other_ranks, load_universal
from internvl_mpo.training.run_log import RunLog
from internvl_mpo.training.speed import apply_speed_settings, return_freed_memory
from internvl_mpo.training.stopping import StopOrSave
from internvl_mpo.training.throughput import FlopModel, device_peak, memory_in_use, speed


class MPOTrainer(FedTrainer):
    """Trains a policy on preference pairs with the objective of `internvl_mpo.objective`.

    The loss is a mean over the pairs of the whole optimizer step: ranks, packs and accumulation change only memory.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: MPOArguments,
        *,
        processor: Any,
        pairs: TrainingPairs,
        reference: ReferencePass | None,
        stopping: StopOrSave,
        held_out: TrainingPairs | None = None,
        fingerprint: Mapping[str, str] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        """Set up the run; nothing is read or written yet.

        Args:
            model: the policy, `InternVLChatModel` or a PEFT model around it.
            args: settings.
            processor: encodes pairs and is saved with the model.
            pairs: what it trains on.
            reference: log-probs of the start model; None computes them with the adapters switched off.
            stopping: asked whether to stop.
            held_out: pairs for `evaluate`; None or empty evaluates nothing.
            fingerprint: what the run depends on (data, start model, ...), compared when a checkpoint is resumed.
            callbacks: more callbacks.
        """
        self.pairs, self.reference, self.stopping = pairs, reference, stopping
        self.compares = needs_reference(args.preference, args.quality)
        self.fingerprint = dict(fingerprint or {})
        if args.device.type == "cpu":
            return_freed_memory()
        apply_speed_settings(model, args)
        if uses_fsdp(args):
            args.fsdp_plugin_args.setdefault("transformer_cls_names_to_wrap", layer_names(model))
        self.live: AdapterOff | MovingReference | None = None
        if reference is None:
            self.live = AdapterOff(model)
        elif args.reference_sync_steps:
            self.live = MovingReference(model, args.reference_mixup_alpha)
            callbacks = [*callbacks, MoveReference(self.live)]
        self.shift = RewardShift(args.reward_shift, args.reward_shift_momentum)
        self.step_rewards: list[Tensor] = []
        self.step_packs: list[PackRecord] = []
        self.sums = MeanMeter()
        self.last_log = time.perf_counter()
        dataset = functools.partial(
            GroupDataset,
            processor=processor,
            max_tiles=args.max_tiles,
            max_length=args.max_length,
            token_weights=args.token_weights,
        )
        super().__init__(
            model=model,
            args=args,
            train_dataset=dataset(pairs.rows),
            eval_dataset=dataset(held_out.rows) if held_out else None,
            processing_class=processor,
            data_collator=pack_groups,
            callbacks=[NoInputGradients(), *callbacks, stopping],
        )
        self.held_out: HeldOut | None = None
        if held_out:
            self.held_out = HeldOut(
                held_out, self.eval_dataset, args, collate=pack_groups, reference_logps=self._reference_logps
            )
            self.add_callback(EvaluateAtTheEnd())
        self.pop_callback(ProgressCallback)
        self.pop_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the loss is normalised over the whole step already

    def create_accelerator_and_postprocess(self) -> None:
        """Build accelerate's part."""
        super().create_accelerator_and_postprocess()
        allow_fsdp_on_cpu(self.accelerator, self.args)
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    def _reference_logps(self, pack: Pack) -> tuple[Tensor, Tensor]:
        """Reference log-probs of the chosen and of the rejected response of each pair. Shape: 2 x (P,)"""
        if self.live is not None and self.live.is_live:
            return self.live.logps(pack)
        chosen, rejected = self.reference.cache.lookup(pack.pair_ids)
        return chosen.to(self.args.device), rejected.to(self.args.device)

    def floating_point_ops(self, inputs: Pack) -> float:
        """Return the FLOP of a pack, forward and backward, see `throughput`."""
        return self.flop_model.of(inputs)

    @functools.cached_property
    def flop_model(self) -> FlopModel:
        """Arithmetic of the policy."""
        return FlopModel(self.accelerator.unwrap_model(self.model))

    # --- one step -----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Pack,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return the part that one pack has in the loss of the step, times the number of ranks (which average)."""
        pack = inputs
        if self.compares:
            reference_chosen, reference_rejected = self._reference_logps(pack)
        else:  # rewards are then beta * log-prob, as TRL logs them for ORPO
            reference_chosen = reference_rejected = torch.zeros(pack.num_pairs, device=self.args.device)
        scores = score_pairs(model, pack, likeness=self.args.wpo)
        pair_weights = wpo_weights(scores.chosen_likeness, scores.rejected_likeness) if self.args.wpo else None
        chosen_change, rejected_change = scores.chosen - reference_chosen, scores.rejected - reference_rejected
        if self.shift.mode == "inclusive":
            # what is not finite stops this step below; in the shift it would put the blame on all packs of all ranks
            changes = torch.cat([chosen_change, rejected_change]).nan_to_num(0.0, 0.0, 0.0)
            self._move_shift(self.args.beta * changes)
        out = mpo_loss(
            scores.chosen,
            scores.rejected,
            reference_chosen,
            reference_rejected,
            pack.chosen_lengths_P,
            shift=self.shift.value,
            rejected_lengths=pack.rejected_lengths_P,
            generation_logps=scores.whole_chosen,
            pair_weights=pair_weights,
            num_pairs=num_items_in_batch[0],
            num_chosen_tokens=num_items_in_batch[1],
            **self.args.objective,
        )
        self.step_packs.append(PackRecord(pack.pair_ids, reference_chosen, reference_rejected, out.loss.detach()))
        if self.accelerator.sync_gradients:  # the last pack of the step
            self._check_losses()
        self.step_rewards += [out.chosen_rewards, out.rejected_rewards]
        numbers = pair_numbers(pack, scores, (reference_chosen, reference_rejected) if self.compares else None, out)
        if pair_weights is not None:
            numbers["pair_weight"] = pair_weights
        self.sums.add(pack.num_pairs, numbers)
        self.sums.tokens += pack.num_tokens
        self.sums.flop += self.flop_model.of(pack)
        loss = out.loss * self.args.world_size
        return (loss, out) if return_outputs else loss

    def training_step(self, model: torch.nn.Module, inputs: Pack, num_items_in_batch: Tensor | None = None) -> Tensor:
        """Run one pack; after the last one of a step its rewards join the shift."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            if self.shift.mode in ("previous", "ema"):
                self._move_shift(torch.cat(self.step_rewards))
            self.step_rewards = []
        return loss

    def _move_shift(self, rewards: Tensor) -> None:
        """Let rewards of this rank and of the others join the shift; a collective."""
        self.shift.update(self.accelerator.reduce(self.shift.sums(rewards), reduction="sum"))

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm of the gradient; stop before the optimizer acts on one that is not finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # DeepSpeed says -1 for a norm that is not finite; float16 with a loss scale meets infinite gradients on purpose
        # and skips the step
        if norm is not None and not 0 <= norm < math.inf and not self.args.fp16:
            raise self._not_finite("gradient", self.step_packs)
        self.step_packs = []
        return norm

    def _check_losses(self) -> None:
        """Stop all ranks if the loss of any pack of the step is not finite.

        The ranks ask each other before the last backward pass: one that stopped by itself would leave the others in a
        collective. No optimizer step has seen the earlier packs.
        """
        is_bad = ~torch.isfinite(torch.stack([pack.loss for pack in self.step_packs]))
        if not self.accelerator.reduce(is_bad.sum(), reduction="sum").item():
            return
        raise self._not_finite(
            "loss", [pack for pack, bad in zip(self.step_packs, is_bad.tolist(), strict=True) if bad]
        )

    def _not_finite(self, what: str, suspects: Sequence[PackRecord]) -> BadInputError:
        """Return the error to raise, the same on all ranks; a collective, see `stop_step`."""
        return stop_step(
            what,
            [pair_id for pack in suspects for pair_id in pack.pair_ids],
            self.step_packs,
            step=self.state.global_step + 1,
            model=self.accelerator.unwrap_model(self.model),
            args=self.args,
            pairs=self.pairs,
            reward_shift=self.shift.value,
        )

    # --- numbers ------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the global means since the last log line; speed is that of all ranks together."""
        if "loss" in logs and self.sums.count:
            now = time.perf_counter()
            seconds, self.last_log = now - self.last_log, now
            means = self.sums.reduce(self.accelerator)
            num_pairs, num_tokens, flop = (means.pop(name) for name in ("num_pairs", "num_tokens", "flop"))
            mean = (means["rewards/chosen"] + means["rewards/rejected"]) / 2
            means["rewards/std"] = math.sqrt(max(0.0, means.pop("rewards/square") - mean**2))
            logs.update(means)
            logs["reward_shift"] = self.shift.value
            peak = device_peak(self.args.device, self.args.peak_tflops)
            logs.update(speed(num_pairs, num_tokens, flop, seconds, peak and peak * self.args.world_size))
            logs.update(self._largest(memory_in_use(self.args.device)))
            self.sums = MeanMeter()
        super().log(logs, start_time)

    def _largest(self, values: dict[str, float]) -> dict[str, float]:
        """The largest of each value over all ranks; a collective."""
        mine = torch.tensor([list(values.values())], dtype=torch.float64 if self.args.device.type != "mps" else None)
        rows = self.accelerator.gather(mine.to(self.args.device))
        return dict(zip(values, rows.max(dim=0).values.tolist(), strict=True))

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Return rewards, accuracy and NLL on the held-out pairs; the reward shift does not move.

        Raises:
            BadInputError: there are no held-out pairs.
        """
        if self.held_out is None:
            raise BadInputError("there are no held-out pairs to evaluate on; set held_out_share above 0")
        started = time.perf_counter()
        model = self.accelerator.unwrap_model(self.model) if self.args.world_size == 1 else self.model_wrapped
        was_training = model.training
        if self.reference is not None:
            self._follow_start()
            self.reference.prepare_held_out()
        model.eval()
        metrics = self.held_out.rewards(model, self.accelerator, metric_key_prefix)
        metrics |= self._answer_some(metric_key_prefix)
        model.train(was_training)
        self.log(dict(metrics))
        self.last_log += time.perf_counter() - started  # the speed that is logged is that of training
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _answer_some(self, prefix: str) -> dict[str, float]:
        """Answer some held-out questions greedily, keep and track the texts, return means over them."""
        model = self.accelerator.unwrap_model(self.model)
        samples = self.held_out.answers(model, self.processing_class.tokenizer, self.state.global_step)
        if samples and self.is_world_process_zero():
            RunLog(Path(self.args.output_dir) / "samples.jsonl").append(samples)
            send_samples(self.callback_handler.callbacks, samples, self.state.global_step)
        return sample_means(samples, prefix)

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any = None) -> None:
        """Save; the mark of a whole checkpoint comes last, and older checkpoints go only after it."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            checkpoint.make_way(folder)
        self.accelerator.wait_for_everyone()
        whole = [path.name for path in checkpoint.whole_checkpoints(self.args.output_dir)]
        try:
            with naming_full_disk(folder, kept=f"{whole[-1]} before it is whole" if whole else ""):
                self._write_checkpoint(folder, model, trial)
        except BadInputError:
            checkpoint.make_way(folder)  # half of it would keep the disk full
            raise
        self.accelerator.wait_for_everyone()

    def _write_checkpoint(self, folder: Path, model: torch.nn.Module, trial: Any) -> None:
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        if uses_fsdp(self.args) and self.args.should_save:  # transformers forgets the best one without a folder
            folder.mkdir(parents=True, exist_ok=True)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if isinstance(self.live, MovingReference) and self.args.should_save:
            self.live.save(folder)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            checkpoint.write_state(folder, self._checkpoint_state())
            checkpoint.rotate(self.args.output_dir, limit, best=self.state.best_model_checkpoint)

    def _checkpoint_state(self) -> dict[str, Any]:
        return {
            "global_step": self.state.global_step,
            "reward_shift": self.shift.state_dict(),
            "fingerprint": self.fingerprint,
            "engine": engine_name(self.args),
            "num_ranks": self.args.world_size,
            "steps_per_epoch": self.pairs.sampler(self.args).num_steps,
        }

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Save weights, config and processor; the settings are in settings.yaml, not in a pickle."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        # transformers resumes by the names of the loaded model, which are not those of every family's files
        names = {} if hasattr(model, "peft_config") else {"save_original_format": False}
        model.save_pretrained(folder, state_dict=state_dict, **names)
        self.processing_class.save_pretrained(folder)

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: Any) -> Any:
        """Build the engine and load the checkpoint, also one that another number of ranks has written."""
        if not is_of_other_ranks(resume_from_checkpoint, self.args):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_universal(resume_from_checkpoint)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        self._load_scaler(resume_from_checkpoint)
        return prepared

    def _load_universal(self, folder: str | Path) -> None:
        load_universal(self.model_wrapped, folder, self.args, strict=not hasattr(self.model, "peft_config"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Load the weights; what the reference needs of those before is kept first."""
        self._follow_start()
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Load it, also if another number of ranks has written it."""
        best = self.state.best_model_checkpoint
        if is_of_other_ranks(best, self.args):
            self._load_universal(best)
        else:
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint_folder: str | None) -> None:
        """Load them and what this file adds to a checkpoint."""
        super()._load_optimizer_and_scheduler(checkpoint_folder)
        if checkpoint_folder is None:
            return
        self.shift.load_state_dict(checkpoint.read_state(checkpoint_folder)["reward_shift"])
        if isinstance(self.live, MovingReference):
            self.live.load(checkpoint_folder)

    def check_resumable(self, folder: str | Path) -> None:
        """Refuse a checkpoint that belongs to another run; see `checkpoint.check_resumable`."""
        checkpoint.check_resumable(folder, self._checkpoint_state())
