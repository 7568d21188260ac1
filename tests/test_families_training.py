"""`train_mpo.py` with models of other families: losses, resume, packs of any size, adapters, folders that stand alone.

pytest tests/test_families_training.py
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import FAMILIES, widen_for_4_bits
from tiny_world import make_training_pairs

import train_mpo
from internvl_mpo.engines import Request, Sampling
from internvl_mpo.engines.loading import load_model_engine
from internvl_mpo.errors import run_program
from internvl_mpo.families.registry import family_of_source
from internvl_mpo.training.policy import load_model

# a family with files of other names than its modules, one with three position axes, one whose tower feeds many layers
TRAINED = ("internvl", "qwen2_5_vl", "qwen3_vl")

CLEAN = """
import sys, torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1]).eval()
assert not any(name.startswith("internvl_mpo") for name in sys.modules)
ids = torch.arange(40, 60)[None]
torch.save((type(model).__name__, model(input_ids=ids).logits.detach()), sys.argv[2])
"""


@pytest.fixture(scope="module", params=TRAINED)
def world(request, tmp_path_factory) -> Path:
    """A start model, pictures, and 12 pairs: three of each question, text-only ones among them."""
    folder = tmp_path_factory.mktemp("world")
    FAMILIES[request.param](folder / "start")
    make_training_pairs(folder)
    return folder


def train(world: Path, output: Path, *more: str) -> int:
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
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return run_program(train_mpo.main, [*words, *more])


def log(output: Path) -> list[dict]:
    rows = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return [row for row in rows if "loss" in row]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.fixture(scope="module")
def unbroken(world, tmp_path_factory) -> Path:
    """A run of four steps from start to end."""
    output = tmp_path_factory.mktemp("unbroken") / "run"
    assert train(world, output) == 0
    return output


def test_the_first_loss_is_that_of_a_policy_equal_to_its_cached_reference(unbroken):
    first = log(unbroken)[0]
    assert first["loss_preference"] == pytest.approx(0.6931, abs=1e-4)
    assert first["loss_quality"] == pytest.approx(1.3863, abs=1e-4)
    assert abs(first["rewards/chosen"]) < 1e-4
    assert first["model_tflops"] > 0
    assert log(unbroken)[-1]["loss"] < first["loss"]


@pytest.mark.slow
def test_smaller_packs_and_the_plain_twin_give_the_same_losses(world, unbroken, tmp_path):
    for number, more in enumerate((["--max_tokens_per_pack", "400"], ["--plain_twin", "true"])):
        assert train(world, tmp_path / str(number), *more) == 0
        for row, expected in zip(log(tmp_path / str(number)), log(unbroken), strict=True):
            assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on_to_the_same_weights(world, unbroken, tmp_path):
    assert train(world, tmp_path / "run", "--max_steps", "2", "--lr_scheduler_type", "constant") == 0
    assert train(world, tmp_path / "run", "--max_steps", "4", "--lr_scheduler_type", "constant") == 0
    assert train(world, tmp_path / "whole", "--lr_scheduler_type", "constant") == 0
    resumed, whole = weights(tmp_path / "run" / "model"), weights(tmp_path / "whole" / "model")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    family = family_of_source(str(world / "start"))
    folders = [tmp_path / "run" / name for name in ("checkpoint-4", "model")]  # a checkpoint is a start model as well
    checkpoint, model = (dict(family.load_model(str(folder)).named_parameters()) for folder in folders)
    assert all(torch.equal(checkpoint[name], model[name]) for name in model)


@pytest.mark.slow
def test_the_trained_folder_is_one_of_transformers_own(world, unbroken, tmp_path):
    before, after = weights(world / "start"), weights(unbroken / "model")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    command = [sys.executable, "-c", CLEAN, str(unbroken / "model"), str(tmp_path / "logits.pt")]
    result = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    name, logits = torch.load(tmp_path / "logits.pt", weights_only=True)
    family = family_of_source(str(unbroken / "model"))
    model = family.load_model(str(unbroken / "model")).eval()
    assert name == type(model).__name__
    with torch.no_grad():
        assert torch.equal(model(input_ids=torch.arange(40, 60)[None]).logits, logits)
    engine = load_model_engine(str(unbroken / "model"))  # sampling and evaluation ask it as it is
    asked = Request(id="1", question="Which?", images=(str(world / "1.png"),), sampling=Sampling(max_new_tokens=3))
    assert [reply.error for reply in engine.generate([asked])] == [None]
    start, trained = (family.load_processor(str(folder)) for folder in (world / "start", unbroken / "model"))
    assert trained.chat_template == start.chat_template
    assert trained.image_processor.to_dict() == start.image_processor.to_dict()


@pytest.mark.slow
def test_adapters_train_on_both_towers_and_are_merged(world, tmp_path):
    lora = ["--lora_rank", "4", "--lora_on", "both", "--save_adapter", "true", "--reference", "adapter_off"]
    assert train(world, tmp_path / "run", *lora) == 0
    first = log(tmp_path / "run")[0]
    assert first["loss_preference"] == pytest.approx(0.6931, abs=1e-4)
    from peft import PeftModel

    family = family_of_source(str(world / "start"))
    merged = family.load_model(str(tmp_path / "run" / "model")).eval()
    adapted = PeftModel.from_pretrained(family.load_model(str(world / "start")), tmp_path / "run" / "adapter").eval()
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        assert (merged(input_ids=ids).logits - adapted(input_ids=ids).logits).abs().max() < 1e-4
    assert weights(tmp_path / "run" / "model").keys() == weights(world / "start").keys()
    towers = {name.split(".lora_")[0] for name in weights(tmp_path / "run" / "adapter")}
    assert any("visual" in name or "vision_tower" in name for name in towers)
    assert any("language_model" in name for name in towers)
    adapter = tmp_path / "run" / "adapter"
    (code,) = re.findall(r"```python\n(.*?)```", (adapter / "README.md").read_text(), flags=re.DOTALL)
    assert f'AutoProcessor.from_pretrained("{world / "start"}")' in code  # which may want torchvision
    scope: dict = {}
    exec(code.partition("processor =")[0].replace('"adapter"', f'"{adapter}"'), scope)  # what the card says
    with torch.no_grad():
        assert (merged(input_ids=ids).logits - scope["model"](input_ids=ids).logits).abs().max() < 1e-4
    assert not list(adapter.glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["internvl", "qwen2_5_vl"])
def test_qlora_saves_what_it_trained_merged_and_as_an_adapter(name, tmp_path):
    pytest.importorskip("bitsandbytes")
    from peft import PeftModel

    widen_for_4_bits(FAMILIES[name](tmp_path / "start"))
    make_training_pairs(tmp_path)
    lora = ["--lora_rank", "4", "--lora_on", "both", "--load_in_4bit", "true", "--save_adapter", "true"]
    assert train(tmp_path, tmp_path / "run", *lora) == 0
    first, last = log(tmp_path / "run")[0], log(tmp_path / "run")[-1]
    assert abs(first["rewards/chosen"]) < 1e-3  # the cached reference is the 4-bit model, not the wide one
    assert last["loss"] < first["loss"]
    assert "quantization_config" not in json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    before, after = weights(tmp_path / "start"), weights(tmp_path / "run" / "model")
    assert {key: value.shape for key, value in before.items()} == {key: value.shape for key, value in after.items()}
    kept = [key for key in before if any(part in key for part in ("projector", "merger", "connector"))]
    assert kept and all(torch.equal(after[key], before[key]) for key in kept)  # neither trained nor quantised
    quantised = next(key for key in before if key.endswith("layers.0.mlp.up_proj.weight") and "vis" not in key)
    assert 0.005 < (after[quantised] - before[quantised]).norm() / before[quantised].norm() < 0.3
    family = family_of_source(str(tmp_path / "start"))
    merged = family.load_model(str(tmp_path / "run" / "model")).eval()
    narrow = load_model(str(tmp_path / "start"), torch.float32, in_4bit=True)
    adapted = PeftModel.from_pretrained(narrow, tmp_path / "run" / "adapter").eval()
    ids = torch.arange(40, 60)[None]
    with torch.no_grad():
        assert (merged(input_ids=ids).logits - adapted(input_ids=ids).logits).abs().max() < 1e-3


def test_frozen_parts_do_not_move(world, tmp_path, capsys):
    assert train(world, tmp_path / "run", "--freeze_vision", "true", "--freeze_projector", "true") == 0
    table = {line.split("  ")[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines() if "%" in line}
    assert table["vision tower"] == table["projector"] == "0.00%"
    before, after = weights(world / "start"), weights(tmp_path / "run" / "model")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any("vis" in name or "projector" in name for name in moved)


@pytest.mark.slow
def test_held_out_pairs_and_sampled_answers(world, tmp_path):
    more = ["--held_out_share", "0.3", "--eval_steps", "2", "--num_eval_samples", "2", "--eval_sample_tokens", "4"]
    assert train(world, tmp_path / "run", *more) == 0
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert samples and all(sample["num_tokens"] > 0 for sample in samples)
