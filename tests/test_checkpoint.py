"""Checkpoint folders by themselves: which are whole, whose they are, which a run may go on from.

pytest tests/test_checkpoint.py
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from internvl_mpo.errors import BadInputError
from internvl_mpo.locks import held
from internvl_mpo.training import checkpoint
from internvl_mpo.training.checkpoint import STATE_FILE, check_resumable, find_checkpoint, write_state

STATE = {"fingerprint": {"seed": 1, "data": "d"}, "engine": "no DeepSpeed", "num_ranks": 2, "steps_per_epoch": 9}


def make(folder: Path, step: int, state: dict | None = None) -> Path:
    """A checkpoint folder; without a state it is half-written."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"weights")
    if state is not None:
        write_state(path, state)
    return path


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_the_newest_checkpoint_is_that_of_the_highest_step_and_not_of_the_last_name(tmp_path):
    for step in (10, 9, 2):
        make(tmp_path, step, STATE)
    make(tmp_path, 11)
    (tmp_path / "checkpoint-best").mkdir()
    assert names(checkpoint.whole_checkpoints(tmp_path)) == ["checkpoint-2", "checkpoint-9", "checkpoint-10"]
    assert find_checkpoint("auto", tmp_path) == tmp_path / "checkpoint-10"
    assert checkpoint.remove_half_written(tmp_path) == ["checkpoint-11"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("checkpoint-10", "checkpoint-2", "checkpoint-9", "checkpoint-best")
    ]


def test_a_new_run_starts_anew_and_never_beside_an_earlier_one(tmp_path):
    assert find_checkpoint("auto", tmp_path) is None
    assert find_checkpoint("never", tmp_path) is None
    make(tmp_path, 4)
    assert find_checkpoint("never", tmp_path) is None
    make(tmp_path, 3, STATE)
    with pytest.raises(BadInputError, match=r"resume is 'never', but .* holds checkpoint-3"):
        find_checkpoint("never", tmp_path)


def test_a_checkpoint_given_by_hand_must_be_a_whole_one(tmp_path):
    whole, half = make(tmp_path, 3, STATE), make(tmp_path, 4)
    assert find_checkpoint(str(whole), tmp_path / "elsewhere") == whole
    with pytest.raises(BadInputError, match=r"checkpoint-4 is not a whole checkpoint: mpo_state\.json is missing"):
        find_checkpoint(str(half), tmp_path)
    with pytest.raises(BadInputError, match=r"'.*checkpoint-5' does not exist; resume takes auto, never or"):
        find_checkpoint(str(tmp_path / "checkpoint-5"), tmp_path)
    (half / STATE_FILE).write_text('{"global_step": ')
    with pytest.raises(BadInputError, match="missing or damaged"):
        checkpoint.read_state(half)


def test_a_state_can_be_read_by_a_person(tmp_path):
    path = make(tmp_path, 1, STATE)
    assert checkpoint.read_state(path) == STATE
    assert '\n  "num_ranks": 2,\n' in (path / STATE_FILE).read_text()


@pytest.mark.parametrize("name", ["log.jsonl", "samples.jsonl", "checkpoint-7"])
def test_a_folder_of_another_program_is_not_taken_for_a_run(tmp_path, name):
    checkpoint.check_run_folder(tmp_path / "new")
    checkpoint.check_run_folder(tmp_path)
    (tmp_path / name).mkdir()
    with pytest.raises(BadInputError, match=f"holds {name}, but no settings.yaml"):
        checkpoint.check_run_folder(tmp_path)
    (tmp_path / "settings.yaml").write_text("")
    checkpoint.check_run_folder(tmp_path)
    with pytest.raises(BadInputError, match="is a file; give a folder"):
        checkpoint.check_run_folder(tmp_path / "settings.yaml")


def test_a_whole_checkpoint_is_no_sign_of_another_program(tmp_path):
    make(tmp_path, 7, STATE)
    checkpoint.check_run_folder(tmp_path)


def test_a_run_holds_its_folder_and_clears_what_a_killed_one_left(tmp_path, capsys):
    run, result = tmp_path / "run", tmp_path / "results" / "model"
    make(run, 5)
    make(run, 4, STATE)
    (result.parent / ".model.part").mkdir(parents=True)
    left = run / f".log.jsonl.{os.uname().nodename.replace('.', '-')}.999999999.part"
    left.write_text("half")
    with checkpoint.run_folder(run, [result, tmp_path / "not there"]):
        assert names(sorted(run.iterdir())) == ["checkpoint-4"]
        assert list(result.parent.iterdir()) == []
        with pytest.raises(BadInputError, match="another training is writing"), checkpoint.run_folder(run):
            pass
    assert "checkpoint-5 is half-written and was removed" in capsys.readouterr().out
    with held(tmp_path / ".run.lock", "nobody holds it any more"):
        pass


def test_a_folder_that_does_not_exist_is_held_and_not_made(tmp_path):
    with checkpoint.run_folder(tmp_path / "run"):
        assert names(list(tmp_path.iterdir())) == [".run.lock"]


def test_a_kill_while_a_checkpoint_is_deleted_leaves_a_half_one(tmp_path, monkeypatch):
    path = make(tmp_path, 1, STATE)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        checkpoint.make_way(path)
    assert path.is_dir()
    assert not checkpoint.is_whole(path)
    checkpoint.make_way(path)
    checkpoint.make_way(path)  # one that is not there is no harm
    assert not path.exists()


def test_rotation_goes_by_the_time_of_writing_and_not_by_the_step(tmp_path):
    """A run that went back to checkpoint 2 and on from there writes 3 again, after a 4 that it no longer stands for."""
    for when, step in enumerate((1, 4, 2, 3), start=1):
        os.utime(make(tmp_path, step, STATE) / STATE_FILE, ns=(when, when))
    half = make(tmp_path, 5)
    checkpoint.rotate(tmp_path, 2)
    assert names(checkpoint.whole_checkpoints(tmp_path)) == ["checkpoint-2", "checkpoint-3"]
    assert half.is_dir()
    checkpoint.rotate(tmp_path, 1, best=tmp_path / "checkpoint-9")  # a best one that is gone
    assert names(checkpoint.whole_checkpoints(tmp_path)) == ["checkpoint-3"]


def test_what_a_checkpoint_does_not_say_is_named_and_what_it_says_counts_more_than_what_is_assumed(tmp_path):
    path = make(tmp_path, 1, {"fingerprint": {"a": 1, "b": 2}})
    assert checkpoint.check_fingerprint(path, {"a": 1, "c": 3, "d": 4}, {"d": 4, "a": 7}) == ["c"]
    with pytest.raises(BadInputError, match=r"another b \(2, now 3\)"):
        checkpoint.check_fingerprint(path, {"a": 1, "b": 3})
    with pytest.raises(BadInputError, match=r"another d \(4, now 5\)"):
        checkpoint.check_fingerprint(path, {"d": 5}, {"d": 4})


@pytest.mark.parametrize(
    ("saved", "now", "words"),
    [
        ({}, {}, None),
        ({}, {"num_ranks": 4}, None),  # without DeepSpeed whole optimizers are saved
        ({}, {"fingerprint": {"seed": 2, "data": "d"}}, r"another seed \(1, now 2\)"),
        ({}, {"engine": "ZeRO-2"}, "made with no DeepSpeed, now it is ZeRO-2, which cannot read its optimizer"),
        ({"engine": "ZeRO-2"}, {}, "made with ZeRO-2, now it is no DeepSpeed"),
        ({"engine": "ZeRO-2"}, {"engine": "ZeRO-2"}, None),
        ({"engine": "ZeRO-2"}, {"engine": "ZeRO-2", "num_ranks": 4}, None),  # cut anew before it is read
        ({}, {"num_ranks": 4, "steps_per_epoch": 8}, "counts 9 steps an epoch, 4 ranks would make it 8"),
    ],
)
def test_a_run_goes_on_from_what_it_can_read_exactly(tmp_path, saved, now, words):
    path = make(tmp_path, 1, STATE | saved)
    if words is None:
        check_resumable(path, STATE | now)
        return
    with pytest.raises(BadInputError, match=words):
        check_resumable(path, STATE | now)


def test_the_way_out_of_a_checkpoint_is_a_model_that_can_be_loaded(tmp_path):
    path = make(tmp_path, 1, STATE)
    other = STATE | {"engine": "ZeRO-2"}
    with pytest.raises(BadInputError, match=f"--model {path} and another output_dir"):
        check_resumable(path, other)
    (path / "adapter_config.json").write_text(json.dumps({}))
    with pytest.raises(BadInputError, match="a new run cannot start from adapters alone"):
        check_resumable(path, other)
