"""InternViT, the vision tower of InternVL: 300M and 6B, with the official state-dict keys.

Letters: I tiles, S sequence (class token and patches), C width, H heads.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, initialization
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_internvl_mpo import InternVisionConfig


class InternRMSNorm(nn.Module):
    """RMS norm with float32 statistics; the weight multiplies after the cast back to the input's dtype."""

    def __init__(self, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normalised = F.rms_norm(hidden_states, hidden_states.shape[-1:], eps=self.variance_epsilon)
        return self.weight * normalised


def _norm(config: InternVisionConfig) -> nn.Module:
    norm_class = nn.LayerNorm if config.norm_type == "layer_norm" else InternRMSNorm
    return norm_class(config.hidden_size, eps=config.layer_norm_eps)


def drop_path(x: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """Drop a residual branch for whole samples and scale the others by 1 / (1 - rate); identity outside training."""
    if rate == 0.0 or not training:
        return x
    keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1.0 - rate)
    return x * keep / (1.0 - rate)


class InternVisionEmbeddings(nn.Module):
    """Patches of a tile, a class token in front, and position embeddings."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.grid_size = config.image_size // config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Parameter(torch.empty(1, self.grid_size**2 + 1, config.hidden_size))

    def _patch_positions(self, height: int, width: int) -> torch.Tensor:
        """Position embeddings of a `height` x `width` patch grid, shape (1, height * width, C)."""
        positions = self.position_embedding[:, 1:]
        if (height, width) == (self.grid_size, self.grid_size):
            return positions
        grid = positions.float().reshape(1, self.grid_size, self.grid_size, -1).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(height, width), mode="bicubic", align_corners=False)
        return grid.flatten(2).transpose(1, 2).to(positions.dtype)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))  # (I, C, rows, columns)
        height, width = patches.shape[-2:]
        patches = patches.flatten(2).transpose(1, 2) + self._patch_positions(height, width)
        class_token = self.class_embedding + self.position_embedding[:, :1]
        return torch.cat([class_token.expand(patches.shape[0], -1, -1), patches], dim=1)


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain attention over (I, H, S, D) tensors; the softmax stays in the compute dtype, as in the original."""
    weights = F.softmax((query * scaling) @ key.transpose(-2, -1), dim=-1)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class InternAttention(nn.Module):
    """Self-attention of all tokens of a tile."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.qk_normalization = config.qk_normalization
        if config.qk_normalization:
            self.q_norm = InternRMSNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.k_norm = InternRMSNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        shape = (*hidden_states.shape[:-1], self.num_heads, self.head_dim)
        query, key, value = self.qkv(hidden_states).chunk(3, dim=-1)
        if self.qk_normalization:
            query, key = self.q_norm(query), self.k_norm(key)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, _ = attention(
            self,
            query.view(shape).transpose(1, 2),
            key.view(shape).transpose(1, 2),
            value.view(shape).transpose(1, 2),
            attention_mask=None,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            is_causal=False,
        )
        output = self.proj(output.reshape(hidden_states.shape))
        return F.dropout(output, p=self.config.dropout, training=self.training)


class InternMLP(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.act = ACT2FN[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(hidden_states)))


class InternVisionEncoderLayer(GradientCheckpointingLayer):
    """Pre-norm block with layer scale and drop path on both branches."""

    def __init__(self, config: InternVisionConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.attn = InternAttention(config)
        self.mlp = InternMLP(config)
        self.norm1 = _norm(config)
        self.norm2 = _norm(config)
        self.ls1 = nn.Parameter(torch.empty(config.hidden_size))
        self.ls2 = nn.Parameter(torch.empty(config.hidden_size))
        self.drop_path_rate = drop_path_rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = hidden_states.dtype
        branch = self.attn(self.norm1(hidden_states).to(dtype)) * self.ls1
        hidden_states = hidden_states + drop_path(branch, self.drop_path_rate, self.training)
        branch = self.mlp(self.norm2(hidden_states).to(dtype)) * self.ls2
        return hidden_states + drop_path(branch, self.drop_path_rate, self.training)


class InternVisionEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        last = max(config.num_hidden_layers - 1, 1)
        self.layers = nn.ModuleList(
            InternVisionEncoderLayer(config, config.drop_path_rate * index / last)
            for index in range(config.num_hidden_layers)
        )


class InternVisionModel(PreTrainedModel):
    """Tiles of shape (I, 3, height, width) to hidden states of shape (I, 1 + patches, C), without a final norm."""

    config_class = InternVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _no_split_modules: ClassVar[list[str]] = ["InternVisionEncoderLayer"]

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = InternVisionEmbeddings(config)
        self.encoder = InternVisionEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the patch convolution."""
        return self.embeddings.patch_embedding

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, InternVisionEmbeddings):
            initialization.normal_(module.class_embedding, std=std)
            initialization.normal_(module.position_embedding, std=std)
        elif isinstance(module, InternVisionEncoderLayer):
            initialization.constant_(module.ls1, self.config.initializer_factor)
            initialization.constant_(module.ls2, self.config.initializer_factor)

    def forward(
        self, pixel_values: torch.Tensor, output_hidden_states: bool = False, **kwargs: object
    ) -> BaseModelOutputWithPooling:
        """Encode tiles.

        Args:
            pixel_values: (I, 3, height, width); sides are multiples of the patch size, other sizes than the
                configured one interpolate the position embeddings.
            output_hidden_states: also return the embeddings and every layer's output.
            **kwargs: ignored.

        Returns:
            `last_hidden_state` (I, S, C); `pooler_output` (I, C), the class token; `hidden_states` if asked for.

        Raises:
            ValueError: pixel_values is not a batch of images.
        """
        if pixel_values.ndim != 4:
            raise ValueError(
                f"pixel_values has shape {tuple(pixel_values.shape)}; expected (num_tiles, 3, height, width)"
            )
        hidden_states = self.embeddings(pixel_values)
        collected = [hidden_states]
        for layer in self.encoder.layers:
            hidden_states = layer(hidden_states)
            if output_hidden_states:  # else each layer's output would live on until the last
                collected.append(hidden_states)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states,
            pooler_output=hidden_states[:, 0],
            hidden_states=tuple(collected) if output_hidden_states else None,
        )
