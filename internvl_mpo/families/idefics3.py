"""Idefics3 and SmolVLM: a picture is cut into rows and columns, each tile named in the prompt."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from internvl_mpo.families.contract import Part, PictureCost, Prompt
from internvl_mpo.families.native import NativeFamily, flat_features
from internvl_mpo.packing import Group


class Idefics3(NativeFamily):
    """The number of tiles follows from the longest edge in the checkpoint, whatever `max_tiles` says."""

    name = "idefics3"
    model_types = ("idefics3", "smolvlm")
    processors = ("Idefics3Processor", "SmolVLMProcessor")
    parts: ClassVar[Mapping[Part, tuple[str, ...]]] = {
        "vision tower": (".model.vision_model.",),
        "projector": (".model.connector.",),
        "language model": (".model.text_model.", ".lm_head."),
    }
    keep_wide = ("vision_model", "connector", "lm_head")

    def picture_cost(self, processor: Any, height: int, width: int, num_images: int, max_tiles: int) -> PictureCost:
        _, num_rows, num_columns = processor.image_processor.get_number_of_image_patches(height, width)
        # the processor's own text, with one picture token a tile
        whole = processor.replace_image_token({"rows": [[num_rows]], "cols": [[num_columns]]}, 0)
        length = processor.image_seq_len
        text = whole.replace(processor.image_token * length, processor.image_token)
        num_tiles = num_rows * num_columns + 1
        return PictureCost(text, num_tiles * (length - 1), num_tiles)

    def prompt(self, processor: Any, ids: list[int], features: Mapping[str, Any]) -> Prompt:
        return Prompt(ids, features["pixel_values"][0], {"pixel_attention_mask": features["pixel_attention_mask"][0]})

    def decoder(self, model: nn.Module) -> nn.Module:
        return model.model.text_model

    def vision_tower(self, model: nn.Module) -> nn.Module:
        return model.model.vision_model

    def picture_features(
        self, model: nn.Module, pixels: Tensor, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        rows = {name: value[None] for name, value in inputs.items()}
        return flat_features(model.get_image_features(pixel_values=pixels[None], **rows).pooler_output), ()

    def blank(self, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        side = model.config.vision_config.image_size
        # a picture of zeros alone would be taken for padding and left out
        return torch.ones(1, 3, side, side), {"pixel_attention_mask": torch.ones(1, side, side, dtype=torch.long)}

    def forward_inputs(self, group: Group, num_rows: int, device: torch.device) -> dict[str, Tensor]:
        if group.tiles is None:
            return {}
        rows = {"pixel_values": group.tiles, **group.image_inputs}
        return {name: torch.stack([value] * num_rows).to(device) for name, value in rows.items()}
