"""How the trainer evaluates, saves and goes on, method by method and without a model.

pytest tests/test_trainer_checkpoints.py
"""

import errno
import time
from types import SimpleNamespace

import pytest
import torch
import transformers
from test_trainer import MODEL, bare

from internvl_mpo.errors import BadInputError
from internvl_mpo.objective import RewardShift
from internvl_mpo.training import checkpoint
from internvl_mpo.training import trainer as module
from internvl_mpo.training.trainer import MPOTrainer


class Model:
    """A model that knows whether it trains."""

    training = True

    def eval(self):
        self.training = False

    def train(self, mode):
        self.training = mode


@pytest.mark.parametrize(("num_ranks", "asked"), [(1, "model"), (2, "model_wrapped")])
def test_an_evaluation_measures_in_evaluation_mode_logs_and_costs_training_no_speed(monkeypatch, num_ranks, asked):
    trainer, events = bare(world_size=num_ranks), []
    trainer.model, trainer.model_wrapped, trainer.last_log = Model(), Model(), 0.0
    used = getattr(trainer, asked)

    def rewards(model, accelerator, prefix):
        time.sleep(0.02)
        assert (model, accelerator, model.training) == (used, trainer.accelerator, False)
        events.append(prefix)
        return {f"{prefix}_nll": 1.0}

    trainer.held_out = SimpleNamespace(rewards=rewards)
    trainer.reference = SimpleNamespace(prepare_held_out=lambda: events.append("reference"))
    trainer._follow_start = lambda: events.append("start")
    trainer._answer_some = lambda prefix: {f"{prefix}_samples": float(not used.training)}
    trainer.log = lambda logs: events.append(logs)
    answer = SimpleNamespace()
    trainer.callback_handler = SimpleNamespace(on_evaluate=lambda *given: events.append(given) or answer)
    control = trainer.control
    metrics = trainer.evaluate()
    assert metrics == {"eval_nll": 1.0, "eval_samples": 1.0}
    assert events == ["start", "reference", "eval", metrics, (trainer.args, trainer.state, control, metrics)]
    assert trainer.control is answer
    assert used.training
    assert 0.02 <= trainer.last_log < 30
    used.training, trainer.reference = False, None
    trainer.evaluate(metric_key_prefix="test")
    assert (events[5], used.training) == ("test", False)


@pytest.mark.parametrize("is_first_rank", [True, False])
def test_answers_to_held_out_questions_are_kept_and_tracked_by_the_first_rank(tmp_path, monkeypatch, is_first_rank):
    trainer, sent = bare(output_dir=str(tmp_path)), []
    trainer.model, trainer.processing_class = MODEL, SimpleNamespace(tokenizer="tokenizer")
    trainer.is_world_process_zero = lambda: is_first_rank
    trainer.callback_handler = SimpleNamespace(callbacks=["tracker"])
    monkeypatch.setattr(module, "send_samples", lambda *given: sent.append(given))
    sample = {"num_tokens": 4, "finished": True, "repetition": 0.5, "step": 3}
    trainer.held_out = SimpleNamespace(answers=lambda *given: [sample] if given == (MODEL, "tokenizer", 3) else None)
    means = {"eval_samples/length": 4.0, "eval_samples/unfinished": 0.0, "eval_samples/repetition": 0.5}
    assert trainer._answer_some("eval") == means
    kept = tmp_path / "samples.jsonl"
    assert sent == ([(["tracker"], [sample], 3)] if is_first_rank else [])
    assert kept.exists() == is_first_rank
    trainer.held_out = SimpleNamespace(answers=lambda *given: [])
    assert trainer._answer_some("eval") == {}
    assert len(sent) == is_first_rank


STATE = {"global_step": 3, "reward_shift": RewardShift("previous").state_dict(), "fingerprint": {"seed": "1"},
         "engine": "no DeepSpeed", "num_ranks": 2, "steps_per_epoch": 7}  # fmt: skip


def saving(folder, monkeypatch, *, should_save: bool = True, fails: BaseException | None = None) -> MPOTrainer:
    """A trainer whose part of transformers writes one file, or breaks off."""
    trainer = bare("previous", output_dir=str(folder), should_save=should_save, save_total_limit=2)
    trainer.fingerprint = {"seed": "1"}
    trainer.state.best_model_checkpoint = None
    trainer.accelerator.wait_for_everyone = lambda: None
    trainer.pairs = SimpleNamespace(sampler=lambda args: SimpleNamespace(num_steps=7))
    monkeypatch.setattr(module, "engine_name", lambda args: "no DeepSpeed")

    def save(self, model, trial):
        assert (model, trial, self.args.save_total_limit) == (MODEL, "trial", None)  # it may not delete by itself
        path = folder / f"checkpoint-{self.state.global_step}"
        assert not path.exists()  # one of an earlier try is gone
        path.mkdir(parents=True)
        (path / "model.safetensors").write_bytes(b"weights")
        if fails is not None:
            raise fails

    monkeypatch.setattr(transformers.Trainer, "_save_checkpoint", save)
    return trainer


def test_a_checkpoint_is_marked_when_it_is_whole_and_older_ones_go_after_it(tmp_path, monkeypatch):
    trainer = saving(tmp_path, monkeypatch)
    for step in (1, 2, 3):
        trainer.state.global_step = step
        trainer._save_checkpoint(MODEL, "trial")
        trainer.state.best_model_checkpoint = trainer.state.best_model_checkpoint or str(tmp_path / "checkpoint-1")
    assert [path.name for path in checkpoint.whole_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-3"]
    assert checkpoint.read_state(tmp_path / "checkpoint-3") == STATE
    assert trainer.args.save_total_limit == 2
    trainer._save_checkpoint(MODEL, "trial")  # once more, over the one that is there
    trainer.check_resumable(tmp_path / "checkpoint-3")
    trainer.fingerprint = {"seed": "2"}
    with pytest.raises(BadInputError, match="another seed"):
        trainer.check_resumable(tmp_path / "checkpoint-3")


def test_only_the_rank_that_saves_marks_and_deletes(tmp_path, monkeypatch):
    trainer = saving(tmp_path, monkeypatch, should_save=False)
    trainer._save_checkpoint(MODEL, "trial")
    assert checkpoint.whole_checkpoints(tmp_path) == []
    with pytest.raises(AssertionError):  # and it does not make way for what the first rank writes
        trainer._save_checkpoint(MODEL, "trial")


@pytest.mark.parametrize("should_save", [True, False])
def test_ranks_wait_for_each_other_before_writing_before_the_mark_and_after_it(tmp_path, monkeypatch, should_save):
    trainer, seen = saving(tmp_path, monkeypatch, should_save=should_save), []
    folder = tmp_path / "checkpoint-3"
    monkeypatch.setattr(module, "MovingReference", SimpleNamespace)
    trainer.live = SimpleNamespace(save=lambda folder: (folder / "moving").touch())
    trainer.accelerator.wait_for_everyone = lambda: seen.append(
        [path.name for path in sorted(folder.glob("*"))] if folder.exists() else None
    )
    trainer._save_checkpoint(MODEL, "trial")
    written = ["model.safetensors", "moving"] if should_save else ["model.safetensors"]
    assert seen == [None, written, sorted([*written, *(["mpo_state.json"] if should_save else [])])]


@pytest.mark.parametrize(("fsdp", "should_save"), [("full_shard", True), ("full_shard", False), ("", True)])
def test_under_fsdp_the_folder_of_a_checkpoint_is_there_before_transformers_looks_for_it(
    tmp_path, monkeypatch, fsdp, should_save
):
    trainer, seen = saving(tmp_path / "run", monkeypatch, should_save=should_save), []
    monkeypatch.setattr(module, "uses_fsdp", lambda args: bool(fsdp))

    def save(self, model, trial):
        seen.append((tmp_path / "run" / "checkpoint-3").is_dir())
        (tmp_path / "run" / "checkpoint-3").mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(transformers.Trainer, "_save_checkpoint", save)
    for _ in range(2):
        trainer._write_checkpoint(tmp_path / "run" / "checkpoint-3", MODEL, "trial")
    assert seen == [bool(fsdp) and should_save, True]


def test_a_checkpoint_that_fills_the_disk_goes_and_what_is_whole_is_named(tmp_path, monkeypatch):
    trainer = saving(tmp_path, monkeypatch, fails=OSError(errno.ENOSPC, "No space left on device"))
    write = checkpoint.write_state
    (tmp_path / "checkpoint-2").mkdir()
    write(tmp_path / "checkpoint-2", STATE)
    with pytest.raises(BadInputError, match="checkpoint-2 before it is whole"):
        trainer._save_checkpoint(MODEL, "trial")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert trainer.args.save_total_limit == 2


def test_a_moving_reference_is_saved_and_loaded_with_its_checkpoint(tmp_path, monkeypatch):
    class Moving:
        def __init__(self):
            self.calls = []

        def save(self, folder):
            self.calls.append(("save", str(folder), checkpoint.is_whole(folder)))

        def load(self, folder):
            self.calls.append(("load", folder))

    monkeypatch.setattr(module, "MovingReference", Moving)
    monkeypatch.setattr(transformers.Trainer, "_load_optimizer_and_scheduler", lambda self, folder: None)
    trainer = saving(tmp_path, monkeypatch)
    trainer.live = Moving()
    trainer.shift.update(torch.tensor([6.0, 2.0]))
    trainer._save_checkpoint(MODEL, "trial")
    folder = str(tmp_path / "checkpoint-3")
    resumed = saving(tmp_path, monkeypatch)
    resumed._load_optimizer_and_scheduler(None)
    assert resumed.shift.value == 0.0
    resumed.live = Moving()
    resumed._load_optimizer_and_scheduler(folder)
    assert resumed.shift.value == 3.0
    assert trainer.live.calls + resumed.live.calls == [("save", folder, False), ("load", folder)]
    resumed = saving(tmp_path, monkeypatch)
    resumed._load_optimizer_and_scheduler(folder)  # nothing moves in this run
    assert resumed.shift.value == 3.0


@pytest.mark.parametrize("has_adapters", [True, False])
def test_weights_are_saved_under_the_names_that_transformers_resumes_by(tmp_path, has_adapters):
    saved = []
    model = SimpleNamespace(save_pretrained=lambda folder, **more: saved.append((folder, more)))
    if has_adapters:
        model.peft_config = {}
    trainer = bare(should_save=True, output_dir=str(tmp_path / "run"))
    trainer.model, trainer.processing_class = (
        model,
        SimpleNamespace(save_pretrained=lambda folder: saved.append(folder)),
    )
    there = tmp_path / "a" / "folder" / "there"
    trainer._save(str(there), state_dict={"a": 1})
    assert there.is_dir()
    names = {} if has_adapters else {"save_original_format": False}
    assert saved == [(there, {"state_dict": {"a": 1}, **names}), there]
    for _ in range(2):  # the folder may be there
        trainer._save()
    assert saved[3] == tmp_path / "run"
    trainer.args.should_save = False
    trainer._save(str(tmp_path / "other"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "run"]
