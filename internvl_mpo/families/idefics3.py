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

    def sample_pictures(self, config: Any, num_rows: int | None, num_tokens: int) -> tuple[Prompt, int]:
        side = config.vision_config.image_size
        length = (side // config.vision_config.patch_size // config.scale_factor) ** 2
        count = num_tokens // length
        count = count if num_rows is None else min(num_rows, count)
        whole = torch.ones(count, side, side, dtype=torch.long)
        return Prompt([], torch.zeros(count, 3, side, side), {"pixel_attention_mask": whole}), count * length

    def decoder(self, model: nn.Module) -> nn.Module:
        return model.model.text_model

    def vision_tower(self, model: nn.Module) -> nn.Module:
        return model.model.vision_model

    def picture_features(
        self, model: nn.Module, pixels: Tensor, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        # as get_image_features, without its search for tiles of zeros, which pads batches and reads numbers
        size = model.config.vision_config.patch_size
        patches = inputs["pixel_attention_mask"].unfold(1, size, size).unfold(2, size, size).sum(dim=(-1, -2)) > 0
        hidden = model.model.vision_model(pixel_values=pixels, patch_attention_mask=patches).last_hidden_state
        return flat_features(model.model.connector(hidden)), ()

    def blank(self, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        side = model.config.vision_config.image_size
        return torch.zeros(1, 3, side, side), {"pixel_attention_mask": torch.ones(1, side, side, dtype=torch.long)}

    def forward_inputs(self, group: Group, num_rows: int, device: torch.device) -> dict[str, Tensor]:
        if group.tiles is None:
            return {}
        rows = {"pixel_values": group.tiles, **group.image_inputs}
        return {name: torch.stack([value] * num_rows).to(device) for name, value in rows.items()}
