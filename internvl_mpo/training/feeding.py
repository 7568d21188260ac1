"""What a training step is fed with: its packs, and the log-probs of the reference for them."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from internvl_mpo.packing import Pack, pack_groups
from internvl_mpo.training.data import StepLoader
from internvl_mpo.training.fsdp import uses_fsdp
from internvl_mpo.training.pairs import TrainingPairs
from internvl_mpo.training.reference_pass import ReferencePass
from internvl_mpo.training.signals import keep_from_signals
from internvl_mpo.training.stopping import StopOrSave


class FedTrainer(Trainer):
    """A Trainer whose steps are those of `pairs`, each with its reference at hand.

    Attributes:
        pairs: what it trains on.
        reference: log-probs of the start model, or None.
        stopping: asked whether to stop.
        last_log: when the last log line was written; time that is not training's is added.
    """

    pairs: TrainingPairs
    reference: ReferencePass | None
    stopping: StopOrSave
    last_log: float

    def get_train_dataloader(self) -> DataLoader:
        """Return the packs of this rank; the sampler knows the ranks, so accelerate must not shard it again."""
        return StepLoader(
            self.train_dataset,
            batch_sampler=self.pairs.sampler(self.args),
            collate_fn=pack_groups,
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=keep_from_signals,
            persistent_workers=self.args.dataloader_persistent_workers,
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Pack], Tensor | None]:
        """Return the packs of the next step; none for a run that is over, or is to stop before its reference is there.

        A run that was killed after its last checkpoint has no step left.
        """
        if self.state.global_step >= self.state.max_steps:  # transformers looks only after a step
            self.control.should_training_stop = True
            return [], None
        if not self._prepare_reference():
            self.stopping.stop_between_steps(self.args, self.state, self.control)
            return [], None
        return super().get_batch_samples(*args, **kwargs)

    def _prepare_reference(self) -> bool:
        """Have the reference of the next step at hand; False if a signal came first."""
        if self.reference is None:
            return True
        self._follow_start()
        before = self.reference.seconds
        is_there = self.reference.prepare(self.state.global_step, lambda: not self.stopping.is_wanted(self.args))
        self.last_log += self.reference.seconds - before  # the speed that is logged is that of training
        return is_there

    def _follow_start(self) -> None:
        """Under FSDP2 keep this rank's share of the start weights: they are cut, and nothing has changed them yet."""
        if uses_fsdp(self.args) and self.reference is not None and not self.reference.follows:
            self.reference.follow(self.model)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Pairs of an epoch."""
        return self.pairs.num_seen

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Pairs of an optimizer step."""
        return args.pairs_per_step

    def _get_num_items_in_batch(self, batch_samples: list[Pack], device: torch.device) -> Tensor:
        """Pairs and chosen tokens of the whole step, over all packs and ranks. Shape: (2,)"""
        pairs = sum(pack.num_pairs for pack in batch_samples)
        tokens = sum(int(pack.chosen_lengths_P.sum()) for pack in batch_samples)
        totals = torch.tensor([pairs, tokens], device=device)
        return self.accelerator.reduce(totals, reduction="sum")

    def _prepare_inputs(self, inputs: Pack) -> Pack:
        return inputs.to(self.args.device)
