"""A training pass on fake tensors: same code, no numbers, counted bytes."""

import contextlib
import functools
import itertools
import json
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from internvl_mpo.errors import BadInputError
from internvl_mpo.families.registry import family_of_model, family_of_type
from internvl_mpo.families.shapes import config_of
from internvl_mpo.kernels.packed_attention import segment_attention
from internvl_mpo.kernels.scoring_head import CPU_TILE_BYTES, MIN_CHUNK, TILE_BYTES
from internvl_mpo.logps import attach_scoring, response_logps
from internvl_mpo.packing import Group, Pack, pack_groups
from internvl_mpo.training.fsdp import layer_names
from internvl_mpo.training.policy import Part, add_adapters, freeze
from internvl_mpo.training.speed import checkpoint_parts, no_input_gradients

NF4_BYTES = 0.5 + 4 / 64  # 4 bits, and a float32 scale for every 64 weights


@dataclass(frozen=True)
class Setup:
    """What memory depends on besides the shape of the model; names are those of `train_mpo.py` where it has them.

    Attributes:
        num_gpus: devices that share the work.
        zero: ZeRO stage; 0 is no DeepSpeed (DDP on several devices).
        fsdp: FSDP2 cuts weights, gradients and optimizer over the devices, instead of ZeRO.
        keep_gathered: FSDP2 keeps whole what it has gathered until the backward pass (`reshard_after_forward` false).
        offload_optimizer: its states live in the host's memory.
        offload_weights: so do the weights (ZeRO-3, FSDP2).
        dtype: type of the weights.
        autocast: type that matrix products run in where the weights are wider, or None; under FSDP2 that of gathered
            weights, and what is trained is kept in float32.
        optim: as in TrainingArguments.
        gradient_checkpointing: layers of both towers are computed again in the backward pass.
        checkpoint_vision, checkpoint_language: those of one tower are.
        lora_rank: rank of adapters, 0 trains the weights themselves.
        lora_on: which tower gets them.
        load_in_4bit: NF4 weights of the language model.
        freeze_vision, freeze_projector, freeze_language, freeze_language_layers: what is not trained.
        reference_sync_steps: above 0, a moving reference takes a second copy of what is trained.
        start_copy: the host keeps the start weights of what is trained, for `reference_pass ahead`; adapters and ZeRO-3
            need none.
        max_tokens_per_pack: tokens of one forward pass.
        num_tiles: tiles of one forward pass; None means that four fifths of the tokens are image tokens.
        response_tokens: scored tokens of a response.
        attention: "fused" as on CUDA, "segments" as on a CPU.
    """

    num_gpus: int = 1
    zero: int = 0
    fsdp: bool = False
    keep_gathered: bool = False
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
    start_copy: bool = True
    max_tokens_per_pack: int = 8192
    num_tiles: int | None = None
    response_tokens: int = 300
    attention: Literal["fused", "segments"] = "fused"


# --- a pass on fake tensors -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FakePolicy:
    """What was found on fake tensors; counts of weights, bytes of one device that holds everything."""

    num_weights: int
    num_trained: int
    num_narrow: int  # trained, and narrower than float32
    largest: int  # weights of the largest tensor
    largest_layer: int  # weights of the largest layer or of the embeddings, which FSDP2 gathers for one use
    beside_layers: int  # weights that FSDP2 keeps gathered from the forward pass to the backward pass
    weight_bytes: float
    trained_bytes: int
    activations: float
    logits: int


@functools.lru_cache(maxsize=64)
def look_at_policy(config: str, setup: Setup) -> FakePolicy:
    """Build the policy of a config.json text out of fake tensors, run one pass, and count."""
    shape = config_of(json.loads(config))
    pack = fake_pack(shape, setup)
    with fake_policy(shape, setup) as model:
        quantised = quantised_weights(model) if setup.load_in_4bit else set()
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise BadInputError("every part of the model is frozen, so there is nothing to train")
        activations = peak_of_a_pass(model, pack, setup)
        if quantised:  # one matrix at a time is made wide again
            activations += max(p.numel() * p.element_size() for p in quantised)
        return FakePolicy(
            num_weights=sum(p.numel() for p in model.parameters()),
            num_trained=sum(p.numel() for p in trained),
            num_narrow=sum(p.numel() for p in trained if p.element_size() < 4),
            largest=max(p.numel() for p in model.parameters()),
            **gathered_alone(model),
            weight_bytes=sum(
                p.numel() * (NF4_BYTES if p in quantised else p.element_size()) for p in model.parameters()
            ),
            trained_bytes=sum(p.numel() * p.element_size() for p in trained),
            activations=activations,
            logits=4 * len(pack.target_ids_S) * min(head_words(model), chunk_size_of(pack, setup)),
        )


def gathered_alone(model: nn.Module) -> dict[str, int]:
    """Count the weights of what FSDP2 gathers for one use, and of the rest: the head, norms, the projector."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names, embeddings = layer_names(model), base.get_input_embeddings()
    units = [module for module in model.modules() if type(module).__name__ in names]
    if embeddings.weight is not base.get_output_embeddings().weight:
        units.append(embeddings)
    inside = {p for module in units for p in module.parameters()}
    return {
        "largest_layer": max(sum(p.numel() for p in module.parameters()) for module in units),
        "beside_layers": sum(p.numel() for p in model.parameters() if p not in inside),
    }


def head_words(model: nn.Module) -> int:
    """Return the words the output head knows."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_output_embeddings().out_features


@contextlib.contextmanager
def fake_policy(config: Any, setup: Setup) -> Iterator[nn.Module]:
    """The policy as it is trained, made of fake tensors; torch acts on fake tensors inside the block."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(getattr(torch, setup.dtype))
        with torch.device("meta"):
            model = family_of_type(config.model_type, "the model").build(config)
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
        family = family_of_model(model)
        family.decoder(model).set_attn_implementation("fused_for_estimate")
        if family.name != "internvl_chat":  # a name with flash: else Qwen's towers would make a call for every window
            family.vision_tower(model).config._attn_implementation = "flash_for_estimate"
    both = setup.gradient_checkpointing
    checkpoint_parts(model, vision=both or setup.checkpoint_vision, language=both or setup.checkpoint_language)
    policy = model
    if setup.lora_rank:
        policy = add_adapters(model, rank=setup.lora_rank, on=setup.lora_on, base="none")
        no_input_gradients(policy)  # peft asks for them as well
    policy.train()
    with (
        _fake_numbers(),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):  # peft cannot move fake tensors, so they come last
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


@contextlib.contextmanager
def _fake_numbers() -> Iterator[None]:
    """Let fake tensors go where they could not.

    Those that were made from numbers keep them, since vision towers read shapes of pictures from tensors. All tokens go
    to the first expert, which takes as much: torch knows the shapes of its grouped product for bfloat16 only.
    """
    from transformers.integrations import moe

    def to_the_first(tokens_SI: Tensor, weight_EIO: Tensor, offs: Tensor) -> Tensor:
        return tokens_SI.to(weight_EIO.dtype) @ weight_EIO[0]

    before = fake_tensor.CONSTANT_NUMEL_LIMIT, moe._grouped_mm
    fake_tensor.CONSTANT_NUMEL_LIMIT, moe._grouped_mm = 2**24, to_the_first
    try:
        yield
    finally:
        fake_tensor.CONSTANT_NUMEL_LIMIT, moe._grouped_mm = before


def quantised_weights(model: nn.Module) -> set[Tensor]:
    """The weights that bitsandbytes would hold in 4 bits: linear layers of the language model, the head apart."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layers = family_of_model(base).decoder(base).named_modules()
    return {module.weight for name, module in layers if isinstance(module, nn.Linear) and "lora_" not in name}


def peak_of_a_pass(model: nn.Module, pack: Pack, setup: Setup) -> int:
    """Bytes that a forward and a backward pass add to weights and gradients at the worst moment."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if base.config.model_type == "internvl_chat":
        base.config.image_token_id = 1
        base.embed = lambda input_ids, pixel_values=None, *_: _embed(base, input_ids, pixel_values)
    # made here, so that a fake mode knows their numbers
    inputs = {name: torch.tensor(rows.tolist(), dtype=rows.dtype) for name, rows in pack.image_inputs.items()}
    pack = replace(pack, image_inputs=inputs)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)  # there from the first pack of a step on
    alive = _AliveBytes(tensor for p in model.parameters() for tensor in (p, p.grad) if tensor is not None)
    precision = torch.autocast("cpu", getattr(torch, setup.autocast or "bfloat16"), enabled=bool(setup.autocast))
    with alive, precision:
        loss = response_logps(model, pack, chunk_size=chunk_size_of(pack, setup)).sum()
    with alive:
        loss.backward()
    return alive.peak


def chunk_size_of(pack: Pack, setup: Setup) -> int:
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


def fake_pack(config: Any, setup: Setup) -> Pack:
    """A pack of pairs with equal lengths that holds the tokens and tiles asked for; only shapes matter.

    Raises:
        ValueError: the family has no estimate.
    """
    tokens, family = setup.max_tokens_per_pack, family_of_type(config.model_type, "the model")
    num_groups = max(1, tokens // 4096)
    response = max(2, min(setup.response_tokens, tokens // num_groups // 4))
    prompt = max(1, tokens // num_groups - 2 * (response - 1))
    most = min(tokens * 4 // 5, prompt * num_groups) if setup.num_tiles is None else prompt * num_groups
    pictures, num_picture_tokens = family.sample_pictures(config, setup.num_tiles, most)
    groups = []
    for number in range(num_groups):
        count = min(prompt, num_picture_tokens)
        num_picture_tokens -= count
        ids = [config.image_token_id or 1] * count + [2] * (prompt - count)
        groups.append(Group(ids, [[3] * response, [4] * response], [(0, 1)], [str(number)]))
    pack = pack_groups(groups)
    if setup.attention == "segments":  # the plan of a layout needs numbers, which fake tensors do not have
        row = torch.zeros(1, 1, pack.num_tokens, 1)
        windows = {None, getattr(config.get_text_config(), "sliding_window", None)}
        for scored_only, window in itertools.product((False, True), windows):
            segment_attention(pack.layout, row, row, row, None, scored_only=scored_only, window=window)
    if pictures.tiles is None or not len(pictures.tiles):
        return pack
    return replace(pack, pixel_values=pictures.tiles, image_inputs=pictures.image_inputs)


def fused_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
    scaling: float | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """One causal call over the whole pack: what FlexAttention and flash attention keep is the same."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=key.shape[1] != query.shape[1]
    )
    return out.transpose(1, 2).contiguous(), None


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
