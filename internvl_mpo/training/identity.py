"""What reference log-probs depend on besides the pairs: weights, template, tiling, precision."""

from typing import Any

import torch

from internvl_mpo.records import content_id
from internvl_mpo.training.distributed import zero_stage
from internvl_mpo.training.settings import TrainSettings


def reference_identity(settings: TrainSettings, processor: Any, weights: str) -> dict[str, Any]:
    """Return what reference log-probs depend on besides the pairs; `weights` tells the reference from other models."""
    autocast = "bfloat16" if settings.bf16 else "float16" if settings.fp16 else None
    if zero_stage(settings) is not None:
        autocast = None  # DeepSpeed casts the weights
    elif autocast and settings.fsdp:
        autocast += ", weights too"  # FSDP2 casts those it has gathered
    return {
        "start model": weights,
        "chat template": content_id(processor.chat_template),
        "max_tiles": settings.max_tiles,
        "max_length": settings.max_length,
        "dtype": str(weights_dtype(settings)).removeprefix("torch."),
        "autocast": autocast,
        "load_in_4bit": settings.load_in_4bit,
        **settings.token_weights.identity(),
    }


def weights_dtype(settings: TrainSettings) -> torch.dtype:
    """Return the type the weights compute in: DeepSpeed casts them, and keeps a float32 master copy of its share."""
    in_engine = zero_stage(settings) is not None
    name = "bfloat16" if in_engine and settings.bf16 else "float16" if in_engine and settings.fp16 else settings.dtype
    return getattr(torch, name)
