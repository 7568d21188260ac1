"""A step that is not finite stops all ranks, leaves what a replay needs, and the replay names the module."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_monitor import lines
from test_train_mpo import arguments, train, world  # noqa: F401 - `world` is a fixture
from tiny import tiny_model, tiny_processor

from internvl_mpo import replay
from internvl_mpo.errors import run_program
from internvl_mpo.logps import attach_scoring
from internvl_mpo.mini.release import MMPRSettings, make_release
from internvl_mpo.mmpr.convert import convert
from internvl_mpo.mmpr.reading import iter_pairs
from internvl_mpo.mmpr.shard_plan import Options
from internvl_mpo.records import PreferencePair
from internvl_mpo.training import trainer
from internvl_mpo.training.not_finite import weights_not_finite
from internvl_mpo.training.trainer import MPOTrainer


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_the_weights(world, tmp_path, monkeypatch, capsys):
    plain = MPOTrainer.compute_loss

    def poisoned(self, model, inputs, *more, **options):
        loss = plain(self, model, inputs, *more, **options)
        if self.state.global_step != 2:
            return loss
        weight = next(model.parameters())
        return loss + ((weight - weight.detach()) ** 2).sum().sqrt()  # 0, with the gradient 0/0

    monkeypatch.setattr(MPOTrainer, "compute_loss", poisoned)
    output = tmp_path / "run"
    assert train(world, output, "--save_steps", "1") == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the gradient is not finite at step 3" in message
    dump = json.loads((output / "not_finite_step3_rank0.json").read_text())
    assert len(dump["pairs"]) == 4
    assert dump["weights_not_finite"] == []
    assert [row["step"] for row in lines(output) if "loss" in row] == [1, 2]
    saved = load_file(output / "checkpoint-2" / "model.safetensors")
    assert all(bool(torch.isfinite(weight).all()) for weight in saved.values())

    assert run_program(replay.main, ["--dump", str(output / "not_finite_step3_rank0.json")]) == 0
    shown = capsys.readouterr().out
    assert "checkpoint-2" in shown
    assert "all pairs are finite with these weights" in shown
    assert all(pair["id"] in shown for pair in dump["pairs"])


def test_a_replay_gives_the_losses_of_the_run_and_names_the_module(world, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(world, output, "--learning_rate", "1e30", "--max_grad_norm", "0", "--save_strategy", "no") == 2
    message = capsys.readouterr().err
    path = next(output.glob("not_finite_*.json"))
    assert f"--dump {path}" in message
    dump = replay.read_dump(path)
    model, processor = replay.load_policy(world / "start", dump["model"], torch.float32)
    attach_scoring(model)
    row = dump["pairs"][0]
    found = replay.replay_pair(model, processor, dump, row)
    assert found.is_finite
    # with the start model's weights, the log-probs are those of the reference
    assert [found.numbers["chosen logp"], found.numbers["rejected logp"]] == pytest.approx(row["reference_logps"])
    assert found.numbers["grad norm"] > 0

    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (world / "start").iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    name = "language_model.model.layers.1.mlp.down_proj.weight"
    weights[name] = weights[name] * torch.inf
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    assert run_program(replay.main, ["--dump", str(path), "--model", str(broken)]) == 1
    shown = capsys.readouterr().out
    assert "language_model.model.layers.1.mlp.down_proj" in shown
    assert "pairs are not finite with these weights" in shown


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """Pairs with pictures in the zip archives of a release (`v1.2`), and the same in Parquet rows (`parquet`)."""
    folder = tmp_path_factory.mktemp("release")
    make_release(MMPRSettings(output=str(folder / "v1.2"), num_pictures=4, pairs_per_picture=1))
    convert(Options(str(folder / "v1.2")), folder / "parquet")
    return folder


@pytest.mark.parametrize("data", ["v1.2", "parquet"])
def test_pictures_in_archives_and_parquet_rows_are_kept_for_the_replay(
    world,
    release,
    tmp_path,
    monkeypatch,
    capsys,
    data,
):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    plain, poisoned = trainer.score_pairs, []

    def score_pairs(model, pack, likeness):
        found = [pair_id for pair_id in pack.pair_ids if pair_id in with_picture]
        poisoned.extend(pack.pair_ids if found else ())
        scores = plain(model, pack, likeness=likeness)
        return scores._replace(chosen=scores.chosen * (torch.nan if found else 1))

    rows = {row.pair.id: row for row in iter_pairs(release / data)}
    with_picture = [pair_id for pair_id, row in rows.items() if row.pair.images]
    assert all(not isinstance(row.image_root, Path) for row in rows.values())
    monkeypatch.setattr(trainer, "score_pairs", score_pairs)
    assert train(world, tmp_path / "run", "--data", str(release / data), "--save_strategy", "no") == 2
    (path,) = (tmp_path / "run").glob("not_finite_*.json")
    sentence = capsys.readouterr().err.strip().split("\n")[-1]
    assert f"error: the loss is not finite at step 1; the pairs are {poisoned[0]}" in sentence

    dump = replay.read_dump(path)
    assert [pair["where"] for pair in dump["pairs"]] == [rows[pair["id"]].where for pair in dump["pairs"]]
    model, processor = replay.load_policy(world / "start", dump["model"], torch.float32)
    attach_scoring(model)
    for pair in dump["pairs"]:  # the very pictures: with the start model's weights, the log-probs are the reference's
        found = replay.replay_pair(model, processor, dump, pair)
        assert [found.numbers["chosen logp"], found.numbers["rejected logp"]] == pytest.approx(pair["reference_logps"])
    assert run_program(replay.main, ["--dump", str(path)]) == 0


def test_weights_that_zero3_has_cut_in_pieces_are_looked_at_where_they_are():
    model = torch.nn.Linear(1, 3, bias=False)
    model.weight = torch.nn.Parameter(torch.empty(0))
    model.weight.ds_numel = 3
    model.weight.ds_tensor = torch.tensor([1.0, torch.nan])
    assert weights_not_finite(model, rank=0) == ["weight"]
    assert weights_not_finite(model, rank=1) == []  # its second number only fills the last share up


@pytest.mark.parametrize(
    ("text", "words"), [("{", "no JSON object"), ("{}", "key 'beta' is missing"), (None, "cannot read")]
)
def test_something_else_than_a_dump_is_refused(tmp_path, capsys, text, words):
    if text is not None:
        (tmp_path / "dump.json").write_text(text)
    assert run_program(replay.main, ["--dump", str(tmp_path / "dump.json")]) == 2
    assert words in capsys.readouterr().err


def test_gradients_that_overflow_are_traced_to_their_module():
    model, processor = tiny_model("llama"), tiny_processor()
    attach_scoring(model)
    pair = PreferencePair(question="a question", chosen="yes", rejected="no")
    dump = {"beta": 0.1, "weights": (0.8, 0.2, 1.0), "reward_shift": 0.0, "preference": "dpo", "quality": "bco",
            "generation": "sft", "label_smoothing": 0.0, "max_tiles": 2, "max_length": 500}  # fmt: skip
    row = {**pair.to_json(), "image_root": ".", "max_tiles": None, "reference_logps": [-3.0, -3.0]}
    assert replay.replay_pair(model, processor, dump, row).is_finite
    layer = model.language_model.model.layers[0].mlp
    layer.register_forward_hook(lambda module, inputs, output: Poison.apply(output))
    found = replay.replay_pair(model, processor, dump, row)
    assert found.first_output is None
    assert found.first_gradient.startswith("language_model.model.layers.0.mlp")
    assert not found.is_finite


class Poison(torch.autograd.Function):
    """The identity, with a gradient of NaN."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.nan
