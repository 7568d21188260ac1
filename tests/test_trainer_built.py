"""The trainer as a whole, built around a tiny model: what reaches which part, and two steps against a plain loop.

pytest tests/test_trainer_built.py
"""

import functools
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from test_trainer import bare
from tiny import tiny_model, tiny_processor
from tiny_world import make_training_pairs
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from internvl_mpo.logps import attach_scoring, score_pairs
from internvl_mpo.objective import mpo_loss
from internvl_mpo.packing import pack_groups
from internvl_mpo.training import trainer as module
from internvl_mpo.training.arguments import MPOArguments
from internvl_mpo.training.callbacks import EvaluateAtTheEnd, MoveReference, NoInputGradients
from internvl_mpo.training.live_reference import AdapterOff, MovingReference
from internvl_mpo.training.pairs import TrainingPairs
from internvl_mpo.training.preflight import Preflight
from internvl_mpo.training.reference_cache import ReferenceCache
from internvl_mpo.training.reference_pass import ReferencePass
from internvl_mpo.training.signals import StopSignals, keep_from_signals
from internvl_mpo.training.stopping import StopOrSave
from internvl_mpo.training.trainer import MPOTrainer

STOPPING, REFERENCE = StopOrSave(StopSignals()), SimpleNamespace()
SMALL = {"max_tiles": 4, "max_length": 900, "max_tokens_per_pack": 700, "pairs_per_step": 4, "beta": 0.5}
PLAIN = {"optim": "sgd", "learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0,
         "max_grad_norm": 0.0, "gradient_accumulation_steps": 2, "max_steps": 2, "save_strategy": "no",
         "num_eval_samples": 0}  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> TrainingPairs:
    """Twelve pairs, three of each question."""
    folder = tmp_path_factory.mktemp("pairs")
    data = [make_training_pairs(folder)]
    table = Preflight(tiny_processor(), folder / "found", data, max_tiles=4, max_length=900, num_workers=0).run()
    return TrainingPairs(table, np.arange(12), np.ones(12, np.int32))


def settings(folder: Path, **more) -> MPOArguments:
    return MPOArguments(output_dir=str(folder / "run"), use_cpu=True, report_to=[], **{**SMALL, **more})


def as_rank(args: MPOArguments, rank: int, num_ranks: int) -> MPOArguments:
    """Settings of one of several ranks."""
    kind = type(args)
    parts = {"world_size": property(lambda self: num_ranks), "process_index": property(lambda self: rank)}
    args.__class__ = type(kind.__name__, (kind,), parts)
    return args


class Adapters(torch.nn.Module):
    """What counts as a model with adapters."""

    def disable_adapter(self):
        raise AssertionError


@pytest.fixture
def built(pairs, tmp_path, monkeypatch):
    """Builds a trainer whose part of transformers only notes what it is given."""

    def build(reference=REFERENCE, model=None, held_out=0, args=None, **more):
        def note(self, **given):
            self.given, self.eval_dataset = given, given["eval_dataset"]
            self.added, self.popped, self.model_accepts_loss_kwargs = [], [], False
            self.add_callback, self.pop_callback = self.added.append, self.popped.append

        monkeypatch.setattr(transformers.Trainer, "__init__", note)
        monkeypatch.setattr(module, "apply_speed_settings", lambda *given: seen.append(given))
        seen = []
        model = Adapters() if model is None else model
        args = args or settings(tmp_path, **more.pop("settings", {}))
        border = 12 - (held_out or 0)
        first, last = pairs.select(np.arange(border)), pairs.select(np.arange(border, 12))
        trainer = MPOTrainer(
            model, args, processor="processor", pairs=first, reference=reference, stopping=STOPPING,
            held_out=last if held_out is not None else None, **more,
        )  # fmt: skip
        assert seen == [(model, args)]
        return trainer

    return build


def test_what_a_trainer_is_given_reaches_its_parts(built, tmp_path):
    reference, fingerprint = SimpleNamespace(), {"seed": "1"}
    trainer = built(
        reference, fingerprint=fingerprint, held_out=3,
        settings={"reward_shift": "ema", "reward_shift_momentum": 0.5, "max_tiles": 3, "max_length": 800},
    )  # fmt: skip
    fingerprint["seed"] = "2"
    assert (trainer.fingerprint, built().fingerprint) == ({"seed": "1"}, {})
    assert (trainer.reference, trainer.stopping, len(trainer.pairs)) == (reference, STOPPING, 9)
    assert (trainer.shift.mode, trainer.shift.momentum, trainer.shift.value) == ("ema", 0.5, 0.0)
    assert (trainer.step_rewards, trainer.step_packs, trainer.sums.count) == ([], [], 0)
    assert 0 <= time.perf_counter() - trainer.last_log < 30
    given = trainer.given
    for dataset, members in ((given["train_dataset"], range(9)), (given["eval_dataset"], range(9, 12))):
        assert [row.pair.chosen for row in dataset.rows] == [f"A colour, {n}." * (1 + n % 3) for n in members]
        assert (dataset.processor, dataset.max_tiles, dataset.max_length) == ("processor", 3, 800)
        assert dataset.token_weights == given["args"].token_weights
    held_out = trainer.held_out
    assert (held_out.dataset, held_out.args, held_out.collate) == (given["eval_dataset"], given["args"], pack_groups)
    assert (len(held_out.pairs), held_out.reference_logps) == (3, trainer._reference_logps)
    assert (given["processing_class"], given["data_collator"]) == ("processor", pack_groups)
    assert isinstance(given["model"], Adapters)
    assert trainer.model_accepts_loss_kwargs, "or transformers would divide the loss by the packs of a step"
    for nothing in (0, None):
        trainer = built(held_out=nothing)
        assert (trainer.given["eval_dataset"], trainer.held_out) == (None, None)


@pytest.mark.parametrize(
    ("terms", "compares"),
    [(("orpo", "none"), False), (("none", "bco"), True), (("dpo", "none"), True), (("none", "none"), False)],
)
def test_a_reference_is_asked_where_a_term_compares_with_it(built, terms, compares):
    assert built(settings=dict(zip(("preference", "quality"), terms, strict=True))).compares is compares


def test_callbacks_come_in_their_order_and_bars_of_transformers_go(built):
    class Mine(transformers.TrainerCallback):
        """One that a caller brings."""

    def kinds(trainer):
        return [type(callback) for callback in trainer.given["callbacks"]]

    trainer = built(callbacks=[Mine()])
    assert kinds(trainer) == [NoInputGradients, Mine, StopOrSave]
    assert (trainer.added, trainer.popped) == ([], [ProgressCallback, PrinterCallback])
    assert trainer.given["callbacks"][-1] is STOPPING
    trainer = built(callbacks=[Mine()], held_out=3, settings={"reference_sync_steps": 2})
    assert kinds(trainer) == [NoInputGradients, Mine, MoveReference, StopOrSave]  # it moves before a checkpoint
    assert [type(callback) for callback in trainer.added] == [EvaluateAtTheEnd]


def test_which_reference_moves_and_which_is_the_policy_without_its_adapters(built):
    assert built().live is None
    trainer = built(None)
    assert isinstance(trainer.live, AdapterOff)
    assert trainer.live.model is trainer.given["model"]
    linear = torch.nn.Linear(2, 2)
    moving = built(model=linear, settings={"reference_sync_steps": 1, "reference_mixup_alpha": 0.25})
    assert isinstance(moving.live, MovingReference)
    assert (moving.live.model, moving.live.alpha) == (linear, 0.25)
    assert moving.given["callbacks"][1].reference is moving.live


@pytest.mark.parametrize(("device", "times"), [("cpu", 1), ("cuda", 0)])
def test_only_a_process_on_a_cpu_gives_back_what_it_frees(built, tmp_path, monkeypatch, device, times):
    calls = []
    monkeypatch.setattr(module, "return_freed_memory", lambda: calls.append(1))
    fields = vars(settings(tmp_path)) | {"device": torch.device(device), "token_weights": None}
    built(args=SimpleNamespace(**fields))
    assert len(calls) == times


@pytest.mark.parametrize(("own", "wrapped"), [({}, ["Layer"]), ({"transformer_cls_names_to_wrap": ["Mine"]}, ["Mine"])])
def test_fsdp_gathers_layer_by_layer_unless_told_otherwise(built, tmp_path, monkeypatch, own, wrapped):
    monkeypatch.setattr(module, "layer_names", lambda model: ["Layer"])
    fields = vars(settings(tmp_path)) | {"device": torch.device("cpu"), "token_weights": None}
    args = SimpleNamespace(**fields | {"fsdp": True, "fsdp_plugin_args": own})
    built(args=args)
    assert args.fsdp_plugin_args == {"transformer_cls_names_to_wrap": wrapped}
    args = SimpleNamespace(**fields | {"fsdp": False, "fsdp_plugin_args": None})
    built(args=args)
    assert args.fsdp_plugin_args is None


@pytest.mark.parametrize("plugin", [None, "plugin"])
def test_the_trainer_knows_the_fsdp_that_was_allowed_on_cpus(monkeypatch, plugin):
    trainer, events = bare(), []
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace())

    def allow(accelerator, args):
        assert (accelerator, args) == (trainer.accelerator, trainer.args)
        events.append("allowed")
        accelerator.state.fsdp_plugin = plugin

    monkeypatch.setattr(
        transformers.Trainer, "create_accelerator_and_postprocess", lambda self: events.append("created")
    )
    monkeypatch.setattr(module, "allow_fsdp_on_cpu", allow)
    trainer.create_accelerator_and_postprocess()
    assert events == ["created", "allowed"]
    assert trainer.is_fsdp_enabled is (plugin is not None)


def test_packs_are_loaded_by_the_plan_of_the_steps_and_workers_outlive_signals(pairs, tmp_path):
    trainer = bare()
    trainer.args = settings(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True, **PLAIN)
    trainer.pairs, trainer.train_dataset = pairs, "dataset"
    loader = trainer.get_train_dataloader()
    sampler = pairs.sampler(trainer.args)
    assert (loader.dataset, loader.num_workers, loader.persistent_workers) == ("dataset", 1, True)
    assert (loader.collate_fn, loader.worker_init_fn) == (pack_groups, keep_from_signals)
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        sampler.set_epoch(epoch)
        assert list(loader.batch_sampler) == list(sampler)
    trainer.args = settings(tmp_path, **PLAIN)
    loader = trainer.get_train_dataloader()
    assert (loader.num_workers, loader.persistent_workers) == (0, False)


def test_two_steps_are_those_of_a_plain_loop(pairs, tmp_path):
    """Without ranks, packs, accumulation and caches: each step one pack, autograd, SGD."""
    args, processor = settings(tmp_path, **PLAIN), tiny_processor()
    trained, held_out = pairs.select(np.arange(9)), pairs.select(np.arange(9, 12))
    cache = ReferenceCache(tmp_path / "reference", {}, pairs.digests)
    reference = ReferencePass(cache, processor, trained, held_out, args)
    model = tiny_model()
    reference.follow(model)
    trainer = MPOTrainer(
        model, args, processor=processor, pairs=trained, held_out=held_out, reference=reference, stopping=STOPPING
    )
    trainer.train()

    start, twin = attach_scoring(tiny_model()), attach_scoring(tiny_model()).train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=args.learning_rate)
    seen, losses = [], []
    for groups in list(trained.sampler(args).steps())[:2]:
        pack = pack_groups([trainer.train_dataset[group] for group in groups])
        with torch.no_grad():
            known = score_pairs(start, pack)
        scores = score_pairs(twin, pack)
        out = mpo_loss(
            scores.chosen, scores.rejected, known.chosen, known.rejected, pack.chosen_lengths_P,
            beta=0.5, shift=float(torch.cat(seen).mean()) if seen else 0.0,
        )  # fmt: skip
        seen += [out.chosen_rewards, out.rejected_rewards]
        losses.append(out.loss.item())
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    history = trainer.state.log_history
    assert [row["loss"] for row in history if "loss" in row] == pytest.approx(losses, rel=1e-4)
    for name, weight in twin.named_parameters():
        torch.testing.assert_close(dict(model.named_parameters())[name], weight, rtol=1e-3, atol=1e-4)

    pack = pack_groups([trainer.eval_dataset[(0, 1, 2)]])
    with torch.no_grad():
        known, scores = score_pairs(start, pack), score_pairs(twin.eval(), pack)
    (evaluated,) = [row for row in history if "eval_nll" in row]  # after the last step
    chosen, rejected = 0.5 * (scores.chosen - known.chosen), 0.5 * (scores.rejected - known.rejected)
    assert evaluated["eval_rewards/margin"] == pytest.approx((chosen - rejected).mean().item(), rel=1e-2)
    assert evaluated["eval_nll"] == pytest.approx((-scores.chosen / pack.chosen_lengths_P).mean().item(), rel=1e-3)
    assert (evaluated["eval_num_pairs"], evaluated["step"]) == (3, 2)
    assert not [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ProgressCallback)]
    one = pack_groups([trainer.train_dataset[(0,)]])
    assert trainer.floating_point_ops(one) == module.FlopModel(model).of(one) > 0


# --- other ranks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def loading(monkeypatch):
    """A trainer that notes what is loaded; checkpoints named "other" are of another number of ranks."""
    trainer, events = bare(), []
    trainer.model, trainer.model_wrapped, trainer.events = "model", "engine", events
    trainer._follow_start = lambda: events.append("follow")

    def is_of_other_ranks(folder, args):
        assert args is trainer.args
        return folder == "other"

    def load_universal(engine, folder, args, *, strict):
        assert (engine, args) == ("engine", trainer.args)
        events.append(("universal", folder, strict))

    def note(name, self, *given):
        events.append((name, *given))
        return name

    monkeypatch.setattr(module, "is_of_other_ranks", is_of_other_ranks)
    monkeypatch.setattr(module, "load_universal", load_universal)
    for name in ("_prepare_for_training", "_load_best_model", "_load_from_checkpoint", "_load_optimizer_and_scheduler"):
        monkeypatch.setattr(transformers.Trainer, name, functools.partialmethod(functools.partial(note, name)))
    return trainer


def test_a_checkpoint_of_other_ranks_is_loaded_once_the_engine_is_there(loading):
    loading._load_optimizer_and_scheduler = lambda folder: loading.events.append(("optimizer", folder))
    loading._load_scaler = lambda folder: loading.events.append(("scaler", folder))
    assert loading._prepare_for_training(9, "loader", "other") == "_prepare_for_training"
    assert loading.events == [
        ("_prepare_for_training", 9, "loader", None), ("universal", "other", True), ("optimizer", "other"),
        ("scaler", "other"),
    ]  # fmt: skip
    del loading.events[:]
    assert loading._prepare_for_training(9, "loader", "own") == "_prepare_for_training"
    assert loading.events == [("_prepare_for_training", 9, "loader", "own")]


@pytest.mark.parametrize(("best", "event"), [("other", ("universal", "other", False)), ("own", ("_load_best_model",))])
def test_the_best_model_is_loaded_whoever_has_written_it(loading, best, event):
    loading.state.best_model_checkpoint = best
    loading.model = SimpleNamespace(peft_config={})  # the file of adapters does not hold every weight
    loading._load_best_model()
    assert loading.events == [event]


def test_what_the_reference_needs_is_kept_before_weights_are_loaded(loading):
    loading._load_from_checkpoint("folder", "a model")
    assert loading.events == ["follow", ("_load_from_checkpoint", "folder", "a model")]
