"""The scoring head alone."""

import copy

import pytest
import torch

from internvl_mpo.kernels.scoring_head import ScoringHead


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
