"""Which engine, with which settings: shared by the programs that ask a model."""

import os
from typing import Any

from internvl_mpo.engines import Engine
from internvl_mpo.engines.settings import EngineSettings


def load_engine(settings: EngineSettings) -> Engine:
    """Import and build the engine the settings ask for."""
    if settings.runner == "ray":
        from internvl_mpo.engines.ray_engine import RayEngine

        return RayEngine(settings, load_local_engine)
    return load_local_engine(settings)


def load_local_engine(settings: EngineSettings) -> Engine:
    """Build the engine in this process, whatever the runner."""
    if settings.engine == "http":
        from internvl_mpo.engines.http_engine import HttpEngine

        return HttpEngine(
            settings.base_url,
            settings.model,
            served_from=settings.served_from,
            concurrency=settings.concurrency,
            api_key=os.environ.get(settings.api_key_env),
            timeout=settings.timeout,
            max_attempts=settings.max_attempts,
            requests_per_minute=settings.requests_per_minute,
        )
    if settings.engine == "vllm":
        from internvl_mpo.engines.vllm_engine import VllmEngine

        return VllmEngine(
            settings.model,
            dtype=settings.dtype,
            tensor_parallel=settings.tensor_parallel,
            max_tiles=settings.max_tiles,
            trust_remote_code=settings.trust_remote_code,
        )
    return load_model_engine(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        batch_size=settings.batch_size,
        max_tiles=settings.max_tiles,
        trust_remote_code=settings.trust_remote_code,
    )


def load_model_engine(model: str, **settings: Any) -> Engine:
    """Build the engine in this process that fits a model: InternVL's own, or the one for every other family.

    Args:
        model: model folder or Hub id.
        **settings: device, dtype, batch_size, max_tiles, trust_remote_code of `InternVLEngine` and `ImageTextEngine`.
    """
    from transformers import PretrainedConfig

    try:
        family = PretrainedConfig.get_config_dict(model)[0].get("model_type", "internvl_chat")
    except (OSError, ValueError):
        family = "internvl_chat"  # whose engine says what is missing
    if family == "internvl_chat":
        from internvl_mpo.engines.internvl_engine import InternVLEngine

        return InternVLEngine(model, **settings)
    from internvl_mpo.engines.image_text_engine import ImageTextEngine

    return ImageTextEngine(model, **settings)
