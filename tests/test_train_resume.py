"""A killed training run goes on with the same command."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train_mpo import losses, train, unbroken, world  # noqa: F401 - fixtures among them
from test_train_refusals import no_work  # noqa: F401 - a fixture

from internvl_mpo.errors import BadInputError
from internvl_mpo.training.arguments import MPOArguments
from internvl_mpo.training.checkpoint import (
    STATE_FILE,
    check_resumable,
    read_state,
    rotate,
    whole_checkpoints,
    write_state,
)
from internvl_mpo.training.trainer import MPOTrainer


def test_a_second_run_continues_and_repeats_every_loss_to_the_bit(world, unbroken, tmp_path):
    output = tmp_path / "run"
    assert train(world, output, "--max_steps", "2", "--lr_scheduler_type", "constant") == 0
    assert train(world, output, "--max_steps", "4", "--lr_scheduler_type", "constant") == 0
    assert train(world, tmp_path / "whole", "--lr_scheduler_type", "constant") == 0
    assert losses(output) == losses(tmp_path / "whole")
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (output, tmp_path / "whole"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_half_written_checkpoints_are_passed_over(world, unbroken, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(world, output) == 0
    (output / "finished.json").unlink()  # killed while it saved its last checkpoint
    (output / "checkpoint-4" / "mpo_state.json").unlink()
    assert train(world, output) == 0
    assert "checkpoint-4 is half-written and was removed" in capsys.readouterr().out
    assert losses(output) == losses(unbroken)


@pytest.mark.parametrize(("more", "words"), [(["--data", "other"], "another data"), (["--pairs_per_step", "3"], "3")])
def test_a_checkpoint_of_another_run_is_refused(world, unbroken, capsys, more, words):
    if "other" in more:
        lines = (world / "pairs.jsonl").read_text().splitlines()
        (world / "other.jsonl").write_text("\n".join(lines[:8]) + "\n")
        more = ["--data", str(world / "other.jsonl")]
    assert train(world, unbroken, *more) == 2
    assert words in capsys.readouterr().err


def test_other_settings_are_refused_before_any_work(world, unbroken, capsys, no_work):
    assert train(world, unbroken, "--learning_rate", "1e-4") == 2
    assert "another learning_rate (0.001, now 0.0001)" in capsys.readouterr().err


def test_a_checkpoint_of_an_earlier_version_goes_on_and_says_what_it_cannot_compare(world, unbroken, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(unbroken, output)
    path = output / "checkpoint-2" / "mpo_state.json"
    state = json.loads(path.read_text())
    del state["fingerprint"]["learning_rate"]
    path.write_text(json.dumps(state))
    more = ("--learning_rate", "1e-4", "--resume", str(path.parent))
    assert train(world, output, *more) == 0
    assert "does not say its learning_rate" in capsys.readouterr().out
    assert losses(output) == losses(unbroken)  # the old learning rate, as the note says


@pytest.mark.slow
def test_the_way_out_of_a_lora_checkpoint_is_one(world, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(world, output, "--lora_rank", "2", "--max_steps", "2") == 0
    checkpoint = output / "checkpoint-2"
    state = read_state(checkpoint)
    with pytest.raises(BadInputError, match="the merged model folder that this run writes"):
        check_resumable(checkpoint, {**state, "engine": "ZeRO-2"})
    assert train(world, tmp_path / "new", "--model", str(checkpoint)) == 2
    assert "holds LoRA adapters alone; give the merged model folder" in capsys.readouterr().err
    assert train(world, tmp_path / "new", "--model", str(output / "model"), "--max_steps", "1") == 0


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file."""
    files = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in files.items()}


def test_a_run_that_is_over_says_so_and_touches_nothing(world, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(world, output) == 0
    (output / "model" / "notes.md").write_text("mine")  # neither a reason to write anew nor one to refuse
    before = snapshot(output)
    capsys.readouterr()
    assert train(world, output, "--dataloader_num_workers", "1") == 0
    assert "all 4 steps were done before, the trained model is in" in capsys.readouterr().out
    assert snapshot(output) == before
    assert train(world, output, "--max_steps", "6") == 2  # two are left, and the notes are in the way
    assert "(notes.md)" in capsys.readouterr().err
    assert snapshot(output) == before
    (output / "model" / "notes.md").unlink()
    assert train(world, output, "--max_steps", "6") == 0
    assert set(losses(output)) == set(range(1, 7))


@pytest.mark.parametrize("gone", ["model/config.json", "model/training_settings.yaml", "finished.json"])
def test_a_run_whose_results_are_incomplete_is_not_over(world, tmp_path, capsys, gone):
    output = tmp_path / "run"
    assert train(world, output, "--max_steps", "1") == 0
    (output / gone).unlink()
    assert train(world, output, "--max_steps", "1") == 0
    assert "all steps were done there; only the results are still to be written" in capsys.readouterr().out
    assert (output / gone).exists()


@pytest.mark.slow
def test_a_run_killed_after_its_last_checkpoint_trains_no_step_more(world, tmp_path):
    assert train(world, tmp_path / "run") == 0
    expected, model = losses(tmp_path / "run"), tmp_path / "run/model/model.safetensors"
    before = load_file(model)
    shutil.rmtree(model.parent)  # all steps were done, the folder was not yet written
    assert train(world, tmp_path / "run") == 0
    assert losses(tmp_path / "run") == expected
    after = load_file(model)
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def write_checkpoints(folder: Path, count: int) -> None:
    """Checkpoints 1 to `count`, one after the other."""
    for step in range(1, count + 1):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        write_state(folder / f"checkpoint-{step}", {})
        os.utime(folder / f"checkpoint-{step}" / STATE_FILE, ns=(step, step))


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (2, None, (3, 4)),
        (2, 1, (1, 4)),
        (3, 1, (1, 3, 4)),
        (1, 1, (1, 4)),  # the last is needed to go on, the best at the end
        (1, 4, (4,)),
        (5, None, (1, 2, 3, 4)),
        (6, 1, (1, 2, 3, 4)),
        (None, 1, (1, 2, 3, 4)),
    ],
)
def test_rotation_keeps_the_best_and_the_last_checkpoint(tmp_path, limit, best, kept):
    write_checkpoints(tmp_path, 4)
    rotate(tmp_path, limit, best=best and tmp_path / f"checkpoint-{best}")
    assert [folder.name for folder in whole_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in kept]


def test_the_best_checkpoint_outlives_rotation_and_is_loaded_at_the_end(world, tmp_path, monkeypatch):
    measured = iter([0.1, 0.9, 0.2, 0.3, 0.4])
    plain = MPOTrainer._answer_some
    monkeypatch.setattr(
        MPOTrainer,
        "_answer_some",
        lambda self, prefix: plain(self, prefix) | {f"{prefix}_rewards/margin": next(measured)},
    )
    more = ("--held_out_share", "0.4", "--pairs_per_step", "2", "--save_steps", "1", "--eval_steps", "1",
            "--save_total_limit", "1", "--num_eval_samples", "0", "--load_best_model_at_end", "true",
            "--metric_for_best_model", "rewards/margin")  # fmt: skip
    assert train(world, tmp_path / "run", *more) == 0
    best = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    final = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert all(torch.equal(weight, final[name]) for name, weight in best.items())


def test_a_metric_that_is_not_measured_is_refused_and_nll_is_better_when_small(world, tmp_path, capsys):
    more = ("--held_out_share", "0.4", "--eval_steps", "2", "--load_best_model_at_end", "true")
    assert train(world, tmp_path / "run", *more, "--metric_for_best_model", "loss") == 2
    assert "metric_for_best_model is 'loss', expected one of rewards/accuracy" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    args = MPOArguments(output_dir=str(tmp_path), use_cpu=True, metric_for_best_model="eval_nll")
    assert args.greater_is_better is False
