"""References computed while training runs: whose weights answer, and that the policy is back afterwards.

pytest tests/test_live_reference.py
"""

import contextlib

import pytest
import torch
from safetensors import safe_open
from torch import nn

from internvl_mpo.errors import BadInputError
from internvl_mpo.training import live_reference
from internvl_mpo.training.live_reference import AdapterOff, MovingReference, StartWeights


class Policy(nn.Module):
    """Two weights that are trained, one that is frozen, and adapters that add 100."""

    def __init__(self, adapters: bool = False):
        super().__init__()
        self.first, self.second = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor(3.0))
        self.frozen = nn.Parameter(torch.tensor(10.0), requires_grad=False)
        self.adapters_are_on = True
        if adapters:
            self.disable_adapter = self._disable_adapter

    @contextlib.contextmanager
    def _disable_adapter(self):
        self.adapters_are_on = False
        try:
            yield
        finally:
            self.adapters_are_on = True

    def value(self) -> float:
        return (self.first.sum() + self.second + self.frozen).item() + 100 * self.adapters_are_on


@pytest.fixture(autouse=True)
def seen(monkeypatch) -> list[tuple[float, bool, bool]]:
    """Each call of the model: its value, whether it trains, whether gradients are kept."""
    calls = []

    def pair_logps(model, pack):
        calls.append((model.value(), model.training, torch.is_grad_enabled()))
        if pack == "broken":
            raise RuntimeError("broken pack")
        return f"chosen of {pack}", f"rejected of {pack}"

    monkeypatch.setattr(live_reference, "pair_logps", pair_logps)
    return calls


def shift(model: nn.Module, by: float) -> None:
    with torch.no_grad():
        for weight in (model.first, model.second):
            weight.add_(by)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("trains", [True, False])
def test_adapters_are_off_for_the_length_of_one_answer(seen, trains):
    model = Policy(adapters=True).train(trains)
    reference = AdapterOff(model)
    assert reference.is_live
    assert reference.logps("pack") == ("chosen of pack", "rejected of pack")
    with pytest.raises(RuntimeError):
        reference.logps("broken")
    assert seen == [(16.0, False, False)] * 2
    assert (model.training, model.adapters_are_on) == (trains, True)
    with pytest.raises(BadInputError, match="adapter_off needs adapters"):
        AdapterOff(Policy())


@pytest.mark.parametrize("trains", [True, False])
def test_start_weights_answer_in_a_window_and_the_policy_comes_back_even_from_an_error(trains):
    model = Policy().train(trains)
    start, at_first = StartWeights(model), state(model)
    assert set(start.weights) == {"first", "second"}, "frozen weights are shared"
    shift(model, 1.0)
    policy = state(model)
    for _ in range(2):
        with start.in_place() as given:
            assert (given, model.training) == (model, False)
            assert same(state(model), at_first)
        assert same(state(model), policy)
        assert model.training is trains
    with pytest.raises(RuntimeError), start.in_place():
        raise RuntimeError("broken pack")
    assert same(state(model), policy)
    with start.in_place():
        assert same(state(model), at_first)


def test_the_start_model_of_adapters_is_the_policy_without_them():
    model = Policy(adapters=True)
    start = StartWeights(model)
    assert (start.weights, start.parameters) == ({}, {})
    shift(model, 1.0)
    with start.in_place() as given:
        assert (given, model.adapters_are_on, model.training) == (model, False, False)
    assert (model.adapters_are_on, model.training) == (True, True)


def test_weights_that_fsdp_gathered_are_let_go_before_pieces_change(monkeypatch):
    model, released = Policy(), []
    start = StartWeights(model)
    monkeypatch.setattr(live_reference, "release_gathered", lambda model: released.append(state(model)))
    shift(model, 1.0)
    policy = state(model)
    with start.in_place():
        at_first = state(model)
    assert [same(one, other) for one, other in zip(released, (policy, at_first), strict=True)] == [True, True]


@pytest.mark.parametrize("trains", [True, False])
def test_a_moving_reference_answers_with_its_own_weights(seen, trains):
    model = Policy().train(trains)
    reference = MovingReference(model, alpha=0.25)
    reference.start()
    shift(model, 4.0)
    assert not reference.is_live, "the cache still holds its log-probs"
    reference.move()
    assert (reference.is_live, reference.num_moves) == (True, 1)
    shift(model, 4.0)
    policy, pointers = state(model), [weight.data_ptr() for weight in model.parameters()]
    assert reference.logps("pack") == ("chosen of pack", "rejected of pack")
    with pytest.raises(RuntimeError):
        reference.logps("broken")
    assert seen == [(16.0 + 3 * 1.0 + 100, False, False)] * 2
    assert same(state(model), policy)
    assert [weight.data_ptr() for weight in model.parameters()] == pointers, "DeepSpeed holds views of them"
    assert model.training is trains
    reference.move()
    assert reference.weights["second"].item() == pytest.approx(0.25 * 11 + 0.75 * 4)


def test_a_moving_reference_goes_on_where_its_checkpoint_was(tmp_path):
    model = Policy()
    reference = MovingReference(model, alpha=0.5)
    reference.start()
    for _ in range(2):
        shift(model, 2.0)
        reference.move()
    shift(model, 5.0)
    reference.save(tmp_path)
    with safe_open(tmp_path / "moving_reference.safetensors", framework="pt") as file:
        assert file.metadata() == {"num_moves": "2"}
    again = MovingReference(model, alpha=0.5)
    again.load(tmp_path)
    again.start()  # when training begins: it has its weights
    assert (again.num_moves, again.is_live) == (2, True)
    assert same(again.weights, reference.weights)
    assert again.weights["first"].tolist() == [3.5, 4.5]
    for one in (again, reference):
        one.move()
    assert same(again.weights, reference.weights)


def test_weights_that_lie_crosswise_in_memory_are_saved_as_they_read(tmp_path):
    model = nn.Module()
    model.weight = nn.Parameter(torch.arange(6.0).reshape(2, 3).t())
    reference = MovingReference(model, alpha=0.5)
    reference.start()
    assert not reference.weights["weight"].is_contiguous()
    reference.save(tmp_path)
    again = MovingReference(model, alpha=0.5)
    again.load(tmp_path)
    assert torch.equal(again.weights["weight"], model.weight)


def test_a_checkpoint_without_a_reference_or_with_one_of_other_weights_is_refused(tmp_path):
    model = Policy()
    with pytest.raises(BadInputError, match="made without reference_sync_steps"):
        MovingReference(model, alpha=0.5).load(tmp_path)
    reference = MovingReference(model, alpha=0.5)
    reference.start()
    reference.save(tmp_path)
    model.frozen.requires_grad_(True)
    with pytest.raises(BadInputError, match="trained other weights"):
        MovingReference(model, alpha=0.5).load(tmp_path)
