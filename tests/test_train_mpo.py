"""The training program on a tiny random model: refusals before any work, splits that change nothing, exact resume.

pytest tests/test_train_mpo.py
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_world import make_model_folder, make_training_pairs

import train_mpo
from internvl_mpo.errors import run_program
from internvl_mpo.training.callbacks import ConsoleCallback
from internvl_mpo.training.held_out import closing_line

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A model folder, pictures, and 12 pairs: three of each question, text-only ones among them."""
    folder = tmp_path_factory.mktemp("world")
    make_model_folder(folder / "start")
    make_training_pairs(folder)
    return folder


def arguments(world: Path, output: Path, *more: str) -> list[str]:
    settings = {
        "model": world / "start",
        "data": world / "pairs.jsonl",
        "output_dir": output,
        "pairs_per_step": 4,
        "pairs_per_group": 2,
        "max_length": 900,
        "max_tokens_per_pack": 4000,
        "learning_rate": 1e-3,
        "max_steps": 4,
        "save_steps": 2,
        "use_cpu": "true",
    }
    return [word for key, value in settings.items() for word in (f"--{key}", str(value))] + list(more)


def train(world: Path, output: Path, *more: str) -> int:
    return run_program(train_mpo.main, arguments(world, output, *more))


def losses(output: Path) -> dict[int, float]:
    """Loss of every step; a step that was run twice must have been logged once."""
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    found = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    assert len(found) == len(dict(found)), "a step was logged twice"
    return dict(found)


def write_pair(path: Path, **changes: object) -> None:
    row = {"question": "q", "chosen": "c", "rejected": "r", **changes}
    path.write_text(json.dumps({key: value for key, value in row.items() if value is not None}) + "\n")


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "copies"),
    [
        ((), 4),  # weights, gradients, two moments of AdamW
        (("--reference_sync_steps", "1"), 5),  # a moving reference is the one thing that costs a copy
    ],
)
def test_no_second_copy_of_the_model_is_held(world, tmp_path, monkeypatch, more, copies):
    counted = []

    def count(self, args, state, control, model=None, **kwargs):
        embedding = model.get_input_embeddings().weight
        live = [item for item in gc.get_objects() if isinstance(item, torch.Tensor) and item.shape == embedding.shape]
        live += [item.grad for item in live if item.is_leaf and item.grad is not None]
        counted.append(len({item.data_ptr() for item in live}))
        counted.append(copies * sum(weight.shape == embedding.shape for weight in model.parameters()))

    monkeypatch.setattr(ConsoleCallback, "on_optimizer_step", count)
    assert train(world, tmp_path / "run", "--max_steps", "2", *more) == 0
    found, expected = counted[-2:]
    assert found == expected


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(world, tmp_path_factory) -> Path:
    """A run of four steps from start to end."""
    output = tmp_path_factory.mktemp("unbroken") / "run"
    assert train(world, output) == 0
    return output


def test_the_first_loss_is_0_832_plus_nll(unbroken):
    first = json.loads((unbroken / "log.jsonl").read_text().splitlines()[0])
    assert first["loss_preference"] == pytest.approx(0.6931, abs=1e-3)
    assert first["loss_quality"] == pytest.approx(1.3863, abs=1e-3)
    assert first["loss"] == pytest.approx(0.8318 + first["loss_generation"], abs=1e-3)
    assert abs(first["rewards/chosen"]) < 1e-3  # the cached reference equals the live policy


def test_lengths_and_mixture_are_shown_and_kept(world, unbroken, tmp_path, capsys):
    report = json.loads(unbroken.with_name("run.preflight.json").read_text())
    assert report["num_pairs"] == sum(report["histogram"]["counts"]) == 12
    meta = {
        "all": {"root": ".", "annotation": "pairs.jsonl", "repeat_time": 0.5},
        "again_pairs_vqa_format_rules": {"root": ".", "annotation": "pairs.jsonl", "repeat_time": 1.25},
    }
    (world / "meta.json").write_text(json.dumps(meta))
    assert train(world, tmp_path / "run", "--data", str(world / "meta.json"), "--max_steps", "1") == 0
    shown = capsys.readouterr().out
    assert "tokens of a pair" in shown
    rows = {line.split()[0]: line.split()[1:4] for line in shown.splitlines() if len(line.split()) == 6}
    assert rows["all"] == ["12", "0.5", "6"]
    assert rows["again_pairs_vqa_format_rules"] == ["12", "1.25", "15"]


@pytest.mark.slow
def test_the_trained_folder_differs_from_the_start_and_loads_by_itself(world, unbroken):
    code = (
        "import sys; from transformers import AutoModel, AutoProcessor\n"
        "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert 'internvl_mpo' not in sys.modules\n"
        "print(model.chat(processor.tokenizer, None, 'Hello', {'max_new_tokens': 2, 'do_sample': False}))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(unbroken / "model")], cwd="/", capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    before, after = (load_file(folder / "model.safetensors") for folder in (world / "start", unbroken / "model"))
    assert before.keys() == after.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert any(name.startswith("vision_model") for name in moved)
    assert any(name.startswith("language_model") for name in moved)
    assert not list((unbroken / "model").glob("*.bin")), "no pickle in a published folder"


@pytest.mark.parametrize("more", [["--max_tokens_per_pack", "650"], ["--pairs_per_group", "1"]])
def test_smaller_packs_give_the_same_losses(world, unbroken, tmp_path, more):
    # groups of one pair change the order of pairs, so only the first step, at policy = reference, is compared there
    assert train(world, tmp_path / "run", *more) == 0
    steps = (1, 2, 3, 4) if "650" in more else ()
    expected, found = losses(unbroken), losses(tmp_path / "run")
    assert found.keys() == expected.keys()
    for step in steps:
        assert found[step] == pytest.approx(expected[step], rel=1e-5)


@pytest.mark.slow
def test_the_token_budget_holds_in_every_epoch_that_max_steps_reaches(world, tmp_path, monkeypatch):
    from internvl_mpo.training import feeding

    sizes = []
    pack_groups = feeding.pack_groups
    monkeypatch.setattr(
        feeding, "pack_groups", lambda groups: sizes.append(pack_groups(groups).num_tokens) or pack_groups(groups)
    )
    assert train(world, tmp_path / "run", "--max_steps", "12", "--max_tokens_per_pack", "650") == 0
    assert len(sizes) > 12
    assert max(sizes) <= 650


@pytest.mark.parametrize(
    "mix",
    [
        ["--preference", "none", "--quality", "none"],
        ["--preference", "orpo", "--quality", "none"],
        ["--preference", "ipo", "--quality", "none", "--generation", "sft_token"],
        ["--reward_shift", "inclusive", "--preference", "robust_dpo", "--label_smoothing", "0.1"],
        ["--reward_shift", "ema", "--preference", "aot"],
    ],
)
def test_every_kind_of_term_trains(world, tmp_path, mix):
    assert train(world, tmp_path / "run", "--max_steps", "2", *mix) == 0
    assert len(losses(tmp_path / "run")) == 2


def test_held_out_questions_are_evaluated_and_not_trained_on(world, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(world, output, "--held_out_share", "0.4", "--max_steps", "2", "--pairs_per_step", "2") == 0
    assert "the arm to beat is SFT on the chosen responses" in capsys.readouterr().out
    rows = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    accuracy = [row["eval_rewards/accuracy"] for row in rows if "eval_rewards/accuracy" in row]
    assert len(accuracy) == 1
    assert 0 <= accuracy[0] <= 1


@pytest.mark.parametrize(
    ("chosen", "rejected", "words"),
    [(0.2, 0.1, "both likelier"), (0.2, -0.1, "apart"), (-0.2, -0.1, "both less likely")],
)
def test_a_run_closes_with_what_it_did_to_pairs_it_has_not_seen(chosen, rejected, words):
    metrics = {"eval_rewards/accuracy": 0.75, "eval_num_pairs": 40.0}
    metrics |= {"eval_logps/chosen_change": chosen, "eval_logps/rejected_change": rejected}
    (line,) = closing_line(metrics, is_compared=False).splitlines()
    assert f"0.750 of 40; nats a token against the reference: chosen {chosen:+.3f}, rejected {rejected:+.3f}" in line
    assert line.endswith(f"({words})")
    arm = "the arm to beat is SFT on the chosen responses: the same command with "
    more = "--preference none --quality none and another --output_dir"
    assert closing_line(metrics, is_compared=True) == f"{line}\n{arm}{more}"


def test_a_held_out_share_that_comes_to_no_question_holds_out_one(world, tmp_path, capsys):
    output = tmp_path / "run"
    more = ("--held_out_share", "1e-9", "--eval_steps", "1", "--num_eval_samples", "0", "--max_steps", "1")
    assert train(world, output, *more) == 0
    assert "9 pairs (9 a pass)" in capsys.readouterr().out  # a question has three
    assert "eval_rewards/accuracy" in (output / "log.jsonl").read_text()


def test_a_held_out_question_that_would_be_the_only_one_is_refused(world, tmp_path, capsys):
    write_pair(world / "single.jsonl")
    more = ("--data", str(world / "single.jsonl"), "--held_out_share", "0.01")
    assert train(world, tmp_path / "run", *more) == 2
    assert "held_out_share 0.01 leaves no question to train on" in capsys.readouterr().err


def test_lora_trains_adapters_and_saves_a_merged_folder(world, tmp_path):
    output = tmp_path / "run"
    assert train(world, output, "--lora_rank", "2", "--max_steps", "2") == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (world / "start", output / "model"))
    assert before.keys() == after.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved
    assert all(name.startswith("language_model") for name in moved)


def test_pairs_over_the_token_budget_and_runs_without_any_pair_are_named_before_training(world, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(world, output, "--max_tokens_per_pack", "100", "--on_bad_row", "skip") == 2
    assert "12 of 12 rows are unusable" in capsys.readouterr().err
    rejects = [json.loads(line) for line in (tmp_path / "run.rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == 12
    assert all("tokens, more than max_tokens_per_pack 100" in row["reason"] for row in rejects)
    assert not output.exists()


@pytest.mark.parametrize("more", [("plain_twin",), ("checkpoint_vision", "checkpoint_language")])
def test_the_plain_twin_and_recomputation_train_to_the_same_losses(world, unbroken, tmp_path, more):
    assert train(world, tmp_path / "run", *(word for name in more for word in (f"--{name}", "true"))) == 0
    expected, found = losses(unbroken), losses(tmp_path / "run")
    assert found.keys() == expected.keys()
    for step, loss in expected.items():
        assert found[step] == pytest.approx(loss, rel=1e-5)


def test_skipping_bad_rows_is_possible_when_asked_for(world, tmp_path, capsys):
    write_pair(world / "bad.jsonl", image="absent.png")
    data = f"{world / 'bad.jsonl'},{world / 'pairs.jsonl'}"
    assert train(world, tmp_path / "run", "--data", data, "--on_bad_row", "skip", "--max_steps", "1") == 0
    assert "left out 1 unusable rows" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run_with_the_pair_ids(world, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(world, output, "--learning_rate", "1e30", "--max_grad_norm", "0") == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the loss is not finite at step" in message
    dump = json.loads(next(output.glob("not_finite_*.json")).read_text())
    assert dump["pair_ids"][0] in message
    assert not (output / "model").exists()


# --- more than one process --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_give_the_losses_of_one_process(world, unbroken, tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*command, str(ROOT / "train_mpo.py"), *arguments(world, output)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    expected, found = losses(unbroken), losses(output)
    assert found.keys() == expected.keys()
    assert [found[step] for step in expected] == pytest.approx(list(expected.values()), rel=1e-5)
