"""The start model as a policy: loaded, frozen in parts, with adapters, and given back as plain weights.

    model = load_model("OpenGVLab/InternVL2-8B", torch.bfloat16)
    freeze(model, vision=True)
    model = add_adapters(model, rank=16, on="language", base="OpenGVLab/InternVL2-8B")
    print(trainable_table(model))
    ...                                     # training, under DDP or DeepSpeed as well
    weights = whole_weights(model)          # merged and gathered, on the CPU of rank 0

A parameter that ZeRO-3 has partitioned is empty between uses; `num_elements` and `gathered` see through that. One that
FSDP2 has partitioned is a DTensor; `whole` and `own_share` see through that.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from internvl_mpo.errors import BadInputError, need_package
from internvl_mpo.families.registry import family_of_model, family_of_source

_LEFT_ALONE = "the folder was not put in its place, and the last checkpoint is untouched"

Part = Literal["language", "vision", "both"]

# The parts of a model that adapters go to, by the setting.
LORA_PARTS = {"language": ("language model",), "vision": ("vision tower",), "both": ("language model", "vision tower")}
# Rates in the configurations of vision towers and language models.
NOISE_RATES = (
    *("dropout", "drop_path_rate", "attention_dropout", "resid_pdrop", "embd_pdrop"),
    *("hidden_dropout_prob", "projection_dropout"),
)


def load_model(source: str, dtype: torch.dtype, *, in_4bit: bool = False) -> nn.Module:
    """Return the model of a folder or Hub id, with dropout and drop path switched off.

    Noise that policy and reference do not share would be read as a preference, so the rates a checkpoint may carry (of
    its own training) are set to 0 in its configuration.

    Args:
        source: folder or Hub id.
        dtype: type of the weights.
        in_4bit: quantise the linear layers of the language model to NF4 (bitsandbytes); vision tower, projector,
            embeddings and output head stay as they are.

    Raises:
        BadInputError: no family takes the model, or bitsandbytes is not installed.
        OSError: from transformers, if there is no such model.
        ValueError: from transformers, if the model does not fit its configuration.
    """
    from transformers import PreTrainedConfig

    family = family_of_source(source)
    config = family.load_config(source)
    for part in (config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))):
        for rate in NOISE_RATES:
            if getattr(part, rate, 0.0):
                setattr(part, rate, 0.0)
    options: dict[str, Any] = {"dtype": dtype, "config": config}
    if in_4bit:
        need_package("bitsandbytes", "load_in_4bit")  # transformers would name it less clearly
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(family.keep_wide),
        )
    model = family.load_model(source, **options)
    if in_4bit:
        # On CPUs with bfloat16 instructions bitsandbytes repacks the weights at the first pass without gradients (the
        # reference's), and its repacked layers cannot be trained.
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    return model


def freeze(
    model: nn.Module,
    *,
    vision: bool = False,
    projector: bool = False,
    language: bool = False,
    num_language_layers: int = 0,
) -> None:
    """Switch gradients of whole parts off, and of what no log-prob depends on.

    Args:
        model: of any family.
        vision: freeze the vision tower.
        projector: freeze the projector.
        language: freeze the language model, embeddings and head included.
        num_language_layers: freeze the embeddings and this many first layers of the language model.

    Raises:
        BadInputError: more layers are asked for than there are.
    """
    family = family_of_model(model)
    frozen = {"vision tower": vision, "projector": projector, "language model": language}
    for name, parameter in model.named_parameters():
        if frozen.get(family.part_of(name), False):
            parameter.requires_grad_(False)
    for module in family.unread(model):
        module.requires_grad_(False)
    if num_language_layers:
        layers = family.decoder(model).layers
        if num_language_layers > len(layers):
            raise BadInputError(
                f"freeze_language_layers is {num_language_layers}, but the language model has {len(layers)} layers"
            )
        model.get_input_embeddings().requires_grad_(False)
        for layer in layers[:num_language_layers]:
            layer.requires_grad_(False)


def add_adapters(
    model: nn.Module, *, rank: int, alpha: int | None = None, dropout: float = 0.0, on: Part = "language", base: str
) -> nn.Module:
    """Return the model with LoRA adapters (peft); nothing else is trained any more.

    Args:
        model: of any family.
        rank: of the adapters.
        alpha: scale; None means twice the rank.
        dropout: of the adapters' input; not 0 makes policy and reference differ from the first step on.
        on: which tower gets them.
        base: what adapter_config.json names as the base model, as the user wrote it.
    """
    from peft import LoraConfig, get_peft_model

    family = family_of_model(model)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha or 2 * rank,
        lora_dropout=dropout,
        target_modules="|".join(family.lora_targets(model, part) for part in LORA_PARTS[on]),
        task_type="CAUSAL_LM",
    )
    # DeepSpeed ZeRO-3 wants one type of weights; elsewhere adapters of a bfloat16 model are kept in float32.
    model = get_peft_model(model, config, autocast_adapter_dtype=not is_partitioned(model))
    for adapter in model.peft_config.values():  # peft would write the absolute path the weights came from
        adapter.base_model_name_or_path = base
    return model


def trainable_table(model: nn.Module) -> str:
    """Return a printable table of all and of the trained weights of each part.

    Raises:
        BadInputError: nothing is left to train.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    family = family_of_model(base)
    parts = [(family.part_of(name), parameter) for name, parameter in base.named_parameters()]
    rows = []
    for part in (*family.parts, "all"):
        parameters = [parameter for its_part, parameter in parts if part in (its_part, "all")]
        everything = sum(map(num_elements, parameters))
        trained = sum(num_elements(p) for p in parameters if p.requires_grad)
        rows.append((part, everything, trained, 100 * trained / max(everything, 1)))
    if not rows[-1][2]:
        raise BadInputError("every part of the model is frozen; leave out one of the freeze_ settings")
    lines = [f"{'part':<14}  {'weights':>15}  {'trained':>15}  {'share':>8}"]
    lines += [f"{part:<14}  {all_:>15,}  {trained:>15,}  {share:>7.2f}%" for part, all_, trained, share in rows]
    return "\n".join(lines)


# --- weights that may be partitioned ----------------------------------------------------------------------------------


def num_elements(parameter: Tensor) -> int:
    """Return the number of weights, also where ZeRO-3 holds them elsewhere or 4 bits share a byte."""
    if hasattr(parameter, "ds_numel"):
        return parameter.ds_numel
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()


def is_partitioned(model: nn.Module) -> bool:
    """Say whether ZeRO-3 or FSDP2 has partitioned the weights."""
    return any(hasattr(parameter, "ds_id") or isinstance(parameter, DTensor) for parameter in model.parameters())


def own_share(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a weight, sharing memory with it; all of it where FSDP2 has not cut it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a weight that FSDP2 may have cut in pieces; then a collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def release_gathered(model: nn.Module) -> None:
    """Forget the gathered weights that FSDP2 kept for a backward pass: pieces that change now would not reach them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def gathered(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Make partitioned parameters whole inside the block; a collective under ZeRO-3, nothing elsewhere."""
    partitioned = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def write_adapter(model: nn.Module, folder: str | Path, *, keep: bool = True) -> None:
    """Write the adapters of a PEFT policy alone: adapter_model.safetensors and adapter_config.json.

    Args:
        model: PEFT model, not wrapped; all ranks must call this where weights are partitioned.
        folder: made if absent.
        keep: whether this rank writes.
    """
    adapters = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    with gathered(adapters.values()):
        weights = {name: whole(p.detach()) for name, p in adapters.items()}
        if keep:
            model.save_pretrained(folder, state_dict=weights)


@torch.no_grad()
def whole_weights(model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """Return the weights under the keys of the start model, adapters merged, 4-bit layers made wide again.

    What was trained is what is returned: a 4-bit layer gives its dequantised weight plus the adapter. Under ZeRO-3 and
    FSDP2 one layer at a time is gathered, so all ranks must call this and no rank ever holds more than a layer beyond
    its share, except the one that keeps the result. Weights that are whole already are returned without a copy.

    Args:
        model: a policy, with or without adapters, not wrapped.
        keep: whether this rank wants the result; others get an empty dict.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    weights: dict[str, Tensor] = {}
    for name, parameter in base.named_parameters():  # a tied weight comes once
        owner_name, _, leaf = name.rpartition(".")
        if ".lora_" in name:
            continue
        layer_name, is_wrapped, _ = owner_name.rpartition(".base_layer")
        layer = base.get_submodule(layer_name if is_wrapped else owner_name)
        with gathered(layer.parameters() if is_wrapped else [parameter]):
            if not keep and not isinstance(parameter, DTensor):
                continue
            value = _merged(layer, parameter, layer.active_adapters if is_wrapped and leaf == "weight" else ())
            if not keep:
                continue
            partitioned = hasattr(parameter, "ds_id")
            if partitioned and parameter.shape != parameter.ds_shape:
                raise RuntimeError(f"ZeRO-3 did not gather {name}: {tuple(parameter.shape)}, not {parameter.ds_shape}")
            key = f"{layer_name}.{leaf}" if is_wrapped else name
            weights[key] = value.detach().cpu().clone() if partitioned else value.detach().cpu()
    if keep:
        saved = base.state_dict(keep_vars=True)
        weights |= {name: saved[name].detach().cpu() for name, _ in base.named_buffers() if name in saved}
    return weights


def _merged(layer: nn.Module, parameter: Tensor, adapters: Sequence[str]) -> Tensor:
    """A weight of a layer, whole and wide, plus its adapters; a collective where FSDP2 has cut them in pieces."""
    value = whole(_dequantised(parameter))
    if not adapters:
        return value
    merged = value.to(torch.float32, copy=True)
    for adapter in adapters:
        merged += whole(layer.get_delta_weight(adapter)).to(merged)
    return merged.to(value.dtype)


def plain_base(model: nn.Module) -> nn.Module:
    """Return the model inside a PEFT model, or the model itself, without its note that it was loaded in 4 bits."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if getattr(base, "hf_quantizer", None) is not None:
        base.hf_quantizer = None
        base.is_quantized = base.is_loaded_in_4bit = False
        del base.config.quantization_config
    return base


def _dequantised(parameter: Tensor) -> Tensor:
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, state)


def _saved_tensors(folder: Path) -> Iterator[tuple[Path, str, Tensor]]:
    """Every tensor of a folder, with its file and name, one in memory at a time.

    Files are opened anew for each: what was read of an open file stays mapped, in the end all of it.
    """
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
        for name in names:
            with safe_open(path, framework="pt") as file:
                yield path, name, file.get_tensor(name)


def _largest(tensor: Tensor) -> float:
    """The largest magnitude, found without a second tensor of that size; 0 or 1 for what holds no fractions."""
    return (torch.linalg.vector_norm(tensor, torch.inf) if tensor.is_floating_point() else tensor.any()).item()


def check_saved_weights(folder: str | Path, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights on disk that nobody could use: absent, of another shape, NaN, infinity, or a matrix of zeros.

    Training programs have been known to write such folders without a word, above all under ZeRO-3.

    Args:
        folder: what was written.
        weights: what should be in it.

    Raises:
        BadInputError: naming the file and the tensor.
    """
    missing = set(weights)
    for path, name, tensor in _saved_tensors(Path(folder)):
        fault = None
        if not tensor.numel() or (name in weights and tensor.shape != weights[name].shape):
            fault = f"has shape {tuple(tensor.shape)}"
        elif not math.isfinite(largest := _largest(tensor)):
            fault = "is not finite"
        elif tensor.ndim > 1 and not largest:
            fault = "is all zero"
        if fault:
            raise BadInputError(f"{path}: {name} {fault}; {_LEFT_ALONE}")
        missing.discard(name)
    if missing:
        raise BadInputError(
            f"{folder} was written without {min(missing)}, {len(missing)} tensors in all; {_LEFT_ALONE}"
        )
