"""Held-out pairs, and sampled answers to their questions during training."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from internvl_mpo.errors import BadInputError
from internvl_mpo.mmpr.pairs import PairRow
from internvl_mpo.packing import Group

if TYPE_CHECKING:
    from internvl_mpo.pack_plan import PairSize


def hold_out(
    settings: Any, rows: list[PairRow], sizes: list["PairSize"]
) -> tuple[list[PairRow], list["PairSize"], list[PairRow], list["PairSize"]]:
    """Return training rows, their sizes, held-out rows, and theirs.

    A question is held out by a number that depends on it alone, so that all its pairs stay on one side and other data
    beside it change nothing. Where the share comes to no question, the one with the smallest number is held out: an
    evaluation that was asked for needs one.

    Raises:
        BadInputError: that would be the only one.
    """
    if not settings.held_out_share:
        return rows, sizes, [], []
    shares = [_share_of(row.pair.group_key) for row in rows]
    border = max(settings.held_out_share, math.nextafter(min(shares), 1))
    kept = [index for index, share in enumerate(shares) if share >= border]
    held_out = [index for index, share in enumerate(shares) if share < border]
    if not kept:
        raise BadInputError(
            f"held_out_share {settings.held_out_share} leaves no question to train on; lower it, or give more data"
        )
    return (*([values[index] for index in part] for part in (kept, held_out) for values in (rows, sizes)),)


def _share_of(key: str) -> float:
    """A number in [0, 1) that depends on the question only, so that its pairs stay on one side."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big") / 2**56


# --- samples ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def greedy_answers(model: nn.Module, groups: Sequence[Group], max_new_tokens: int) -> list[list[int]]:
    """Return greedy continuations of the groups' prompts, as token ids without the prompt.

    Every rank must call this with the same groups where weights are sharded.

    Args:
        model: `InternVLChatModel`, or a PEFT model around it, in evaluation mode.
        groups: encoded prompts.
        max_new_tokens: where an answer is cut.
    """
    device = next(model.parameters()).device
    answers = []
    for group in groups:
        prompt = torch.tensor([group.prompt_ids], device=device)
        tiles = {} if group.tiles is None else {"pixel_values": group.tiles.to(device, model.dtype)}
        ids = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            **tiles,
        )
        answers.append(ids[0, prompt.shape[1] :].tolist())
    return answers


def repetition(ids: Sequence[int], size: int = 4) -> float:
    """Return the share of n-grams of tokens that occurred before in the same answer; 0 for short answers."""
    grams = [tuple(ids[start : start + size]) for start in range(len(ids) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def send_samples(callbacks: Sequence[Any], samples: Sequence[Mapping[str, Any]], step: int) -> None:
    """Hand samples to the trackers among transformers' callbacks: text in TensorBoard, a table in wandb and trackio."""
    columns = ("question", "answer", "chosen", "repetition")
    rows = [[step, *(sample[column] for column in columns)] for sample in samples]
    for callback in callbacks:
        name = type(callback).__name__
        if name == "TensorBoardCallback" and callback.tb_writer is not None:
            text = "\n\n---\n\n".join(
                f"**question** {sample['question']}\n\n**answer** {sample['answer']}\n\n**chosen** {sample['chosen']}"
                for sample in samples
            )
            callback.tb_writer.add_text("eval/samples", text, step)
        elif name == "WandbCallback" and getattr(callback, "_wandb", None) is not None:
            table = callback._wandb.Table(columns=["step", *columns], data=rows)
            callback._wandb.log({"eval/samples": table, "train/global_step": step})
        elif name == "TrackioCallback" and callback._trackio.context_vars.current_run.get() is not None:
            import pandas

            table = callback._trackio.Table(dataframe=pandas.DataFrame(rows, columns=["step", *columns]))
            callback._trackio.log({"eval/samples": table})
