"""How much memory a training run needs, from the shape of the model alone; no weights are read or made.

    python -m internvl_mpo.memory_estimate --model 8b --zero 3 --num_gpus 8 --device_gib 80
    python -m internvl_mpo.memory_estimate --run configs/internvl2_26b.yaml --num_gpus 8
    python -m internvl_mpo.memory_estimate --model path/to/config.json --lora_rank 16 --load_in_4bit true

Weights, gradients and optimizer states are counted on the real module tree. Activations are not a formula either: one
forward and backward pass of the program's own code runs on fake tensors (torch's FakeTensorMode: shapes and types, no
numbers), and the bytes alive at the worst moment are counted. So checkpointing, frozen parts, adapters and every
backbone are what they are in training. What is assumed, not counted: `RESERVE` for the device's context, communication
libraries and fragmentation; DeepSpeed's buckets as in configs/deepspeed; attention that saves its inputs, its output
and one number a row, as FlexAttention and flash attention do.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.families.shapes import SHAPES, read_shape
from internvl_mpo.objective import needs_reference
from internvl_mpo.programs import run_file
from internvl_mpo.settings import parse_settings, read_yaml, setting
from internvl_mpo.training.arguments import MPOArguments
from internvl_mpo.training.fake_pass import FakePolicy, Setup, fused_attention, look_at_policy
from internvl_mpo.training.fsdp import read_fsdp_config
from internvl_mpo.training.policy import Part

GIB = 2**30
# Allowances. On a GPU context, NCCL and fragmentation; on a CPU Python with the libraries a run imports, as measured.
RESERVE = {"fused": 2 * GIB, "segments": 0.9 * GIB}
BUCKET = 500_000_000  # elements in a communication bucket of ZeRO-1 and 2, see configs/deepspeed
LIVE_WEIGHTS = 1_000_000_000  # weights that ZeRO-3 may hold gathered at a time, see configs/deepspeed
# numbers that an optimizer keeps for a weight
STATES = {"adamw": 2, "adam": 2, "lion": 1, "adafactor": 0, "sgd": 0, "rmsprop": 1, "adagrad": 1}


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device, and what the host holds for it.

    Attributes:
        num_weights: weights of the model.
        num_trained: weights that are trained, adapters included.
        weights: of the share of this device, what ZeRO-3 or FSDP2 holds gathered, and a moving reference; on a CPU also
            the copy of the start weights.
        gradients: with DDP's or ZeRO's communication buckets, or those of layers that FSDP2 has not cut yet.
        optimizer: its states, and float32 copies of half-precision weights under DeepSpeed.
        activations: the most that a forward and backward pass adds, a part of the logits included.
        logits: the part of the logits that exists at a time, for comparison.
        step: what the optimizer step adds, when activations are gone.
        reserve: an allowance, see `RESERVE`.
        host: bytes in the host's memory for this device; under FSDP2 at least those of the whole model as it is read.
    """

    num_weights: int
    num_trained: int
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    step: float
    reserve: float
    host: float

    @property
    def total(self) -> float:
        """Bytes on the device at the worst moment."""
        return self.weights + self.gradients + self.optimizer + max(self.activations, self.step) + self.reserve


def estimate_memory(config: Any, setup: Setup) -> Estimate:
    """Return what one device needs.

    Args:
        config: shape of the model.
        setup: how it is trained.

    Raises:
        BadInputError: nothing is left to train.
        ValueError: the family has no estimate.
    """
    # The pass does not depend on how many devices there are, so that variants of one setup are cheap.
    alone = replace(
        setup, num_gpus=1, zero=0, fsdp=False, keep_gathered=False, offload_optimizer=False, offload_weights=False,
        optim="", start_copy=False,
    )  # fmt: skip
    if setup.fsdp:
        alone = replace(alone, dtype=setup.autocast or setup.dtype, autocast=None)
    policy = look_at_policy(json.dumps(config.to_dict(), sort_keys=True, default=str), alone)
    held = _under_fsdp(setup, policy) if setup.fsdp else _under_zero(setup, policy)
    return Estimate(
        num_weights=policy.num_weights,
        num_trained=policy.num_trained,
        activations=policy.activations,
        logits=policy.logits,
        reserve=RESERVE[setup.attention],
        **held,
    )


def _under_zero(setup: Setup, policy: FakePolicy) -> dict[str, float]:
    """What DDP or DeepSpeed holds, by field of `Estimate`."""
    ranks, trained, width = setup.num_gpus, policy.num_trained, policy.trained_bytes / policy.num_trained
    weights, host, step = policy.weight_bytes, 0.0, 0.0
    if setup.zero == 3:
        gathered = min(max(LIVE_WEIGHTS, policy.largest), policy.num_weights) * weights / policy.num_weights
        host += setup.offload_weights * weights / ranks
        weights = (0 if setup.offload_weights else weights / ranks) + gathered * (ranks > 1 or setup.offload_weights)
    weights += policy.trained_bytes * (setup.reference_sync_steps > 0)
    copied = policy.trained_bytes * (setup.start_copy and not setup.lora_rank and setup.zero != 3)
    if setup.attention == "segments":  # a CPU: the device's memory is the host's
        weights += copied
    else:
        host += copied
    gradients = policy.trained_bytes / (ranks if setup.zero >= 2 else 1)
    if setup.zero == 0 and ranks > 1:
        gradients += policy.trained_bytes  # DDP's buckets
    if setup.zero in (1, 2):
        gradients += 2 * min(BUCKET, trained) * width  # two, since communication overlaps with the backward pass
        step = 4 * policy.num_narrow / ranks + min(BUCKET, trained) * width
    optimizer = _state_bytes(setup, policy)
    if setup.offload_optimizer:
        host += optimizer + 4 * trained / ranks  # and the gradients in float32
        optimizer = step = 0.0
    return {"weights": weights, "gradients": gradients, "optimizer": optimizer, "step": step, "host": host}


def _under_fsdp(setup: Setup, policy: FakePolicy) -> dict[str, float]:
    """What FSDP2 holds, by field of `Estimate`: pieces of everything, and whole what is used now and next."""
    ranks, width = setup.num_gpus, getattr(torch, setup.autocast or setup.dtype).itemsize
    trained = 4 * policy.num_trained if setup.autocast else policy.trained_bytes
    frozen = (policy.num_weights - policy.num_trained) * getattr(torch, setup.dtype).itemsize
    two_layers = min(2 * policy.largest_layer, policy.num_weights)
    at_a_time = policy.num_weights if setup.keep_gathered else policy.beside_layers + two_layers
    pieces = (trained + frozen) / ranks
    gradients = trained / ranks
    optimizer = _num_states(setup) * trained / ranks
    copied = trained / ranks * (setup.start_copy and not setup.lora_rank)
    held = {
        "weights": width * at_a_time + pieces,
        "gradients": gradients + two_layers * policy.trained_bytes / policy.num_weights,
        "optimizer": optimizer,
        "host": copied,
    }
    if setup.attention == "segments":  # a CPU: the device's memory is the host's
        held["weights"] += copied
        held["host"] = 0.0
    elif setup.offload_weights:
        held["weights"] -= pieces
        held["gradients"] -= gradients
        held["optimizer"] = 0.0
        held["host"] += pieces + gradients + optimizer
    return {**held, "step": 0.0, "host": max(held["host"], trained + frozen)}


def _state_bytes(setup: Setup, policy: "FakePolicy") -> float:
    """Optimizer states of one device; DeepSpeed keeps them, and a copy of narrow weights, in float32."""
    count = _num_states(setup)
    if setup.zero:
        return (count * 4 * policy.num_trained + 4 * policy.num_narrow) / setup.num_gpus
    return count * (policy.num_trained if "8bit" in setup.optim else policy.trained_bytes)


def _num_states(setup: Setup) -> int:
    """Numbers that the optimizer keeps for a weight."""
    name = setup.optim.lower().removeprefix("paged_")
    return next((count for key, count in STATES.items() if name.startswith(key)), 2)


def show_estimate(estimate: Estimate, setup: Setup, device_bytes: int | None = None) -> str:
    """Return the estimate as text for a terminal."""
    engine = "FSDP2" if setup.fsdp else f"ZeRO-{setup.zero}" if setup.zero else "no DeepSpeed"
    devices = f"{setup.num_gpus} device" + "s" * (setup.num_gpus > 1)
    rows = [
        ("weights", estimate.weights, ""),
        ("gradients", estimate.gradients, "communication buckets included" if setup.num_gpus > 1 else ""),
        ("optimizer", estimate.optimizer, "in the host's memory" if setup.offload_optimizer else ""),
        ("activations", estimate.activations, f"with a part of the logits of {_size(estimate.logits)}"),
    ]
    if estimate.step > estimate.activations:
        rows[-1] = ("optimizer step", estimate.step, f"activations, gone by then: {_size(estimate.activations)}")
    rows += [
        ("reserve", estimate.reserve, "context, libraries, fragmentation: an allowance"),
        ("total", estimate.total, ""),
    ]
    if estimate.host:
        rows.append(("host", estimate.host, "of its memory, for each device"))
    lines = [
        f"expected memory of a device (calculated): {engine}, {devices}, {estimate.num_trained:,} of "
        f"{estimate.num_weights:,} weights trained, packs of {setup.max_tokens_per_pack:,} tokens"
    ]
    lines += [f"  {name:<14} {_size(size):>10}  {note}".rstrip() for name, size, note in rows]
    if device_bytes:
        lines.append(f"  {'device':<14} {_size(device_bytes):>10}")
    return "\n".join(lines)


def advise(config: Any, setup: Setup, device_bytes: int, longest_pair: int = 2048) -> str | None:
    """Return None if a run fits, else a sentence that says what to change, found by trying.

    Args:
        config: shape of the model.
        setup: how it is to be trained.
        device_bytes: memory of a device.
        longest_pair: tokens of the longest pair, below which packs cannot go.
    """
    needed = estimate_memory(config, setup).total
    if needed <= device_bytes:
        return None
    for words, changed in _ways_out(setup, longest_pair):
        tried = estimate_memory(config, changed)
        if tried.total <= device_bytes:
            host = f", and {_size(tried.host)} of the host's memory for each device" if tried.host else ""
            return (
                f"this needs {_size(needed)} of a device's {_size(device_bytes)}; with {words} it would need "
                f"{_size(tried.total)}{host}"
            )
    return (
        f"this needs {_size(needed)} of a device's {_size(device_bytes)}, and neither QLoRA nor 512 devices that share "
        "all weights bring it down to that; take a smaller model or a larger device"
    )


def _ways_out(setup: Setup, longest_pair: int) -> Iterator[tuple[str, Setup]]:
    """Changes from the cheapest to the one that costs most, each on top of those before it up to ZeRO-3."""
    words: list[str] = []
    if not setup.gradient_checkpointing:
        words.append("gradient_checkpointing true")
        setup = replace(setup, gradient_checkpointing=True)
        yield ", ".join(words), setup
    tokens = max(longest_pair, setup.max_tokens_per_pack // 2)
    if tokens < setup.max_tokens_per_pack:
        share = None if setup.num_tiles is None else setup.num_tiles * tokens // setup.max_tokens_per_pack
        words.append(f"max_tokens_per_pack {tokens}")
        setup = replace(setup, max_tokens_per_pack=tokens, num_tiles=share)
        yield ", ".join(words), setup
    if setup.load_in_4bit:  # DeepSpeed does not partition 4-bit weights
        return
    for stage in range(setup.zero + 1, 4) if setup.num_gpus > 1 and not setup.fsdp else ():
        if stage == 3 and setup.reference_sync_steps:
            break
        file = f"deepspeed configs/deepspeed/zero{stage}.json"
        yield ", ".join([*words, file]), replace(setup, zero=stage)
    if setup.reference_sync_steps:  # ZeRO-3 and 4 bits, which is all that is left, come without a moving reference
        words.append("reference_sync_steps 0")
        setup = replace(setup, reference_sync_steps=0)
        yield ", ".join(words), setup
        if setup.num_gpus > 1 and setup.zero < 3 and not setup.fsdp:
            yield ", ".join([*words, "deepspeed configs/deepspeed/zero3.json"]), replace(setup, zero=3)
    offload = 'fsdp_config {"cpu_offload": true}' if setup.fsdp else "deepspeed configs/deepspeed/zero3_offload.json"
    zero = 0 if setup.fsdp else 3
    yield ", ".join([*words, offload]), replace(setup, zero=zero, offload_optimizer=True, offload_weights=True)
    full = setup
    if not setup.lora_rank:
        setup = replace(setup, lora_rank=16, freeze_vision=True, freeze_projector=True)
        yield ", ".join([*words, "lora_rank 16"]), setup
    adapters = "lora_rank 16, load_in_4bit true" + ", deepspeed none" * (setup.zero > 0) + ", fsdp false" * setup.fsdp
    yield ", ".join([*words, adapters]), replace(setup, load_in_4bit=True, zero=0, fsdp=False)
    for num_gpus in (8, 16, 32, 64, 128, 256, 512):
        if num_gpus > setup.num_gpus:
            more = replace(full, num_gpus=num_gpus, zero=zero)
            yield ", ".join([*words, f"{'fsdp' if setup.fsdp else 'zero3.json'} on {num_gpus} devices"]), more


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= 0.1 * GIB else f"{num_bytes / 2**20:.1f} MiB"


def device_bytes() -> int | None:
    """Memory of this process's device, or None where it is not known."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


for _name in ("fused_for_estimate", "flash_for_estimate"):
    AttentionInterface.register(_name, fused_attention)
    AttentionMaskInterface.register(_name, sdpa_mask)


# --- the command ------------------------------------------------------------------------------------------------------


@dataclass
class EstimateSettings:
    """Settings of `python -m internvl_mpo.memory_estimate`."""

    model: str | None = setting(None, help="config.json, a model folder, or a size: " + " ".join(SHAPES))
    run: str | None = setting(None, help="run file of train_mpo.py; what is given beside it wins")
    num_gpus: int = setting(1, help="devices that share the work")
    device_gib: float | None = setting(None, help="memory of a device; none = that of the GPU here, if there is one")
    zero: int | None = setting(None, help="ZeRO stage; 0 = no DeepSpeed (default: as in the run file, else 0)")
    fsdp: bool | None = setting(None, help="FSDP2 instead of ZeRO")
    keep_gathered: bool | None = setting(None, help="with reshard_after_forward false (FSDP2)")
    offload_optimizer: bool | None = setting(None, help="optimizer states in the host's memory")
    offload_weights: bool | None = setting(None, help="weights there too (ZeRO-3; FSDP2: everything)")
    dtype: str | None = setting(None, help="type of the weights: bfloat16 float16 float32")
    autocast: str | None = setting(None, help="type of matrix products where weights are float32")
    optim: str | None = setting(None, help="as in TrainingArguments")
    gradient_checkpointing: bool | None = setting(None, help="compute layers again in the backward pass")
    checkpoint_vision: bool | None = setting(None, help="those of the vision tower alone")
    checkpoint_language: bool | None = setting(None, help="those of the language model alone")
    lora_rank: int | None = setting(None, help="rank of adapters; 0 trains all weights")
    lora_on: Part | None = setting(None, help="language, vision or both")
    load_in_4bit: bool | None = setting(None, help="language model in 4 bits")
    freeze_vision: bool | None = setting(None, help="do not train the vision tower")
    freeze_projector: bool | None = setting(None, help="do not train the projector")
    freeze_language: bool | None = setting(None, help="do not train the language model")
    freeze_language_layers: int | None = setting(None, help="nor so many of its first layers")
    reference_sync_steps: int | None = setting(None, help="above 0: a moving reference")
    max_tokens_per_pack: int | None = setting(None, help="tokens of one forward pass")
    num_tiles: int | None = setting(None, help="tiles of one forward pass; none = four fifths of the tokens are images")
    response_tokens: int | None = setting(None, help="scored tokens of a response")
    attention: Literal["fused", "segments"] | None = setting(None, help="fused (CUDA) or segments (CPU)")


def main(argv: list[str]) -> int:
    """Print the estimate; exit with 1 if it does not fit."""
    settings = parse_settings(
        EstimateSettings, argv, program="-m internvl_mpo.memory_estimate", about=__doc__, config=False
    )
    run = read_yaml(settings.run) if settings.run else {}
    source = settings.model or run.get("model")
    if source is None:
        raise BadInputError("give --model (a config.json, a folder or a size such as 8b) or --run FILE.yaml")
    config = read_shape(source)
    given = {field.name: getattr(settings, field.name, None) for field in fields(Setup)}
    setup = Setup(**{**setup_of_run(run), **{name: value for name, value in given.items() if value is not None}})
    if setup.num_gpus < 1 or setup.zero not in (0, 1, 2, 3) or setup.max_tokens_per_pack < 1:
        raise BadInputError(
            f"num_gpus {setup.num_gpus}, zero {setup.zero} and max_tokens_per_pack {setup.max_tokens_per_pack} do not "
            "fit together: at least one device and one token, and a ZeRO stage from 0 to 3"
        )
    if setup.fsdp and (setup.zero or setup.num_gpus == 1):
        raise BadInputError(
            "fsdp shares weights out over devices, without DeepSpeed; give --num_gpus 2 or more, --zero 0"
        )
    size = int(settings.device_gib * GIB) if settings.device_gib else device_bytes()
    estimate = estimate_memory(config, setup)
    print(show_estimate(estimate, setup, size))
    if not size:
        return 0
    advice = advise(config, setup, size)
    print(advice or f"this fits: {_size(estimate.total)} of a device's {_size(size)}")
    return 1 if advice else 0


def setup_of_run(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the settings of `train_mpo.py` say about memory, as arguments of `Setup`.

    Raises:
        BadInputError: the DeepSpeed file cannot be read.
    """
    if not run:
        return {}
    names = {field.name for field in fields(Setup)} - {"zero", "num_gpus", "num_tiles", "attention"}
    values = {name: run[name] for name in names if run.get(name) is not None}
    values.setdefault("dtype", "float32")
    values.setdefault("gradient_checkpointing", False)
    precision = "bfloat16" if run.get("bf16") else "float16" if run.get("fp16") else None
    terms = (run.get(name, getattr(MPOArguments, name)) for name in ("preference", "quality"))
    is_ahead = run.get("reference_pass", "ahead") == "ahead" and not run.get("reference_model")
    values["start_copy"] = is_ahead and needs_reference(*terms)
    engine = run.get("deepspeed")
    values["fsdp"] = bool(run.get("fsdp"))
    if values["fsdp"]:
        config = read_fsdp_config(run.get("fsdp_config"))
        values["keep_gathered"] = str(config.get("reshard_after_forward", True)).lower() == "false"
        values["offload_optimizer"] = values["offload_weights"] = bool(config.get("cpu_offload"))
        values["autocast"] = precision
    elif engine:
        zero = _read_engine(engine).get("zero_optimization", {})
        values["zero"] = int(zero.get("stage", 0))
        for name, key in (("offload_optimizer", "offload_optimizer"), ("offload_weights", "offload_param")):
            values[name] = zero.get(key, {}).get("device", "none") != "none"
        values["dtype"] = precision or values["dtype"]  # DeepSpeed casts the weights
    elif precision and values["dtype"] == "float32":
        values["autocast"] = precision
    return values


def _read_engine(engine: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """A DeepSpeed configuration, given itself or as a file."""
    if not isinstance(engine, str):
        return engine
    try:
        return json.loads(run_file(engine).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInputError(f"cannot read the DeepSpeed file '{engine}': {error}") from error


if __name__ == "__main__":
    sys.exit(run_program(main))
