"""Repeat a training step that was not finite, pair by pair, and say where it goes wrong.

    python -m internvl_mpo.replay --dump outputs/run/not_finite_step12_rank0.json

Runs exactly the pairs of the dump with the weights of the last whole checkpoint, or of the start model where there is
none, and prints log-probs, loss terms and gradient norm of each, and the first module whose output or gradient is not
finite. If all is finite here, the weights had gone wrong by then, not the pairs: lower the learning rate.
"""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from internvl_mpo.encoding import encode_group
from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.families.registry import family_of_source
from internvl_mpo.logps import attach_scoring, score_pairs
from internvl_mpo.objective import mpo_loss, wpo_weights
from internvl_mpo.packing import pack_groups
from internvl_mpo.records import PreferencePair
from internvl_mpo.settings import parse_settings, setting
from internvl_mpo.token_weights import TokenWeights
from internvl_mpo.training.checkpoint import whole_checkpoints


@dataclass
class ReplaySettings:
    """Settings of `python -m internvl_mpo.replay`."""

    dump: str = setting(help="not_finite_*.json that the training run left")
    model: str | None = setting(
        None, help="weights to use; none = last whole checkpoint of the run, else the start model"
    )
    device: str = setting("auto", help="cuda, cpu, mps; auto takes what is there")


@dataclass(frozen=True)
class Replayed:
    """What one pair gives.

    Attributes:
        pair_id: its id.
        numbers: log-probs, terms, loss and norm of the gradient.
        first_output: first module whose output is not finite, or None.
        first_gradient: first module, seen from the loss, whose output's gradient is not finite, or None.
    """

    pair_id: str
    numbers: dict[str, float]
    first_output: str | None
    first_gradient: str | None

    @property
    def is_finite(self) -> bool:
        """Whether everything is."""
        return self.first_output is self.first_gradient is None and all(map(math.isfinite, self.numbers.values()))


def read_dump(path: str | Path) -> dict[str, Any]:
    """Return a dump.

    Raises:
        BadInputError: it cannot be read, or is something else.
    """
    try:
        dump = json.loads(Path(path).read_text(encoding="utf-8"))
        assert isinstance(dump, dict)
        missing = {"model", "pairs", "beta", "weights", "reward_shift", "max_tiles", "max_length"} - dump.keys()
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, AssertionError, RecursionError) as error:
        raise BadInputError(f"{path} is not a dump of a training run: it is no JSON object") from error
    if missing:
        raise BadInputError(f"{path} is not a dump of a training run: key '{min(missing)}' is missing")
    return dump


def replay_pair(model: nn.Module, processor: Any, dump: Mapping[str, Any], row: Mapping[str, Any]) -> Replayed:
    """Run one pair forward and backward.

    Args:
        model: went through `attach_scoring`.
        processor: of the model.
        dump: settings of the run.
        row: one of its pairs.
    """
    pair = PreferencePair.from_json({key: row[key] for key in row if key not in _EXTRA})
    group = encode_group(
        processor,
        [pair],
        row["image_root"],
        max_tiles=row["max_tiles"] or dump["max_tiles"],
        max_length=dump["max_length"],
    )
    device = next(model.parameters()).device
    pack = pack_groups([TokenWeights(**dump.get("token_weights", {})).weigh(group)]).to(device)
    wpo = dump.get("wpo", False)
    autocast = nullcontext()
    if dump.get("autocast"):
        autocast = torch.autocast(device.type, getattr(torch, dump["autocast"]))
    model.zero_grad(set_to_none=True)
    reference = [torch.tensor([value], device=device) for value in row["reference_logps"]]
    with _watched(model) as (outputs, gradients):
        with autocast:
            scores = score_pairs(model, pack, likeness=wpo)
        out = mpo_loss(
            scores.chosen,
            scores.rejected,
            *reference,
            pack.chosen_lengths_P,
            shift=dump["reward_shift"],
            rejected_lengths=pack.rejected_lengths_P,
            generation_logps=scores.whole_chosen,
            pair_weights=wpo_weights(scores.chosen_likeness, scores.rejected_likeness) if wpo else None,
            **{name: dump[name] for name in _OBJECTIVE if name in dump},
        )
        out.loss.backward()
    grads = [p.grad.float().norm() for p in model.parameters() if p.grad is not None]
    numbers = {
        "chosen logp": scores.whole_chosen.item(),
        "rejected logp": scores.whole_rejected.item(),
        "preference": out.preference.item(),
        "quality": out.quality.item(),
        "generation": out.generation.item(),
        "loss": out.loss.item(),
        "grad norm": torch.stack(grads).norm().item() if grads else 0.0,
    }
    return Replayed(pair.id, numbers, next(iter(outputs), None), next(iter(gradients), None))


# what `mpo_loss` takes as it is; a dump of an earlier version lacks the last two
_OBJECTIVE = ("beta", "weights", "preference", "quality", "generation", "label_smoothing", "simpo_gamma", "dpop_lambda")
_EXTRA = ("where", "image_root", "max_tiles", "reference_logps")


@contextmanager
def _watched(model: nn.Module) -> Iterator[tuple[list[str], list[str]]]:
    """Collect the names of modules whose output, and whose output's gradient, is not finite, as it happens."""
    outputs: list[str] = []
    gradients: list[str] = []

    def look(name: str) -> Any:
        def on_forward(module: nn.Module, inputs: Any, output: Any) -> None:
            for leaf in tree_leaves(output if isinstance(output, (Tensor, tuple)) else dict(output or {})):
                if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                    continue
                if not bool(torch.isfinite(leaf).all()):
                    outputs.append(name)
                if leaf.requires_grad:
                    leaf.register_hook(
                        lambda grad: None if bool(torch.isfinite(grad).all()) else gradients.append(name)
                    )

        return on_forward

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        yield outputs, gradients
    finally:
        for handle in handles:
            handle.remove()


def load_policy(source: str | Path, base: str, dtype: torch.dtype) -> tuple[nn.Module, Any]:
    """Return a model and its processor from a model folder, or from a checkpoint that holds adapters of `base`."""
    adapters = (Path(source) / "adapter_config.json").is_file()
    folder = base if adapters else str(source)
    try:
        family = family_of_source(folder)
        model, processor = family.load_model(folder, dtype=dtype), family.load_processor(folder)
    except (OSError, ValueError) as error:
        raise BadInputError(f"cannot load weights from '{source}': {' '.join(str(error).split())}") from error
    if adapters:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(source), is_trainable=True)
    return model, processor


def weights_to_use(dump: Mapping[str, Any]) -> str:
    """Return the newest checkpoint of the run that holds weights in a file of their own, else the start model."""
    for folder in reversed(whole_checkpoints(dump["output_dir"])):
        if any(folder.glob("*model*.safetensors")):
            return str(folder)
    return dump["model"]


def main(argv: list[str]) -> int:
    """Print a table and a verdict; exit with 1 if a number is not finite."""
    settings = parse_settings(ReplaySettings, argv, program="-m internvl_mpo.replay", about=__doc__, config=False)
    dump = read_dump(settings.dump)
    source = settings.model or weights_to_use(dump)
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    model, processor = load_policy(source, dump["model"], getattr(torch, dump["dtype"]))
    attach_scoring(model.to(device).train())
    print(f"{len(dump['pairs'])} pairs of step {dump['step']}, whose {dump['what']} was not finite; weights: {source}")
    if dump["weights_not_finite"]:
        names = dump["weights_not_finite"]
        print(f"when the run stopped, {len(names)} weight tensors were not finite, {names[0]} the first")
    results = []
    for row in dump["pairs"]:
        result = replay_pair(model, processor, dump, row)
        if not results:
            print(f"{'pair':<20} " + " ".join(f"{name:>13}" for name in result.numbers) + "  first that is not finite")
        results.append(result)
        where = result.first_output or (result.first_gradient and f"gradient at {result.first_gradient}") or "-"
        print(f"{result.pair_id:<20} " + " ".join(f"{v:>13.4f}" for v in result.numbers.values()) + f"  {where}")
    bad = [result for result in results if not result.is_finite]
    if bad:
        print(f"{len(bad)} of {len(results)} pairs are not finite with these weights; {bad[0].pair_id} is the first")
        return 1
    print("all pairs are finite with these weights: the weights had gone wrong by that step, not the pairs; lower "
          "learning_rate, lengthen the warm-up, or keep max_grad_norm at 1")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
