"""A model named by its Hub id goes through the same door as a folder: config.json first, weights last.

pytest tests/hub/test_families_from_hub.py
"""

import json
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from loopback import WRITER, LoopbackHub
from tiny_families import FAMILIES
from tiny_world import make_training_pairs

import train_mpo
from internvl_mpo.demo.family_model import FamilyChatModel, FamilyCutter
from internvl_mpo.demo.local_models import LocalModels
from internvl_mpo.engines import Request, Sampling
from internvl_mpo.engines.loading import load_model_engine
from internvl_mpo.errors import run_program
from internvl_mpo.families.registry import family_of_source
from tests.test_demo_families import ask, finish


@pytest.fixture
def upload(hub: LoopbackHub):
    """Puts a folder on the Hub under a name, and forgets the requests that took."""

    def put(folder: Path, name: str) -> str:
        api = HfApi(endpoint=hub.url, token=WRITER)
        api.create_repo(name)
        api.upload_folder(repo_id=name, folder_path=folder)
        hub.requests.clear()
        return name

    return put


def fetched(hub: LoopbackHub) -> list[str]:
    """Names of the files that were asked for, each once, in order."""
    return list(dict.fromkeys(path.split("/")[-1] for _, path, _, _ in hub.requests if "/resolve/" in path))


def train(model: str, folder: Path, *more: str) -> int:
    make_training_pairs(folder)
    words = ["--model", model, "--data", str(folder / "pairs.jsonl"), "--output_dir", str(folder / "run")]
    words += ["--pairs_per_step", "4", "--max_length", "900", "--use_cpu", "true", "--max_steps", "2", *more]
    return run_program(train_mpo.main, words)


def test_weights_are_fetched_after_every_pair_has_been_checked(hub, upload, tmp_path, capsys):
    name = upload(FAMILIES["qwen2_5_vl"](tmp_path / "model"), "ada/tiny-qwen")
    (tmp_path / "0.png").mkdir()  # no picture
    rows = [{"image": "0.png", "question": "Which?", "chosen": "this", "rejected": "that"}]
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--model", name, "--data", str(tmp_path / "bad.jsonl"), "--output_dir", str(tmp_path / "run")]
    assert run_program(train_mpo.main, [*words, "--use_cpu", "true"]) == 2
    assert fetched(hub)[0] == "config.json"
    assert "tokenizer.json" in fetched(hub) and "model.safetensors" not in fetched(hub)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"model_type": "blip_2"},
            "'ada/other' is of model_type 'blip_2', expected one of 'internvl_chat', 'internvl', ",
        ),
        ({"model_type": "gemma3"}, "'ada/other' is of model_type 'gemma3' (its attention goes in both directions"),
        (
            {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]},
            "class LlavaLlamaForCausalLM is its authors",
        ),
    ],
)
def test_what_no_family_takes_costs_one_small_file_and_is_one_sentence(hub, upload, tmp_path, capsys, config, words):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"large")
    name = upload(tmp_path / "model", "ada/other")
    assert train(name, tmp_path) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "ada/other" in line or words in line]
    assert words in line
    assert fetched(hub) == ["config.json"]
    assert not (tmp_path / "run").exists()


def test_a_name_that_is_not_there_is_one_sentence(hub, tmp_path, capsys):
    assert train("ada/nothing", tmp_path) == 2
    assert "'ada/nothing' is no folder here, and the Hub does not give it" in capsys.readouterr().err


@pytest.mark.slow
def test_engines_and_the_demo_take_an_id(hub, upload, tmp_path):
    name = upload(FAMILIES["qwen2_5_vl"](tmp_path / "model"), "ada/tiny-qwen")
    engine = load_model_engine(name)
    assert engine.revision == hub.repository("models", name).head("main").oid
    (reply,) = engine.generate([Request(id="1", question="What is this?", sampling=Sampling(max_new_tokens=8), seed=5)])
    backend = LocalModels(name, name)
    assert isinstance(backend.cutter(), FamilyCutter)
    assert finish(backend.stream(ask()))["mpo"].text == reply.text
    assert {type(model) for model in backend._models.get()} == {FamilyChatModel}


@pytest.mark.slow
def test_a_model_is_trained_by_its_id(hub, upload, tmp_path, capsys):
    name = upload(FAMILIES["qwen3_vl"](tmp_path / "model"), "ada/tiny-qwen")
    assert train(name, tmp_path) == 0
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert next(row for row in log if "loss" in row)["loss_preference"] == pytest.approx(0.6931, abs=1e-4)
    assert fetched(hub)[0] == "config.json"
    assert family_of_source(str(tmp_path / "run" / "model")).name == "qwen3_vl"
