"""What the trainer adds to transformers' around one step, method by method and without a model.

pytest tests/test_trainer.py
"""

import math
import time
from types import SimpleNamespace

import pytest
import torch
import transformers

from internvl_mpo.errors import BadInputError
from internvl_mpo.logps import PairScores
from internvl_mpo.objective import RewardShift, mpo_loss, needs_reference, wpo_weights
from internvl_mpo.packing import Group, pack_groups
from internvl_mpo.training import trainer as module
from internvl_mpo.training.meters import MeanMeter
from internvl_mpo.training.not_finite import PackRecord
from internvl_mpo.training.trainer import MPOTrainer

OBJECTIVE = {"beta": 0.5, "weights": (0.8, 0.2, 1.0), "preference": "dpo", "quality": "bco", "generation": "sft_token"}
POLICY = torch.tensor([-5.0, -9.0]), torch.tensor([-7.0, -6.5])
REFERENCE = torch.tensor([-5.5, -8.0]), torch.tensor([-6.0, -6.25])
MODEL = "a model"
STEP = torch.tensor([6, 40])  # pairs and chosen tokens of the whole step


class TwoRanks:
    """Stands for accelerate on two ranks that have the same numbers."""

    device = torch.device("cpu")
    sync_gradients = True

    def reduce(self, values, reduction):
        assert reduction == "sum"
        return values * 2

    def gather(self, rows):
        return torch.cat([rows, rows - torch.arange(float(rows.shape[1])) + 1])

    def unwrap_model(self, model):
        return model


def bare(shift: str = "none", **args) -> MPOTrainer:
    """A trainer with what the methods below look at and nothing else."""
    trainer = MPOTrainer.__new__(MPOTrainer)
    settings = {"device": torch.device("cpu"), "world_size": 2, "beta": 0.5, "objective": OBJECTIVE}
    more = {"wpo": False, "fsdp": "", "fp16": False, "bf16": False, "peak_tflops": 1.0, "output_dir": "run"}
    trainer.args = SimpleNamespace(**{**settings, **more, **args})
    trainer.accelerator, trainer.model = TwoRanks(), None
    trainer.shift, trainer.sums = RewardShift(shift), MeanMeter()
    trainer.step_rewards, trainer.step_packs = [], []
    trainer.state = SimpleNamespace(global_step=3, max_steps=9)
    trainer.control = SimpleNamespace(should_training_stop=False)
    trainer.live = trainer.reference = trainer.pairs = None
    trainer.compares = True
    trainer.flop_model = SimpleNamespace(of=lambda pack: 7.0 * pack.num_tokens)
    trainer._reference_logps = lambda pack: REFERENCE
    return trainer


@pytest.fixture
def pack():
    """Two pairs: chosen responses of 3 and 2 tokens."""
    first = Group([1, 2], [[3, 4, 5], [6]], [(0, 1)], ["a"])
    return pack_groups([first, Group([1], [[7, 8], [9, 8]], [(0, 1)], ["b"])])


@pytest.fixture
def scored(monkeypatch):
    """The policy's log-probs; those that the generation term is meant to imitate differ."""
    values = torch.tensor([-1.0, -0.5]), torch.tensor([-0.25, -2.0])

    def score_pairs(model, pack, *, likeness):
        assert (model, pack.num_pairs) == (MODEL, 2)
        chosen, rejected = (logps.clone().requires_grad_() for logps in POLICY)
        return PairScores(chosen, rejected, POLICY[0] * 2, POLICY[1], *(values if likeness else (None, None)))

    monkeypatch.setattr(module, "score_pairs", score_pairs)
    return values


def expected(pack, reference=REFERENCE, shift=0.0, **more):
    return mpo_loss(
        *POLICY, *reference, pack.chosen_lengths_P, shift=shift, rejected_lengths=pack.rejected_lengths_P,
        generation_logps=POLICY[0] * 2, num_pairs=6, num_chosen_tokens=40, **OBJECTIVE, **more,
    )  # fmt: skip


def test_a_pack_gives_its_share_of_the_step_times_the_ranks_that_average(pack, scored):
    trainer, whole = bare(), expected(pack)
    loss, out = trainer.compute_loss(MODEL, pack, return_outputs=True, num_items_in_batch=STEP)
    assert loss.item() == pytest.approx(2 * whole.loss.item())
    assert torch.equal(out.preference.detach(), whole.preference)
    assert trainer.compute_loss(MODEL, pack, num_items_in_batch=STEP).item() == loss.item()
    assert [rewards.tolist() for rewards in trainer.step_rewards] == [
        whole.chosen_rewards.tolist(), whole.rejected_rewards.tolist()
    ] * 2  # fmt: skip
    (record, _), sums = trainer.step_packs, trainer.sums
    assert (record.pair_ids, record.loss.requires_grad) == (["a", "b"], False)
    assert (record.reference_chosen, record.reference_rejected) == REFERENCE
    assert record.loss.item() == pytest.approx(whole.loss.item())
    assert (sums.count, sums.tokens, sums.flop) == (4, 2 * pack.num_tokens, 14.0 * pack.num_tokens)
    assert sums.totals["kl"] > 0
    assert "pair_weight" not in sums.totals


def test_without_a_reference_rewards_are_those_of_the_policy_alone(pack, scored):
    trainer = bare()
    trainer.compares = needs_reference("orpo", "none")
    del trainer._reference_logps
    loss = trainer.compute_loss(MODEL, pack, num_items_in_batch=STEP)
    zeros = torch.zeros(2)
    assert loss.item() == pytest.approx(2 * expected(pack, (zeros, zeros)).loss.item())
    assert "kl" not in trainer.sums.totals


def test_formulas_a_token_divide_each_response_by_its_own_length(pack, scored):
    trainer = bare(objective=OBJECTIVE | {"preference": "simpo"})
    _, out = trainer.compute_loss(MODEL, pack, return_outputs=True, num_items_in_batch=STEP)
    margins = (POLICY[0] / torch.tensor([3, 2]) - POLICY[1] / torch.tensor([1, 2])) * 0.5 - 1.0
    assert out.preference.tolist() == pytest.approx((-torch.nn.functional.logsigmoid(margins)).tolist())


def test_changes_that_are_logged_are_those_of_each_side_against_its_own_reference(pack, scored):
    trainer = bare()
    trainer.compute_loss(MODEL, pack, num_items_in_batch=STEP)
    chosen, rejected = ((policy - known) for policy, known in zip(POLICY, REFERENCE, strict=True))
    chosen, rejected = chosen / torch.tensor([3, 2]), rejected / torch.tensor([1, 2])
    kl = sum((change.exp() - 1 - change).sum().item() / 2 for change in (chosen, rejected))
    assert trainer.sums.totals["logps/chosen_change"].item() == pytest.approx(chosen.sum().item())
    assert trainer.sums.totals["kl"].item() == pytest.approx(kl)


def test_the_loss_moves_the_policy_alone_and_no_shift(monkeypatch, pack):
    """An inclusive shift holds the pack's own rewards, yet it is a constant of the loss."""
    policy = [logps.clone().requires_grad_() for logps in POLICY]
    monkeypatch.setattr(module, "score_pairs", lambda *given, **more: PairScores(*policy, policy[0] * 2, policy[1]))
    trainer = bare("inclusive")
    trainer.compute_loss(MODEL, pack, num_items_in_batch=STEP).backward()
    twin = [logps.clone().requires_grad_() for logps in POLICY]
    loss = mpo_loss(
        *twin, *REFERENCE, pack.chosen_lengths_P, shift=trainer.shift.value, generation_logps=twin[0] * 2,
        num_pairs=6, num_chosen_tokens=40, **OBJECTIVE,
    ).loss  # fmt: skip
    (2 * loss).backward()
    for one, other in zip(policy, twin, strict=True):
        assert one.grad.tolist() == pytest.approx(other.grad.tolist())


@pytest.mark.parametrize("mode", ["previous", "ema", "none"])
def test_a_shift_of_earlier_steps_does_not_move_within_one(pack, scored, mode):
    trainer = bare(mode)
    for _ in range(2):
        trainer.compute_loss(MODEL, pack, num_items_in_batch=STEP)
    assert (trainer.shift.value, trainer.shift.count) == (0.0, 0)


def test_what_a_pack_needs_beside_it_is_made_on_its_device(pack, monkeypatch):
    """On the device without memory: what is left on the CPU cannot meet it."""
    device = torch.device("meta")
    policy = [logps.to(device) for logps in POLICY]
    monkeypatch.setattr(module, "score_pairs", lambda *given, **more: PairScores(*policy, *policy))
    trainer = bare(device=device)
    trainer.accelerator.sync_gradients = False
    trainer.compares = False
    monkeypatch.setattr(module, "mpo_loss", lambda *given, **more: seen.append(given) or whole)
    monkeypatch.setattr(module, "pair_numbers", lambda *given: {})
    seen, whole = [], SimpleNamespace(loss=torch.zeros(()), chosen_rewards=policy[0], rejected_rewards=policy[1])
    trainer.compute_loss(MODEL, pack, num_items_in_batch=STEP)
    assert {logps.device for logps in seen[0][:4]} == {device}
    assert trainer._get_num_items_in_batch([pack], device).device == device


def test_weights_of_pairs_are_those_of_wpo_and_logged(pack, scored):
    trainer = bare(wpo=True)
    weights = wpo_weights(*scored)
    loss = trainer.compute_loss(MODEL, pack, num_items_in_batch=STEP)
    assert loss.item() == pytest.approx(2 * expected(pack, pair_weights=weights).loss.item())
    assert trainer.sums.totals["pair_weight"].item() == pytest.approx(weights.sum().item())


def test_an_inclusive_shift_holds_the_pack_itself_and_no_number_that_is_not_finite(pack, scored):
    trainer = bare("inclusive")
    chosen, rejected = (0.5 * (policy - reference) for policy, reference in zip(POLICY, REFERENCE, strict=True))
    mean = torch.cat([chosen, rejected]).mean().item()
    loss = trainer.compute_loss(MODEL, pack, num_items_in_batch=STEP)
    assert trainer.shift.value == pytest.approx(mean)
    assert loss.item() == pytest.approx(2 * expected(pack, shift=mean).loss.item())

    for broken in (math.nan, math.inf, -math.inf):
        trainer = bare("inclusive")
        trainer.accelerator.sync_gradients = False
        trainer._reference_logps = lambda pack, value=broken: (torch.tensor([value, -8.0]), REFERENCE[1])
        trainer.compute_loss(MODEL, pack, num_items_in_batch=STEP)
        assert trainer.shift.value == pytest.approx((mean * 4 - chosen[0].item()) / 4)


@pytest.mark.parametrize("mode", ["previous", "ema", "inclusive", "none"])
def test_rewards_join_the_shift_after_the_last_pack_of_a_step(monkeypatch, mode):
    trainer = bare(mode)
    rewards = [torch.tensor([1.0, 3.0]), torch.tensor([5.0])]

    def one_pack(self, model, inputs, num_items_in_batch):
        assert (model, inputs) == (MODEL, "a pack")
        self.step_rewards += rewards
        return num_items_in_batch

    monkeypatch.setattr(transformers.Trainer, "training_step", one_pack)
    trainer.accelerator.sync_gradients = False
    assert trainer.training_step(MODEL, "a pack", 11) == 11
    assert (len(trainer.step_rewards), trainer.shift.value) == (2, 0.0)
    trainer.accelerator.sync_gradients = True
    trainer.training_step(MODEL, "a pack", 11)
    assert trainer.step_rewards == []
    assert trainer.shift.value == (3.0 if mode in ("previous", "ema") else 0.0)
    assert trainer.shift.count == (12 if mode in ("previous", "ema") else 0)  # six rewards on each of two ranks


def test_the_generation_term_of_a_pack_is_divided_by_the_tokens_of_its_chosen_responses(pack, scored):
    trainer = bare(objective=OBJECTIVE | {"generation": "sft"})
    _, out = trainer.compute_loss(MODEL, pack, return_outputs=True, num_items_in_batch=STEP)
    assert out.generation.tolist() == pytest.approx([10 / 3, 18 / 2])


def test_pairs_and_chosen_tokens_of_a_step_are_added_up_over_packs_and_ranks(pack):
    assert bare()._get_num_items_in_batch([pack, pack], torch.device("cpu")).tolist() == [8, 20]


def refusing(trainer: MPOTrainer) -> list:
    """Let a trainer say what it blames instead of writing it down."""
    blamed = []
    trainer._not_finite = lambda what, suspects: blamed.append((what, list(suspects))) or BadInputError("not finite")
    return blamed


@pytest.mark.parametrize("norm", [math.nan, math.inf, -1.0])
def test_a_gradient_that_is_not_finite_stops_unless_float16_expects_it(monkeypatch, norm):
    given = []
    monkeypatch.setattr(
        transformers.Trainer, "_get_grad_norm", lambda self, model, grad_norm: given.append(grad_norm) or norm
    )
    trainer = bare()
    trainer.step_packs = records = [PackRecord(["a"], *REFERENCE, torch.tensor(1.0))]
    blamed = refusing(trainer)
    with pytest.raises(BadInputError):
        trainer._get_grad_norm(None, 5.0)
    assert blamed == [("gradient", records)]
    assert given == [5.0]
    trainer.args.fp16 = True
    trainer._get_grad_norm(None)
    assert trainer.step_packs == []


@pytest.mark.parametrize("norm", [None, 0.0, 0.5, 1e30])
def test_a_gradient_that_is_finite_or_not_known_goes_on(monkeypatch, norm):
    monkeypatch.setattr(transformers.Trainer, "_get_grad_norm", lambda self, model, grad_norm: norm)
    trainer = bare()
    trainer.step_packs = [PackRecord(["a"], *REFERENCE, torch.tensor(1.0))]
    assert trainer._get_grad_norm(None) == norm
    assert trainer.step_packs == []


def test_a_loss_that_is_not_finite_stops_all_ranks_and_blames_its_own_packs():
    trainer = bare()
    losses = (1.0, math.nan, 2.0, math.inf)
    trainer.step_packs = [PackRecord([str(loss)], *REFERENCE, torch.tensor(loss)) for loss in losses]
    blamed = refusing(trainer)
    with pytest.raises(BadInputError):
        trainer._check_losses()
    ((what, suspects),) = blamed
    assert (what, [record.pair_ids for record in suspects]) == ("loss", [["nan"], ["inf"]])
    trainer.step_packs = trainer.step_packs[::2]
    trainer._check_losses()
    trainer.accelerator.reduce = lambda values, reduction: values + 1  # a pack of the other rank
    with pytest.raises(BadInputError):
        trainer._check_losses()
    assert blamed[1:] == [("loss", [])]


def test_a_loss_is_looked_at_before_the_last_backward_pass_of_a_step(pack, scored):
    trainer, looked = bare(), []
    trainer._check_losses = lambda: looked.append(len(trainer.step_packs))
    for trainer.accelerator.sync_gradients in (False, False, True):
        trainer.compute_loss(MODEL, pack, num_items_in_batch=STEP)
    assert looked == [3]


def test_what_stops_a_step_says_where_and_with_what_shift(monkeypatch):
    trainer = bare("previous")
    trainer.shift.update(torch.tensor([6.0, 2.0]))
    trainer.step_packs = [PackRecord(ids, *REFERENCE, torch.tensor(1.0)) for ids in (["a", "b"], ["c"])]
    monkeypatch.setattr(module, "stop_step", lambda *args, **more: (args, more))
    (what, ids, packs), more = trainer._not_finite("loss", trainer.step_packs)
    assert (what, ids, packs) == ("loss", ["a", "b", "c"], trainer.step_packs)
    assert (more["step"], more["reward_shift"], more["args"]) == (4, 3.0, trainer.args)


def test_the_largest_of_each_value_over_all_ranks_is_logged():
    assert bare()._largest({"a": 1.0, "b": 5.0, "c": 7.0}) == {"a": 2.0, "b": 5.0, "c": 7.0}
    exact = 2.0**24 + 1  # float32 has no such number
    assert bare()._largest({"a": 1.0, "b": exact}) == {"a": 2.0, "b": exact}


def test_a_device_without_float64_is_given_none(monkeypatch):
    seen, plain = [], torch.tensor
    monkeypatch.setattr(
        module.torch, "tensor", lambda rows, dtype: seen.append(dtype) or SimpleNamespace(to=lambda device: plain(rows))
    )
    for device in (SimpleNamespace(type="mps"), torch.device("cpu")):
        assert bare(device=device)._largest({"a": 1.0}) == {"a": 2.0}
    assert seen == [None, torch.float64]


def test_a_log_line_holds_means_since_the_last_one_and_the_speed_of_training(monkeypatch):
    trainer, shown = bare("previous"), []
    trainer.shift.update(torch.tensor([6.0, 2.0]))
    monkeypatch.setattr(
        transformers.Trainer, "log", lambda self, logs, start_time: shown.append((dict(logs), start_time))
    )
    monkeypatch.setattr(module, "memory_in_use", lambda device: {"memory_gib": 1.0})
    monkeypatch.setattr(module, "device_peak", lambda device, given: given)
    monkeypatch.setattr(module, "speed", lambda *given: {"speed": given})
    rewards = torch.tensor([1.0, 1.5]), torch.tensor([0.0, 0.5])
    square = (rewards[0] ** 2 + rewards[1] ** 2) / 2
    trainer.sums.add(2, {"rewards/chosen": rewards[0], "rewards/rejected": rewards[1], "rewards/square": square})
    trainer.sums.tokens, trainer.sums.flop = 10, 100.0
    trainer.last_log = time.perf_counter() - 3
    trainer.log({"loss": 1.0}, 5.0)
    ((row, start_time),) = shown
    pairs, tokens, flop, seconds, peak = row.pop("speed")
    assert (pairs, tokens, flop, peak) == (4, 20, 200.0, 2.0)
    assert 3 <= seconds < 30
    assert row.pop("rewards/std") == pytest.approx(torch.cat(rewards).std(correction=0).item())
    rewards_of_all = {"rewards/chosen": 1.25, "rewards/rejected": 0.25}
    assert row == {"loss": 1.0, **rewards_of_all, "reward_shift": 3.0, "memory_gib": 2.0}
    assert start_time == 5.0
    assert trainer.last_log > time.perf_counter() - 30 and trainer.sums.count == 0
    for logs in ({"loss": 2.0}, {"eval_nll": 1.0}):  # nothing was added since; no line of training
        trainer.log(dict(logs))
        assert shown[-1] == (logs, None)
        trainer.sums.count = 2
    trainer.log({"eval_nll": 1.0})
    assert (shown[-1], trainer.sums.count) == (({"eval_nll": 1.0}, None), 2)
    trainer.args.peak_tflops = None  # of a device that is not known
    trainer.sums.add(2, {"rewards/chosen": rewards[0], "rewards/rejected": rewards[1], "rewards/square": square})
    trainer.log({"loss": 1.0})
    assert shown[-1][0]["speed"][-1] is None


def test_a_run_that_is_over_has_no_packs_left():
    trainer = bare()
    trainer.state.global_step = 9
    assert trainer.get_batch_samples() == ([], None)
    assert trainer.control.should_training_stop


def test_a_step_waits_for_its_reference_and_none_begins_when_a_signal_came_first(monkeypatch):
    trainer, asked, stopped = bare(), [], []

    def prepare(step, go_on):
        asked.append((step, go_on()))
        trainer.reference.seconds += 5
        return trainer.reference.is_there

    trainer.last_log = 100.0
    trainer.reference = SimpleNamespace(seconds=2.0, prepare=prepare, is_there=True)
    trainer.stopping = SimpleNamespace(
        is_wanted=lambda args: not trainer.reference.is_there, stop_between_steps=lambda *given: stopped.append(given)
    )
    monkeypatch.setattr(transformers.Trainer, "get_batch_samples", lambda self, *given, more=None: given or more)
    trainer._follow_start = lambda: asked.append("follow")
    assert trainer.get_batch_samples(1, 2) == (1, 2)
    assert (trainer.last_log, stopped) == (105.0, [])  # the speed that is logged is that of training
    trainer.reference.is_there = False
    assert trainer.get_batch_samples(1, 2) == ([], None)
    assert asked == ["follow", (3, True), "follow", (3, False)]
    assert stopped == [(trainer.args, trainer.state, trainer.control)]
    trainer.reference = None
    assert trainer.get_batch_samples(more=(1, 2)) == (1, 2)


@pytest.mark.parametrize(("fsdp", "follows", "followed"), [("", False, []), ("on", True, []), ("on", False, ["model"])])
def test_under_fsdp_the_share_of_the_start_weights_is_kept_before_the_first_step_and_once(fsdp, follows, followed):
    trainer, models = bare(fsdp=fsdp), []
    trainer._follow_start()  # there is no reference to follow
    trainer.model = "model"
    trainer.reference = SimpleNamespace(follows=follows, follow=models.append)
    trainer._follow_start()
    assert models == followed


def test_numbers_that_transformers_asks_for_are_counted_in_pairs(pack):
    trainer = bare(pairs_per_step=4)
    trainer.pairs = SimpleNamespace(num_seen=12)
    assert trainer.num_examples(None) == 12
    assert trainer.get_total_train_batch_size(trainer.args) == 4
    assert trainer.floating_point_ops(pack) == 7.0 * pack.num_tokens
    assert trainer._prepare_inputs(pack).pair_ids == pack.pair_ids


def test_a_live_reference_comes_before_the_cache_while_it_is_live(pack):
    trainer = bare()
    del trainer._reference_logps
    live, cached = ((torch.tensor([value]), torch.tensor([-value])) for value in (1.0, 2.0))
    trainer.reference = SimpleNamespace(cache=SimpleNamespace(lookup=lambda ids: cached))
    assert trainer._reference_logps(pack) == cached
    trainer.live = SimpleNamespace(is_live=True, logps=lambda pack: live)
    assert trainer._reference_logps(pack) == live
    trainer.live.is_live = False
    assert trainer._reference_logps(pack) == cached


def test_evaluation_without_held_out_pairs_is_refused():
    trainer = bare()
    trainer.held_out = None
    with pytest.raises(BadInputError, match="set held_out_share above 0"):
        trainer.evaluate()
