"""What `train_mpo.py` refuses, by name and before work starts."""

import dataclasses
import gc
import importlib.util
import json
import os
import subprocess
import sys

import pytest
from test_train_mpo import ROOT, arguments, train, unbroken, world, write_pair  # noqa: F401 - fixtures among them

import train_mpo
from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.settings import write_settings
from internvl_mpo.training.first_look import look_at_rows, setting_keys
from internvl_mpo.training.settings import TrainSettings, check_trackers


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


def test_mlflow_that_is_not_installed_is_one_sentence_and_leaves_nothing_that_fails_later(monkeypatch):
    """Its callback fails in `__del__` if it never began, which Python reports as a second traceback."""
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "is_mlflow_available", lambda: False)
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with pytest.raises(BadInputError, match=r"report_to names 'mlflow': .*pip install") as refused:
        check_trackers(["mlflow"])
    assert "\n" not in str(refused.value)
    del refused
    gc.collect()
    assert unraisable == []


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
    with open(world / "bad.jsonl", "a", encoding="utf-8") as out:
        out.write('{"question": "q", "rejected": "r"}\n{"question": "q", "chosen": "c", "rejected": "r"}\n')
    code = (
        "import sys, train_mpo\n"
        "from internvl_mpo.errors import run_program\n"
        "print(run_program(train_mpo.main, sys.argv[1:]))\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
    )
    for words, sentence in (
        (("--betta", "1"), "unknown setting 'betta' (command line); did you mean 'beta'?"),
        (("--data", str(world / "bad.jsonl")), "bad.jsonl:1: 'rejected' is empty (2 of 3 rows are unusable, listed in"),
    ):
        command = [sys.executable, "-c", code, *arguments(world, tmp_path / "run", *words)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert result.stdout == "2\n"
        assert sentence in result.stderr
    rejects = [json.loads(line) for line in (tmp_path / "run.rejects.jsonl").read_text().splitlines()]
    assert [row["row"].rpartition(":")[2] for row in rejects] == ["1", "2"]


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
    look = look_at_rows([str(ROOT / "README.md")], seconds=-1)
    assert (len(look.unreadable), look.is_whole) == (1, False)  # one row is looked at in any case


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
