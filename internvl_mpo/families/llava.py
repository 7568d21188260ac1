"""LLaVA 1.5: every picture is one square of the same size."""

from typing import Any

import torch
from torch import nn

from internvl_mpo.families.contract import PictureCost, Prompt
from internvl_mpo.families.native import NativeFamily


class Llava(NativeFamily):
    """One tile a picture, whatever `max_tiles` says."""

    name = "llava"
    model_types = ("llava",)
    processors = ("LlavaProcessor",)
    towers = ("clip_vision_model", "siglip_vision_model")  # Pixtral's pictures keep their shape and are another family

    def picture_cost(self, processor: Any, height: int, width: int, num_images: int, max_tiles: int) -> PictureCost:
        images = processor.image_processor
        size = images.crop_size if getattr(images, "do_center_crop", False) else images.size
        patches = (size["height"] // processor.patch_size) * (size["width"] // processor.patch_size)
        num_tokens = patches + processor.num_additional_image_tokens
        num_tokens -= processor.vision_feature_select_strategy == "default"
        return PictureCost(processor.image_token, num_tokens - 1, 1)

    def sample_pictures(self, config: Any, num_rows: int | None, num_tokens: int) -> tuple[Prompt, int]:
        length, side = tile_tokens(config), config.vision_config.image_size
        count = num_tokens // length
        count = count if num_rows is None else min(num_rows, count)
        return Prompt([], torch.zeros(count, 3, side, side)), count * length

    def unread(self, model: nn.Module) -> tuple[nn.Module, ...]:
        tower, wanted = self.vision_tower(model), model.config.vision_feature_layer
        layers = tower.encoder.layers
        states = range(len(layers) + 1)  # what enters the layers, then what leaves each
        last = max(states[index] for index in ([wanted] if isinstance(wanted, int) else wanted))
        further = (getattr(tower, name, None) for name in ("post_layernorm", "head"))
        return *layers[last:], *(module for module in further if module is not None)


def tile_tokens(config: Any) -> int:
    """Return the tokens of a tile before line breaks."""
    vision = config.vision_config
    with_class = (vision.image_size // vision.patch_size) ** 2 + (vision.model_type == "clip_vision_model")
    return with_class - (getattr(config, "vision_feature_select_strategy", "full") == "default")
