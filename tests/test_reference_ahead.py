"""Reference log-probs just ahead of the steps: the losses of a pass before training, to the last bit.

pytest tests/test_reference_ahead.py
"""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from test_distributed import run_on_ranks, small_configs
from test_train_mpo import arguments, losses, train, world  # noqa: F401 - world is a fixture
from tiny import tiny_model

from internvl_mpo.errors import EXIT_STOPPED
from internvl_mpo.training.callbacks import ConsoleCallback
from internvl_mpo.training.checkpoint import whole_checkpoints
from internvl_mpo.training.live_reference import StartWeights
from internvl_mpo.training.reference_cache import ReferenceCache
from internvl_mpo.training.reference_pass import ReferencePass
from internvl_mpo.training.reference_plan import ReferencePlan

LORA = ("--lora_rank", "2", "--lora_on", "both")
ONE = ("--reference_ahead_steps", "1")


@pytest.fixture(scope="module")
def before(world, tmp_path_factory) -> Path:
    """A run whose reference was there before its first step."""
    output = tmp_path_factory.mktemp("before") / "run"
    assert train(world, output, "--reference_pass", "before") == 0
    return output


@pytest.fixture
def no_pass(monkeypatch) -> None:
    """The start model may not be asked."""

    def refuse(*args, **kwargs):
        raise AssertionError("a reference pass")

    monkeypatch.setattr(ReferencePass, "_compute", refuse)


@pytest.mark.parametrize(
    "steps", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(32, marks=pytest.mark.slow)]
)
def test_ahead_gives_the_losses_of_before_to_the_last_bit(world, before, tmp_path, steps):
    assert train(world, tmp_path / "run", "--reference_ahead_steps", str(steps)) == 0
    assert losses(tmp_path / "run") == losses(before)


@pytest.mark.parametrize(
    "more",
    [
        ("--held_out_share", "0.4", "--pairs_per_step", "2", "--num_eval_samples", "1", "--eval_sample_tokens", "4"),
        *(
            pytest.param(more, marks=pytest.mark.slow, id=more[0])
            for more in (
                (*LORA, "--lora_dropout", "0.5"),  # random numbers
                ("--bf16", "true"),
                ("--reference_sync_steps", "2"),
                ("--dataloader_num_workers", "1"),
                ("--ld_alpha", "0.25", "--pairs_per_group", "1"),
            )
        ),
    ],
)
def test_ahead_gives_the_log_of_before(world, tmp_path, more):
    rows = []
    for name in ("before", "ahead"):
        assert train(world, tmp_path / name, *more, *ONE, "--reference_pass", name) == 0
        lines = map(json.loads, (tmp_path / name / "log.jsonl").read_text().splitlines())
        speed = ("second", "tflops", "memory", "runtime", "mfu")
        rows.append([{k: v for k, v in line.items() if not any(word in k for word in speed)} for line in lines])
    assert rows[0] == rows[1]


def test_the_first_step_waits_for_its_own_window_alone(world, tmp_path, monkeypatch):
    known = []

    def count(self, args, state, control, model=None, **kwargs):
        shards = sorted((tmp_path / "run" / "reference").rglob("part-*.parquet"))
        known.append(len(shards))

    monkeypatch.setattr(ConsoleCallback, "on_step_begin", count)
    computed = []
    plain = ReferenceCache.add
    monkeypatch.setattr(
        ReferenceCache, "add", lambda self, ids, *logps: (computed.append(len(ids)), plain(self, ids, *logps))[1]
    )
    assert train(world, tmp_path / "run", *ONE, "--pairs_per_step", "2", "--max_steps", "2") == 0
    assert known[0] == 1  # and it is on the disk
    assert sum(computed) < 12  # two steps of two pairs, a question has three


@pytest.mark.parametrize(
    "preference", ["orpo", pytest.param("simpo", marks=pytest.mark.slow), pytest.param("none", marks=pytest.mark.slow)]
)
def test_what_compares_with_no_reference_makes_no_pass(world, tmp_path, no_pass, preference):
    assert train(world, tmp_path / "run", "--preference", preference, "--quality", "none") == 0
    assert not (tmp_path / "run" / "reference").exists()
    row = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert row["rewards/chosen"] == pytest.approx(0.1 * row["logps/chosen"])
    assert "kl" not in row
    assert "logps/chosen_change" not in row


def test_held_out_pairs_are_compared_with_the_start_even_if_training_is_not(world, tmp_path):
    more = ("--preference", "orpo", "--quality", "none", "--held_out_share", "0.4", "--pairs_per_step", "2")
    assert train(world, tmp_path / "run", *more, "--num_eval_samples", "0", "--max_steps", "1") == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert any("eval_logps/chosen_change" in row for row in rows)


def test_shares_of_a_job_of_their_own_are_found_by_a_run(world, before, tmp_path, monkeypatch, capsys):
    cache = ("--reference_cache", str(tmp_path / "cache"))
    for share in ("1/2", "0/2"):
        assert train(world, tmp_path / "run", *cache, "--reference_pass", "only", "--reference_shard", share) == 0
    assert f"reference log-probs of share 0/2 are in {tmp_path / 'cache'}" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(ReferencePass, "_compute", lambda *args: pytest.fail("a reference pass"))
    monkeypatch.setattr(StartWeights, "__init__", lambda *args: pytest.fail("a copy of the weights"))
    assert train(world, tmp_path / "run", *cache) == 0
    assert losses(tmp_path / "run") == losses(before)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--reference_shard", "0/2"), "add --reference_pass only"),
        (("--reference_pass", "only", "--reference_shard", "2/2"), "expected i/n with i from 0 to n - 1"),
        (("--reference_pass", "only", "--reference_shard", "half"), "expected i/n"),
        (("--reference_pass", "only", "--preference", "orpo", "--quality", "none"), "needs no reference"),
        (("--reference_pass", "only", "--reference", "adapter_off", *LORA), "would have nothing to do"),
        (("--reference_ahead_steps", "0"), "reference_ahead_steps is 0, expected 1 or more"),
    ],
)
def test_a_pass_that_cannot_be_meant_is_refused(world, tmp_path, capsys, more, words):
    assert train(world, tmp_path / "run", *more) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_run_killed_in_the_middle_of_a_window_goes_on_to_the_bit(world, tmp_path, monkeypatch, at):
    small = ("--save_steps", "1", "--max_tokens_per_pack", "650", *ONE)  # several packs a window
    assert train(world, tmp_path / "before", *small, "--reference_pass", "before") == 0
    count = 0
    plain = ReferenceCache.add

    def die(self, *found):
        nonlocal count
        count += 1
        if count == at:
            raise KeyboardInterrupt
        return plain(self, *found)

    with monkeypatch.context() as patch:
        patch.setattr(ReferenceCache, "add", die)
        patch.setattr(ReferenceCache, "__exit__", lambda self, *exc: None if exc[0] else self.flush())
        assert train(world, tmp_path / "run", *small) == 130
    assert train(world, tmp_path / "run", *small) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "before")


def test_a_signal_in_a_window_stops_before_its_step_with_a_checkpoint(world, tmp_path, monkeypatch, capsys):
    more = ("--pairs_per_step", "2", "--save_steps", "100", *ONE)
    assert train(world, tmp_path / "whole", *more) == 0
    plain, calls = ReferencePass._compute, []

    def send(self, *given):
        calls.append(given)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(ReferencePass, "_compute", send)
        assert train(world, tmp_path / "run", *more) == EXIT_STOPPED
    (folder,) = whole_checkpoints(tmp_path / "run")
    assert f"{folder} is whole, the same command goes on from it" in capsys.readouterr().err
    assert folder.name == f"checkpoint-{len(losses(tmp_path / 'run'))}"  # no step was run without its reference
    assert train(world, tmp_path / "run", *more) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_the_policy_is_back_after_a_window_to_the_last_bit():
    model = tiny_model().train()
    at_start = {name: p.detach().clone() for name, p in model.named_parameters()}
    start = StartWeights(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
    policy = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        with start.in_place() as same:
            assert all(torch.equal(p, at_start[name]) for name, p in same.named_parameters())
            assert not same.training
        assert all(torch.equal(p, policy[name]) for name, p in model.named_parameters())
        assert model.training


# --- the plan ---------------------------------------------------------------------------------------------------------


class Pairs:
    """What a plan looks at of 40 pairs of 13 questions; the last four are held out."""

    def __init__(self, indices: np.ndarray):
        from internvl_mpo.pack_plan import PairSize

        self.indices = indices
        self.sizes = [PairSize(5 + index % 7, 3, 4 + index % 3) for index in indices.tolist()]

    def __len__(self) -> int:
        return len(self.indices)

    def column(self, name: str) -> np.ndarray:
        keys = self.indices % 12 + 13 * (self.indices >= 36)
        return {"digest": self.indices.astype(np.uint64), "key": keys}[name]

    def sampler(self, args):
        from internvl_mpo.steps import StepSampler

        return StepSampler(
            self.column("key"), [1 + index % 2 for index in self.indices.tolist()], self.sizes,
            pairs_per_step=5, pairs_per_group=2, max_tokens=60, num_ranks=1, rank=0,
            gradient_accumulation_steps=1, seed=0,
        )  # fmt: skip


def planned(steps: int, num_steps: int = 10**6) -> tuple[list, list[list], list]:
    """Windows, their packs, and the packs of what is held out."""
    args = type("Args", (), {"reference_ahead_steps": steps, "pairs_per_step": 5, "max_tokens_per_pack": 60})
    trained = Pairs(np.arange(36))
    plan = ReferencePlan(Pairs(np.arange(40)), args, num_steps=num_steps)
    windows = list(plan.windows(trained))
    for window in windows:
        rows = plan.rows(np.concatenate(window.questions)).tolist()
        packs = plan.packs(window.questions)
        assert sorted(rows) == sorted(row for pack in packs for group in pack for row in group)
    return windows, [plan.packs(window.questions) for window in windows], plan.packs([plan.others(trained)])


def test_each_pair_is_computed_once_in_packs_that_do_not_depend_on_the_window():
    _, packs, others = planned(3)
    packs = [pack for some in packs for pack in some]
    assert sorted(row for pack in packs for group in pack for row in group) == list(range(36))
    assert sorted(row for pack in others for group in pack for row in group) == [36, 37, 38, 39]
    for steps in (1, 2, 50):
        assert [pack for some in planned(steps)[1] for pack in some] == packs


def test_windows_keep_to_their_steps_and_pairs_and_a_short_run_needs_less():
    windows, packs, _ = planned(3)
    assert [window.first for window in windows[1:]] == [window.end for window in windows[:-1]]
    for window, some in zip(windows, packs, strict=True):
        pairs = sum(len(group) for pack in some for group in pack)
        assert window.end - window.first == 1 or (window.end - window.first <= 3 and pairs <= 15)
    _, packs, _ = planned(50, num_steps=1)
    assert 5 <= sum(len(group) for some in packs for pack in some for group in pack) <= 15


@pytest.mark.slow
def test_two_ranks_ahead_give_the_losses_of_before_to_the_bit(world, tmp_path):
    configs = small_configs(tmp_path)
    engines = {
        "ddp": (),
        "zero2": ("--deepspeed", str(configs["zero2"])),
        "zero3": ("--deepspeed", str(configs["zero3"])),
    }
    cases = [
        (arguments(world, tmp_path / f"{name}_{when}", *engine, *ONE, "--reference_pass", when), None)
        for name, engine in engines.items()
        for when in ("before", "ahead")
    ]
    codes, errors = run_on_ranks(2, tmp_path, cases)
    assert codes == ["0,0"] * len(cases), errors[-3000:]
    for name in engines:
        assert losses(tmp_path / f"{name}_ahead") == losses(tmp_path / f"{name}_before"), name
