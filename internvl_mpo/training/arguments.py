"""The objective's and the data's settings on top of transformers' TrainingArguments."""

import math
from dataclasses import dataclass
from typing import Any, get_args

from transformers import TrainingArguments

from internvl_mpo.errors import BadInputError
from internvl_mpo.kernels.packed_attention import PackedAttention
from internvl_mpo.objective import Generation, Preference, Quality, ShiftMode, needs_reference
from internvl_mpo.preference_terms import SMOOTHED, SORTED
from internvl_mpo.settings import setting
from internvl_mpo.token_weights import TokenWeights
from internvl_mpo.training.speed import check_speed_settings


@dataclass(kw_only=True)
class MPOArguments(TrainingArguments):
    """Settings of `MPOTrainer`; every field of transformers' TrainingArguments can be given as well.

    The defaults are the recipe of InternVL2-8B-MPO.
    """

    pairs_per_step: int = setting(256, help="preference pairs of one optimizer step, over all ranks")
    pairs_per_group: int = setting(
        1, help="pairs of one question that may share a step and its prompt; 1 = the batch statistics of the paper"
    )
    max_tokens_per_pack: int = setting(
        8192, help="token budget of one forward pass; lower it when memory runs out, the result stays the same"
    )
    beta: float = setting(0.1, help="pull towards the reference")
    preference: Preference = setting("dpo", help="preference term: " + " ".join(get_args(Preference)))
    quality: Quality = setting("bco", help="quality term: bco none")
    generation: Generation = setting("sft", help="generation term: sft (mean per response) sft_token none")
    preference_weight: float = setting(0.8, help="w_p")
    quality_weight: float = setting(0.2, help="w_q")
    generation_weight: float = setting(1.0, help="w_g")
    label_smoothing: float = setting(0.0, help="share of pairs labelled the wrong way round (cdpo, robust_dpo, exo)")
    simpo_gamma: float = setting(1.0, help="margin that simpo wants")
    dpop_lambda: float = setting(50.0, help="weight of dpop's penalty on chosen responses that become less likely")
    ld_alpha: float = setting(1.0, help="weight of tokens beyond the shorter response's length (LD-DPO); 1 = all alike")
    after_difference_weight: float = setting(
        1.0, help="weight of tokens after the step in which the responses of a pair first differ; 1 = all alike"
    )
    difference_tokens: int = setting(16, help="tokens of that step, from the first difference on")
    wpo: bool = setting(False, help="weigh pairs by how much they look like the policy's own samples (WPO)")
    reward_shift: ShiftMode = setting("previous", help="delta of the quality term: previous inclusive ema none")
    reward_shift_momentum: float = setting(0.99, help="memory of reward_shift ema")
    peak_tflops: float | None = setting(None, help="bfloat16 peak of a device for MFU; none = as known for its name")
    num_eval_samples: int = setting(4, help="held-out questions answered greedily at each evaluation")
    eval_sample_tokens: int = setting(256, help="where such an answer is cut")
    reference_model: str | None = setting(
        None, help="reference where it is not the start model: folder or Hub id, as the first model of several rounds"
    )
    reference_sync_steps: int = setting(
        0, help="move the reference towards the policy every so many steps (TR-DPO); 0 = it stays the start model"
    )
    reference_mixup_alpha: float = setting(0.6, help="share of the policy when the reference moves; 1 = copy it")
    reference_ahead_steps: int = setting(
        32, help="reference log-probs are computed so many steps ahead, and as many steps' worth of pairs at a time"
    )
    max_length: int = setting(6144, help="longest prompt plus response in tokens")
    max_tiles: int = setting(12, help="tiles per image, thumbnail not counted")
    packed_attention: PackedAttention = setting(
        "auto", help="auto, segments (SDPA), flex (FlexAttention, CUDA), varlen (flash-attn, CUDA)"
    )
    checkpoint_vision: bool = setting(False, help="recompute activations of the vision tower: less memory, 4 % slower")
    checkpoint_language: bool = setting(False, help="recompute activations of the language model: a fifth slower")
    use_liger_kernel: bool = setting(False, help="Triton kernels for norms, rotation and SwiGLU (liger-kernel, CUDA)")
    plain_twin: bool = setting(False, help="score every response as a sequence of its own, to compare with; slow")

    # Defaults of TrainingArguments that the recipe changes.
    learning_rate: float = setting(5e-6, help="peak learning rate")
    weight_decay: float = setting(0.05, help="AdamW weight decay")
    warmup_steps: float = setting(0.03, help="warm-up steps, below 1 a share of all steps")
    lr_scheduler_type: str = setting("cosine", help="learning-rate schedule")
    num_train_epochs: float = setting(1.0, help="passes over the data")
    seed: int = setting(42, help="data order and dropout")
    logging_steps: float = setting(1, help="steps between log lines")
    logging_first_step: bool = setting(True, help="log the first step whatever logging_steps is")
    save_steps: float = setting(200, help="steps between checkpoints")
    save_total_limit: int | None = setting(2, help="checkpoints kept")
    save_minutes: float | None = setting(None, help="also write a checkpoint when so many minutes have passed")

    def __post_init__(self) -> None:
        """Refuse values that cannot work.

        Raises:
            BadInputError: naming the setting and what to give instead.
        """
        counts = ("pairs_per_step", "pairs_per_group", "max_tokens_per_pack", "reference_ahead_steps")
        for name in (*counts, "max_length", "max_tiles"):
            if getattr(self, name) < 1:
                raise BadInputError(f"{name} is {getattr(self, name)}, expected 1 or more")
        check_speed_settings(self)
        self._check_saving()
        if self.beta <= 0:
            raise BadInputError(f"beta is {self.beta}, expected more than 0")
        self._check_weights()
        self._check_terms()
        if not 0 <= self.reward_shift_momentum < 1:
            raise BadInputError(
                f"reward_shift_momentum is {self.reward_shift_momentum}, expected 0 or more and below 1"
            )
        if self.num_eval_samples < 0 or self.eval_sample_tokens < 1:
            raise BadInputError(
                f"num_eval_samples is {self.num_eval_samples} and eval_sample_tokens {self.eval_sample_tokens}, "
                "expected 0 or more, and 1 or more"
            )
        if self.eval_steps is not None and self.eval_strategy == "no":
            self.eval_strategy = "steps"  # whoever says how often wants it
        self._check_moving_reference()
        self._choose_metric()
        self.remove_unused_columns = False  # packs are not columns
        self.logging_nan_inf_filter = False  # a non-finite loss stops the run instead of being averaged away
        self.per_device_train_batch_size = 1  # a batch is a pack
        try:
            super().__post_init__()
        except ValueError as error:
            raise BadInputError(f"the training settings do not fit together: {error}") from error

    def _check_saving(self) -> None:
        """Refuse what would save at a moment from which nothing goes on exactly."""
        if self.save_minutes is not None and self.save_minutes <= 0:
            raise BadInputError(f"save_minutes is {self.save_minutes}, expected more than 0, or none")
        if self.enable_jit_checkpoint:
            raise BadInputError(
                "enable_jit_checkpoint saves in the middle of a step, from where no run goes on exactly; leave it out: "
                "SIGTERM finishes the step, writes a whole checkpoint and ends with exit code 75 anyway"
            )

    def _check_weights(self) -> None:
        """Refuse weights of the three terms that leave nothing to train on."""
        if self.preference == self.quality == self.generation == "none":
            raise BadInputError("preference, quality and generation are all 'none', so there is nothing to train on")
        kinds = (self.preference, self.quality, self.generation)
        if not all(0 <= weight < math.inf for weight in self.weights) or not any(
            weight for kind, weight in zip(kinds, self.weights, strict=True) if kind != "none"
        ):
            raise BadInputError(
                "preference_weight, quality_weight and generation_weight are {}, {} and {}, expected 0 or more, and "
                "above 0 for a term that is not none".format(*self.weights)
            )

    def _check_moving_reference(self) -> None:
        """Refuse a reference that cannot move, or that nothing looks at."""
        if self.reference_sync_steps < 0 or not 0 < self.reference_mixup_alpha <= 1:
            raise BadInputError(
                f"reference_sync_steps is {self.reference_sync_steps} and reference_mixup_alpha "
                f"{self.reference_mixup_alpha}, expected 0 or more, and above 0 up to 1"
            )
        if self.reference_sync_steps and not needs_reference(self.preference, self.quality):
            raise BadInputError(
                f"reference_sync_steps moves a reference that preference '{self.preference}' with quality "
                f"'{self.quality}' does not use; leave it out"
            )

    def _check_terms(self) -> None:
        """Refuse settings of the preference term that cannot work or would have no effect."""
        if not 0 <= self.label_smoothing < 0.5:
            raise BadInputError(f"label_smoothing is {self.label_smoothing}, expected 0 or more and below 0.5")
        if self.preference == "exo" and not self.label_smoothing:
            raise BadInputError("preference exo takes the logarithm of label_smoothing; give it a value, as 0.001")
        for name in ("ld_alpha", "after_difference_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInputError(f"{name} is {getattr(self, name)}, expected 0 to 1")
        if self.difference_tokens < 1 or self.dpop_lambda < 0:
            raise BadInputError(
                f"difference_tokens is {self.difference_tokens} and dpop_lambda {self.dpop_lambda}, expected 1 or "
                "more, and 0 or more"
            )
        needs_kind = {"label_smoothing": SMOOTHED, "simpo_gamma": ("simpo",), "dpop_lambda": ("dpop",)}
        for name, kinds in needs_kind.items():
            if getattr(self, name) != getattr(MPOArguments, name) and self.preference not in kinds:
                raise BadInputError(
                    f"{name} has no effect on preference '{self.preference}'; leave it out, or use {', '.join(kinds)}"
                )
        if self.difference_tokens != MPOArguments.difference_tokens and self.after_difference_weight == 1:
            raise BadInputError("difference_tokens has no effect while after_difference_weight is 1; lower that")
        compares = needs_reference(self.preference, self.quality)
        if not self.token_weights.are_equal and (self.preference in ("simpo", "orpo") or not compares):
            raise BadInputError(
                "ld_alpha and after_difference_weight weigh tokens in log-ratios with the reference, which preference "
                f"'{self.preference}' with quality '{self.quality}' does not use alone; leave them at 1"
            )
        if self.wpo and (self.preference in SORTED or self.preference == self.quality == "none"):
            raise BadInputError(
                f"wpo weighs pairs, which preference '{self.preference}' with quality '{self.quality}' does not look "
                "at one by one; leave it out"
            )

    def _choose_metric(self) -> None:
        """Know which checkpoint is the best one; transformers' own choice would be a loss that is not measured."""
        if not self.load_best_model_at_end and self.save_strategy != "best" and self.metric_for_best_model is None:
            return
        better = {"rewards/accuracy": True, "rewards/margin": True, "nll": False}
        name = (self.metric_for_best_model or "rewards/accuracy").removeprefix("eval_")
        if name not in better:
            raise BadInputError(f"metric_for_best_model is '{name}', expected one of {', '.join(better)}")
        self.metric_for_best_model = name
        if self.greater_is_better is None:
            self.greater_is_better = better[name]

    @property
    def weights(self) -> tuple[float, float, float]:
        """(w_p, w_q, w_g)."""
        return self.preference_weight, self.quality_weight, self.generation_weight

    @property
    def token_weights(self) -> TokenWeights:
        """How much each response token counts in the log-ratios."""
        return TokenWeights(self.ld_alpha, self.after_difference_weight, self.difference_tokens)

    @property
    def objective(self) -> dict[str, Any]:
        """The settings that `mpo_loss` takes as they are; JSON-able."""
        names = ("beta", "preference", "quality", "generation", "label_smoothing", "simpo_gamma", "dpop_lambda")
        return {name: getattr(self, name) for name in names} | {"weights": self.weights}
