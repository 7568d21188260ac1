"""Log-probs of the responses in a pack, without logits for the whole pack.

    attach_scoring(model)                       # once, before DDP or DeepSpeed wrap the model
    logps_R = response_logps(wrapped, pack)     # goes through wrapped(pack=pack), so gradient hooks work

`attach_scoring` makes the model's own `forward` answer `model(pack=pack)` with the log-probs of the responses; all
other calls stay as they are, and so do parameter names, `save_pretrained` and `generate`. Because scoring is a call of
the outermost module, backward runs through the wrapper's hooks. Because the head is a module that owns its weight and
computes log-probs in its own `forward`, ZeRO-3 gathers the weight for it.

The head runs on the positions that predict a scored token only, a part of the vocabulary at a time, and again in the
backward pass: logits exist for one part and are never kept. The last layer leaves out what is not read. Letters as in
`packing.py`, and V for the vocabulary, D for the width.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from internvl_mpo.last_layer import trim_last_layer
from internvl_mpo.packed_attention import use_packed_attention
from internvl_mpo.packing import Group, Pack, unpack_groups

# Bytes of logits that exist at a time. A CPU is as fast with little (measured from 1 to 16 MiB); a GPU wants large
# products: 192 MiB are 6,000 words for 8,000 scored tokens.
CPU_TILE_BYTES = 2**20
TILE_BYTES = 192 * 2**20
MIN_CHUNK = 1024  # words; products narrower than that are slow


def attach_scoring(
    model: nn.Module, *, attention: str = "auto", trim: bool = True, plain_twin: bool = False
) -> nn.Module:
    """Teach a model to answer `model(pack=pack)` with log-probs; see the top of this file.

    Args:
        model: an InternVL chat model or a causal language model of transformers, or one with a LoRA adapter of peft.
        attention: back end for packs, see `use_packed_attention`.
        trim: leave out of the last layer what no scored token needs, see `last_layer.py`; the result is the same.
        plain_twin: score packs in the form of `twin_logps` instead, slow and with all logits, to compare with.

    Returns:
        The same model.

    Raises:
        ValueError: the output head is not a plain linear layer (leave it out of LoRA's targets), or the back end is
            unknown.
    """
    # LoRA lives inside the layers of the base model, and peft passes unknown arguments of forward on to it.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    use_packed_attention(base, attention)
    head = base.get_output_embeddings()
    if isinstance(head, ScoringHead):
        return model
    if type(head) is not nn.Linear:
        raise ValueError(f"the output head is a {type(head).__name__}; scoring needs a plain nn.Linear")
    base.set_output_embeddings(ScoringHead(head))
    if trim:
        decoder = base.get_decoder()
        trim_last_layer(getattr(decoder, "model", decoder))
    plain_forward = base.forward

    @functools.wraps(plain_forward)
    def forward(
        *args: Any, pack: Pack | None = None, chunk_size: int | None = None, temperature: float = 1.0, **kwargs: Any
    ) -> Any:
        if pack is None:
            return plain_forward(*args, **kwargs)
        if plain_twin:
            return twin_logps(base, unpack_groups(pack), temperature=temperature)
        return _score(base, pack, chunk_size, temperature)  # kwargs: peft adds arguments of its own, all None

    base.forward = forward
    return model


def response_logps(model: nn.Module, pack: Pack, *, chunk_size: int | None = None, temperature: float = 1.0) -> Tensor:
    """Return the summed log-prob of each response of a pack, differentiable. Shape: (R,)

    Args:
        model: a model that went through `attach_scoring`, wrapped or not.
        pack: on the model's device.
        chunk_size: words of the vocabulary for which logits exist at a time; None chooses.
        temperature: divides the logits.

    Returns:
        float32, or float64 for a float64 model.
    """
    return model(pack=pack, chunk_size=chunk_size, temperature=temperature)


def pair_logps(model: nn.Module, pack: Pack, **options: Any) -> tuple[Tensor, Tensor]:
    """Return the log-probs of the chosen and of the rejected response of each pair. Shape: 2 x (P,)

    Args:
        model: as in `response_logps`.
        pack: as in `response_logps`.
        options: `chunk_size` and `temperature` of `response_logps`.
    """
    logps_R = response_logps(model, pack, **options)
    return logps_R[pack.chosen_index_P], logps_R[pack.rejected_index_P]


def _score(model: nn.Module, pack: Pack, chunk_size: int | None, temperature: float) -> Tensor:
    hidden_TD = _trunk(model, pack)
    head = model.get_output_embeddings()
    logps_S = head(hidden_TD[pack.predict_index_S], pack.target_ids_S, chunk_size=chunk_size, temperature=temperature)
    zeros_R = logps_S.new_zeros(pack.num_responses)
    return zeros_R.index_add(0, pack.entry_response_E, logps_S[pack.entry_scored_E])


def _trunk(model: nn.Module, pack: Pack) -> Tensor:
    """Return the last hidden states of a pack, after the final norm. Shape: (T, D)"""
    images = {} if pack.pixel_values is None else {"pixel_values": pack.pixel_values.to(model.dtype)}
    # A ready 4-D mask is handed on as it is; with none, transformers would build a dense one from the positions.
    no_mask = torch.empty(1, 1, 1, 0, dtype=torch.bool, device=pack.input_ids.device)
    output = model.base_model(
        input_ids=pack.input_ids,
        position_ids=pack.position_ids,
        attention_mask=no_mask,
        pack_layout=pack.layout,
        use_cache=False,
        **images,
    )
    return output.last_hidden_state[0]


class ScoringHead(nn.Linear):
    """An output head that also computes log-probs of given tokens without keeping logits.

    It takes over weight and bias of an existing head, so tied weights stay tied and checkpoints keep their keys.
    """

    def __init__(self, head: nn.Linear):
        """Take over the parameters of `head`."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = head.in_features, head.out_features
        self.weight, self.bias = head.weight, head.bias
        self.train(head.training)

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, *, chunk_size: int | None = None, temperature: float = 1.0
    ) -> Tensor:
        """Return logits, or log-probs of `targets` if they are given.

        Args:
            hidden: Shape: (..., D), with targets (S, D)
            targets: token ids. Shape: (S,)
            chunk_size: words for which logits exist at a time; None chooses.
            temperature: divides the logits.

        Returns:
            Logits of shape (..., V), or log-probs of shape (S,), at least float32.
        """
        if targets is None:
            return super().forward(hidden)
        if chunk_size is None:
            tile_bytes = CPU_TILE_BYTES if hidden.device.type == "cpu" else TILE_BYTES
            chunk_size = max(MIN_CHUNK, tile_bytes // (4 * len(hidden)))
        # Autocast does not reach the backward pass of an autograd function, so its casts are made here.
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(device, enabled=False):
            return _TargetLogps.apply(hidden.to(dtype), self.weight.to(dtype), bias, targets, chunk_size, temperature)


class _TargetLogps(torch.autograd.Function):
    """log softmax(hidden weight^T + bias)[target], with the logits of one part of the vocabulary alive at a time.

    Kept for the backward pass: the inputs and one logsumexp a row. With p the probabilities and g the incoming
    gradient, the gradient of a row's logits is g (onehot(target) - p); the logits are computed again to get p. Parts of
    the vocabulary rather than of the rows, so that the gradient of the weight, the largest tensor, is written once.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden_SD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_S: Tensor,
        chunk_size: int,
        temperature: float,
    ) -> Tensor:
        tiles = _Tiles(hidden_SD, weight_VD, bias_V, targets_S, chunk_size, temperature)
        largest_S = torch.full_like(targets_S, -torch.inf, dtype=tiles.dtype)
        total_S, score_S = torch.zeros_like(largest_S), torch.zeros_like(largest_S)
        for words in tiles.words:
            logits = tiles.logits(words)
            index_S, inside_S = tiles.targets(words)
            score_S = torch.where(inside_S, logits.gather(1, index_S[:, None])[:, 0], score_S)
            before_S, largest_S = largest_S, torch.maximum(largest_S, logits.amax(dim=1))
            total_S = total_S * (before_S - largest_S).exp_() + logits.sub_(largest_S[:, None]).exp_().sum(dim=1)
        logsumexp_S = largest_S + total_S.log_()
        ctx.save_for_backward(hidden_SD, weight_VD, bias_V, targets_S, logsumexp_S)
        ctx.chunk_size, ctx.temperature = chunk_size, temperature
        return score_S - logsumexp_S

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_S: Tensor) -> tuple[Tensor | None, ...]:
        hidden_SD, weight_VD, bias_V, targets_S, logsumexp_S = ctx.saved_tensors
        tiles = _Tiles(hidden_SD, weight_VD, bias_V, targets_S, ctx.chunk_size, ctx.temperature)
        grad_hidden = torch.zeros_like(hidden_SD, dtype=tiles.dtype) if ctx.needs_input_grad[0] else None
        grad_weight = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
        grad_bias = torch.empty_like(bias_V) if ctx.needs_input_grad[2] else None
        for words in tiles.words:
            grad_logits = tiles.logits(words).sub_(logsumexp_S[:, None]).exp_().mul_(-grad_S[:, None])
            index_S, inside_S = tiles.targets(words)
            grad_logits.scatter_add_(1, index_S[:, None], torch.where(inside_S, grad_S, 0)[:, None])
            grad_logits = grad_logits.div_(ctx.temperature).to(hidden_SD.dtype)
            if grad_hidden is not None:
                grad_hidden += grad_logits @ weight_VD[words]
            if grad_weight is not None:
                torch.mm(grad_logits.T, hidden_SD, out=grad_weight[words])
            if grad_bias is not None:
                grad_bias[words] = grad_logits.sum(0)
        if grad_hidden is not None:
            grad_hidden = grad_hidden.to(hidden_SD.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


class _Tiles:
    """The logits of all rows, a part of the vocabulary at a time, each written over the one before."""

    def __init__(
        self,
        hidden_SD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        targets_S: Tensor,
        chunk_size: int,
        temperature: float,
    ):
        self.hidden_SD, self.weight_VD, self.bias_V, self.targets_S = hidden_SD, weight_VD, bias_V, targets_S
        self.temperature = temperature
        # at least float32, so that sums over a large vocabulary stay exact
        self.dtype = torch.promote_types(hidden_SD.dtype, torch.float32)
        num_words = len(weight_VD)
        self.words = [slice(start, min(start + chunk_size, num_words)) for start in range(0, num_words, chunk_size)]
        # one piece of memory for all, since an allocator may keep what is freed
        self.memory = hidden_SD.new_empty(len(hidden_SD) * min(chunk_size, num_words), dtype=self.dtype)

    def logits(self, words: slice) -> Tensor:
        """Return the logits of some words. Shape: (S, words)"""
        shape = len(self.hidden_SD), words.stop - words.start
        logits = self.memory[: shape[0] * shape[1]].view(shape)
        if self.hidden_SD.dtype == self.dtype:
            torch.mm(self.hidden_SD, self.weight_VD[words].T, out=logits)
        else:
            logits.copy_(self.hidden_SD @ self.weight_VD[words].T)
        if self.bias_V is not None:
            logits += self.bias_V[words]
        return logits if self.temperature == 1 else logits.div_(self.temperature)

    def targets(self, words: slice) -> tuple[Tensor, Tensor]:
        """Return where each row's target lies among the words, and whether it is one of them. Shape: 2 x (S,)"""
        index_S = self.targets_S - words.start
        last = words.stop - words.start - 1
        return index_S.clamp(0, last), (index_S >= 0) & (index_S <= last)


def twin_logps(model: nn.Module, groups: Sequence[Group], *, temperature: float = 1.0) -> Tensor:
    """Return what `response_logps` returns for the pack of `groups`, the plain way. Shape: (R,)

    Every response is a padded sequence of its own that starts with the prompt and brings its own copy of the tiles, and
    all logits exist at once: the form of the original program with two responses, and the measure of the packed form.

    Args:
        model: any causal language model of transformers, wrapped or not; `attach_scoring` is not needed.
        groups: the groups of the pack, in order.
        temperature: divides the logits.
    """
    device = next(model.parameters()).device
    return torch.cat([_twin_group(model, group, temperature, device) for group in groups])


def _twin_group(model: nn.Module, group: Group, temperature: float, device: torch.device) -> Tensor:
    rows = [torch.tensor(group.prompt_ids + response) for response in group.responses]
    lengths_R = torch.tensor([len(row) for row in rows], device=device)
    input_ids_RL = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    place_L = torch.arange(input_ids_RL.shape[1], device=device)
    real_RL = place_L < lengths_R[:, None]
    images = {}
    if group.tiles is not None:
        images = {"pixel_values": group.tiles.to(device).repeat(len(rows), 1, 1, 1)}
    logits_RLV = model(input_ids=input_ids_RL, attention_mask=real_RL.long(), use_cache=False, **images).logits[:, :-1]
    if logits_RLV.dtype in (torch.float16, torch.bfloat16):
        logits_RLV = logits_RLV.float()
    logps_RL = (logits_RLV / temperature).log_softmax(-1).gather(2, input_ids_RL[:, 1:, None])[..., 0]
    scored_RL = (real_RL & (place_L >= len(group.prompt_ids)))[:, 1:]
    return (logps_RL * scored_RL).sum(1)
