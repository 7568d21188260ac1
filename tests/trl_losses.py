"""TRL's own loss computation, fed with log-probs of tokens in place of a model."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

PROMPT = 2  # tokens before a response


def trl_dpo_loss(
    policy: list[Tensor],
    reference: list[Tensor],
    loss_type: str,
    log_squares: list[Tensor] | None = None,
    **settings: Any,
) -> Tensor:
    """Return the loss of `DPOTrainer`, a mean over pairs.

    Args:
        policy: log-probs of the tokens of all chosen, then of all rejected responses. Each of shape (tokens,)
        reference: the same under the reference.
        loss_type: TRL's name.
        log_squares: log sum_v p(v)^2 at each of these tokens, for WPO's weights.
        settings: beta, label_smoothing, ld_alpha.
    """
    from trl.trainer.dpo_trainer import DPOTrainer

    same = lambda values: values  # noqa: E731 - one process has nothing to gather
    owner = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", gather=same, gather_for_metrics=same),
        model=_Scores(policy, log_squares),
        ref_model=_Scores(reference, log_squares),
        aux_loss_enabled=False,
        precompute_ref_logps=False,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        use_weighting=log_squares is not None,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        _metrics={"train": _Anything(), "eval": _Anything()},
        _total_train_tokens=0,
        _tp_size=1,
        **{"beta": 0.1, "label_smoothing": 0.0, "ld_alpha": None, **settings},
    )
    return DPOTrainer._compute_loss(owner, owner.model, owner.model.inputs(), return_outputs=False)


class _Anything(dict):
    def __missing__(self, name: str) -> list:
        return self.setdefault(name, [])


class _Scores(nn.Module):
    """In place of a model: answers with the log-probs it was made with."""

    is_gradient_checkpointing = False

    def __init__(self, rows: list[Tensor], log_squares: list[Tensor] | None):
        super().__init__()
        self.lengths = torch.tensor([len(row) for row in rows])
        self.outputs = SimpleNamespace(log_probs=_pad(rows))
        self.outputs.log_sum_sq_probs = _pad(log_squares or rows)
        self.outputs.is_top1 = torch.zeros_like(self.outputs.log_probs, dtype=torch.bool)
        self.outputs.entropy = self.outputs.mean_logits = torch.zeros_like(self.outputs.log_probs)

    def inputs(self) -> dict[str, Tensor]:
        place = torch.arange(PROMPT + int(self.lengths.max()))
        real = place < PROMPT + self.lengths[:, None]
        return {
            "input_ids": real.long(),
            "attention_mask": real.long(),
            "completion_mask": (real & (place >= PROMPT)).long(),
        }

    def forward(self, **inputs: Any) -> SimpleNamespace:
        return self.outputs


def _pad(rows: list[Tensor]) -> Tensor:
    """One row per response, zeros before (all but the first token of a prompt is predicted) and behind."""
    padded = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return torch.cat([padded.new_zeros(len(rows), PROMPT - 1), padded], dim=1)
