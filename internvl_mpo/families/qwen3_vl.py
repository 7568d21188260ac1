"""Qwen3-VL, dense and mixture of experts: picture features enter several layers of the decoder."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from internvl_mpo.families.contract import Part
from internvl_mpo.families.native import flat_features
from internvl_mpo.families.qwen2_vl import Qwen2VL


class Qwen3VL(Qwen2VL):
    """As Qwen2-VL, with features of earlier tower layers added to the first decoder layers (deepstack)."""

    name = "qwen3_vl"
    model_types = ("qwen3_vl", "qwen3_vl_moe")
    processors = ("Qwen3VLProcessor",)
    decoders = ("qwen3_vl_text", "qwen3_vl_moe_text")
    parts: ClassVar[Mapping[Part, tuple[str, ...]]] = {
        **Qwen2VL.parts,
        "projector": (".model.visual.merger.", ".model.visual.deepstack_merger_list."),
    }

    def picture_features(
        self, model: nn.Module, pixels: Tensor, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        output = model.get_image_features(pixel_values=pixels, **inputs)
        return flat_features(output.pooler_output), [flat_features(part) for part in output.deepstack_features]

    def deeper_inputs(self, is_picture: Tensor, deeper: Sequence[Tensor]) -> dict[str, Any]:
        return {"visual_pos_masks": is_picture, "deepstack_visual_embeds": list(deeper)}
