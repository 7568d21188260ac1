"""What is measured on held-out pairs during training: rewards, NLL, and sampled answers to their questions."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from internvl_mpo.families.registry import family_of_model
from internvl_mpo.logps import score_pairs
from internvl_mpo.pack_plan import fill_packs
from internvl_mpo.packing import Group, Pack
from internvl_mpo.training.arguments import MPOArguments
from internvl_mpo.training.data import GroupDataset
from internvl_mpo.training.meters import MeanMeter
from internvl_mpo.training.pairs import TrainingPairs


class HeldOut:
    """The held-out pairs of a run and what they are asked."""

    def __init__(
        self,
        pairs: TrainingPairs,
        dataset: GroupDataset,
        args: MPOArguments,
        *,
        collate: Callable[[Sequence[Group]], Pack],
        reference_logps: Callable[[Pack], tuple[Tensor, Tensor]],
    ):
        """Keep the pairs.

        Args:
            pairs: at least one.
            dataset: encodes them.
            args: budget, precision, ranks.
            collate: packs groups.
            reference_logps: gives the reference log-probs of a pack, chosen and rejected. Shape: 2 x (P,)
        """
        self.pairs, self.dataset, self.args = pairs, dataset, args
        self.collate, self.reference_logps = collate, reference_logps

    @torch.no_grad()
    def rewards(self, model: nn.Module, accelerator: Any, prefix: str) -> dict[str, float]:
        """Return accuracy, margin, NLL and changes a token, and the number of pairs, over all ranks; a collective.

        Args:
            model: the policy in evaluation mode, wrapped where there is more than one rank.
            accelerator: adds up over the ranks.
            prefix: of the names.
        """
        # Every rank does the same number of packs, so that sharded models meet in the same collectives.
        costs = self.pairs.column("num_tokens").tolist()
        packs = fill_packs(costs, max(self.args.max_tokens_per_pack, max(costs)))
        ranks, rank = self.args.world_size, self.args.process_index
        meter = MeanMeter()
        for turn in range(math.ceil(len(packs) / ranks)):
            number = turn * ranks + rank
            pack = self.collate([self.dataset[(row,)] for row in packs[min(number, len(packs) - 1)]])
            pack = pack.to(self.args.device)
            reference_chosen, reference_rejected = self.reference_logps(pack)
            scores = score_pairs(model, pack)
            num_pairs = pack.num_pairs if number < len(packs) else 0  # a pack that only fills the round
            chosen_rewards = self.args.beta * (scores.chosen - reference_chosen)
            rejected_rewards = self.args.beta * (scores.rejected - reference_rejected)
            values = {
                f"{prefix}_rewards/accuracy": chosen_rewards > rejected_rewards,
                f"{prefix}_rewards/margin": chosen_rewards - rejected_rewards,
                f"{prefix}_nll": -scores.whole_chosen / pack.chosen_lengths_P,
                f"{prefix}_logps/chosen_change": (scores.chosen - reference_chosen) / pack.chosen_lengths_P,
                f"{prefix}_logps/rejected_change": (scores.rejected - reference_rejected) / pack.rejected_lengths_P,
            }
            meter.add(num_pairs, {name: value[:num_pairs] for name, value in values.items()})
        means = meter.reduce(accelerator)
        means[f"{prefix}_num_pairs"] = means.pop("num_pairs")
        return {name: value for name, value in means.items() if name not in ("num_tokens", "flop")}

    def answers(self, model: nn.Module, tokenizer: Any, step: int) -> list[dict[str, Any]]:
        """Return greedy answers to `num_eval_samples` of the questions; all ranks do the same, see `greedy_answers`.

        Args:
            model: the policy in evaluation mode, not wrapped.
            tokenizer: turns ids into text.
            step: noted in each row.
        """
        count, limit = self.args.num_eval_samples, self.args.eval_sample_tokens
        questions: dict[Any, int] = {}
        for index, key in enumerate(self.pairs.column("key").tolist()):
            questions.setdefault(key, index)
        spread = max(1, len(questions) // max(1, count))  # over all files, which lie one after another
        asked = list(questions.values())[::spread][:count]
        precision = torch.bfloat16 if self.args.bf16 else torch.float16
        with torch.autocast(self.args.device.type, precision, enabled=self.args.bf16 or self.args.fp16):
            answers = greedy_answers(model, [self.dataset[(index,)] for index in asked], limit)
        return [
            {
                "step": step,
                "images": list(self.pairs.rows[index].pair.images),
                "question": self.pairs.rows[index].pair.question,
                "answer": tokenizer.decode(ids, skip_special_tokens=True),
                "chosen": self.pairs.rows[index].pair.chosen,
                "num_tokens": len(ids),
                "finished": len(ids) < limit,
                "repetition": repetition(ids),
            }
            for index, ids in zip(asked, answers, strict=True)
        ]


def closing_line(metrics: Mapping[str, float], is_compared: bool) -> str:
    """Return what a run did to pairs it has not seen, and the control arm it is to be compared with.

    Args:
        metrics: of the last evaluation, with the prefix "eval".
        is_compared: whether the loss compared chosen with rejected responses, as SFT does not.
    """
    chosen, rejected = (metrics[f"eval_logps/{side}_change"] for side in ("chosen", "rejected"))
    words = (
        "both less likely" if max(chosen, rejected) < 0 else "both likelier" if min(chosen, rejected) > 0 else "apart"
    )
    line = (
        f"held-out pairs: reward accuracy {metrics['eval_rewards/accuracy']:.3f} of {metrics['eval_num_pairs']:.0f}; "
        f"nats a token against the reference: chosen {chosen:+.3f}, rejected {rejected:+.3f} ({words})"
    )
    if not is_compared:
        return line
    control = "--preference none --quality none and another --output_dir"
    return f"{line}\nthe arm to beat is SFT on the chosen responses: the same command with {control}"


def sample_means(samples: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, float]:
    """Return means over sampled answers, see `HeldOut.answers`; empty where there are none."""
    if not samples:
        return {}
    values = {
        "length": [sample["num_tokens"] for sample in samples],
        "unfinished": [not sample["finished"] for sample in samples],
        "repetition": [sample["repetition"] for sample in samples],
    }
    return {f"{prefix}_samples/{name}": sum(column) / len(column) for name, column in values.items()}


@torch.no_grad()
def greedy_answers(model: nn.Module, groups: Sequence[Group], max_new_tokens: int) -> list[list[int]]:
    """Return greedy continuations of the groups' prompts, as token ids without the prompt.

    Every rank must call this with the same groups where weights are sharded.

    Args:
        model: of any family, or a PEFT model around it, in evaluation mode.
        groups: encoded prompts.
        max_new_tokens: where an answer is cut.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    family, device = family_of_model(base), next(model.parameters()).device
    answers = []
    for group in groups:
        prompt = torch.tensor([group.prompt_ids], device=device)
        inputs = family.forward_inputs(group, 1, device) | family.token_inputs(base, prompt)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        ids = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            **inputs,
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
