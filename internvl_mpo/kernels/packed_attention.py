"""Attention over a pack, registered with transformers so that no model code knows about it.

`use_packed_attention(model)` selects it for the language model. A forward pass that is given `pack_layout=` (a
`packing.Layout`) attends along the tree of the pack; any other forward pass, such as `generate`, is plain SDPA.

Three back ends compute the same thing:

- segments: each prompt attends to itself, each branch to its path and itself, as a handful of SDPA calls. Segments of
  like size share a call. Works on every device and does no work on masked blocks.
- varlen: one call of flash-attn's kernel, a segment being a sequence whose keys are its path. CUDA, half precision.
- flex: FlexAttention with a block mask; one kernel for the pack. CUDA only, since it has no backward pass on the CPU.

"auto" takes varlen on CUDA where flash-attn is installed and the precision is right, else flex, and segments elsewhere.
Layers that see the last tokens of their path only (sliding windows) or have sinks (gpt-oss) run in flex and segments.

Letters: T tokens of a pack, B segments in one call, Q and K query and key tokens of a call, H heads, N key-value heads.
"""

import bisect
import functools
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from internvl_mpo.packing import Layout, Segment

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

# An argument of attention functions that changes the result and that no back end here computes.
_UNSERVED = "softcap"

PackedAttention = Literal["auto", "segments", "flex", "varlen"]

# What one more SDPA call costs, in query x key cells; measured on a CPU with 4 heads of 16 and with 8 heads of 64.
CALL_COST = 4096


def use_packed_attention(model: PreTrainedModel, backend: str = "auto") -> None:
    """Let the language model of `model` attend to packs.

    Args:
        model: an InternVL chat model or a bare language model.
        backend: auto, segments, flex or varlen, see above.

    Raises:
        ValueError: unknown back end.
    """
    if f"packed_{backend}" not in _BACKENDS:
        names = ", ".join(name.removeprefix("packed_") for name in _BACKENDS)
        raise ValueError(f"unknown packed attention '{backend}', expected one of {names}")
    getattr(model, "language_model", model).set_attn_implementation(f"packed_{backend}")


def segment_attention(
    layout: Layout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    *,
    scored_only: bool = False,
    window: int | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attend along the tree of a pack with SDPA.

    Args:
        layout: who may see whom.
        query: Shape: (1, H, T, head_dim)
        key: Shape: (1, N, T, head_dim)
        value: Shape: (1, N, T, head_dim)
        scaling: factor on the scores; None means head_dim ** -0.5.
        scored_only: leave tokens that predict no scored token at 0; enough for the last layer.
        window: tokens of its path that a token sees, itself included; None means all.
        sinks_H: a score of each head that takes a share of the attention and gives nothing. Shape: (H,)

    Returns:
        Shape: (1, T, H, head_dim)
    """
    name = ("segments", scored_only, window)
    if name not in layout.plan:
        layout.plan[name] = _plan(layout, scored_only, window)
    plan = layout.plan[name]
    query_rows = _rows(query)[plan.query_index].split(plan.query_sizes)
    key_rows = _rows(key)[plan.key_index].split(plan.key_sizes)
    value_rows = _rows(value)[plan.key_index].split(plan.key_sizes)
    outputs = []
    for call, q, k, v in zip(plan.calls, query_rows, key_rows, value_rows, strict=True):
        out_BHQD = _attend(
            q.view(call.num_segments, -1, query.shape[1], query.shape[3]).transpose(1, 2),
            k.view(call.num_segments, -1, key.shape[1], key.shape[3]).transpose(1, 2),
            v.view(call.num_segments, -1, value.shape[1], value.shape[3]).transpose(1, 2),
            call.mask,
            scaling,
            sinks_H,
        )
        outputs.append(out_BHQD.transpose(1, 2).flatten(0, 1))
    if scored_only:
        outputs.append(outputs[0].new_zeros(1, *outputs[0].shape[1:]))
    return torch.cat(outputs)[plan.output_index][None]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, sinks_H: Tensor | None
) -> Tensor:
    """SDPA, with sinks where there are some: a further key of zeros, whose score is the mask and whose value is 0."""
    if sinks_H is not None:
        num_queries, num_keys = query.shape[2], key.shape[2]
        if mask is None:
            mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
            mask = mask.tril(num_keys - num_queries)[None, None]
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill(~mask, -torch.inf)
        sinks_BHQ1 = sinks_H.to(query.dtype)[None, :, None, None].expand(len(query), -1, num_queries, 1)
        mask = torch.cat([mask.expand(len(query), query.shape[1], -1, -1), sinks_BHQ1], dim=-1)
        key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )


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


def _plan(layout: Layout, scored_only: bool, window: int | None) -> _Plan:
    device = layout.visible_until_T.device
    queries, paths = _queries(layout, scored_only), _paths(layout.segments)
    asking = [index for index, query in enumerate(queries) if query]
    # a prompt, all of it; where windows cut some of it off, it needs a mask as the others do
    whole = [i for i in asking if len(queries[i]) == len(paths[i]) <= (window or len(paths[i]))]
    others = [index for index in asking if index not in whole]
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
                mask = (key_BK[:, None] <= query_BQ[:, :, None]) & real_BK[:, None]
                if window is not None:
                    # a token's place on its path: queries are the end of it
                    end_B1 = torch.tensor([[len(paths[index]) - queries[index].stop] for index in batch])
                    mask &= (query_BQ + end_B1)[:, :, None] - torch.arange(longest_key) < window
                mask = mask[:, None].to(device)
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


def varlen_attention(
    layout: Layout, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, *, scored_only: bool = False
) -> Tensor:
    """Attend along the tree of a pack with flash-attn; arguments and result as in `segment_attention`.

    Where there are fewer queries than keys, flash-attn (2.1 and later) aligns its causal mask to the lower right: the
    last query sees all keys, the one before all but one. A branch, whose keys are its path and itself, needs just that.

    Raises:
        ValueError: the precision is not half.
    """
    from flash_attn import flash_attn_varlen_func

    if value.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"flash-attn computes in bfloat16 or float16, not {value.dtype}; take another packed attention"
        )
    name = ("varlen", scored_only)
    if name not in layout.plan:
        layout.plan[name] = _varlen_plan(layout, scored_only)
    plan = layout.plan[name]
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary embeddings return float32
    out = flash_attn_varlen_func(
        query[0].transpose(0, 1)[plan.query_index],
        key[0].transpose(0, 1)[plan.key_index],
        value[0].transpose(0, 1)[plan.key_index],
        cu_seqlens_q=plan.query_ends,
        cu_seqlens_k=plan.key_ends,
        max_seqlen_q=plan.longest_query,
        max_seqlen_k=plan.longest_key,
        softmax_scale=scaling,
        causal=True,
    )
    return out.new_zeros(query.shape[2], *out.shape[1:]).index_copy(0, plan.query_index, out)[None]


@dataclass(frozen=True)
class _VarlenPlan:
    """Rows to gather, and where each segment's rows end; `*_ends` start with 0, as flash-attn wants it."""

    query_index: Tensor
    key_index: Tensor
    query_ends: Tensor
    key_ends: Tensor
    longest_query: int
    longest_key: int


def _varlen_plan(layout: Layout, scored_only: bool) -> _VarlenPlan:
    device = layout.visible_until_T.device
    segments = zip(_queries(layout, scored_only), _paths(layout.segments), strict=True)
    queries, paths = zip(*((query, path) for query, path in segments if query), strict=True)

    def ends(runs: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(map(len, runs))], dtype=torch.int32, device=device)

    def rows(runs: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(list(itertools.chain.from_iterable(runs)), device=device)

    return _VarlenPlan(
        rows(queries), rows(paths), ends(queries), ends(paths), max(map(len, queries)), max(map(len, paths))
    )


def flex_attention(
    layout: Layout,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    *,
    window: int | None = None,
    sinks_H: Tensor | None = None,
) -> Tensor:
    """Attend along the tree of a pack with FlexAttention; arguments and result as in `segment_attention`."""
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast, rotary embeddings return float32
    num_tokens = query.shape[2]
    padding = (0, 0, 0, _static_size(num_tokens) - num_tokens)
    found = _flex_kernel(query.is_cuda)(
        *(F.pad(heads, padding) for heads in (query, key, value)),
        block_mask=flex_block_mask(layout, window),
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
        return_lse=sinks_H is not None,
    )
    if sinks_H is None:
        return found[:, :, :num_tokens].transpose(1, 2)
    out_BHTD, logsumexp_BHT = (part[:, :, :num_tokens] for part in found)
    share_BHT = torch.sigmoid(logsumexp_BHT - sinks_H[:, None])  # what is left for keys
    return (out_BHTD * share_BHT[..., None].to(out_BHTD.dtype)).transpose(1, 2)


def _static_size(num_tokens: int) -> int:
    """A power of two, so that packs of any length share a few compiled kernels. Blocks of padding are skipped."""
    return max(1024, 1 << (num_tokens - 1).bit_length())


@functools.cache
def _flex_kernel(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention import flex_attention as flex

    return torch.compile(flex.flex_attention, dynamic=False) if compiled else flex.flex_attention


def flex_block_mask(layout: Layout, window: int | None = None) -> "BlockMask":
    """Return the mask of a pack for FlexAttention, made once per pack and window."""
    from torch.nn.attention.flex_attention import create_block_mask

    num_tokens = len(layout.visible_until_T)
    size = _static_size(num_tokens)
    until_T = F.pad(layout.visible_until_T, (0, size - num_tokens))  # nobody sees padding
    place_T = F.pad(_places(layout).to(until_T.device), (0, size - num_tokens)) if window else until_T

    def sees(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen = (k <= q) & (q < until_T[k])
        return seen & (place_T[q] - place_T[k] < window) if window else seen

    name = ("flex", window)
    if name not in layout.plan:
        # not compiled, it would make the dense mask first
        layout.plan[name] = create_block_mask(
            sees, None, None, size, size, device=until_T.device, _compile=until_T.is_cuda
        )
    return layout.plan[name]


def _places(layout: Layout) -> Tensor:
    """Return how many tokens of its path stand before each token. Shape: (T,)"""
    lengths = [len(path) for path in _paths(layout.segments)]
    segments = zip(layout.segments, lengths, strict=True)
    return torch.cat([torch.arange(end - (segment.stop - segment.start), end) for segment, end in segments])


@functools.cache
def has_flash_attention() -> bool:
    """Whether flash-attn is installed."""
    return importlib.util.find_spec("flash_attn") is not None


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
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if pack_layout is None:
        if s_aux is not None:  # transformers' SDPA would leave them out
            return _attend(query, key, value, attention_mask, scaling, s_aux).transpose(1, 2), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if dropout:
        raise ValueError("attention dropout must be 0 where log-probs are compared; set attention_dropout to 0")
    if kwargs.get(_UNSERVED) is not None:  # without a word it would be left out
        raise ValueError(f"packed attention knows no {_UNSERVED}, which this model's layers ask for; use plain_twin")
    if sliding_window is not None and sliding_window >= query.shape[2]:
        sliding_window = None
    is_plain = sliding_window is None and s_aux is None
    if backend == "auto":
        backend = "segments"
        if query.is_cuda:
            narrow = value.dtype in (torch.float16, torch.bfloat16)
            backend = "varlen" if is_plain and narrow and has_flash_attention() else "flex"
    if backend == "varlen":
        if not is_plain:
            raise ValueError("packed attention varlen knows no sliding windows and no sinks; take auto")
        return varlen_attention(pack_layout, query, key, value, scaling, scored_only=scored_only), None
    options: dict[str, Any] = {"window": sliding_window, "sinks_H": s_aux}
    if backend == "flex":
        return flex_attention(pack_layout, query, key, value, scaling, **options), None
    return segment_attention(pack_layout, query, key, value, scaling, scored_only=scored_only, **options), None


_BACKENDS = {
    f"packed_{backend}": functools.partial(_packed_attention, backend) for backend in get_args(PackedAttention)
}
for _name, _function in _BACKENDS.items():
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, sdpa_mask)
