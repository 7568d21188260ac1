"""What makes a step fast or small besides packing: kernels, attention back end, recomputation. All of it by settings.

--packed_attention auto|segments|flex|varlen    --use_liger_kernel true
--checkpoint_vision true                         --checkpoint_language true
--plain_twin true                                the plain two-sequence form instead, to compare with
"""

import ctypes
import importlib.util
import os
import sys
import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from internvl_mpo.errors import BadInputError
from internvl_mpo.families.registry import family_of_model
from internvl_mpo.kernels.packed_attention import has_flash_attention
from internvl_mpo.logps import attach_scoring

M_MMAP_THRESHOLD = -3  # its number in malloc.h


def apply_speed_settings(model: nn.Module, settings: Any) -> nn.Module:
    """Teach a model to score packs in the way the settings ask for; calling it again does no harm.

    Args:
        model: of any family, or one with a LoRA adapter.
        settings: has `packed_attention`, `plain_twin`, `use_liger_kernel`, `checkpoint_vision` and
            `checkpoint_language`.

    Returns:
        The same model.

    Raises:
        BadInputError: Liger does not know the language model.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if settings.use_liger_kernel:
        use_liger_kernels(family_of_model(base).decoder(base))
    attach_scoring(model, attention=settings.packed_attention, plain_twin=settings.plain_twin)
    checkpoint_parts(base, vision=settings.checkpoint_vision, language=settings.checkpoint_language)
    return model


def check_speed_settings(settings: Any) -> None:
    """Refuse kernels that cannot run here, before anything is loaded.

    Raises:
        BadInputError: naming what is missing.
    """
    attention = settings.packed_attention
    if attention == "varlen" and not has_flash_attention():
        raise BadInputError("packed_attention varlen needs the package flash-attn; pip install it, or take auto")
    if attention in ("varlen", "flex") and not torch.cuda.is_available():
        raise BadInputError(f"packed_attention {attention} needs a CUDA GPU, and torch finds none here; take auto")
    if not settings.use_liger_kernel:
        return
    if importlib.util.find_spec("liger_kernel") is None:
        raise BadInputError("use_liger_kernel needs the package liger-kernel; pip install it, or leave it out")
    if not torch.cuda.is_available():
        raise BadInputError("use_liger_kernel needs a CUDA GPU, and torch finds none here; leave it out")


def use_liger_kernels(decoder: nn.Module) -> None:
    """Replace RMS norm, rotary embedding and SwiGLU of a language model with Liger's Triton kernels.

    Liger patches the models of transformers itself, those inside image-text models as well; vision towers stay as they
    are. InternLM2 is ours: its norms and its SwiGLU get Liger's functions; its rotary embedding is a single fused
    addcmul that keeps nothing for the backward pass, and stays.

    Args:
        decoder: the decoder layers with their final norm, of any family.

    Raises:
        BadInputError: Liger does not know the architecture.
    """
    from liger_kernel.ops import LigerRMSNormFunction, LigerSiLUMulFunction
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    kind = decoder.config.model_type
    if kind != "internlm2":
        if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
            raise BadInputError(
                f"Liger has no kernels for a language model of type '{kind}'; leave use_liger_kernel out"
            )
        # The head has its own memory-saving path here, so Liger's losses stay out.
        _apply_liger_kernel_to_instance(
            model=decoder, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False,
        )  # fmt: skip
        return

    def rms_norm(norm: nn.Module, hidden_states: Tensor) -> Tensor:
        return LigerRMSNormFunction.apply(hidden_states, norm.weight, norm.variance_epsilon, 0.0, "llama")

    def swiglu(mlp: nn.Module, hidden_states: Tensor) -> Tensor:
        return mlp.w2(LigerSiLUMulFunction.apply(mlp.w1(hidden_states), mlp.w3(hidden_states)))

    for layer in decoder.layers:
        layer.attention_norm.forward = types.MethodType(rms_norm, layer.attention_norm)
        layer.ffn_norm.forward = types.MethodType(rms_norm, layer.ffn_norm)
        layer.feed_forward.forward = types.MethodType(swiglu, layer.feed_forward)
    decoder.norm.forward = types.MethodType(rms_norm, decoder.norm)


def checkpoint_parts(model: nn.Module, *, vision: bool, language: bool) -> None:
    """Recompute activations in the backward pass, for each tower by itself.

    The vision tower gives back most memory for the least time: 18 % of the saved bytes for 4 % more work at 5 tiles.

    Args:
        model: of any family.
        vision: recompute the vision tower.
        language: recompute the language model.
    """
    family = family_of_model(model)
    for part, wanted in ((family.vision_tower(model), vision), (family.decoder(model), language)):
        if wanted:
            # transformers 5.23 renamed it
            new = hasattr(part, "activation_checkpointing_enable")
            enable = part.activation_checkpointing_enable if new else part.gradient_checkpointing_enable
            enable({"use_reentrant": False})
    no_input_gradients(model)


def return_freed_memory() -> None:
    """Let a process on a CPU give back what it frees; elsewhere than with glibc nothing happens.

    Once a large block has been freed, glibc serves blocks of up to 32 MiB from its heap, and there the small ones that
    are kept, such as the inputs of recomputed layers, hold back what was freed below them: ten times their own size was
    seen. With a fixed threshold large blocks are mapped one by one and are given back at once; mapping blocks of a few
    MiB, as small models have them, would cost more time than it is worth. The user's own MALLOC_MMAP_THRESHOLD_ wins.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if adjust is not None and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        adjust(M_MMAP_THRESHOLD, 2**23)


def no_input_gradients(model: nn.Module) -> None:
    """Let what is frozen run forward only, and once.

    As soon as activations are recomputed, transformers and peft make the output of every embedding ask for a gradient,
    that of the vision tower's patches too, since the reentrant form of recomputation works on nothing else. The form
    used here needs none, and a frozen tower would be kept, recomputed and run backwards for nothing.

    Args:
        model: of any family, or one with a LoRA adapter.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.disable_input_require_grads()
