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

import contextlib
import functools
import json
import re
import sys
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.logps import CPU_TILE_BYTES, MIN_CHUNK, TILE_BYTES, attach_scoring, response_logps
from internvl_mpo.packed_attention import segment_attention
from internvl_mpo.packing import Group, Pack, pack_groups
from internvl_mpo.policy import Part, add_adapters, freeze
from internvl_mpo.settings import parse_settings, read_yaml, setting
from internvl_mpo.speed import checkpoint_parts
from modeling_internvl_mpo import InternVLChatConfig, InternVLChatModel

GIB = 2**30
RESERVE = {"fused": 2 * GIB, "segments": 0.7 * GIB}  # allowances: context, NCCL, fragmentation; Python with torch
BUCKET = 500_000_000  # elements in a communication bucket of ZeRO-1 and 2, see configs/deepspeed
LIVE_WEIGHTS = 1_000_000_000  # weights that ZeRO-3 may hold gathered at a time, see configs/deepspeed
NF4_BYTES = 0.5 + 4 / 64  # 4 bits, and a float32 scale for every 64 weights
# numbers that an optimizer keeps for a weight
STATES = {"adamw": 2, "adam": 2, "lion": 1, "adafactor": 0, "sgd": 0, "rmsprop": 1, "adagrad": 1}

_VISION_300M = {
    **{"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    **{"norm_type": "layer_norm", "qk_normalization": False, "qkv_bias": True, "image_size": 448},
}
_VISION_6B = {
    **{"hidden_size": 3200, "num_hidden_layers": 45, "num_attention_heads": 25, "intermediate_size": 12800},
    **{"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False, "image_size": 448},
}
# The official InternVL2 checkpoints: tower; language model; its width, layers, heads, key heads, inner width, words.
SHAPES: dict[str, tuple[dict[str, Any], str, tuple[int, int, int, int, int, int]]] = {
    "1b": (_VISION_300M, "Qwen2ForCausalLM", (896, 24, 14, 2, 4864, 151655)),
    "2b": (_VISION_300M, "InternLM2ForCausalLM", (2048, 24, 16, 8, 8192, 92553)),
    "4b": (_VISION_300M, "Phi3ForCausalLM", (3072, 32, 32, 32, 8192, 32020)),
    "8b": (_VISION_300M, "InternLM2ForCausalLM", (4096, 32, 32, 8, 14336, 92553)),
    "26b": (_VISION_6B, "InternLM2ForCausalLM", (6144, 48, 48, 8, 16384, 92553)),
    "40b": (_VISION_6B, "LlamaForCausalLM", (7168, 60, 56, 8, 20480, 64009)),
    "76b": (_VISION_6B, "LlamaForCausalLM", (8192, 80, 64, 8, 28672, 128265)),
}


@dataclass(frozen=True)
class Setup:
    """What memory depends on besides the shape of the model; names are those of `train_mpo.py` where it has them.

    Attributes:
        num_gpus: devices that share the work.
        zero: ZeRO stage; 0 is no DeepSpeed (DDP on several devices).
        offload_optimizer: its states live in the host's memory.
        offload_weights: so do the weights (ZeRO-3).
        dtype: type of the weights.
        autocast: type that matrix products run in where the weights are wider, or None.
        optim: as in TrainingArguments.
        gradient_checkpointing: layers of both towers are computed again in the backward pass.
        checkpoint_vision, checkpoint_language: those of one tower are.
        lora_rank: rank of adapters, 0 trains the weights themselves.
        lora_on: which tower gets them.
        load_in_4bit: NF4 weights of the language model.
        freeze_vision, freeze_projector, freeze_language, freeze_language_layers: what is not trained.
        reference_sync_steps: above 0, a moving reference takes a second copy of what is trained.
        max_tokens_per_pack: tokens of one forward pass.
        num_tiles: tiles of one forward pass; None means that four fifths of the tokens are image tokens.
        response_tokens: scored tokens of a response.
        attention: "fused" as on CUDA, "segments" as on a CPU.
    """

    num_gpus: int = 1
    zero: int = 0
    offload_optimizer: bool = False
    offload_weights: bool = False
    dtype: str = "bfloat16"
    autocast: str | None = None
    optim: str = "adamw_torch_fused"
    gradient_checkpointing: bool = True
    checkpoint_vision: bool = False
    checkpoint_language: bool = False
    lora_rank: int = 0
    lora_on: Part = "language"
    load_in_4bit: bool = False
    freeze_vision: bool = False
    freeze_projector: bool = False
    freeze_language: bool = False
    freeze_language_layers: int = 0
    reference_sync_steps: int = 0
    max_tokens_per_pack: int = 8192
    num_tiles: int | None = None
    response_tokens: int = 300
    attention: Literal["fused", "segments"] = "fused"


@dataclass(frozen=True)
class Estimate:
    """Bytes on one device, and what the host holds for it.

    Attributes:
        num_weights: weights of the model.
        num_trained: weights that are trained, adapters included.
        weights: of the share of this device, what ZeRO-3 holds gathered, and a moving reference.
        gradients: with DDP's or ZeRO's communication buckets.
        optimizer: its states, and float32 copies of half-precision weights under DeepSpeed.
        activations: the most that a forward and backward pass adds, a part of the logits included.
        logits: the part of the logits that exists at a time, for comparison.
        step: what the optimizer step adds, when activations are gone.
        reserve: an allowance, see `RESERVE`.
        host: bytes in the host's memory for this device.
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


def estimate_memory(config: InternVLChatConfig, setup: Setup) -> Estimate:
    """Return what one device needs.

    Args:
        config: shape of the model.
        setup: how it is trained.

    Raises:
        BadInputError: nothing is left to train.
    """
    # The pass does not depend on how many devices there are, so that variants of one setup are cheap.
    alone = replace(setup, num_gpus=1, zero=0, offload_optimizer=False, offload_weights=False, optim="")
    policy = _look(json.dumps(config.to_dict(), sort_keys=True, default=str), alone)
    ranks, trained, width = setup.num_gpus, policy.num_trained, policy.trained_bytes / policy.num_trained

    weights, host, step = policy.weight_bytes, 0.0, 0.0
    if setup.zero == 3:
        gathered = min(max(LIVE_WEIGHTS, policy.largest), policy.num_weights) * weights / policy.num_weights
        host += setup.offload_weights * weights / ranks
        weights = (0 if setup.offload_weights else weights / ranks) + gathered * (ranks > 1 or setup.offload_weights)
    weights += policy.trained_bytes * (setup.reference_sync_steps > 0)
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
    return Estimate(
        num_weights=policy.num_weights,
        num_trained=trained,
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        activations=policy.activations,
        logits=policy.logits,
        step=step,
        reserve=RESERVE[setup.attention],
        host=host,
    )


def _state_bytes(setup: Setup, policy: "_Policy") -> float:
    """Optimizer states of one device; DeepSpeed keeps them, and a copy of narrow weights, in float32."""
    name = setup.optim.lower().removeprefix("paged_")
    count = next((count for key, count in STATES.items() if name.startswith(key)), 2)
    if setup.zero:
        return (count * 4 * policy.num_trained + 4 * policy.num_narrow) / setup.num_gpus
    return count * (policy.num_trained if "8bit" in name else policy.trained_bytes)


def show_estimate(estimate: Estimate, setup: Setup, device_bytes: int | None = None) -> str:
    """Return the estimate as text for a terminal."""
    engine = f"ZeRO-{setup.zero}" if setup.zero else "no DeepSpeed"
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


def advise(config: InternVLChatConfig, setup: Setup, device_bytes: int, longest_pair: int = 2048) -> str | None:
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
        f"this needs {_size(needed)} of a device's {_size(device_bytes)}, and neither QLoRA nor ZeRO-3 on 512 devices "
        "brings it down to that; take a smaller model or a larger device"
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
    for stage in range(setup.zero + 1, 4) if setup.num_gpus > 1 else ():
        if stage == 3 and setup.reference_sync_steps:
            break
        file = f"deepspeed configs/deepspeed/zero{stage}.json"
        yield ", ".join([*words, file]), replace(setup, zero=stage)
    if setup.reference_sync_steps:  # ZeRO-3 and 4 bits, which is all that is left, come without a moving reference
        words.append("reference_sync_steps 0")
        setup = replace(setup, reference_sync_steps=0)
        yield ", ".join(words), setup
        if setup.num_gpus > 1 and setup.zero < 3:
            yield ", ".join([*words, "deepspeed configs/deepspeed/zero3.json"]), replace(setup, zero=3)
    offload = "deepspeed configs/deepspeed/zero3_offload.json"
    yield ", ".join([*words, offload]), replace(setup, zero=3, offload_optimizer=True, offload_weights=True)
    full = setup
    if not setup.lora_rank:
        setup = replace(setup, lora_rank=16, freeze_vision=True, freeze_projector=True)
        yield ", ".join([*words, "lora_rank 16"]), setup
    adapters = "lora_rank 16, load_in_4bit true" + ", deepspeed none" * (setup.zero > 0)
    yield ", ".join([*words, adapters]), replace(setup, load_in_4bit=True, zero=0)
    for num_gpus in (8, 16, 32, 64, 128, 256, 512):
        if num_gpus > setup.num_gpus:
            more = replace(full, num_gpus=num_gpus, zero=3)
            yield ", ".join([*words, f"zero3.json on {num_gpus} devices"]), more


def _size(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= 0.1 * GIB else f"{num_bytes / 2**20:.1f} MiB"


def device_bytes() -> int | None:
    """Memory of this process's device, or None where it is not known."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


# --- a pass on fake tensors -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Policy:
    """What was found on fake tensors; counts of weights, bytes of one device that holds everything."""

    num_weights: int
    num_trained: int
    num_narrow: int  # trained, and narrower than float32
    largest: int  # weights of the largest tensor
    weight_bytes: float
    trained_bytes: int
    activations: float
    logits: int


@functools.lru_cache(maxsize=64)
def _look(config: str, setup: Setup) -> _Policy:
    """Build the policy of a config.json text out of fake tensors, run one pass, and count."""
    shape = InternVLChatConfig(**json.loads(config))
    pack = _pack(shape, setup)
    with _fake_policy(shape, setup) as model:
        quantised = _quantised(model) if setup.load_in_4bit else set()
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise BadInputError("every part of the model is frozen, so there is nothing to train")
        activations = _peak_of_a_pass(model, pack, setup)
        if quantised:  # one matrix at a time is made wide again
            activations += max(p.numel() * p.element_size() for p in quantised)
        return _Policy(
            num_weights=sum(p.numel() for p in model.parameters()),
            num_trained=sum(p.numel() for p in trained),
            num_narrow=sum(p.numel() for p in trained if p.element_size() < 4),
            largest=max(p.numel() for p in model.parameters()),
            weight_bytes=sum(
                p.numel() * (NF4_BYTES if p in quantised else p.element_size()) for p in model.parameters()
            ),
            trained_bytes=sum(p.numel() * p.element_size() for p in trained),
            activations=activations,
            logits=4 * len(pack.target_ids_S) * min(shape.llm_config.vocab_size, _chunk_size(pack, setup)),
        )


@contextlib.contextmanager
def _fake_policy(config: InternVLChatConfig, setup: Setup) -> Iterator[nn.Module]:
    """The policy as it is trained, made of fake tensors; torch acts on fake tensors inside the block."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(getattr(torch, setup.dtype))
        with torch.device("meta"):
            model = InternVLChatModel(config)
    finally:
        torch.set_default_dtype(before)
    freeze(
        model,
        vision=setup.freeze_vision,
        projector=setup.freeze_projector,
        language=setup.freeze_language,
        num_language_layers=setup.freeze_language_layers,
    )
    attach_scoring(model, attention="segments")
    if setup.attention == "fused":
        model.language_model.set_attn_implementation("fused_for_estimate")
    both = setup.gradient_checkpointing
    checkpoint_parts(model, vision=both or setup.checkpoint_vision, language=both or setup.checkpoint_language)
    policy = model
    if setup.lora_rank:
        policy = add_adapters(model, rank=setup.lora_rank, on=setup.lora_on, base="none")
        if both:
            model.enable_input_require_grads()
    policy.train()
    with FakeTensorMode(allow_non_fake_inputs=True):  # peft cannot move fake tensors, so they come last
        made: dict[Tensor, Tensor] = {}
        for module in policy.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter not in made:
                    fake = torch.empty_like(parameter, device="cpu")
                    made[parameter] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
                module._parameters[name] = parameter if parameter is None else made[parameter]
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer if buffer is None else torch.empty_like(buffer, device="cpu")
        yield policy


def _quantised(model: nn.Module) -> set[Tensor]:
    """The weights that bitsandbytes would hold in 4 bits: linear layers of the language model, the head apart."""
    return {
        module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "language_model.model." in name and "lora_" not in name
    }


def _peak_of_a_pass(model: nn.Module, pack: Pack, setup: Setup) -> int:
    """Bytes that a forward and a backward pass add to weights and gradients at the worst moment."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.config.image_token_id = 1
    base.embed = lambda input_ids, pixel_values=None, *_: _embed(base, input_ids, pixel_values)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)  # there from the first pack of a step on
    alive = _AliveBytes(tensor for p in model.parameters() for tensor in (p, p.grad) if tensor is not None)
    precision = torch.autocast("cpu", getattr(torch, setup.autocast or "bfloat16"), enabled=bool(setup.autocast))
    with alive, precision:
        loss = response_logps(model, pack, chunk_size=_chunk_size(pack, setup)).sum()
    with alive:
        loss.backward()
    return alive.peak


def _chunk_size(pack: Pack, setup: Setup) -> int:
    """Words of the vocabulary for which logits exist at a time, as the head chooses them on the device."""
    tile_bytes = TILE_BYTES if setup.attention == "fused" else CPU_TILE_BYTES
    return max(MIN_CHUNK, tile_bytes // (4 * len(pack.target_ids_S)))


def _embed(model: nn.Module, input_ids: Tensor, pixel_values: Tensor | None) -> Tensor:
    """`InternVLChatModel.embed` without its check of numbers, which fake tensors do not have."""
    embeds = model.get_input_embeddings()(input_ids)
    if pixel_values is None:
        return embeds
    features = model.extract_feature(pixel_values)
    return embeds.masked_scatter((input_ids == 1)[..., None], features.to(embeds.dtype))


def _pack(config: InternVLChatConfig, setup: Setup) -> Pack:
    """A pack of pairs with equal lengths that holds the tokens and tiles asked for; only shapes matter."""
    tokens, per_tile = setup.max_tokens_per_pack, config.num_image_token
    num_groups = max(1, tokens // 4096)
    response = max(2, min(setup.response_tokens, tokens // num_groups // 4))
    prompt = max(1, tokens // num_groups - 2 * (response - 1))
    groups = [Group([2] * prompt, [[3] * response, [4] * response], [(0, 1)], [str(i)]) for i in range(num_groups)]
    num_tiles = tokens * 4 // 5 // per_tile if setup.num_tiles is None else setup.num_tiles
    num_tiles = min(num_tiles, prompt * num_groups // per_tile)
    pack = pack_groups(groups)
    if setup.attention == "segments":  # the plan of a layout needs numbers, which fake tensors do not have
        row = torch.zeros(1, 1, pack.num_tokens, 1)
        for scored_only in (False, True):
            segment_attention(pack.layout, row, row, row, None, scored_only=scored_only)
    side = config.force_image_size
    return replace(pack, pixel_values=torch.zeros(num_tiles, 3, side, side)) if num_tiles else pack


def _fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """One causal call over the whole pack: what FlexAttention and flash attention keep is the same."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("fused_for_estimate", _fused_attention)
AttentionMaskInterface.register("fused_for_estimate", sdpa_mask)


class _AliveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, as long as they are alive."""

    def __init__(self, known: Iterator[Tensor]):
        """Leave out the storages of `known` tensors, views of them included."""
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.sizes: dict[int, int] = {}
        self.alive = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._born(leaf.untyped_storage())
        return result

    def _born(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.sizes or key in self.known:
            return
        self.sizes[key] = storage.nbytes()
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._died, key)

    def _died(self, key: int) -> None:
        self.alive -= self.sizes.pop(key, 0)


# --- the command ------------------------------------------------------------------------------------------------------


@dataclass
class EstimateSettings:
    """Settings of `python -m internvl_mpo.memory_estimate`."""

    model: str | None = setting(None, help="config.json, a model folder, or a size: " + " ".join(SHAPES))
    run: str | None = setting(None, help="run file of train_mpo.py; what is given beside it wins")
    num_gpus: int = setting(1, help="devices that share the work")
    device_gib: float | None = setting(None, help="memory of a device; none = that of the GPU here, if there is one")
    zero: int | None = setting(None, help="ZeRO stage; 0 = no DeepSpeed (default: as in the run file, else 0)")
    offload_optimizer: bool | None = setting(None, help="optimizer states in the host's memory")
    offload_weights: bool | None = setting(None, help="weights there too (ZeRO-3)")
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
    size = int(settings.device_gib * GIB) if settings.device_gib else device_bytes()
    print(show_estimate(estimate_memory(config, setup), setup, size))
    advice = advise(config, setup, size) if size else None
    if advice:
        print(advice)
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
    engine = run.get("deepspeed")
    if engine:
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
        return json.loads(Path(engine).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInputError(f"cannot read the DeepSpeed file '{engine}': {error}") from error


def read_shape(source: str) -> InternVLChatConfig:
    """Return the configuration of a size ("8b", "OpenGVLab/InternVL2-8B"), a model folder or a config.json.

    Raises:
        BadInputError: there is none, or it is not of InternVL.
    """
    path = Path(source) / "config.json" if Path(source).is_dir() else Path(source)
    if path.is_file():
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise BadInputError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(values, dict) or values.get("model_type") != "internvl_chat":
            raise BadInputError(f"{path} is not a configuration of InternVL (model_type internvl_chat)")
        return InternVLChatConfig(**values)
    found = re.search(r"(?:^|internvl2-(?:llama3-)?)(\d+b)(?:-mpo)?$", source.lower())
    if not found or found.group(1) not in SHAPES:
        raise BadInputError(f"'{source}' is no config.json, no model folder and none of the sizes {', '.join(SHAPES)}")
    vision, architecture, (width, layers, heads, key_heads, inner, vocabulary) = SHAPES[found.group(1)]
    language = {
        **{"architectures": [architecture], "hidden_size": width, "num_hidden_layers": layers},
        **{"num_attention_heads": heads, "num_key_value_heads": key_heads, "intermediate_size": inner},
        **{"vocab_size": vocabulary, "pad_token_id": 0},
        **({"bias": False} if architecture == "InternLM2ForCausalLM" else {}),
    }
    return InternVLChatConfig(vision_config=vision, llm_config=language, force_image_size=448, ps_version="v2")


if __name__ == "__main__":
    sys.exit(run_program(main))
