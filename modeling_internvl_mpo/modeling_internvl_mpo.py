"""InternVL chat model: vision tower, pixel shuffle, projector, language model.

Works with every InternVL2 checkpoint (and 2.5, 3, 3.5, the MPO ones included) on current transformers, with the
official state-dict keys `vision_model.`, `mlp1.`, `language_model.`.

Letters: B rows, L tokens, I tiles of all rows, S side of a tile, N image tokens per tile, C width.
"""

import os
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    BitsAndBytesConfig,
    Cache,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .chat_internvl_mpo import Chat
from .configuration_internvl_mpo import InternVLChatConfig
from .conversation_internvl_mpo import IMG_CONTEXT, get_conversation
from .modeling_intern_vit import InternVisionModel
from .modeling_internlm2 import InternLM2ForCausalLM
from .tokenization_internvl_mpo import find_token_id, hub_arguments


def pixel_shuffle(x: torch.Tensor, scale_factor: float = 0.5, ps_version: str = "v2") -> torch.Tensor:
    """Fold neighbouring patches into channels.

    Args:
        x: (I, rows, columns, C).
        scale_factor: of the side; 0.5 joins 2 x 2 patches in the order top left, top right, bottom left, bottom right.
        ps_version: "v2" keeps rows as rows, "v1" returns them transposed.

    Returns:
        (I, rows * scale, columns * scale, C / scale**2).
    """
    num_tiles, rows, columns, width = x.shape
    fold = round(1 / scale_factor)
    x = x.view(num_tiles, rows // fold, fold, columns // fold, fold, width)
    order = (0, 1, 3, 2, 4, 5) if ps_version == "v2" else (0, 3, 1, 2, 4, 5)
    shape = (rows // fold, columns // fold) if ps_version == "v2" else (columns // fold, rows // fold)
    return x.permute(order).reshape(num_tiles, *shape, width * fold * fold)


class Headless:
    """The model without its output matrix: what `base_model` means in transformers and TRL.

    A view, not a module: the official checkpoint keys leave no room for a module between the model and its parts.
    """

    def __init__(self, model: "InternVLChatModel") -> None:
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> BaseModelOutputWithPast:
        return self._model.encode(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class InternVLChatModel(Chat, PreTrainedModel, GenerationMixin):
    """Text and images in, text out.

    Args:
        config: an `InternVLChatConfig`.
        vision_model: used instead of a new tower.
        language_model: used instead of a new language model.
        use_flash_attn: accepted because every published example passes it. Attention is chosen by
            `attn_implementation`; the default, sdpa, needs no extra package.
    """

    config_class = InternVLChatConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _no_split_modules: ClassVar[list[str]] = [
        "InternVisionEncoderLayer",
        "InternLM2DecoderLayer",
        "LlamaDecoderLayer",
        "Phi3DecoderLayer",
        "Qwen2DecoderLayer",
        "Qwen3DecoderLayer",
    ]

    def __init__(
        self,
        config: InternVLChatConfig,
        vision_model: nn.Module | None = None,
        language_model: nn.Module | None = None,
        use_flash_attn: bool | None = None,
    ) -> None:
        if config.use_backbone_lora or config.use_llm_lora:
            raise ValueError(
                "the config asks for LoRA inside the model (use_backbone_lora, use_llm_lora); merge the adapter, "
                "or set both to 0 and load it with peft"
            )
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.vision_model = vision_model or InternVisionModel(config.vision_config)
        self.language_model = language_model or _language_model(config.llm_config)
        folded = config.vision_config.hidden_size * round(1 / config.downsample_ratio) ** 2
        width = config.llm_config.hidden_size
        self.mlp1 = nn.Sequential(nn.LayerNorm(folded), nn.Linear(folded, width), nn.GELU(), nn.Linear(width, width))
        self.select_layer = config.select_layer
        self.downsample_ratio = config.downsample_ratio
        self.ps_version = config.ps_version
        self.template = config.template
        self.num_image_token = config.num_image_token
        self.conv_template = None if config.template is None else get_conversation(config.template)
        self.system_message = config.system_message
        if self.system_message is None and self.conv_template is not None:
            self.system_message = self.conv_template.system_message
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """Load a folder or Hub repository; see transformers. Finds the image token's id if the config has none.

        `load_in_8bit` and `load_in_4bit`, which published examples pass, become a `quantization_config`.
        """
        wanted = {name: True for name in ("load_in_8bit", "load_in_4bit") if kwargs.pop(name, None)}
        if wanted:
            kwargs["quantization_config"] = BitsAndBytesConfig(**wanted)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.config.image_token_id is None:
            where = hub_arguments(kwargs)
            model.config.image_token_id = find_token_id(pretrained_model_name_or_path, IMG_CONTEXT, **where)
        return loaded

    @property
    def base_model(self) -> Headless:
        """The model without its output matrix; `model.base_model(...)` returns `last_hidden_state` and no logits."""
        return Headless(self)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """Return the vision tower for "image" and "video", else the model itself, which has no text encoder.

        transformers would ask `base_model`, a view of this very model, for ever; peft asks in mixed batches.
        """
        return self.vision_model if modality in ("image", "video") else self

    @property
    def img_context_token_id(self) -> int | None:
        """Id of `<IMG_CONTEXT>`; the official name of `config.image_token_id`."""
        return self.config.image_token_id

    @img_context_token_id.setter
    def img_context_token_id(self, value: int | None) -> None:
        self.config.image_token_id = value

    @property
    def lm_head(self) -> nn.Module:
        """The output matrix, under its usual name."""
        return self.language_model.get_output_embeddings()

    def get_input_embeddings(self) -> nn.Module:
        """Return the token embeddings."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token embeddings."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """Return the output matrix."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output matrix."""
        self.language_model.set_output_embeddings(new_embeddings)

    def pixel_shuffle(self, x: torch.Tensor, scale_factor: float = 0.5) -> torch.Tensor:
        """Fold neighbouring patches into channels; see the function of the same name."""
        return pixel_shuffle(x, scale_factor, self.ps_version)

    def extract_feature(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Turn tiles into image tokens: (I, 3, S, S) to (I, N, C)."""
        outputs = self.vision_model(pixel_values, output_hidden_states=self.select_layer != -1)
        if self.select_layer == -1:
            hidden_states = outputs.last_hidden_state
        else:
            hidden_states = outputs.hidden_states[self.select_layer]
        patches = hidden_states[:, 1:]
        side = round(patches.shape[1] ** 0.5)
        patches = patches.reshape(patches.shape[0], side, side, -1)
        return self.mlp1(self.pixel_shuffle(patches, self.downsample_ratio).flatten(1, 2))

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Return image tokens (I, N, C) as `pooler_output`; the name other libraries look for."""
        return BaseModelOutputWithPooling(pooler_output=self.extract_feature(pixel_values))

    def embed(
        self,
        input_ids: torch.LongTensor,
        pixel_values: torch.Tensor | None = None,
        image_flags: torch.Tensor | None = None,
        visual_features: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Embed tokens and put the tiles' features at the `<IMG_CONTEXT>` positions.

        Args:
            input_ids: (B, L).
            pixel_values: (I, 3, S, S), tiles in reading order over all rows.
            image_flags: (I,) or (I, 1); tiles whose flag is not 1 are left out.
            visual_features: (I, N, C), already projected; replaces pixel_values.

        Returns:
            (B, L, C).

        Raises:
            ValueError: image tokens and tile features differ in number, tiles have another side than the model's, or
                the image token's id is not known.
        """
        embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None and image_flags is not None:
            pixel_values = pixel_values[image_flags.reshape(-1) == 1]
        if visual_features is None and pixel_values is not None and len(pixel_values):
            self._check_tile_side(pixel_values, input_ids)
            visual_features = self.extract_feature(pixel_values)
        if self.config.image_token_id is None:
            if visual_features is not None:
                raise ValueError(f"the id of {IMG_CONTEXT} is not known; set model.img_context_token_id")
            return embeds
        is_image = input_ids == self.config.image_token_id
        num_tokens = int(is_image.sum())
        num_features = 0 if visual_features is None else visual_features.shape[:-1].numel()
        if num_tokens != num_features:
            raise ValueError(
                f"the text has {num_tokens} {IMG_CONTEXT} tokens, the tiles give {num_features} features "
                f"({self.num_image_token} per tile); check truncation and literal {IMG_CONTEXT} in the text"
            )
        if visual_features is not None:
            return embeds.masked_scatter(is_image.unsqueeze(-1), visual_features.to(embeds.device, embeds.dtype))
        is_shared = self.training and torch.distributed.is_available() and torch.distributed.is_initialized()
        # ZeRO-3 and FSDP2 gather weights at each use, in evaluation too. (Naming one, as mlp1[1].weight, is a use.)
        is_cut = any(hasattr(parameter, "ds_id") for parameter in self.mlp1.parameters())
        is_cut |= any(type(module).__name__.startswith("FSDP") for module in self.vision_model.modules())
        if is_shared or is_cut:
            # Every rank must run the tower, and before the language model: collectives are paired up by their order.
            side = self.config.force_image_size
            blank = torch.zeros(1, 3, side, side, dtype=embeds.dtype, device=embeds.device)
            embeds = embeds + 0.0 * self.extract_feature(blank).sum()
        return embeds

    def _check_tile_side(self, pixel_values: torch.Tensor, input_ids: torch.LongTensor) -> None:
        """Refuse tiles of another side, unless the text has as many image tokens as tiles of that side give."""
        height, width = pixel_values.shape[-2:]
        side, unit = self.config.force_image_size, round(self.config.vision_config.patch_size / self.downsample_ratio)
        if (height, width) == (side, side) or self.config.image_token_id is None:
            return
        num_tokens = int((input_ids == self.config.image_token_id).sum())
        if height != width or height % unit or num_tokens != (height // unit) ** 2 * len(pixel_values):
            raise ValueError(
                f"the tiles are {width} x {height} pixels, this model takes {side} x {side}; cut pictures with its own "
                f"image processor, or with load_image(picture, input_size={side})"
            )

    def encode(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        image_flags: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        visual_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the language model's hidden states after its final norm, (B, L, C), without logits.

        Arguments are those of `forward`; `model.base_model(...)` calls this.
        """
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            # While decoding, an image token is one the model chose to write, not a place for a tile.
            decoding = past_key_values is not None and (input_ids.shape[1] == 1 or past_key_values.get_seq_length() > 0)
            if decoding and pixel_values is None and visual_features is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)
            else:
                inputs_embeds = self.embed(input_ids, pixel_values, image_flags, visual_features)
        return self.language_model.model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        image_flags: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        visual_features: torch.Tensor | None = None,
        loss_weight: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Predict the next token everywhere.

        Args:
            input_ids: (B, L).
            pixel_values: (I, 3, S, S); tiles fill the `<IMG_CONTEXT>` positions in reading order over all rows.
            attention_mask: (B, total length) of 0 and 1, or a prepared 4-D or block mask.
            position_ids: (B, L).
            image_flags: (I,) or (I, 1); tiles whose flag is not 1 are left out.
            labels: (B, L); -100 is not scored. Token t is predicted at position t - 1.
            past_key_values: cache of earlier tokens.
            inputs_embeds: (B, L, C), replaces input_ids and pixel_values.
            visual_features: (I, N, C), already projected tiles; replaces pixel_values.
            loss_weight: (B, L), weights of the labels; the loss is sum(weight * cross entropy) / sum(weight).
            logits_to_keep: number of last positions, or an index into positions; 0 keeps all.
            **kwargs: go to the language model, and from there to its attention function.

        Returns:
            `logits` (B, kept, vocabulary); `loss` if labels are given; `past_key_values`.

        Raises:
            ValueError: image tokens and tile features differ in number.
        """
        outputs = self.encode(
            input_ids,
            pixel_values,
            attention_mask,
            position_ids,
            image_flags,
            past_key_values,
            inputs_embeds,
            visual_features,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None and loss_weight is not None:
            loss = _weighted_loss(logits, labels, loss_weight)
        elif labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.llm_config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        pixel_values: torch.Tensor | None = None,
        visual_features: torch.Tensor | None = None,
        image_flags: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts; see `transformers.GenerationMixin.generate`. Pad on the left.

        Tiles are encoded once and put into the prompt embeddings, so several samples or beams per row share them.

        Args:
            inputs: (B, L) prompt ids, also accepted as `input_ids`.
            generation_config: of transformers.
            pixel_values: (I, 3, S, S), tiles of all rows in reading order.
            visual_features: (I, N, C), already projected tiles; replaces pixel_values.
            image_flags: (I,) or (I, 1); tiles whose flag is not 1 are left out.
            **kwargs: of transformers.

        Returns:
            (B * num_return_sequences, L + new tokens): prompt and answer, as everywhere in transformers.

        Raises:
            ValueError: image tokens and tile features differ in number, or a mode that cannot see pictures gets some.
        """
        input_ids = kwargs.pop("input_ids", inputs)
        mode = _mode_of_ids({**_settings(self.generation_config), **_settings(generation_config), **kwargs})
        if mode == "assistant_early_exit":
            raise ValueError("assistant_early_exit is not known to this model, whose layers lie in its language model")
        if mode is not None and "inputs_embeds" not in kwargs:
            if pixel_values is not None or visual_features is not None:
                raise ValueError(f"{mode} reads token ids alone and would not see the pictures; leave it out")
            kwargs.setdefault("attention_mask", torch.ones_like(input_ids))
        elif input_ids is not None and "inputs_embeds" not in kwargs:
            kwargs["inputs_embeds"] = self.embed(input_ids, pixel_values, image_flags, visual_features)
            # Without a mask transformers would guess one from pad tokens; pads cannot be told from embeddings.
            kwargs.setdefault("attention_mask", torch.ones_like(input_ids))
        return super().generate(input_ids=input_ids, generation_config=generation_config, **kwargs)


def _settings(config: GenerationConfig | None) -> dict[str, Any]:
    return {} if config is None else vars(config)


def _mode_of_ids(settings: dict[str, Any]) -> str | None:
    """Return the setting of a generation mode that feeds token ids to the model and knows no embeddings, or None."""
    names = ("prompt_lookup_num_tokens", "assistant_model", "assistant_early_exit", "prefill_chunk_size")
    return next((name for name in names if settings.get(name) is not None), None)


def _language_model(config: Any) -> PreTrainedModel:
    if config.model_type == "internlm2":
        return InternLM2ForCausalLM(config)
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)


def _weighted_loss(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean of the next-token cross entropies, weighted by the weights of the predicted tokens."""
    losses = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device), reduction="none"
    )
    weights = weights[:, 1:].flatten().to(losses)
    return (losses * weights).sum() / weights.sum()
