"""InternVL in transformers' own layout: the -hf checkpoints of InternVL2.5, 3 and 3.5, and what `convert` writes."""

from typing import Any

import torch

from internvl_mpo.families.contract import PictureCost, Prompt
from internvl_mpo.families.native import NativeFamily


class InternVL(NativeFamily):
    """Tiles of one size with a thumbnail, one run of picture tokens a picture, as in InternVL chat."""

    name = "internvl"
    model_types = ("internvl",)
    processors = ("InternVLProcessor",)

    def limits(self, processor: Any, max_tiles: int) -> dict[str, Any]:
        return {"max_patches": min(max_tiles, processor.image_processor.max_patches)}

    def picture_cost(self, processor: Any, height: int, width: int, num_images: int, max_tiles: int) -> PictureCost:
        options = {"crop_to_patches": True, **self.limits(processor, max_tiles)}
        num_tiles = processor.image_processor.get_number_of_image_patches(height, width, options)
        text = processor.start_image_token + processor.image_token + processor.end_image_token
        return PictureCost(text, num_tiles * processor.image_seq_length - 1, num_tiles)

    def sample_pictures(self, config: Any, num_rows: int | None, num_tokens: int) -> tuple[Prompt, int]:
        count = num_tokens // config.image_seq_length
        count = count if num_rows is None else min(num_rows, count)
        return Prompt([], torch.zeros(count, 3, *config.vision_config.image_size)), count * config.image_seq_length
