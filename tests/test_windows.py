"""Layers that see the last tokens of their path only, and layers with sinks: each back end against dense attention.

pytest tests/test_windows.py
"""

import random

import pytest
import torch
from test_logps import random_group
from tiny import dense_mask

from internvl_mpo.kernels.packed_attention import _packed_attention, flex_attention, segment_attention
from internvl_mpo.packing import Layout, pack_groups

WINDOW_AND_SINKS = [(5, False), (None, True), (1, True), (7, True), (10_000, True)]


def layout_and_heads(seed: int = 0) -> tuple[Layout, list[torch.Tensor], torch.Tensor]:
    """A pack of three questions with shared stems; queries, keys and values in float64, and a sink for each head."""
    rng = random.Random(seed)
    layout = pack_groups([random_group(rng, 0, 0, str(number), 2 + number) for number in range(3)]).layout
    generator = torch.Generator().manual_seed(seed)
    size = len(layout.visible_until_T)
    heads = [torch.randn(1, n, size, 8, generator=generator, dtype=torch.float64) for n in (4, 2, 2)]
    return layout, heads, torch.randn(4, generator=generator, dtype=torch.float64)


def by_hand(layout: Layout, heads: list[torch.Tensor], window: int | None, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax over every token that may be seen, and over the sink. Shape: (1, T, H, head_dim)"""
    query, key, value = heads[0], *(head.repeat_interleave(2, dim=1) for head in heads[1:])
    seen = dense_mask(layout)
    place = seen.sum(dim=1) - 1  # a token sees its path, itself included
    if window is not None:
        seen = seen & (place[:, None] - place[None, :] < window)
    scores = (query @ key.transpose(2, 3) * 0.3).masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[None, :, None, None].expand(1, -1, len(seen), 1)], dim=-1)
        return (scores.softmax(-1)[..., :-1] @ value).transpose(1, 2)
    return (scores.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize(("window", "has_sinks"), WINDOW_AND_SINKS)
def test_segments_with_windows_and_sinks_equal_dense_attention_gradients_too(window, has_sinks):
    for seed in range(4):
        layout, heads, sinks = layout_and_heads(seed)
        leaves = [head.requires_grad_() for head in (*heads, sinks)]
        outputs, gradients = [], []
        for attend in (by_hand, segment_attention):
            names = {"window": window, "sinks_H": sinks if has_sinks else None}
            out = by_hand(layout, heads, *names.values()) if attend is by_hand else attend(layout, *heads, 0.3, **names)
            outputs.append(out)
            weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
            gradients.append(torch.autograd.grad((out * weights).sum(), leaves, allow_unused=not has_sinks))
        assert (outputs[0] - outputs[1]).abs().max() < 1e-12
        for ours, exact in zip(*gradients, strict=True):
            assert exact is None or (ours - exact).abs().max() < 1e-10
        trimmed = segment_attention(layout, *heads, 0.3, scored_only=True, **names)
        scored = layout.scored_index_U
        assert (trimmed[:, scored] - outputs[0][:, scored]).abs().max() < 1e-12


@pytest.mark.parametrize(("window", "has_sinks"), [(5, False), (7, True)])
def test_flex_attention_with_windows_and_sinks_equals_dense_attention(window, has_sinks):
    layout, heads, sinks = layout_and_heads()
    sinks = sinks if has_sinks else None
    found = flex_attention(layout, *(head.float() for head in heads), 0.3, window=window, sinks_H=sinks)
    assert (found - by_hand(layout, heads, window, sinks)).abs().max() < 1e-5


def test_without_a_pack_sinks_take_their_share_as_well():
    _, heads, sinks = layout_and_heads()
    size = heads[0].shape[2]
    plain = torch.ones(size, size, dtype=torch.bool).tril()
    scores = (heads[0] @ heads[1].repeat_interleave(2, 1).transpose(2, 3) * 0.3).masked_fill(~plain, -torch.inf)
    scores = torch.cat([scores, sinks[None, :, None, None].expand(1, -1, size, 1)], dim=-1)
    expected = (scores.softmax(-1)[..., :-1] @ heads[2].repeat_interleave(2, 1)).transpose(1, 2)
    for mask in (None, plain[None, None]):
        found, _ = _packed_attention("auto", torch.nn.Module(), *heads, mask, scaling=0.3, s_aux=sinks)
        assert (found - expected).abs().max() < 1e-12


def test_what_a_back_end_does_not_compute_is_refused_by_name():
    layout, heads, sinks = layout_and_heads()
    for backend, options, words in (
        ("varlen", {"s_aux": sinks}, "varlen knows no sliding windows and no sinks"),
        ("varlen", {"sliding_window": 3}, "varlen knows no sliding windows and no sinks"),
        ("auto", {"softcap": 30.0}, "knows no softcap"),
    ):
        with pytest.raises(ValueError, match=words):
            _packed_attention(backend, torch.nn.Module(), *heads, None, pack_layout=layout, **options)
