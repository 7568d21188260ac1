"""LLaVA-NeXT (1.6): a picture is cut into tiles beside a small copy of the whole, padding is cut off its features."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from internvl_mpo.families.contract import PictureCost, Prompt
from internvl_mpo.families.llava import Llava, tile_tokens


class LlavaNext(Llava):
    """Grids are those of the checkpoint (`image_grid_pinpoints`), whatever `max_tiles` says."""

    name = "llava_next"
    model_types = ("llava_next",)
    processors = ("LlavaNextProcessor",)

    def picture_cost(self, processor: Any, height: int, width: int, num_images: int, max_tiles: int) -> PictureCost:
        side = tile_side(processor)
        num_tokens = processor._get_number_of_features(height, width, side, side)
        num_tokens -= processor.vision_feature_select_strategy == "default"
        return PictureCost(processor.image_token, num_tokens - 1, num_tiles(processor, height, width))

    def prompt(self, processor: Any, ids: list[int], features: Mapping[str, Any]) -> Prompt:
        sizes = features["image_sizes"]
        counts = [num_tiles(processor, height, width) for height, width in sizes.tolist()]
        tiles = [rows[:count] for rows, count in zip(features["pixel_values"], counts, strict=True)]  # without padding
        return Prompt(ids, torch.cat(tiles), {"image_sizes": sizes})

    def sample_pictures(self, config: Any, num_rows: int | None, num_tokens: int) -> tuple[Prompt, int]:
        side = config.vision_config.image_size
        across = side // config.vision_config.patch_size
        picture = None
        for height, width in sorted(self.whole_grids(config), key=lambda grid: grid[0] * grid[1]):
            rows, columns = height // side, width // side
            # a picture that fills its grid: the small copy, every patch, and a line break behind each row of patches
            length = tile_tokens(config) + rows * across * (columns * across + 1)
            num_tiles = rows * columns + 1
            if length <= num_tokens and (picture is None or num_rows is None or num_tiles <= num_rows):
                picture = length, num_tiles, [height, width]
        if picture is None:
            return Prompt([]), 0
        length, num_tiles, size = picture
        count = num_tokens // length
        count = count if num_rows is None else min(count, max(1, num_rows // num_tiles))
        sizes = torch.tensor([size] * count)
        return self.many(torch.zeros(count * num_tiles, 3, side, side), sizes), count * length

    def whole_grids(self, config: Any) -> list[list[int]]:
        """Return the grids that a picture may fill without being made smaller, as (height, width) in pixels."""
        return config.image_grid_pinpoints

    def many(self, tiles: Tensor, sizes: Tensor) -> Prompt:
        """Return pictures of `sizes`, each in a question of its own."""
        return Prompt([], tiles, {"image_sizes": sizes})

    def blank(self, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        config, side = model.config, model.config.vision_config.image_size
        sizes = torch.tensor([[side, side]])
        count = image_size_to_num_patches(sizes[0], config.image_grid_pinpoints, side)
        return torch.zeros(count, 3, side, side), {"image_sizes": sizes}


def tile_side(processor: Any) -> int:
    """Return the side of a tile in pixels."""
    size = processor.image_processor.size
    return size["shortest_edge"] if size.get("shortest_edge") else min(size["height"], size["width"])


def num_tiles(processor: Any, height: int, width: int) -> int:
    """Return the tiles of a picture, the small copy of the whole included."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    return image_size_to_num_patches(
        [height, width], processor.image_processor.image_grid_pinpoints, tile_side(processor)
    )
