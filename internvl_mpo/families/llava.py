"""LLaVA 1.5: every picture is one square of the same size."""

from typing import Any

from internvl_mpo.families.contract import PictureCost
from internvl_mpo.families.native import NativeFamily

SQUARE_TOWERS = ("clip_vision_model", "siglip_vision_model")


class Llava(NativeFamily):
    """One tile a picture, whatever `max_tiles` says."""

    name = "llava"
    model_types = ("llava",)
    processors = ("LlavaProcessor",)
    towers = SQUARE_TOWERS  # Pixtral's pictures keep their shape and are another family

    def picture_cost(self, processor: Any, height: int, width: int, num_images: int, max_tiles: int) -> PictureCost:
        images = processor.image_processor
        size = images.crop_size if getattr(images, "do_center_crop", False) else images.size
        patches = (size["height"] // processor.patch_size) * (size["width"] // processor.patch_size)
        num_tokens = patches + processor.num_additional_image_tokens
        num_tokens -= processor.vision_feature_select_strategy == "default"
        return PictureCost(processor.image_token, num_tokens - 1, 1)
