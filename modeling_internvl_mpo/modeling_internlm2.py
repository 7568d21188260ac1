"""InternLM2, the language model of InternVL2 2B, 8B and 26B, with the official state-dict keys.

Written on transformers' attention interface and Cache API. The rotary tables hold no buffers: frequencies are derived
from the configuration where they are used, so no way of loading a checkpoint can leave them uninitialised.

Letters: B batch, L tokens, H query heads, K key-value heads, D head width, C model width.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_internvl_mpo import InternLM2Config


class InternLM2RMSNorm(nn.Module):
    """RMS norm with float32 statistics."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # The weight multiplies after the cast back, as in the original; rms_norm's own weight would come before it.
        normalised = F.rms_norm(hidden_states, hidden_states.shape[-1:], eps=self.variance_epsilon)
        return self.weight * normalised


class InternLM2RotaryEmbedding(nn.Module):
    """Cosines and sines of positions, with linear or dynamic NTK scaling.

    Dynamic NTK stretches the base for a total length L above `max_position_embeddings` M:
    base * (factor * L / M - (factor - 1)) ** (D / (D - 2)), for the whole call. Cached keys keep the rotation
    they got. Nothing is remembered between calls: short inputs after a long one are rotated as if it never came.
    """

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__()
        self.config = config
        self.dim = config.hidden_size // config.num_attention_heads
        scaling = config.rope_scaling or {}
        self.kind = scaling.get("type", scaling.get("rope_type"))
        self.factor = float(scaling.get("factor", 1.0))
        self._frequencies: torch.Tensor | None = None  # (D / 2,) float32, unscaled; made on first use per device

    def _inv_freq(self, position_ids: torch.Tensor, total_length: int | torch.Tensor) -> torch.Tensor:
        """Inverse frequencies, shape (D / 2,)."""
        base, dim, limit = self.config.rope_theta, self.dim, self.config.max_position_embeddings
        if self._frequencies is None or self._frequencies.device != position_ids.device:
            exponent = torch.arange(0, dim, 2, dtype=torch.int64).to(position_ids.device, torch.float32) / dim
            self._frequencies = 1.0 / (base**exponent)
        if self.kind == "linear":
            return self._frequencies / self.factor
        # Positions are asked for only where the row is long enough: looking at them in every decoding step would
        # cost kernels. A long pack of short texts gets here and is left as it is.
        if self.kind == "dynamic" and not (isinstance(total_length, int) and total_length <= limit):
            length = (position_ids.max() + 1).clamp(min=limit)
            stretch = (self.factor * length / limit - (self.factor - 1)) ** (dim / (dim - 2))
            exponent = torch.arange(0, dim, 2, device=position_ids.device, dtype=torch.float32) / dim
            return self._frequencies * stretch**-exponent
        return self._frequencies

    @torch.no_grad()
    def forward(
        self, hidden_states: torch.Tensor, position_ids: torch.Tensor, total_length: int | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and signed sines, each (B or 1, L, 1, 1, D), in the dtype of `hidden_states`; see `rotate`."""
        angles = (position_ids[..., None].float() * self._inv_freq(position_ids, total_length))[:, :, None, None]
        cos, sin = angles.cos(), angles.sin()
        return tuple(torch.cat(pair, dim=-1).to(hidden_states.dtype) for pair in ((cos, cos), (-sin, sin)))


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the last dimension; its halves are the pairs, and the sign of a half's swapped partner is in `sin`."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


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
    """Plain grouped-query attention with a float32 softmax; returns (B, L, H, D) and the weights (B, H, L, total)."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    weights = (query @ key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class InternLM2Attention(nn.Module):
    """Grouped-query attention with one fused projection.

    The rows of `wqkv` are K groups; a group holds the H / K query heads that share a key head, then that key head,
    then its value head.
    """

    def __init__(self, config: InternLM2Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        num_heads = config.num_attention_heads + 2 * config.num_key_value_heads
        self.wqkv = nn.Linear(config.hidden_size, num_heads * self.head_dim, bias=config.bias)
        self.wo = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=config.bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = hidden_states.shape[:-1]
        groups = self.num_key_value_groups
        qkv = self.wqkv(hidden_states).view(*shape, -1, groups + 2, self.head_dim)  # (B, L, K, H / K + 2, D)
        rotated = rotate(qkv[..., :-1, :], *position_embeddings)  # queries and key of a group in one go
        query = rotated[..., :-1, :].reshape(*shape, -1, self.head_dim).transpose(1, 2)
        key, value = rotated[..., -1, :].transpose(1, 2), qkv[..., -1, :].transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        output, weights = attention(
            self, query, key, value, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        return self.wo(output.reshape(*shape, -1)), weights


class InternLM2MLP(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.w2(self.act_fn(self.w1(hidden_states)) * self.w3(hidden_states))


class InternLM2DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm block."""

    def __init__(self, config: InternLM2Config, layer_idx: int) -> None:
        super().__init__()
        self.attention = InternLM2Attention(config, layer_idx)
        self.feed_forward = InternLM2MLP(config)
        self.attention_norm = InternLM2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.ffn_norm = InternLM2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs: object) -> torch.Tensor:
        attended, _ = self.attention(self.attention_norm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.feed_forward(self.ffn_norm(hidden_states))


class InternLM2PreTrainedModel(PreTrainedModel):
    """What both classes below declare to transformers."""

    config_class = InternLM2Config
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["InternLM2DecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs: ClassVar[dict[str, type]] = {
        "hidden_states": InternLM2DecoderLayer,
        "attentions": InternLM2Attention,
    }


class InternLM2Model(InternLM2PreTrainedModel):
    """Token embeddings, decoder layers, final norm."""

    _input_embed_layer = "tok_embeddings"

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(InternLM2DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = InternLM2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = InternLM2RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPast:
        """Return hidden states after the final norm, (B, L, C). Extra keywords reach the attention function.

        Raises:
            ValueError: neither or both of input_ids and inputs_embeds were given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.tok_embeddings(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        past_length = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
            position_ids = position_ids.unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids, past_length + inputs_embeds.shape[1])
        hidden_states = inputs_embeds
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                past_key_values=past_key_values,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


class InternLM2ForCausalLM(InternLM2PreTrainedModel, GenerationMixin):
    """InternLM2 with its output matrix."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"output.weight": "model.tok_embeddings.weight"}

    def __init__(self, config: InternLM2Config) -> None:
        super().__init__(config)
        self.model = InternLM2Model(config)
        self.vocab_size = config.vocab_size
        self.output = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """Return the output matrix."""
        return self.output

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output matrix."""
        self.output = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        """Return logits (B, kept tokens, vocabulary), and the next-token loss if labels are given."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.output(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
