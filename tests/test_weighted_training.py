"""Weights of tokens and pairs through whole training runs: splits, caches, references, resuming, replays.

pytest tests/test_weighted_training.py
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from test_train_mpo import losses, train, world  # noqa: F401 - `world` is a fixture
from tiny import tiny_model

from internvl_mpo import replay
from internvl_mpo.logps import attach_scoring, pair_logps
from internvl_mpo.packing import Group, pack_groups
from internvl_mpo.token_weights import TokenWeights
from internvl_mpo.training.live_reference import MovingReference

TOKENS = ("--ld_alpha", "0.25", "--after_difference_weight", "0.5", "--difference_tokens", "3")
WEIGHTS = (*TOKENS, "--wpo", "--preference", "apo_zero")


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def weighted(world, tmp_path_factory) -> Path:
    """A run with all weights on."""
    folder = tmp_path_factory.mktemp("weighted") / "run"
    assert train(world, folder, *WEIGHTS) == 0
    return folder


@pytest.mark.parametrize("more", [("--max_tokens_per_pack", "650"), ("--plain_twin",)])
def test_losses_do_not_depend_on_packs_or_on_sharing(world, weighted, tmp_path, more):
    assert train(world, tmp_path / "run", *WEIGHTS, *more) == 0
    expected, found = losses(weighted), losses(tmp_path / "run")
    assert list(found) == list(expected) == [1, 2, 3, 4]
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-5)


def test_the_first_step_is_the_start_model_and_says_what_has_no_fixed_value(world, tmp_path, capsys):
    assert train(world, tmp_path / "run", *WEIGHTS, "--max_steps", "1", "--save_strategy", "no") == 0
    (first,) = [row for row in lines(tmp_path / "run") if "loss" in row]
    assert first["rewards/chosen"] == pytest.approx(0, abs=1e-4)  # the reference was summed with the same weights
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    assert first["pair_weight"] > 0
    assert first["loss_preference"] == pytest.approx(first["pair_weight"], rel=1e-3)  # apo_zero starts at 1
    assert first["loss_quality"] == pytest.approx(2 * math.log(2) * first["pair_weight"], rel=1e-3)
    assert "the weights of the pairs depend on the start model" in capsys.readouterr().out


def test_the_generation_term_and_the_plain_log_probs_see_no_weights(world, tmp_path):
    firsts = []
    for name, more in (("plain", ()), ("weighted", TOKENS)):
        assert train(world, tmp_path / name, *more, "--max_steps", "1", "--save_strategy", "no") == 0
        firsts.append(next(row for row in lines(tmp_path / name) if "loss" in row))
    for key in ("loss_generation", "logps/chosen", "logps/rejected", "length/chosen"):
        assert firsts[0][key] == pytest.approx(firsts[1][key], rel=1e-6), key


@pytest.mark.slow
def test_other_weights_have_another_cache_and_equal_ones_keep_the_old(world, tmp_path):
    shared = ("--reference_cache", str(tmp_path / "cache"), "--max_steps", "1", "--save_strategy", "no")
    assert train(world, tmp_path / "plain", *shared) == 0
    (plain,) = (tmp_path / "cache").iterdir()
    assert "token_weights" not in json.loads((plain / "settings.json").read_text())
    assert train(world, tmp_path / "wpo", *shared, "--wpo") == 0  # weights of pairs leave the reference alone
    assert [*(tmp_path / "cache").iterdir()] == [plain]
    assert train(world, tmp_path / "tokens", *shared, *TOKENS) == 0
    (other,) = set((tmp_path / "cache").iterdir()) - {plain}
    weights = json.loads((other / "settings.json").read_text())["token_weights"]
    assert weights == {"ld_alpha": 0.25, "after_difference": 0.5, "difference_tokens": 3}


@pytest.mark.slow
def test_disabled_adapters_are_summed_with_the_same_weights_as_the_cache(world, tmp_path):
    lora = ("--lora_rank", "2", "--save_strategy", "no", *TOKENS)
    assert train(world, tmp_path / "cache", *lora) == 0
    assert train(world, tmp_path / "off", *lora, "--reference", "adapter_off") == 0
    assert list(losses(tmp_path / "off").values()) == pytest.approx(list(losses(tmp_path / "cache").values()), rel=1e-5)


def test_a_moving_reference_is_summed_with_the_same_weights():
    model = attach_scoring(tiny_model())
    group = Group([1, 2], [[3, 4, 5, 6], [3, 7], [8]], [(0, 1), (2, 0)], ["a", "b"])
    pack = pack_groups([TokenWeights(0.25, 0.5, 1).weigh(group)])
    reference = MovingReference(model, alpha=0.5)
    reference.start()
    with torch.no_grad():
        expected = pair_logps(model, pack)
        for parameter in model.parameters():
            parameter.mul_(0.9)
    assert all(map(torch.equal, reference.logps(pack), expected))


def test_a_checkpoint_without_the_settings_is_one_of_equal_weights(world, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(world, output, "--max_steps", "2") == 0
    path = output / "checkpoint-2" / "mpo_state.json"
    state = json.loads(path.read_text())
    for name in ("simpo_gamma", "dpop_lambda", "ld_alpha", "after_difference_weight", "difference_tokens", "wpo"):
        del state["fingerprint"][name]
    path.write_text(json.dumps(state))
    shutil.copytree(output, tmp_path / "other")
    assert train(world, tmp_path / "other", "--wpo") == 2
    assert "was made with another wpo (False, now True)" in capsys.readouterr().err
    assert train(world, output, "--max_steps", "2") == 0
    assert "does not say" not in capsys.readouterr().out


def test_another_weight_is_refused_on_resuming(world, weighted, tmp_path, capsys):
    shutil.copytree(weighted, tmp_path / "run")
    assert train(world, tmp_path / "run", *WEIGHTS, "--ld_alpha", "0.5") == 2
    assert "another ld_alpha (0.25, now 0.5)" in capsys.readouterr().err


@pytest.mark.parametrize("wpo", [(), ("--wpo",)])
def test_a_replay_knows_the_weights_of_the_run(world, tmp_path, wpo):
    more = (*TOKENS, *wpo, "--learning_rate", "1e30", "--max_grad_norm", "0", "--save_strategy", "no")
    assert train(world, tmp_path / "run", *more) == 2
    dump = replay.read_dump(next((tmp_path / "run").glob("not_finite_*.json")))
    model, processor = replay.load_policy(world / "start", dump["model"], torch.float32)
    attach_scoring(model)
    dump["reward_shift"] = 0.0
    for row in dump["pairs"]:
        numbers = replay.replay_pair(model, processor, dump, row).numbers
        weight = numbers["preference"] / math.log(2)  # the start model is the reference: the margin is 0
        assert numbers["quality"] == pytest.approx(2 * math.log(2) * weight, rel=1e-4)
        assert weight > 0 if wpo else weight == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--label_smoothing", "0.1"], "label_smoothing has no effect on preference 'dpo'; leave it out, or use cdpo"),
        (["--preference", "exo"], "give it a value, as 0.001"),
        (["--simpo_gamma", "2"], "simpo_gamma has no effect on preference 'dpo'"),
        (["--dpop_lambda", "5"], "dpop_lambda has no effect on preference 'dpo'"),
        (["--preference", "dpop", "--dpop_lambda", "-1"], "dpop_lambda -1.0"),
        (["--ld_alpha", "1.5"], "ld_alpha is 1.5, expected 0 to 1"),
        (["--after_difference_weight", "-1"], "after_difference_weight is -1.0, expected 0 to 1"),
        (["--after_difference_weight", "0", "--difference_tokens", "0"], "difference_tokens is 0"),
        (["--difference_tokens", "4"], "difference_tokens has no effect while after_difference_weight is 1"),
        (["--ld_alpha", "0.5", "--preference", "orpo"], "which preference 'orpo' with quality 'bco' does not use"),
        (["--ld_alpha", "0.5", "--preference", "none", "--quality", "none"], "which preference 'none'"),
        (["--wpo", "--preference", "aot_unpaired"], "wpo weighs pairs, which preference 'aot_unpaired'"),
        (["--wpo", "--preference", "none", "--quality", "none"], "wpo weighs pairs"),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused_by_name(world, tmp_path, capsys, more, words):
    assert train(world, tmp_path / "run", *more) == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "mix",
    [
        ("--preference", "simpo", "--quality", "none", "--beta", "2"),
        ("--preference", "dpop", "--dpop_lambda", "5", "--ld_alpha", "0"),
        ("--preference", "exo", "--label_smoothing", "0.001", "--quality", "none", "--wpo"),
        ("--preference", "aot_unpaired", "--after_difference_weight", "0"),
        ("--preference", "none", "--wpo"),
    ],
)
def test_every_new_setting_trains(world, tmp_path, mix):
    assert train(world, tmp_path / "run", "--max_steps", "2", "--save_strategy", "no", *mix) == 0
    assert all(map(math.isfinite, losses(tmp_path / "run").values()))
