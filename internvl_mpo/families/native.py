"""What the families have in common whose model, processor and chat template are transformers' own.

A family file on top of this one says what its pictures cost and what its vision tower takes; the rest is here.
"""

import importlib
import importlib.util
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.fsdp import FSDPModule

from internvl_mpo.errors import BadInputError
from internvl_mpo.families.contract import Family, Message, Part, Prompt, Turn
from internvl_mpo.files import update_json
from internvl_mpo.packing import Group, Pack
from internvl_mpo.records import IMAGE_PLACEHOLDER
from modeling_internvl_mpo.image_processing_internvl_mpo import to_rgb

# Decoders whose attention a pack serves: causal, no soft caps on scores or logits. Windows and sinks are served.
DECODERS = ("llama", "mistral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gpt_oss")
STANDARD_PARTS: dict[Part, tuple[str, ...]] = {
    "vision tower": (".model.vision_tower.",),
    "projector": (".model.multi_modal_projector.", ".model.image_newline"),
    "language model": (".model.language_model.", ".lm_head."),
}


class NativeFamily(Family):
    """A family of transformers.

    Attributes:
        decoders: `model_type` of the language models it takes.
        towers: `model_type` of the vision towers it takes; empty takes all.
    """

    decoders: ClassVar[tuple[str, ...]] = DECODERS
    towers: ClassVar[tuple[str, ...]] = ()
    parts: ClassVar[Mapping[Part, tuple[str, ...]]] = STANDARD_PARTS

    @property
    def keep_wide(self) -> tuple[str, ...]:  # from the root on: transformers takes a name for the beginning of a path
        paths = [path for part in ("vision tower", "projector") for path in self.parts[part]]
        return (*(path.strip(".") for path in paths), "lm_head")

    # --- before anything heavy ----------------------------------------------------------------------------------------

    def check_config(self, config: Mapping[str, Any]) -> None:
        import transformers

        classes = config.get("architectures") or ()
        if classes and not set(classes) & set(dir(transformers)):
            raise BadInputError(
                f"model_type is '{config.get('model_type')}', but the class {classes[0]} is its authors' code and not "
                "part of transformers; take the checkpoint that transformers loads (mostly named -hf)"
            )
        text, vision = config.get("text_config") or config, config.get("vision_config") or {}
        kind = text.get("model_type", self.decoders[0])
        if kind not in (*self.decoders, *self.model_types):
            raise BadInputError(
                f"{self.name} with a language model of type '{kind}' is not supported: its attention is another than "
                f"packs are laid out for; supported are {', '.join(self.decoders)}"
            )
        tower = vision.get("model_type")
        if self.towers and tower is not None and tower not in self.towers:
            raise BadInputError(
                f"{self.name} with a vision tower of type '{tower}' is not supported; expected one of "
                f"{', '.join(self.towers)}"
            )

    def load_processor(self, source: str) -> Any:
        processor = load_native_processor(source)
        if not getattr(processor, "chat_template", None):
            raise BadInputError(f"{source} has no chat template; give the folder of a chat model")
        return processor

    # --- a question becomes a prompt ----------------------------------------------------------------------------------

    def placeholder(self, processor: Any) -> str:
        return processor.image_token

    def reserved(self, processor: Any) -> tuple[str, ...]:
        tokens = (processor.image_token, getattr(processor, "video_token", None))
        vocabulary = processor.tokenizer.get_vocab()
        return tuple(token for token in tokens if token in vocabulary)

    def render_all(
        self, processor: Any, conversations: Sequence[Sequence[Message]], *, add_generation_prompt: bool
    ) -> list[str]:
        chats = [
            [{"role": message["role"], "content": content_parts(message["content"])} for message in messages]
            for messages in conversations
        ]
        return processor.apply_chat_template(chats, add_generation_prompt=add_generation_prompt, tokenize=False)

    def adds_specials(self, processor: Any, text: str) -> bool:
        return not begins(processor.tokenizer, text)

    def encode(self, processor: Any, prompt: str, images: Sequence[Image.Image], max_tiles: int) -> Prompt:
        if not images:
            return Prompt(self.tokenize(processor, prompt))
        features = processor(
            text=[prompt],
            images=[[to_rgb(image) for image in images]],
            add_special_tokens=not begins(processor.tokenizer, prompt),
            return_tensors="pt",
            **self.limits(processor, max_tiles),
        )
        return self.prompt(processor, features["input_ids"][0].tolist(), features)

    def limits(self, processor: Any, max_tiles: int) -> dict[str, Any]:
        """Return arguments of the processor that keep a picture to `max_tiles`."""
        return {}

    def prompt(self, processor: Any, ids: list[int], features: Mapping[str, Any]) -> Prompt:
        """Return what a processor made of a question with pictures."""
        return Prompt(ids, features["pixel_values"])

    def cost_settings(self, processor: Any) -> tuple[Any, ...]:
        numbers = {name: value for name, value in vars(processor).items() if isinstance(value, (int, str))}
        return sorted(numbers.items()), processor.image_processor.to_json_string()

    def turn(self, processor: Any) -> Turn:
        lead, end_id = super().turn(processor)
        tokenizer = processor.tokenizer
        if end_id not in tokenizer.all_special_ids:  # a template that goes on without a mark, as LLaVA 1.5's does
            end_id = tokenizer.eos_token_id
        return Turn(lead, end_id)

    # --- the model ----------------------------------------------------------------------------------------------------

    def load_config(self, source: str) -> Any:
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(source, trust_remote_code=False)

    def load_model(self, source: str, **options: Any) -> nn.Module:
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=False, **options)

    def build(self, config: Any) -> nn.Module:
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_config(config)

    def decoder(self, model: nn.Module) -> nn.Module:
        return model.model.language_model

    def vision_tower(self, model: nn.Module) -> nn.Module:
        return model.model.vision_tower

    def embed(self, model: nn.Module, pack: Pack) -> tuple[Tensor, dict[str, Any]]:
        embeds = model.get_input_embeddings()(pack.input_ids)
        if pack.pixel_values is not None:
            is_picture = pack.input_ids == model.config.image_token_id
            features, deeper = self.picture_features(model, pack.pixel_values.to(model.dtype), pack.image_inputs)
            has_numbers = not isinstance(embeds, FakeTensor)  # a memory estimate runs on shapes alone
            if has_numbers and int(is_picture.sum()) != len(features):
                raise ValueError(f"{int(is_picture.sum())} picture tokens, but the pictures give {len(features)}")
            embeds = embeds.masked_scatter(is_picture[..., None], features.to(embeds.dtype))
            return embeds, self.deeper_inputs(is_picture, deeper) if has_numbers else {}
        is_shared = model.training and torch.distributed.is_available() and torch.distributed.is_initialized()
        tower = self.vision_tower(model)
        is_cut = any(hasattr(parameter, "ds_id") for parameter in tower.parameters())
        is_cut |= any(isinstance(module, FSDPModule) for module in tower.modules())
        if is_shared or is_cut:
            pixels, inputs = self.blank(model)
            inputs = {name: rows.to(embeds.device) for name, rows in inputs.items()}
            features, deeper = self.picture_features(model, pixels.to(embeds.device, model.dtype), inputs)
            embeds = embeds + 0.0 * sum(rows.sum() for rows in (features, *deeper)).to(embeds.dtype)
        return embeds, {}

    def picture_features(
        self, model: nn.Module, pixels: Tensor, inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, Sequence[Tensor]]:
        """Return the features that take the place of picture tokens, in order, and those that enter deeper layers.

        Returns:
            Shape: (picture tokens, C), and the same for each deeper layer.
        """
        return flat_features(model.get_image_features(pixel_values=pixels, **inputs).pooler_output), ()

    def deeper_inputs(self, is_picture: Tensor, deeper: Sequence[Tensor]) -> dict[str, Any]:
        """Return the arguments that hand features to deeper layers of the decoder; `is_picture` has shape (1, T)."""
        return {}

    def blank(self, model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
        """Return pixels and further inputs of the smallest picture."""
        side = model.config.vision_config.image_size
        height, width = side if isinstance(side, (list, tuple)) else (side, side)
        return torch.zeros(1, 3, height, width), {}

    def forward_inputs(self, group: Group, num_rows: int, device: torch.device) -> dict[str, Tensor]:
        if group.tiles is None:
            return {}
        rows = {"pixel_values": group.tiles, **group.image_inputs}
        return {name: torch.cat([value] * num_rows).to(device) for name, value in rows.items()}

    def tower_width(self, model: nn.Module) -> int:
        vision = model.config.vision_config
        return vision.hidden_size * vision.num_hidden_layers

    def tower_runs(self, model: nn.Module, pack: Pack) -> list[tuple[int, float]]:
        size = model.config.vision_config.patch_size
        tokens = pack.pixel_values.shape[-1] * pack.pixel_values.shape[-2]
        for side in size if isinstance(size, (list, tuple)) else (size, size):
            tokens //= side
        return [(tokens, tokens)] * len(pack.pixel_values)

    def saved_weights(self, model: nn.Module, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(model, dict(weights))

    def lora_targets(self, model: nn.Module, part: Part) -> str:
        root = self.decoder(model) if part == "language model" else self.vision_tower(model)
        path = next(name for name, module in model.named_modules() if module is root)
        layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        unread = set(self.unread(model))
        own = [name for name in layers if name.startswith(f"{path}.") and self.part_of(f"{name}.weight") == part]
        names = {name.rpartition(".")[2] for name in own}
        # what belongs to another part although it lies in this one (Qwen's merger) is left alone
        inner = {
            key.removeprefix(".").rstrip(".")
            for other, keys in self.parts.items()
            for key in keys
            if other != part and key.startswith(f".{path}.")
        }
        inner |= {name for name, module in model.named_modules() if module in unread}
        without = "".join(rf"(?!{re.escape(name)}\.)" for name in sorted(inner))
        return rf"(?:.*\.)?{without}{re.escape(path)}\.(?:.*\.)?(?:{'|'.join(sorted(names))})"


def content_parts(text: str) -> list[dict[str, str]]:
    """Return text with `<image>` marks as the parts a chat template takes; line breaks around a picture are its own."""
    pieces = text.split(IMAGE_PLACEHOLDER)
    content: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        content += [{"type": "image"}] if number else []
        piece = piece.strip("\n") if len(pieces) > 1 else piece
        content += [{"type": "text", "text": piece}] if piece else []
    return content


def begins(tokenizer: Any, text: str) -> bool:
    """Say whether a rendered prompt brings its own first token, so that the tokenizer must not add another."""
    return tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)


def flat_features(features: Tensor | Sequence[Tensor]) -> Tensor:
    """Return picture features as rows, whether a model gives one tensor or one for each picture. Shape: (rows, C)"""
    features = features if isinstance(features, Tensor) else torch.cat([part.flatten(0, -2) for part in features])
    return features.flatten(0, -2)


def load_native_processor(source: str, trust_remote_code: bool = False) -> Any:
    """Return a model's own processor, without the part for videos where a package for it is missing (torchvision).

    What the folder says of videos is kept and saved again, so that a trained model still takes them where the package
    is there.
    """
    from transformers import AutoConfig, AutoProcessor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    _free_pil_classes()
    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    wanted = PROCESSOR_MAPPING.get(type(config), None)
    if wanted is None or all(importlib.util.find_spec(name) for name in video_packages(wanted)):
        return AutoProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    attributes = [name for name in wanted.get_attributes() if name != "video_processor"]
    video_settings = _video_settings(source)

    class Stills(_for_pictures(wanted)):  # takes the name of the class it stands for, which is what folders say
        @classmethod
        def get_attributes(cls) -> list[str]:
            return attributes

        def save_pretrained(self, save_directory: Any, **options: Any) -> Any:
            written = super().save_pretrained(save_directory, **options)
            if video_settings:
                update_json(Path(save_directory) / "processor_config.json", {"video_processor": video_settings})
            return written

    Stills.__name__ = Stills.__qualname__ = wanted.__name__
    return Stills.from_pretrained(source, trust_remote_code=False)


def _free_pil_classes() -> None:
    """Let transformers 5.17 load its PIL classes, which it lists by mistake among those that need torchvision."""
    for model_type, name in (("idefics3", "Idefics3ImageProcessorPil"), ("smolvlm", "SmolVLMImageProcessorPil")):
        package = importlib.import_module(f"transformers.models.{model_type}")
        if getattr(getattr(package, name), "is_dummy", False):
            module = importlib.import_module(f"transformers.models.{model_type}.image_processing_pil_{model_type}")
            setattr(package, name, getattr(module, name))


def video_packages(processor_class: type) -> tuple[str, ...]:
    """Return the packages that a processor class needs for videos, and asks for with pictures too."""
    if "video_processor" not in processor_class.get_attributes():
        return ()
    return ("torchvision", "num2words") if processor_class.__name__ == "SmolVLMProcessor" else ("torchvision",)


def _for_pictures(wanted: type) -> type:
    """Return a class that makes the same prompts from pictures, and can be made without a part for videos."""
    from transformers import Idefics3Processor

    return Idefics3Processor if wanted.__name__ == "SmolVLMProcessor" else wanted


def _video_settings(source: str) -> dict[str, Any] | None:
    """Return what a folder or Hub id says of videos; older folders say it in the file for images."""
    from transformers.utils import cached_file

    found = {}
    for name in ("processor_config.json", "video_preprocessor_config.json", "preprocessor_config.json"):
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        found[name] = {} if path is None else json.loads(Path(path).read_text(encoding="utf-8"))
    return (
        found["processor_config.json"].get("video_processor")
        or found["video_preprocessor_config.json"]
        or found["preprocessor_config.json"]
        or None
    )
