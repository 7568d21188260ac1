"""InternVL chat: InternVL2, 2.5, 3 and 3.5 in the official layout, MPO checkpoints included."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from internvl_mpo.errors import BadInputError
from internvl_mpo.families.contract import Family, Message, Part, PictureCost, Prompt
from internvl_mpo.packing import Group, Pack

# Linear layers of InternViT that adapters go to.
VISION_TARGETS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


class InternVLChat(Family):
    """Tiles of one size, one run of picture tokens a picture, positions that count tokens.

    Loaded by the classes of `modeling_internvl_mpo`: code inside a folder (`auto_map`) is never run.
    """

    name = "internvl_chat"
    model_types = ("internvl_chat",)
    processors = ("InternVLChatProcessor",)
    parts: ClassVar[Mapping[Part, tuple[str, ...]]] = {
        "vision tower": (".vision_model.",),
        "projector": (".mlp1.",),
        "language model": (".language_model.",),
    }
    keep_wide = ("vision_model", "mlp1", "language_model.output", "lm_head")

    def check_config(self, config: Mapping[str, Any]) -> None:
        from modeling_internvl_mpo.configuration_internvl_mpo import LANGUAGE_MODELS

        kinds = (config.get("llm_config") or {}).get("architectures") or ()
        if kinds and kinds[0] not in LANGUAGE_MODELS:
            way = "; its checkpoint in the -hf layout is trained as family 'internvl'" if "Moe" in kinds[0] else ""
            raise BadInputError(
                f"InternVL chat with the language model {kinds[0]} is not supported; expected one of "
                f"{', '.join(LANGUAGE_MODELS)}{way}"
            )

    def load_processor(self, source: str) -> Any:
        from modeling_internvl_mpo import InternVLChatProcessor

        return InternVLChatProcessor.from_pretrained(source, trust_remote_code=False)

    def placeholder(self, processor: Any) -> str:
        return processor.image_token

    def reserved(self, processor: Any) -> tuple[str, ...]:
        return (processor.tokenizer.convert_ids_to_tokens(processor.image_token_id),)

    def render_all(
        self, processor: Any, conversations: Sequence[Sequence[Message]], *, add_generation_prompt: bool
    ) -> list[str]:
        chats = list(map(list, conversations))
        return processor.apply_chat_template(chats, add_generation_prompt=add_generation_prompt, tokenize=False)

    def encode(self, processor: Any, prompt: str, images: Sequence[Image.Image], max_tiles: int) -> Prompt:
        inputs = {"images": [list(images)], "max_dynamic_patch": max_tiles} if images else {}
        features = processor(text=[prompt], return_num_tiles=True, **inputs)
        return Prompt(list(features["input_ids"][0]), features.get("pixel_values"))

    def picture_cost(self, processor: Any, height: int, width: int, num_images: int, max_tiles: int) -> PictureCost:
        from modeling_internvl_mpo.conversation_internvl_mpo import IMG_CONTEXT, IMG_END, IMG_START

        limits = {"max_dynamic_patch": max_tiles}
        num_tiles = processor.image_processor.get_number_of_image_patches(height, width, limits)
        text = IMG_START + IMG_CONTEXT + IMG_END
        return PictureCost(text, num_tiles * processor.num_image_token - 1, num_tiles)

    def cost_settings(self, processor: Any) -> tuple[Any, ...]:
        return processor.num_image_token, processor.image_processor.to_json_string()

    def load_config(self, source: str) -> Any:
        from modeling_internvl_mpo import InternVLChatConfig

        return InternVLChatConfig.from_pretrained(source)

    def load_model(self, source: str, **options: Any) -> nn.Module:
        from modeling_internvl_mpo import InternVLChatModel

        return InternVLChatModel.from_pretrained(source, **options)

    def build(self, config: Any) -> nn.Module:
        from modeling_internvl_mpo import InternVLChatModel

        return InternVLChatModel(config)

    def sample_pictures(self, config: Any, num_rows: int | None, num_tokens: int) -> tuple[Prompt, int]:
        count = num_tokens // config.num_image_token
        count = count if num_rows is None else min(num_rows, count)
        side = config.force_image_size
        return Prompt([], torch.zeros(count, 3, side, side) if count else None), count * config.num_image_token

    def decoder(self, model: nn.Module) -> nn.Module:
        return model.language_model.model

    def vision_tower(self, model: nn.Module) -> nn.Module:
        return model.vision_model

    def embed(self, model: nn.Module, pack: Pack) -> tuple[Tensor, dict[str, Any]]:
        pixels = None if pack.pixel_values is None else pack.pixel_values.to(model.dtype)
        return model.embed(pack.input_ids, pixels), {}

    def forward_inputs(self, group: Group, num_rows: int, device: torch.device) -> dict[str, Tensor]:
        if group.tiles is None:
            return {}
        return {"pixel_values": group.tiles.to(device).repeat(num_rows, 1, 1, 1)}

    def tower_width(self, model: nn.Module) -> int:
        vision = model.config.vision_config
        return vision.hidden_size * vision.num_hidden_layers

    def tower_runs(self, model: nn.Module, pack: Pack) -> list[tuple[int, float]]:
        tokens = (model.config.force_image_size // model.config.vision_config.patch_size) ** 2 + 1  # a class token
        return [(tokens, tokens)] * len(pack.pixel_values)

    def lora_targets(self, model: nn.Module, part: Part) -> str:
        from modeling_internvl_mpo.configuration_internvl_mpo import LORA_TARGETS

        if part == "vision tower":
            tower, names = "vision_model", VISION_TARGETS
        else:
            tower, names = "language_model", LORA_TARGETS[model.config.llm_config.model_type]
        return "|".join(rf".*{tower}\..*\.{re.escape(name)}" for name in names)
