"""Qwen2-VL and Qwen2.5-VL: pictures keep their shape, rotary positions have three axes."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from internvl_mpo.families.contract import Part, PictureCost, Prompt
from internvl_mpo.families.native import NativeFamily
from internvl_mpo.packing import Pack

TILE_PIXELS = 448 * 448  # what one of `max_tiles` stands for where pictures are not cut


class Qwen2VL(NativeFamily):
    """Patches of all pictures in one row; `max_tiles` bounds a picture's pixels."""

    name = "qwen2_vl"
    model_types = ("qwen2_vl", "qwen2_5_vl")
    processors = ("Qwen2VLProcessor", "Qwen2_5_VLProcessor")
    decoders = ("qwen2_vl_text", "qwen2_5_vl_text")
    parts: ClassVar[Mapping[Part, tuple[str, ...]]] = {
        "vision tower": (".model.visual.",),
        "projector": (".model.visual.merger.",),
        "language model": (".model.language_model.", ".lm_head."),
    }

    def limits(self, processor: Any, max_tiles: int) -> dict[str, Any]:
        fewest, most = self._pixels(processor, max_tiles)
        return {"size": {"shortest_edge": fewest, "longest_edge": most}}

    def picture_cost(self, processor: Any, height: int, width: int, num_images: int, max_tiles: int) -> PictureCost:
        fewest, most = self._pixels(processor, max_tiles)
        images = processor.image_processor
        num_patches = images.get_number_of_image_patches(height, width, {"min_pixels": fewest, "max_pixels": most})
        return PictureCost(processor.image_token, num_patches // images.merge_size**2 - 1, num_patches)

    def prompt(self, processor: Any, ids: list[int], features: Mapping[str, Any]) -> Prompt:
        grids = features["image_grid_thw"]
        side = processor.image_processor.merge_size
        positions = rotary_positions(ids, processor.image_token_id, (grids // torch.tensor([1, side, side])).tolist())
        return Prompt(ids, features["pixel_values"], {"image_grid_thw": grids}, positions)

    def sample_pictures(self, config: Any, num_rows: int | None, num_tokens: int) -> tuple[Prompt, int]:
        vision = config.vision_config
        merged = vision.spatial_merge_size**2
        num_rows = min(num_rows or num_tokens * merged, num_tokens * merged)
        side = 448 // vision.patch_size // vision.spatial_merge_size * vision.spatial_merge_size
        rows, _ = self._blank(config, side)
        count = num_rows // len(rows)
        grids = torch.tensor([[1, side, side]]).repeat(count, 1)
        inputs = {"image_grid_thw": grids}
        if hasattr(vision, "fullatt_block_indexes"):  # found here, since finding them needs numbers
            from transformers.vision_utils import get_vision_window_index

            windows = get_vision_window_index(grids, vision.spatial_merge_size, vision.window_size, vision.patch_size)
            inputs |= dict(zip(("window_index", "cu_window_seqlens"), windows, strict=True))
        return Prompt([], rows.repeat(count, 1), inputs), count * len(rows) // merged

    def vision_tower(self, model: nn.Module) -> nn.Module:
        return model.model.visual

    def blank(self, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        return self._blank(model.config, model.config.vision_config.spatial_merge_size)

    @staticmethod
    def _blank(config: Any, side: int) -> tuple[Tensor, dict[str, Tensor]]:
        """One square picture without content; `side` in patches."""
        vision = config.vision_config
        channels = getattr(vision, "in_channels", 3)
        width = channels * vision.temporal_patch_size * vision.patch_size**2
        return torch.zeros(side * side, width), {"image_grid_thw": torch.tensor([[1, side, side]])}

    def tower_width(self, model: nn.Module) -> int:
        vision = model.config.vision_config
        return getattr(vision, "embed_dim", vision.hidden_size) * vision.depth

    def tower_runs(self, model: nn.Module, pack: Pack) -> list[tuple[int, float]]:
        vision = model.config.vision_config
        tokens = pack.image_inputs["image_grid_thw"].prod(dim=1).tolist()
        if not hasattr(vision, "fullatt_block_indexes"):
            return [(count, count) for count in tokens]
        whole = len(vision.fullatt_block_indexes) / vision.depth  # the other layers see windows only
        window = (vision.window_size // vision.patch_size) ** 2
        return [(count, whole * count + (1 - whole) * min(count, window)) for count in tokens]

    def token_inputs(self, model: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (input_ids == model.config.image_token_id).int()}

    def _pixels(self, processor: Any, max_tiles: int) -> tuple[int, int]:
        """Fewest and most pixels of a picture."""
        size = processor.image_processor.size
        fewest = size["shortest_edge"]
        return fewest, max(fewest, min(size["longest_edge"], max_tiles * TILE_PIXELS))


def rotary_positions(ids: Sequence[int], image_token_id: int, grids: Sequence[Sequence[int]]) -> Tensor:
    """Return the positions of a prompt on the axes time, height and width.

    Text counts on all three axes alike. A picture starts where the text before it ended, counts its rows and columns,
    and the text after it goes on behind the longer of its sides (arXiv 2409.12191, section 2.1).

    Args:
        ids: of the prompt.
        image_token_id: id of the picture token.
        grids: (frames, rows, columns) of the tokens of each picture.

    Returns:
        Shape: (3, tokens)
    """
    columns: list[Tensor] = []
    place, start = 0, 0
    for frames, height, width in grids:
        first = ids.index(image_token_id, start)
        text = first - start
        columns.append(torch.arange(place, place + text).expand(3, -1))
        place += text
        axes = torch.meshgrid(torch.arange(frames), torch.arange(height), torch.arange(width), indexing="ij")
        columns.append(place + torch.stack([axis.flatten() for axis in axes]))
        place += max(height, width)
        start = first + frames * height * width
    columns.append(torch.arange(place, place + len(ids) - start).expand(3, -1))
    return torch.cat(columns, dim=1)
