"""LLaVA-OneVision: a single picture is cut into tiles, several are one tile each."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from internvl_mpo.families.contract import PictureCost, Prompt
from internvl_mpo.families.llava_next import LlavaNext, num_tiles, tile_side


class LlavaOnevision(LlavaNext):
    """Grids are those of the checkpoint (`image_grid_pinpoints`), whatever `max_tiles` says."""

    name = "llava_onevision"
    model_types = ("llava_onevision",)
    processors = ("LlavaOnevisionProcessor",)

    def picture_cost(self, processor: Any, height: int, width: int, num_images: int, max_tiles: int) -> PictureCost:
        if num_images == 1:
            side = tile_side(processor)
            num_tokens = processor._get_number_of_features(height, width, side, side)
        else:
            num_tokens = processor.num_image_tokens + 1  # a line break after the picture
        num_tokens -= processor.vision_feature_select_strategy == "default"
        return PictureCost(
            processor.image_token, num_tokens - 1, num_tiles(processor, height, width) if num_images == 1 else 1
        )

    def prompt(self, processor: Any, ids: list[int], features: Mapping[str, Any]) -> Prompt:
        sizes = features["image_sizes"]
        is_single = len(sizes) == 1
        counts = [num_tiles(processor, height, width) if is_single else 1 for height, width in sizes.tolist()]
        tiles = [rows[:count] for rows, count in zip(features["pixel_values"], counts, strict=True)]
        return Prompt(ids, torch.cat(tiles), {"image_sizes": sizes, "batch_num_images": torch.tensor([len(sizes)])})

    def whole_grids(self, config: Any) -> list[list[int]]:
        most = int(config.vision_aspect_ratio.removeprefix("anyres_max_")) * config.vision_config.image_size**2
        return [grid for grid in config.image_grid_pinpoints if grid[0] * grid[1] <= most]

    def many(self, tiles: Tensor, sizes: Tensor) -> Prompt:
        return Prompt([], tiles, {"image_sizes": sizes, "batch_num_images": torch.ones(len(sizes), dtype=torch.long)})

    def blank(self, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        pixels, inputs = super().blank(model)
        return pixels, {**inputs, "batch_num_images": torch.tensor([1])}
