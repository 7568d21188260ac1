"""The scoring head alone, and how much runs before it."""

import copy

import pytest
import torch
from tiny import tiny_model

from internvl_mpo.kernels.scoring_head import ScoringHead
from internvl_mpo.logps import attach_scoring, response_logps
from internvl_mpo.packing import Group, pack_groups


@pytest.mark.parametrize("bias", [True, False])
def test_under_autocast_the_head_scores_in_the_type_that_autocast_asks_for(bias):
    torch.manual_seed(0)
    plain = torch.nn.Linear(8, 40, bias=bias)
    head, half = (ScoringHead(copy.deepcopy(layer)) for layer in (plain, plain))
    half.bfloat16()
    hidden, targets = torch.randn(6, 8), torch.arange(6)
    with torch.autocast("cpu", torch.bfloat16):
        found = head(hidden.requires_grad_(), targets, chunk_size=16)
    assert torch.equal(found, half(hidden.bfloat16(), targets, chunk_size=16))
    assert not torch.equal(found, head(hidden, targets, chunk_size=16))
    found.sum().backward()  # outside of autocast, as a trainer does
    assert head.weight.grad.dtype == hidden.grad.dtype == torch.float32
    assert found.dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"trim": False}])
def test_a_pack_runs_once_without_a_cache_of_keys_and_its_last_layer_is_trimmed_unless_told_otherwise(options):
    model = attach_scoring(tiny_model(), **options)
    pack = pack_groups([Group([5] * 60, [[2], [3, 4]], [(0, 1)], ["long"])])
    decoder, sizes, caches = model.language_model.model, [], []
    for layer in decoder.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[1]))
    decoder.register_forward_hook(lambda _, args, output: caches.append(output.past_key_values))
    with torch.no_grad():
        response_logps(model, pack)
    assert sizes == [61, 61 if options else 2]
    assert caches == [None]
