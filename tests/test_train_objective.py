"""What a real run puts into the objective, read back from the numbers that it logs.

pytest tests/test_train_objective.py
"""

import json
import math
from pathlib import Path

import pytest
from test_train_mpo import train, world  # noqa: F401 - `world` is a fixture


def steps(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def expected_shift(mode: str, means: list[float], momentum: float) -> float:
    """The shift of the last of some steps of one pair each, from the mean reward of every step so far."""
    earlier = means[:-1]
    if mode == "inclusive":
        return sum(means) / len(means)
    if mode == "previous":
        return sum(earlier) / len(earlier) if earlier else 0.0
    value = earlier[0] if earlier else 0.0
    for mean in earlier[1:]:
        value = momentum * value + (1 - momentum) * mean
    return value


@pytest.mark.parametrize("mode", ["inclusive", "previous", "ema"])
def test_the_quality_term_meets_the_shift_of_its_mode(world, tmp_path, mode):
    one_pair = ("--pairs_per_step", "1", "--pairs_per_group", "1", "--save_strategy", "no", "--max_steps", "4")
    shift = ("--reward_shift", mode, "--reward_shift_momentum", "0.5", "--beta", "2")
    assert train(world, tmp_path / "run", *one_pair, *shift) == 0
    means: list[float] = []
    for row in steps(tmp_path / "run"):
        chosen, rejected = row["rewards/chosen"], row["rewards/rejected"]
        means.append((chosen + rejected) / 2)
        delta = expected_shift(mode, means, 0.5)
        assert row["loss_quality"] == pytest.approx(softplus(delta - chosen) + softplus(rejected - delta), rel=1e-4)
    assert len(means) == 4
    assert max(map(abs, means)) > 0.05  # large enough to tell one shift from another


def test_sft_token_is_a_mean_over_the_tokens_of_the_step_and_not_of_a_pack(world, tmp_path):
    settings = ("--generation", "sft_token", "--max_tokens_per_pack", "650", "--pairs_per_step", "8")
    assert train(world, tmp_path / "run", *settings, "--max_steps", "1", "--save_strategy", "no") == 0
    (row,) = steps(tmp_path / "run")
    assert row["loss_generation"] == pytest.approx(-row["logps/chosen"] / row["length/chosen"], rel=1e-5)
    mix = 0.8 * row["loss_preference"] + 0.2 * row["loss_quality"] + row["loss_generation"]
    assert row["loss"] == pytest.approx(mix, rel=1e-4)
