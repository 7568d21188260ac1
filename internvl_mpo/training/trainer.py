"""MPO on transformers' Trainer: packs in, the objective on top, global means out.

The Trainer brings DeepSpeed, DDP, mixed precision, trackers and the Hub. What this file adds: steps that hold a fixed
number of pairs however they are split, reference log-probs from a cache, the reward shift, checkpoints that are either
whole or passed over, and numbers a user needs.
"""

import functools
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from internvl_mpo.errors import BadInputError
from internvl_mpo.logps import response_logps
from internvl_mpo.mmpr.pairs import PairRow
from internvl_mpo.objective import (
    RewardShift,
    mpo_loss,
    sequence_kl,
)
from internvl_mpo.pack_plan import PairSize, fill_packs
from internvl_mpo.packing import Group, pack_groups
from internvl_mpo.steps import StepSampler
from internvl_mpo.training import checkpoint
from internvl_mpo.training.arguments import MPOArguments
from internvl_mpo.training.callbacks import EvaluateAtTheEnd, MoveReference
from internvl_mpo.training.data import GroupDataset, Micro, StepLoader
from internvl_mpo.training.distributed import engine_name, from_all_ranks
from internvl_mpo.training.held_out import greedy_answers, repetition, send_samples
from internvl_mpo.training.live_reference import AdapterOff, MovingReference
from internvl_mpo.training.meters import MeanMeter
from internvl_mpo.training.not_finite import dump_step, weights_not_finite
from internvl_mpo.training.reference_cache import ReferenceCache
from internvl_mpo.training.speed import apply_speed_settings
from internvl_mpo.training.throughput import FlopModel, device_peak, memory_in_use, speed


class MPOTrainer(Trainer):
    """Trains a policy on preference pairs with the objective of `internvl_mpo.objective`.

    The loss is a mean over the pairs of the whole optimizer step: ranks, packs and accumulation change only memory.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        args: MPOArguments,
        *,
        processor: Any,
        rows: Sequence[PairRow],
        counts: Sequence[int],
        sizes: Sequence[PairSize],
        reference: ReferenceCache | None,
        held_out: Sequence[PairRow] = (),
        held_out_sizes: Sequence[PairSize] = (),
        fingerprint: Mapping[str, str] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
    ):
        """Set up the run; nothing is read or written yet.

        Args:
            model: the policy, `InternVLChatModel` or a PEFT model around it.
            args: settings.
            processor: encodes pairs and is saved with the model.
            rows: training pairs.
            counts: how often each of them is seen in an epoch, see `mmpr.repeats`.
            sizes: tokens of each pair.
            reference: log-probs of the start model for every pair; None computes them with the adapters switched off.
            held_out: pairs for `evaluate`.
            held_out_sizes: tokens of each of them.
            fingerprint: what the run depends on (data, start model, ...), compared when a checkpoint is resumed.
            callbacks: more callbacks.
        """
        self.rows, self.counts, self.sizes = rows, counts, sizes
        self.held_out, self.held_out_sizes = held_out, held_out_sizes
        self.reference = reference
        self.fingerprint = dict(fingerprint or {})
        apply_speed_settings(model, args)
        self.live: AdapterOff | MovingReference | None = None
        if reference is None:
            self.live = AdapterOff(model)
        elif args.reference_sync_steps:
            self.live = MovingReference(model, args.reference_mixup_alpha)
            callbacks = [*callbacks, MoveReference(self.live)]
        self.shift = RewardShift(args.reward_shift, args.reward_shift_momentum)
        self.step_rewards: list[Tensor] = []
        self.step_packs: list[tuple[list[str], Tensor, Tensor, Tensor]] = []  # ids, reference log-probs, loss
        self.sums = MeanMeter()
        self.last_log = time.perf_counter()
        super().__init__(
            model=model,
            args=args,
            train_dataset=self._dataset(rows, processor, args),
            eval_dataset=self._dataset(held_out, processor, args) if held_out else None,
            processing_class=processor,
            data_collator=self._collate,
            callbacks=list(callbacks),
        )
        if held_out:
            self.add_callback(EvaluateAtTheEnd())
        self.pop_callback(ProgressCallback)
        self.pop_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the loss is normalised over the whole step already

    @staticmethod
    def _dataset(rows: Sequence[PairRow], processor: Any, args: MPOArguments) -> GroupDataset:
        return GroupDataset(rows, processor, max_tiles=args.max_tiles, max_length=args.max_length)

    def _collate(self, groups: Sequence[Group]) -> Micro:
        pack = pack_groups(groups)
        return Micro(pack, self.reference and self.reference.lookup(pack.pair_ids))

    def _reference_logps(self, micro: Micro) -> tuple[Tensor, Tensor]:
        """Reference log-probs of the chosen and of the rejected response of each pair. Shape: 2 x (P,)"""
        if self.live is None or not self.live.is_live:
            return micro.reference_logps
        logps_R = self.live.logps(micro.pack)
        return logps_R[micro.pack.chosen_index_P], logps_R[micro.pack.rejected_index_P]

    # --- data ---------------------------------------------------------------------------------------------------------

    def step_sampler(self) -> StepSampler:
        """Return the sampler of this rank."""
        return StepSampler(
            [row.key for row in self.rows],
            self.counts,
            self.sizes,
            pairs_per_step=self.args.pairs_per_step,
            pairs_per_group=self.args.pairs_per_group,
            max_tokens=self.args.max_tokens_per_pack,
            num_ranks=self.args.world_size,
            rank=self.args.process_index,
            gradient_accumulation_steps=self.args.gradient_accumulation_steps,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
        )

    def get_train_dataloader(self) -> DataLoader:
        """Return the packs of this rank; the sampler knows the ranks, so accelerate must not shard it again."""
        return StepLoader(
            self.train_dataset,
            batch_sampler=self.step_sampler(),
            collate_fn=self._collate,
            num_workers=self.args.dataloader_num_workers,
            persistent_workers=self.args.dataloader_persistent_workers,
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Micro], Tensor | None]:
        """Return the packs of the next step; none for a run that was killed after its last checkpoint."""
        if self.state.global_step >= self.state.max_steps:  # transformers looks only after a step
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Pairs of an epoch."""
        return sum(self.counts)

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Pairs of an optimizer step."""
        return args.pairs_per_step

    def _get_num_items_in_batch(self, batch_samples: list[Micro], device: torch.device) -> Tensor:
        """Pairs and chosen tokens of the whole step, over all packs and ranks. Shape: (2,)"""
        pairs = sum(micro.pack.num_pairs for micro in batch_samples)
        tokens = sum(int(micro.pack.chosen_lengths_P.sum()) for micro in batch_samples)
        totals = torch.tensor([pairs, tokens], device=device)
        return self.accelerator.reduce(totals, reduction="sum")

    def _prepare_inputs(self, inputs: Micro) -> Micro:
        return inputs.to(self.args.device)

    def floating_point_ops(self, inputs: Micro) -> float:
        """Return the FLOP of a pack, forward and backward, see `throughput`."""
        return self.flop_model.of(inputs.pack)

    @functools.cached_property
    def flop_model(self) -> FlopModel:
        """Arithmetic of the policy."""
        return FlopModel(self.accelerator.unwrap_model(self.model))

    # --- one step -----------------------------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Micro,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return the part that one pack has in the loss of the step, times the number of ranks (which average)."""
        pack = inputs.pack
        reference_chosen, reference_rejected = self._reference_logps(inputs)
        logps_R = response_logps(model, pack)
        policy_chosen, policy_rejected = logps_R[pack.chosen_index_P], logps_R[pack.rejected_index_P]
        if self.shift.mode == "inclusive":
            ratios = (policy_chosen - reference_chosen, policy_rejected - reference_rejected)
            # what is not finite stops this step below; in the shift it would put the blame on all packs of all ranks
            self.shift.update(self.args.beta * torch.cat(ratios).detach().nan_to_num(0.0, 0.0, 0.0))
        out = mpo_loss(
            policy_chosen,
            policy_rejected,
            reference_chosen,
            reference_rejected,
            pack.chosen_lengths_P,
            beta=self.args.beta,
            weights=self.args.weights,
            shift=self.shift.value,
            preference=self.args.preference,
            quality=self.args.quality,
            generation=self.args.generation,
            label_smoothing=self.args.label_smoothing,
            rejected_lengths=pack.rejected_lengths_P,
            num_pairs=num_items_in_batch[0],
            num_chosen_tokens=num_items_in_batch[1],
        )
        self.step_packs.append((pack.pair_ids, reference_chosen, reference_rejected, out.loss.detach()))
        if self.accelerator.sync_gradients:  # the last pack of the step
            self._check_losses()
        self.step_rewards += [out.chosen_rewards, out.rejected_rewards]
        self.sums.add(
            pack.num_pairs,
            {
                "loss_preference": out.preference,
                "loss_quality": out.quality,
                "loss_generation": out.generation,
                "rewards/chosen": out.chosen_rewards,
                "rewards/rejected": out.rejected_rewards,
                "rewards/margin": out.chosen_rewards - out.rejected_rewards,
                "rewards/accuracy": out.chosen_rewards > out.rejected_rewards,
                "logps/chosen": policy_chosen,
                "logps/rejected": policy_rejected,
                "logps/chosen_change": (policy_chosen - reference_chosen) / pack.chosen_lengths_P,
                "kl": (
                    sequence_kl(policy_chosen, reference_chosen, pack.chosen_lengths_P)
                    + sequence_kl(policy_rejected, reference_rejected, pack.rejected_lengths_P)
                ).detach()
                / 2,
                "rewards/square": (out.chosen_rewards**2 + out.rejected_rewards**2) / 2,
                "length/chosen": pack.chosen_lengths_P,
                "length/rejected": pack.rejected_lengths_P,
            },
        )
        self.sums.tokens += pack.num_tokens
        self.sums.flop += self.flop_model.of(pack)
        loss = out.loss * self.args.world_size
        return (loss, out) if return_outputs else loss

    def training_step(self, model: torch.nn.Module, inputs: Micro, num_items_in_batch: Tensor | None = None) -> Tensor:
        """Run one pack; after the last one of a step its rewards join the shift."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            if self.shift.mode in ("previous", "ema"):
                self.shift.update(torch.cat(self.step_rewards))
            self.step_rewards = []
        return loss

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm of the gradient; stop before the optimizer acts on one that is not finite."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # DeepSpeed says -1 for a norm that is not finite; float16 with a loss scale meets infinite gradients on purpose
        # and skips the step
        if norm is not None and not 0 <= norm < math.inf and not self.args.fp16:
            raise self._not_finite("gradient", [pair_id for ids, *_ in self.step_packs for pair_id in ids])
        self.step_packs = []
        return norm

    def _check_losses(self) -> None:
        """Stop all ranks if the loss of any pack of the step is not finite.

        The ranks ask each other before the last backward pass: one that stopped by itself would leave the others in a
        collective. No optimizer step has seen the earlier packs.
        """
        is_bad = ~torch.isfinite(torch.stack([loss for *_, loss in self.step_packs]))
        if not self.accelerator.reduce(is_bad.sum(), reduction="sum").item():
            return
        bad = [ids for (ids, *_), is_bad_pack in zip(self.step_packs, is_bad.tolist(), strict=True) if is_bad_pack]
        raise self._not_finite("loss", [pair_id for ids in bad for pair_id in ids])

    def _not_finite(self, what: str, pair_ids: Sequence[str]) -> BadInputError:
        """Write down the step so far and return the error to raise, the same on all ranks; a collective.

        Args:
            what: "loss" or "gradient".
            pair_ids: pairs of this rank that it may come from.
        """
        args, step = self.args, self.state.global_step + 1
        model = self.accelerator.unwrap_model(self.model)
        found = from_all_ranks((list(pair_ids), weights_not_finite(model, args.process_index)), args)
        broken = list(dict.fromkeys(name for _, names in found for name in names))
        paths = {
            rank: Path(args.output_dir) / f"not_finite_step{step}_rank{rank}.json"
            for rank, (ids, _) in enumerate(found)
            if ids
        }
        references = {
            pair_id: (chosen, rejected)
            for ids, *logps, _ in self.step_packs
            for pair_id, chosen, rejected in zip(ids, *(values.tolist() for values in logps), strict=True)
        }
        names = ("max_tiles", "max_length", "beta", "preference", "quality", "generation", "label_smoothing")
        header = {
            "what": what,
            "step": step,
            "model": getattr(args, "model", None),
            "output_dir": args.output_dir,
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "autocast": "bfloat16" if args.bf16 else "float16" if args.fp16 else None,
            "weights": list(args.weights),
            "reward_shift": self.shift.value,
            **{name: getattr(args, name) for name in names},
            "pair_ids": list(pair_ids),
            "packs": [ids for ids, *_ in self.step_packs],
            "weights_not_finite": broken,
        }
        if pair_ids:
            dump_step(paths[args.process_index], header, [r for r in self.rows if r.pair.id in references], references)
        from_all_ranks(None, args)  # a launcher kills the others when the first one ends: all dumps must be written
        suspects = [pair_id for ids, _ in found for pair_id in ids]
        shown = ", ".join(suspects[:5]) + (", ..." if len(suspects) > 5 else "")
        weights = f"{len(broken)} tensors of weights are not finite, the step before broke them; " if broken else ""
        first, files = next(iter(paths.values())), ", ".join(map(str, paths.values()))
        return BadInputError(
            f"the {what} is not finite at step {step}; the pairs are {shown} (all in {files}); {weights}look at "
            f"them with python -m internvl_mpo.replay --dump {first}, then lower learning_rate or leave pairs out"
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
        if not self.held_out:
            raise BadInputError("there are no held-out pairs to evaluate on; set held_out_share above 0")
        started = time.perf_counter()
        # Every rank does the same number of packs, so that sharded models meet in the same collectives.
        costs = [size.num_tokens for size in self.held_out_sizes]
        plan = fill_packs(costs, max(self.args.max_tokens_per_pack, max(costs)))
        ranks, rank = self.args.world_size, self.args.process_index
        rounds = math.ceil(len(plan) / ranks)
        meter = MeanMeter()
        model = self.accelerator.unwrap_model(self.model) if ranks == 1 else self.model_wrapped
        was_training = model.training
        model.eval()
        with torch.no_grad():
            for turn in range(rounds):
                number = turn * ranks + rank
                micro = self._collate([self.eval_dataset[(row,)] for row in plan[min(number, len(plan) - 1)]])
                micro = micro.to(self.args.device)
                reference_chosen, reference_rejected = self._reference_logps(micro)
                logps_R = response_logps(model, micro.pack)
                num_pairs = micro.pack.num_pairs if number < len(plan) else 0  # a pack that only fills the round
                chosen, rejected = logps_R[micro.pack.chosen_index_P], logps_R[micro.pack.rejected_index_P]
                chosen_rewards = self.args.beta * (chosen - reference_chosen)
                rejected_rewards = self.args.beta * (rejected - reference_rejected)
                values = {
                    f"{metric_key_prefix}_rewards/accuracy": chosen_rewards > rejected_rewards,
                    f"{metric_key_prefix}_rewards/margin": chosen_rewards - rejected_rewards,
                    f"{metric_key_prefix}_nll": -chosen / micro.pack.chosen_lengths_P,
                }
                meter.add(num_pairs, {name: value[:num_pairs] for name, value in values.items()})
        metrics = meter.reduce(self.accelerator)
        metrics[f"{metric_key_prefix}_num_pairs"] = metrics.pop("num_pairs")
        for name in ("num_tokens", "flop"):
            metrics.pop(name)
        metrics |= self._answer_some(metric_key_prefix)
        model.train(was_training)
        self.log(dict(metrics))
        self.last_log += time.perf_counter() - started  # the speed that is logged is that of training
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _answer_some(self, prefix: str) -> dict[str, float]:
        """Answer some held-out questions greedily, keep and track the texts, return means over them.

        All ranks do the same, so that sharded weights are gathered together.
        """
        questions: dict[Any, int] = {}
        for index, row in enumerate(self.held_out):
            questions.setdefault(row.key, index)
        if not self.args.num_eval_samples:
            return {}
        spread = max(1, len(questions) // self.args.num_eval_samples)  # over all files, which lie one after another
        chosen = list(questions.values())[::spread][: self.args.num_eval_samples]
        model = self.accelerator.unwrap_model(self.model)
        precision = torch.bfloat16 if self.args.bf16 else torch.float16
        with torch.autocast(self.args.device.type, precision, enabled=self.args.bf16 or self.args.fp16):
            groups = [self.eval_dataset[(index,)] for index in chosen]
            answers = greedy_answers(model, groups, self.args.eval_sample_tokens)
        tokenizer = self.processing_class.tokenizer
        samples = []
        for index, ids in zip(chosen, answers, strict=True):
            pair = self.held_out[index].pair
            samples.append(
                {
                    "step": self.state.global_step,
                    "images": list(pair.images),
                    "question": pair.question,
                    "answer": tokenizer.decode(ids, skip_special_tokens=True),
                    "chosen": pair.chosen,
                    "num_tokens": len(ids),
                    "finished": len(ids) < self.args.eval_sample_tokens,
                    "repetition": repetition(ids),
                }
            )
        if self.is_world_process_zero():
            with open(Path(self.args.output_dir) / "samples.jsonl", "a", encoding="utf-8") as out:
                out.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
            send_samples(self.callback_handler.callbacks, samples, self.state.global_step)
        means = {
            "length": [sample["num_tokens"] for sample in samples],
            "unfinished": [not sample["finished"] for sample in samples],
            "repetition": [sample["repetition"] for sample in samples],
        }
        return {f"{prefix}_samples/{name}": sum(values) / len(values) for name, values in means.items()}

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any = None) -> None:
        """Save; the mark of a whole checkpoint comes last, and older checkpoints go only after it."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            checkpoint.make_way(folder)
        self.accelerator.wait_for_everyone()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
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
        self.accelerator.wait_for_everyone()

    def _checkpoint_state(self) -> dict[str, Any]:
        return {
            "global_step": self.state.global_step,
            "reward_shift": self.shift.state_dict(),
            "fingerprint": self.fingerprint,
            "engine": engine_name(self.args),
            "num_ranks": self.args.world_size,
            "steps_per_epoch": self.step_sampler().num_steps,
        }

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Save weights, config and processor; the settings are in settings.yaml, not in a pickle."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=state_dict)
        self.processing_class.save_pretrained(folder)

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
