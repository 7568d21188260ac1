"""What follows a step: checkpoints by the clock and by signals, a reference that moves, the last evaluation, the bar.

pytest tests/test_after_steps.py
"""

import json
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from internvl_mpo.errors import StoppedError
from internvl_mpo.training import callbacks, signals, stopping
from internvl_mpo.training.arguments import MPOArguments
from internvl_mpo.training.callbacks import (
    ConsoleCallback,
    EvaluateAtTheEnd,
    MoveReference,
    NoInputGradients,
    first_loss_line,
)
from internvl_mpo.training.checkpoint import write_state
from internvl_mpo.training.signals import StopSignals, keep_from_signals
from internvl_mpo.training.stopping import StopOrSave

# --- checkpoints and signals ------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now.seconds)
    return now


def run(tmp_path, **more) -> tuple[SimpleNamespace, SimpleNamespace, SimpleNamespace]:
    """Settings, state and control of a run."""
    args = {"save_minutes": None, "world_size": 1, "load_best_model_at_end": True, "output_dir": str(tmp_path)}
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    return SimpleNamespace(**{**args, **more}), SimpleNamespace(global_step=5), control


@pytest.mark.parametrize("save_minutes", [2.0, None])
def test_a_checkpoint_is_written_when_its_minutes_have_passed_since_the_last(tmp_path, clock, save_minutes):
    callback = StopOrSave(StopSignals())
    args, state, control = run(tmp_path, save_minutes=save_minutes)
    clock.seconds += 1000
    callback.on_train_begin(args, state, control)  # what came before does not count
    for seconds, is_time in ((119, False), (1, True), (1, True)):
        clock.seconds += seconds
        control.should_save = False
        callback.on_step_end(args, state, control)
        assert control.should_save == (is_time and save_minutes is not None)
    callback.on_save(args, state, control)
    clock.seconds += 119
    control.should_save = False
    callback.on_step_end(args, state, control)
    assert (control.should_save, control.should_training_stop, callback.stopped_at) == (False, False, None)
    control.should_save = True  # transformers wants one anyway
    callback.on_step_end(args, state, control)
    assert control.should_save


def test_a_signal_saves_and_stops_after_its_step(tmp_path):
    callback = StopOrSave(StopSignals())
    args, state, control = run(tmp_path)
    callback.on_step_end(args, state, control)
    assert not control.should_save
    assert not callback.is_wanted(args)
    callback.signals.received = "SIGTERM"
    callback.on_step_end(args, state, control)
    assert (control.should_save, control.should_training_stop, callback.stopped_at) == (True, True, 5)
    assert not args.load_best_model_at_end, "a run that is not over has no best checkpoint yet"
    assert callback.is_wanted(args)
    folder = f"{tmp_path}/checkpoint-5"
    assert callback.message(str(tmp_path)).startswith(f"stopped by SIGTERM after step 5; {folder} is whole")
    callback.stopped_at, callback.signals.received = 0, None
    assert callback.message("run").startswith("stopped by a signal to another rank before step 1; finished work")


def test_a_signal_while_a_checkpoint_is_written_begins_no_other_step(tmp_path):
    callback = StopOrSave(StopSignals())
    args, state, control = run(tmp_path)
    callback.on_save(args, state, control)
    assert (control.should_training_stop, callback.stopped_at) == (False, None)
    callback.signals.received = "SIGTERM"
    callback.on_save(args, state, control)
    assert (control.should_training_stop, callback.stopped_at) == (True, 5)


@pytest.mark.parametrize(("step", "is_there", "saves"), [(5, False, True), (5, True, False), (0, False, False)])
def test_a_stop_before_a_step_saves_the_one_before_unless_that_was_done(tmp_path, step, is_there, saves):
    callback = StopOrSave(StopSignals())
    args, state, control = run(tmp_path)
    state.global_step = step
    for number in {step - 1, step + 1, *([step] if is_there else [])}:
        (tmp_path / f"checkpoint-{number}").mkdir()
        write_state(tmp_path / f"checkpoint-{number}", {})
    callback.stop_between_steps(args, state, control)
    assert (control.should_save, control.should_training_stop) == (saves, True)
    assert (callback.stopped_at, args.load_best_model_at_end) == (step, False)


@pytest.mark.parametrize("of_another", [(1, 0), (0, 1), (0, 0)])
def test_ranks_do_what_any_of_them_wants(tmp_path, monkeypatch, of_another):
    def all_reduce(box, op):
        assert (op, box.dtype) == (torch.distributed.ReduceOp.MAX, torch.int32)  # no engine adds up truth values alike
        box.copy_(torch.maximum(box, torch.tensor(of_another[: len(box)], dtype=box.dtype)))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    callback = StopOrSave(StopSignals())
    args, state, control = run(tmp_path, world_size=2, device="cpu")
    callback.on_step_end(args, state, control)
    assert (control.should_training_stop, control.should_save) == (bool(of_another[0]), any(of_another))
    assert callback.is_wanted(args) is bool(of_another[0])


def test_signals_wait_for_the_end_of_a_step_between_the_first_and_the_last(tmp_path):
    callback = StopOrSave(StopSignals())
    assert not callback.signals.deferred
    callback.on_train_begin(*run(tmp_path))
    assert callback.signals.deferred
    callback.on_train_end(*run(tmp_path))
    assert not callback.signals.deferred


def test_both_signals_are_caught_inside_the_block_and_given_back_after_it():
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    with StopSignals() as caught:
        assert [signal.getsignal(number) for number in numbers] == [caught._handle] * 2
        for number in numbers:
            caught.received = None
            with pytest.raises(StoppedError, match=f"stopped by {number.name}; finished work is kept"):
                os.kill(os.getpid(), number)
            assert caught.received == number.name
    assert [signal.getsignal(number) for number in numbers] == before
    thread = threading.Thread(target=lambda: StopSignals().__enter__())  # Python would refuse there
    thread.start()
    thread.join()
    assert [signal.getsignal(number) for number in numbers] == before


def test_what_a_second_signal_does_depends_on_its_kind_and_its_time(monkeypatch):
    now = SimpleNamespace(seconds=50.0)
    monkeypatch.setattr(signals.time, "monotonic", lambda: now.seconds)
    caught = StopSignals()
    caught.deferred = True
    caught._handle(signal.SIGTERM, None)
    now.seconds += 0.9  # terminal and launcher both send it
    caught._handle(signal.SIGINT, None)
    now.seconds += 100
    caught._handle(signal.SIGTERM, None)  # a launcher that insists
    assert caught.received == "SIGTERM"
    with pytest.raises(StoppedError, match="stopped by SIGTERM"):
        caught._handle(signal.SIGINT, None)
    early = StopSignals()
    with pytest.raises(StoppedError):
        early._handle(signal.SIGTERM, None)
    early._handle(signal.SIGTERM, None)  # while it ends
    now.seconds += 1.0
    with pytest.raises(StoppedError):
        early._handle(signal.SIGINT, None)


def test_a_worker_leaves_signals_to_the_process_that_started_it(monkeypatch):
    caught = StopSignals()
    caught.process += 1
    caught._handle(signal.SIGTERM, None)
    assert caught.received is None
    set_to = []
    monkeypatch.setattr(signals.signal, "signal", lambda *given: set_to.append(given))
    keep_from_signals(0)
    assert set(set_to) == {(signal.SIGTERM, signal.SIG_IGN), (signal.SIGINT, signal.SIG_IGN)}


@pytest.mark.parametrize("launched", [True, False])
def test_a_rank_whose_launcher_is_gone_stops(monkeypatch, launched):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "0")
    caught = StopSignals()
    assert not caught.wants_to_stop()
    caught.launcher += 1
    assert caught.wants_to_stop() is launched
    assert caught.received == ("the end of its launcher" if launched else None)
    caught.received = "SIGTERM"
    assert caught.wants_to_stop()
    assert caught.received == "SIGTERM"


# --- callbacks --------------------------------------------------------------------------------------------------------


def test_a_reference_moves_every_so_many_steps():
    moves = []
    reference = SimpleNamespace(start=lambda: moves.append("start"), move=lambda: moves.append(state.global_step))
    callback, state = MoveReference(reference), SimpleNamespace(global_step=0)
    args = SimpleNamespace(reference_sync_steps=3)
    callback.on_train_begin(args, state, None)
    for state.global_step in range(1, 8):
        callback.on_step_end(args, state, None)
    assert moves == ["start", 3, 6]


@pytest.mark.parametrize(
    ("kwargs", "taken_back"), [(None, 1), ({}, 1), ({"use_reentrant": False}, 1), ({"use_reentrant": True}, 0)]
)
def test_gradients_of_embeddings_stay_where_the_reentrant_form_needs_them(monkeypatch, kwargs, taken_back):
    models = []
    monkeypatch.setattr(callbacks, "no_input_gradients", models.append)
    args = SimpleNamespace(gradient_checkpointing_kwargs=kwargs)
    NoInputGradients().on_train_begin(args, None, None, model="model")
    assert models == ["model"] * taken_back


def test_an_evaluation_follows_the_last_step_alone():
    asked = []
    for step in (8, 9, 10):
        control = SimpleNamespace(should_evaluate=False)
        EvaluateAtTheEnd().on_step_end(None, SimpleNamespace(global_step=step, max_steps=9), control)
        asked.append(control.should_evaluate)
    assert asked == [False, True, True]


class Bar:
    """A progress bar that remembers."""

    def __init__(self, **given):
        self.given, self.lines, self.shown, self.count, self.is_open = given, [], [], 0, True
        self.write, self.set_postfix = self.lines.append, self.shown.append

    def update(self, count):
        self.count += count

    def close(self):
        self.is_open = False


LOGS = {"loss": 1.8, "rewards/accuracy": 0.5, "rewards/margin": 0.25, "loss_generation": 1.0,
        "loss_preference": 0.6931, "loss_quality": 1.3863, "rewards/chosen": 0.0, "rewards/rejected": 0.0,
        "reward_shift": 0.0}  # fmt: skip


def console(tmp_path, monkeypatch, step: int = 0, **more) -> tuple[ConsoleCallback, MPOArguments, SimpleNamespace]:
    monkeypatch.setattr("tqdm.tqdm", Bar)
    args = MPOArguments(output_dir=str(tmp_path), use_cpu=True)
    state = SimpleNamespace(global_step=step, max_steps=9, is_world_process_zero=True, **more)
    return ConsoleCallback(tmp_path), args, state


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_console_shows_each_step_and_keeps_its_line(tmp_path, monkeypatch):
    callback, args, state = console(tmp_path, monkeypatch)
    callback.on_train_begin(args, state, None)
    bar = callback.bar
    assert (bar.given["total"], bar.given["initial"]) == (9, 0)
    monkeypatch.setattr(callbacks, "first_loss_line", lambda args, logs: f"first loss {logs['loss']}")
    later = LOGS | {"loss": 1.7}
    for state.global_step, logs in ((1, LOGS), (2, later)):
        callback.on_log(args, state, None, logs=dict(logs))
        callback.on_step_end(args, state, None)
    callback.on_log(args, state, None, logs={"eval_nll": 2.0})
    for nothing in ({}, None):
        callback.on_log(args, state, None, logs=nothing)
    assert lines(tmp_path / "log.jsonl") == [{"step": 1, **LOGS}, {"step": 2, **later}, {"step": 2, "eval_nll": 2.0}]
    assert bar.lines == ["first loss 1.8"]
    shown = {"loss": "1.800", "accuracy": "0.50", "margin": "+0.25"}
    assert bar.shown == [shown, shown | {"loss": "1.700"}]
    assert bar.count == 2
    callback.on_train_end(args, state, None)
    assert (bar.is_open, callback.bar) == (False, None)
    callback.close()
    callback.on_step_end(args, state, None)
    callback.on_log(args, state, None, logs={"loss": 1.0})  # after the end, as the best model is evaluated


def test_warnings_are_shown_and_kept_beside_their_line(tmp_path, monkeypatch, capsys):
    callback, args, state = console(tmp_path, monkeypatch, step=4)
    callback.on_log(args, state, None, logs={"eval_samples/repetition": 0.1})
    callback.on_log(args, state, None, logs={"eval_samples/repetition": 0.9})
    (warning,) = [row["warning"] for row in lines(tmp_path / "log.jsonl") if "warning" in row]
    assert capsys.readouterr().out == f"warning, {warning}\n"
    callback.on_train_begin(args, state, None)
    assert lines(tmp_path / "log.jsonl")[-1] == {"step": 4, "warning": warning}
    assert callback.watch.look(4, {"eval_samples/repetition": 0.95}) == []  # it was said before
    monkeypatch.setattr(callback.watch, "look", lambda step, logs: ["a warning"])
    callback.on_log(args, state, None, logs={"eval_samples/repetition": 0.9})
    assert callback.bar.lines == ["warning, a warning"]


def test_a_run_that_goes_on_drops_the_lines_of_steps_it_repeats(tmp_path, monkeypatch):
    for name in ("log.jsonl", "samples.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)))
    callback, args, state = console(tmp_path, monkeypatch, step=2)
    state.is_world_process_zero = False
    callback.on_train_begin(args, state, None)
    callback.on_log(args, state, None, logs={"loss": 1.0})
    assert callback.bar is None
    assert [row["step"] for row in lines(tmp_path / "log.jsonl")] == [1, 2, 3]  # another rank writes
    state.is_world_process_zero = True
    callback.on_train_begin(args, state, None)
    assert callback.bar.given["initial"] == 2
    for name in ("log.jsonl", "samples.jsonl"):
        assert [row["step"] for row in lines(tmp_path / name)] == [1, 2]


def test_what_counts_as_equal_rewards_is_known_from_the_start(tmp_path, monkeypatch):
    callback, args, state = console(tmp_path, monkeypatch)
    args.bf16 = True
    callback.on_train_begin(args, state, None)
    assert callback.watch.noise == callbacks.rounding_noise(args) != callbacks.Watch().noise


@pytest.mark.parametrize(
    ("loss", "says"), [(1.8318, False), (1.8318 + 0.035, False), (1.8318 + 0.04, True), (1.8318 - 0.04, True)]
)
def test_a_first_loss_that_two_models_would_give_is_told_from_rounding(tmp_path, monkeypatch, loss, says):
    _, args, _ = console(tmp_path, monkeypatch)
    line = first_loss_line(args, LOGS | {"loss": loss})
    assert line.startswith(f"step 1: loss {loss:.4f}, expected 1.8318 = ")
    assert ("policy and reference are not the same model here" in line) is says
    if says:
        assert f"they differ by {loss - 1.8318:+.4f}" in line
    for name, value in (("loss_preference", 0.6931), ("loss_quality", 1.3863), ("rewards/chosen", 0.0)):
        assert f"\n  {name} {LOGS[name]:.4f}, expected {value:.4f}" in line
    args.wpo = True
    words = "the weights of the pairs depend on the start model, so it has no fixed value"
    assert first_loss_line(args, LOGS) == f"step 1: loss 1.8000; {words}"
    args.wpo, args.preference = False, "orpo"
    line = first_loss_line(args, LOGS)
    assert line.startswith("step 1: loss 1.8000; orpo depends on the start model alone, so it has no fixed value\n")
    assert "\n  loss_quality 1.3863, expected 1.3863" in line and "loss_preference" not in line
    args.preference = args.quality = "none"
    words = "1 * NLL of the chosen responses (1.0000) (policy = reference)"
    assert first_loss_line(args, LOGS | {"loss": 1.0}) == f"step 1: loss 1.0000, expected 1.0000 = {words}"
    small = first_loss_line(args, LOGS | {"loss": 0.315, "loss_generation": 0.3})
    assert small.startswith("step 1: loss 0.3150, expected 0.3000") and "not the same model" not in small
    args.reference_model = "another"
    words = "policy and reference_model are two, so it has no fixed value"
    assert first_loss_line(args, LOGS) == f"step 1: loss 1.8000; {words}"
