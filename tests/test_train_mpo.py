"""The training program on a tiny random model: refusals before any work, splits that change nothing, exact resume.

pytest tests/test_train_mpo.py
"""

import dataclasses
import gc
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_world import make_model_folder, make_training_pairs

import train_mpo
from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.settings import write_settings
from internvl_mpo.training.arguments import MPOArguments
from internvl_mpo.training.callbacks import ConsoleCallback
from internvl_mpo.training.checkpoint import (
    STATE_FILE,
    check_resumable,
    read_state,
    rotate,
    whole_checkpoints,
    write_state,
)
from internvl_mpo.training.first_look import first_bad_row, setting_keys
from internvl_mpo.training.held_out import closing_line
from internvl_mpo.training.settings import TrainSettings
from internvl_mpo.training.trainer import MPOTrainer

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


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_no_arguments_print_how_to_use_it(capsys):
    with pytest.raises(SystemExit) as stop:
        train_mpo.main([])
    assert stop.value.code == 2
    assert "configs/mini.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--beta", "high"], "'beta' is 'high'"),
        (["--betta", "0.1"], "unknown setting 'betta'"),
        (["--beta", "-1"], "beta is -1"),
        (["--preference", "ppo"], "'preference' is 'ppo'"),
        (["--data", "absent.jsonl"], "data file 'absent.jsonl' does not exist"),
        (["--config", "absent.yaml"], "cannot read config file absent.yaml: No such file"),
        (["--model", "./absent"], "model folder './absent' does not exist"),
        (["--pairs_per_step", "99"], "one epoch has 12 pairs, fewer than the 99"),
        (["--max_tokens_per_pack", "100"], "more than max_tokens_per_pack 100"),
        (["--preference", "none", "--quality", "none", "--generation", "none"], "nothing to train on"),
        (
            ["--preference_weight", "-1"],
            "preference_weight, quality_weight and generation_weight are -1.0, 0.2 and 1.0",
        ),
        (
            ["--generation_weight", "0", "--preference", "none", "--quality", "none"],
            "above 0 for a term that is not none",
        ),
        (["--reward_shift_momentum", "1"], "reward_shift_momentum is 1.0, expected 0 or more and below 1"),
        (["--label_smoothing", "0.5"], "label_smoothing is 0.5, expected 0 or more and below 0.5"),
        (["--lora_rank", "2", "--lora_alpha", "0"], "lora_alpha is 0, expected more than 0"),
        (["--lora_rank", "2", "--freeze_language", "true"], "freeze_language has no effect with lora_rank"),
        (["--lora_rank", "2", "--freeze_language_layers", "1"], "freeze_language_layers has no effect with lora_rank"),
        (
            ["--gradient_accumulation_steps", "2"],
            "gradient_accumulation_steps is 2, which has no effect here: pairs_per_",
        ),
        (
            ["--per_device_train_batch_size", "4"],
            "per_device_train_batch_size is 4, which has no effect here: pairs_per_",
        ),
        (["--per_device_eval_batch_size", "4"], "per_device_eval_batch_size is 4, which has no effect"),
        (["--dataloader_drop_last"], "dataloader_drop_last is True, which has no effect"),
        (
            ["--dataloader_num_workers", "1", "--dataloader_prefetch_factor", "4"],
            "dataloader_prefetch_factor is 4, which has no effect",
        ),
    ],
)
def test_bad_settings_stop_with_one_sentence_and_leave_nothing(world, tmp_path, capsys, more, words):
    output = tmp_path / "run"
    assert train(world, output, *more) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    assert words in message
    assert not output.exists()


def without(monkeypatch, package: str) -> None:
    """Let a package look as if it were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == package else find(name, *more))


@pytest.fixture
def no_work(monkeypatch):
    """Fail when the program gets as far as reading pairs."""
    monkeypatch.setattr(train_mpo, "read_pairs", lambda settings: pytest.fail("the refusal came after the settings"))


@pytest.mark.parametrize(
    ("package", "more"),
    [
        ("peft", ["--lora_rank", "2"]),
        ("bitsandbytes", ["--lora_rank", "2", "--load_in_4bit"]),
        ("deepspeed", ["--deepspeed", str(ROOT / "configs/deepspeed/zero1.json")]),
    ],
)
def test_a_package_that_is_missing_is_named_before_any_work(
    world, tmp_path, capsys, monkeypatch, no_work, package, more
):
    without(monkeypatch, package)
    assert train(world, tmp_path / "run", *more) == 2
    assert f"needs the package {package}; pip install {package}" in capsys.readouterr().err


def test_a_tracker_that_is_unknown_or_not_installed_is_named_before_any_work(
    world, tmp_path, capsys, monkeypatch, no_work
):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    monkeypatch.setattr(integration_utils, "has_tensorboard", lambda: False, raising=False)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: False)
    for name, words in {
        "foo": "which is no tracker",
        "wandb": "pip install wandb",
        "tensorboard": "pip install",
    }.items():
        assert train(world, tmp_path / "run", "--report_to", name) == 2
        message = capsys.readouterr().err.strip().splitlines()[-1]
        assert f"report_to names '{name}'" in message
        assert words in message


@pytest.mark.parametrize("more", [["--eval_steps", "200"], ["--eval_strategy", "epoch"], ["--eval_on_start"]])
def test_an_evaluation_without_held_out_questions_is_refused_before_any_work(world, tmp_path, capsys, no_work, more):
    assert train(world, tmp_path / "run", *more) == 2
    assert "held_out_share is 0: give --held_out_share" in capsys.readouterr().err


def test_the_way_out_of_that_refusal_is_one(world, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("held_out_share: 0.001\neval_steps: 200\n")
    off = ("--held_out_share", "0", "--eval_steps", "none", "--eval_strategy", "no", "--eval_on_start", "false")
    settings = train_mpo.read_settings([*arguments(world, tmp_path / "run", *off), "--config", str(config)])
    assert settings.eval_strategy == "no"


def test_settings_of_a_run_are_taken_back_and_equal(world, tmp_path):
    """transformers replaces some settings by objects of its own; their repr was saved, and read as a file name."""
    more = ("--accelerator_config", "{even_batches: false}", "--lr_scheduler_kwargs", "{num_cycles: 1}")
    more += ("--held_out_share", "0.1", "--eval_steps", "3", "--report_to", "tensorboard", "--save_total_limit", "none")
    first = train_mpo.read_settings(arguments(world, tmp_path / "run", *more))
    write_settings(first, tmp_path / "settings.yaml")
    again = train_mpo.read_settings(["--config", str(tmp_path / "settings.yaml")])
    names = [field.name for field in dataclasses.fields(first)]
    assert {name: getattr(again, name) for name in names} == {name: getattr(first, name) for name in names}


def test_what_a_run_saved_is_taken_back(unbroken):
    """`gradient_accumulation_steps`, which the program finds and refuses, is not in the file."""
    settings = train_mpo.read_settings(["--config", str(unbroken / "settings.yaml")])
    assert (settings.output_dir, settings.max_steps) == (str(unbroken), 4)
    again = train_mpo.read_settings(["--config", str(unbroken / "model" / "training_settings.yaml")])
    assert again.learning_rate == 1e-3


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model_dir", "FOLDER/thesis"], "model_dir FOLDER/thesis holds other things than were built there (a.tex)"),
        (["--model_dir", "FOLDER/run"], "or lies around it"),  # the run folder would be replaced at the end
        (["--model_dir", "FOLDER"], "or lies around it"),
        (["--model_dir", "WORLD/start"], "or lies around it"),
        (["--model_dir", "FOLDER/ref", "--reference_cache", "FOLDER/ref"], "or lies around it"),
        (["--model_dir", "FOLDER/run/adapter", "--lora_rank", "2", "--save_adapter"], "or lies around it"),
        (["--output_dir", "FOLDER/old"], "the model folder FOLDER/old/model holds other things"),
        (["--output_dir", "FOLDER/old", "--model_dir", "FOLDER/new", "--lora_rank", "2", "--save_adapter"],
         "the adapter folder FOLDER/old/adapter holds other things"),
        (["--output_dir", "FOLDER/other"], "other holds checkpoint-7, but no settings.yaml of a run of this program"),
        (["--output_dir", "FOLDER/logged"], "logged holds log.jsonl, but no settings.yaml"),
    ],
)  # fmt: skip
def test_folders_of_others_are_refused_before_any_work_and_stay(world, tmp_path, capsys, no_work, more, words):
    files = ("thesis/a.tex", "old/model/config.json", "old/adapter/mine.txt", "other/checkpoint-7/model.bin",
             "logged/log.jsonl")  # fmt: skip
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    fill = lambda text: text.replace("FOLDER", str(tmp_path)).replace("WORLD", str(world))  # noqa: E731
    assert train(world, tmp_path / "run", *map(fill, more)) == 2
    assert fill(words) in capsys.readouterr().err
    assert all((tmp_path / name).is_file() for name in files)
    assert (world / "start" / "config.json").is_file()


def test_a_model_folder_of_this_program_is_replaced_until_somebody_adds_to_it(world, tmp_path, capsys):
    output, model = tmp_path / "run", tmp_path / "model"
    assert train(world, output, "--model_dir", str(model), "--max_steps", "1") == 0
    (tmp_path / ".model.built").unlink()  # as version 0.2 left it
    os.utime(model / "training_settings.yaml")
    assert train(world, tmp_path / "second", "--model_dir", str(model), "--max_steps", "1", "--seed", "7") == 0
    assert "seed: 7" in (model / "training_settings.yaml").read_text()
    for kept in (".model.built", None):
        (model / "notes.md").write_text("mine")
        if kept is None:
            (tmp_path / ".model.built").unlink()
            os.utime(model / "notes.md", ns=(1, 1))  # older than all the rest, but no file of ours
        assert train(world, tmp_path / "third", "--model_dir", str(model), "--max_steps", "1") == 2
        assert "(notes.md)" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


def test_keys_and_first_rows_are_looked_at_before_transformers_is_imported(world, tmp_path):
    """Its import takes seconds, and whoever mistyped a key waits for them."""
    write_pair(world / "bad.jsonl", rejected=" ")
    code = (
        "import sys, train_mpo\n"
        "from internvl_mpo.errors import run_program\n"
        "from internvl_mpo.training.first_look import first_bad_row\n"
        "print(run_program(train_mpo.main, sys.argv[2:]), first_bad_row([sys.argv[1]]))\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    command = [
        sys.executable,
        "-c",
        code,
        str(world / "bad.jsonl"),
        *arguments(world, tmp_path / "run", "--betta", "1"),
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "2 " in result.stdout
    assert "bad.jsonl:1: 'rejected' is empty" in result.stdout
    assert "unknown setting 'betta' (command line); did you mean 'beta'?" in result.stderr


def test_the_keys_read_from_source_are_those_of_the_class():
    fields = [field for field in dataclasses.fields(TrainSettings) if field.init]
    required = {"model", "data", "output_dir"}
    assert setting_keys() == {field.name: field.name in required for field in fields}


def test_the_first_bad_row_is_named_before_all_rows_are_looked_at(world, tmp_path, capsys):
    write_pair(world / "bad.jsonl", image="absent.png")
    data = f"{world / 'pairs.jsonl'},{world / 'bad.jsonl'}"
    assert train(world, tmp_path / "run", "--data", data) == 2
    printed = capsys.readouterr()
    assert "absent.png' does not exist" in printed.out.splitlines()[0]
    assert "1 of 13 rows are unusable" in printed.err
    assert train(world, tmp_path / "run", "--data", data, "--on_bad_row", "skip", "--pairs_per_step", "99") == 2
    assert "does not exist" not in capsys.readouterr().out


def test_the_first_look_ends_in_time():
    assert first_bad_row([str(ROOT / "README.md")], seconds=-1) is not None  # one row is looked at in any case


def test_data_comes_before_settings_and_only_chosen_settings_are_shown(world, tmp_path, capsys):
    assert train(world, tmp_path / "run", "--max_steps", "1") == 0
    shown = capsys.readouterr().out
    assert shown.index("tokens of a pair") < shown.index("settings that differ")
    table = shown[shown.index("settings that differ") :]
    assert "max_length" in table
    assert "freeze_vision" not in table


def test_a_missing_setting_is_named(world, capsys):
    assert run_program(train_mpo.main, ["--data", str(world / "pairs.jsonl"), "--output_dir", "x"]) == 2
    assert "missing setting 'model'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chosen": "same", "rejected": "same"}, "bad.jsonl:1: 'chosen' equals 'rejected'"),
        ({"rejected": "   "}, "bad.jsonl:1: 'rejected' is empty"),
        ({"chosen": None}, "bad.jsonl:1: key 'chosen' is missing"),
        ({"chosen": 7}, "bad.jsonl:1: key 'chosen' must be text"),
        ({"image": "absent.png"}, "absent.png' does not exist"),
        ({"image": "0.png", "question": "<image> <image>"}, "2 <image> placeholders for 1 images"),
        ({"question": "long " * 500}, "no response fits below the limit of 900"),
        ({"chosen": "so " * 900 + "1", "rejected": "so " * 900 + "2"}, "are equal in the"),
    ],
)
def test_bad_rows_stop_the_run_before_training(world, tmp_path, capsys, changes, words):
    write_pair(world / "bad.jsonl", **changes)
    output = tmp_path / "run"
    assert train(world, output, "--data", f"{world / 'bad.jsonl'},{world / 'pairs.jsonl'}") == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in message
    assert "1 of 13 rows are unusable" in message
    rejects = [json.loads(line) for line in (tmp_path / "run.rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == 1
    assert rejects[0]["row"] == f"{world / 'bad.jsonl'}:1"
    assert words.removeprefix("bad.jsonl:1: ") in rejects[0]["reason"]
    assert not output.exists()


def test_a_folder_of_another_model_family_is_refused(world, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "blip"}')
    assert train(world, tmp_path / "run", "--model", str(tmp_path / "other")) == 2
    assert "model_type 'blip', expected one of 'internvl_chat'" in capsys.readouterr().err


def test_two_pairs_with_one_id_are_refused(world, tmp_path, capsys):
    write_pair(world / "bad.jsonl", id="7")
    write_pair(world / "worse.jsonl", id="7", chosen="something else")
    data = ",".join(str(world / name) for name in ("pairs.jsonl", "bad.jsonl", "worse.jsonl"))
    assert train(world, tmp_path / "run", "--data", data) == 2
    assert "worse.jsonl:1: id '7' is also that of" in capsys.readouterr().err


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
    from internvl_mpo.training import trainer

    sizes = []
    pack_groups = trainer.pack_groups
    monkeypatch.setattr(
        trainer, "pack_groups", lambda groups: sizes.append(pack_groups(groups).num_tokens) or pack_groups(groups)
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


# --- resume -----------------------------------------------------------------------------------------------------------


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
