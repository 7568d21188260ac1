"""Attention over a pack, registered with transformers so that no model code knows about it.

`use_packed_attention(model)` selects it for the language model. A forward pass that is given `pack_layout=` (a
`packing.Layout`) attends along the tree of the pack; any other forward pass, such as `generate`, is plain SDPA.

Two back ends compute the same thing:

- segments: each prompt attends to itself, each branch to its path and itself, as a handful of SDPA calls. Segments of
  like size share a call. Works on every device and does no work on masked blocks.
- flex: FlexAttention with a block mask; one kernel for the pack. CUDA only, since it has no backward pass on the CPU.

Letters: T tokens of a pack, B segments in one call, Q and K query and key tokens of a call, H heads, N key-value heads.
"""

import bisect
import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from internvl_mpo.packing import Layout, Segment

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# What one more SDPA call costs, in query x key cells; measured on a CPU with 4 heads of 16 and with 8 heads of 64.
CALL_COST = 4096


def use_packed_attention(model: PreTrainedModel, backend: str = "auto") -> None:
    """Let the language model of `model` attend to packs.

    Args:
        model: an InternVL chat model or a bare language model.
        backend: "segments", "flex", or "auto", which takes flex on CUDA and segments elsewhere.

    Raises:
        ValueError: unknown back end.
    """
    if f"packed_{backend}" not in _BACKENDS:
        names = ", ".join(name.removeprefix("packed_") for name in _BACKENDS)
        raise ValueError(f"unknown packed attention '{backend}', expected one of {names}")
    getattr(model, "language_model", model).set_attn_implementation(f"packed_{backend}")


def segment_attention(
    layout: Layout, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, *, scored_only: bool = False
) -> Tensor:
    """Attend along the tree of a pack with SDPA.

    Args:
        layout: who may see whom.
        query: Shape: (1, H, T, head_dim)
        key: Shape: (1, N, T, head_dim)
        value: Shape: (1, N, T, head_dim)
        scaling: factor on the scores; None means head_dim ** -0.5.
        scored_only: leave tokens that predict no scored token at 0; enough for the last layer.

    Returns:
        Shape: (1, T, H, head_dim)
    """
    name = ("segments", scored_only)
    if name not in layout.plan:
        layout.plan[name] = _plan(layout, scored_only)
    plan = layout.plan[name]
    query_rows = _rows(query)[plan.query_index].split(plan.query_sizes)
    key_rows = _rows(key)[plan.key_index].split(plan.key_sizes)
    value_rows = _rows(value)[plan.key_index].split(plan.key_sizes)
    outputs = []
    for call, q, k, v in zip(plan.calls, query_rows, key_rows, value_rows, strict=True):
        out_BHQD = F.scaled_dot_product_attention(
            q.view(call.num_segments, -1, query.shape[1], query.shape[3]).transpose(1, 2),
            k.view(call.num_segments, -1, key.shape[1], key.shape[3]).transpose(1, 2),
            v.view(call.num_segments, -1, value.shape[1], value.shape[3]).transpose(1, 2),
            attn_mask=call.mask,
            is_causal=call.mask is None,
            scale=scaling,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        outputs.append(out_BHQD.transpose(1, 2).flatten(0, 1))
    if scored_only:
        outputs.append(outputs[0].new_zeros(1, *outputs[0].shape[1:]))
    return torch.cat(outputs)[plan.output_index][None]


@dataclass(frozen=True)
class _Call:
    """One SDPA call over segments padded to one size; `mask` None means causal. Mask shape: (B, 1, Q, K)"""

    num_segments: int
    mask: Tensor | None


@dataclass(frozen=True)
class _Plan:
    """Every SDPA call of one layer: rows to gather for all calls, and where each token's output ends up."""

    calls: list[_Call]
    query_index: Tensor
    query_sizes: list[int]
    key_index: Tensor
    key_sizes: list[int]
    output_index: Tensor


def _plan(layout: Layout, scored_only: bool) -> _Plan:
    device = layout.visible_until_T.device
    queries, paths = _queries(layout, scored_only), _paths(layout.segments)
    asking = [index for index, query in enumerate(queries) if query]
    whole = [index for index in asking if len(queries[index]) == len(paths[index])]  # a prompt, all of it
    others = [index for index in asking if len(queries[index]) != len(paths[index])]
    calls, query_index, query_sizes, key_index, key_sizes = [], [], [], [], []
    output_index = torch.full((len(layout.visible_until_T),), -1)  # -1: the row of zeros behind all others
    num_rows = 0
    for members, causal in ((whole, True), (others, False)):
        for batch in _batches(queries, paths, members):
            longest_query = max(len(queries[index]) for index in batch)
            longest_key = max(len(paths[index]) for index in batch)
            # Padding repeats the last token, which keeps every row of the mask non-empty.
            query_BQ = torch.tensor([_pad(queries[index], longest_query) for index in batch])
            key_BK = torch.tensor([_pad(paths[index], longest_key) for index in batch])
            mask = None
            if not causal:
                lengths_B = torch.tensor([len(paths[index]) for index in batch])
                real_BK = torch.arange(longest_key) < lengths_B[:, None]
                mask = ((key_BK[:, None] <= query_BQ[:, :, None]) & real_BK[:, None])[:, None].to(device)
            for row, index in enumerate(batch):
                first = num_rows + row * longest_query
                output_index[list(queries[index])] = torch.arange(first, first + len(queries[index]))
            calls.append(_Call(len(batch), mask))
            query_index.append(query_BQ.flatten())
            key_index.append(key_BK.flatten())
            query_sizes.append(query_BQ.numel())
            key_sizes.append(key_BK.numel())
            num_rows += query_BQ.numel()
    return _Plan(
        calls,
        torch.cat(query_index).to(device),
        query_sizes,
        torch.cat(key_index).to(device),
        key_sizes,
        output_index.to(device),
    )


def _queries(layout: Layout, scored_only: bool) -> list[range]:
    """Tokens of each segment that ask; none at all is possible."""
    if not scored_only:
        return [range(segment.start, segment.stop) for segment in layout.segments]
    scored = layout.scored_index_U.tolist()
    queries = []
    for start, stop, _ in layout.segments:
        count = bisect.bisect_left(scored, stop) - bisect.bisect_left(scored, start)
        queries.append(range(stop - count, stop))
    return queries


def _paths(segments: list[Segment]) -> list[list[int]]:
    """Indices of all tokens from the start of the prompt to the end of each segment."""
    paths: list[list[int]] = []
    for segment in segments:
        before = paths[segment.parent] if segment.parent >= 0 else []
        paths.append([*before, *range(segment.start, segment.stop)])
    return paths


def _batches(queries: list[range], paths: list[list[int]], members: list[int]) -> list[list[int]]:
    """Put segments of like size into one call wherever padding costs less than one more call."""

    def sizes(index: int) -> tuple[int, int]:
        return len(queries[index]), len(paths[index])

    batches: list[list[int]] = []
    cells, widest = 0, (0, 0)  # of the open batch
    for index in sorted(members, key=sizes, reverse=True):
        size = sizes(index)
        wider = (max(widest[0], size[0]), max(widest[1], size[1]))
        merged = (len(batches[-1]) + 1) * wider[0] * wider[1] if batches else 0
        if batches and merged <= cells + size[0] * size[1] + CALL_COST:
            batches[-1].append(index)
            cells, widest = merged, wider
        else:
            batches.append([index])
            cells, widest = size[0] * size[1], size
    return batches


def _pad(indices: range | list[int], length: int) -> list[int]:
    return [*indices, *[indices[-1]] * (length - len(indices))]


def _rows(heads: Tensor) -> Tensor:
    """(1, H, T, head_dim) -> (T, H * head_dim), so that gathering a token moves one contiguous row."""
    return heads[0].transpose(0, 1).flatten(1)


def flex_attention(layout: Layout, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scaling: float | None):
    """Attend along the tree of a pack with FlexAttention; arguments and result as in `segment_attention`."""
    from transformers.integrations.flex_attention import flex_attention_forward

    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary embeddings return float32
    return flex_attention_forward(module, query, key, value, flex_block_mask(layout), scaling=scaling)[0]


def flex_block_mask(layout: Layout) -> "BlockMask":
    """Return the mask of a pack for FlexAttention, made once per pack."""
    from torch.nn.attention.flex_attention import create_block_mask

    until_T = layout.visible_until_T

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) & (q < until_T[k])

    if "flex" not in layout.plan:
        layout.plan["flex"] = create_block_mask(sees, None, None, len(until_T), len(until_T), device=until_T.device)
    return layout.plan["flex"]


def _packed_attention(
    backend: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    pack_layout: Layout | None = None,
    scored_only: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if pack_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if dropout:
        raise ValueError("attention dropout must be 0 where log-probs are compared; set attention_dropout to 0")
    if backend == "flex" or (backend == "auto" and query.is_cuda):
        return flex_attention(pack_layout, module, query, key, value, scaling), None
    return segment_attention(pack_layout, query, key, value, scaling, scored_only=scored_only), None


_BACKENDS = {
    f"packed_{backend}": functools.partial(_packed_attention, backend) for backend in ("auto", "segments", "flex")
}
for _name, _function in _BACKENDS.items():
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, sdpa_mask)
