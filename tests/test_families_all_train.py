"""Every family that `test_families_training.py` leaves out: adapters on both towers, trained and merged into a folder.

pytest tests/test_families_all_train.py
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import FAMILIES, tiny_internvl, tiny_qwen3_vl
from tiny_world import make_training_pairs

import train_mpo
from internvl_mpo.errors import run_program
from internvl_mpo.families.registry import family_of_source

BUILDERS = {
    **{name: FAMILIES[name] for name in FAMILIES if name not in ("internvl", "qwen2_5_vl", "qwen3_vl")},
    "internvl (experts)": lambda folder: tiny_internvl(folder, "qwen3_moe"),
    "qwen3_vl (experts)": lambda folder: tiny_qwen3_vl(folder, experts=True),
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_adapters_are_trained_and_merged_into_a_folder_of_the_same_class(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    start, run = BUILDERS[name](tmp_path / "start"), tmp_path / "run"
    make_training_pairs(tmp_path)
    settings = {
        **{"model": start, "data": tmp_path / "pairs.jsonl", "output_dir": run, "use_cpu": "true"},
        **{"pairs_per_step": 6, "max_length": 900, "learning_rate": 1e-2, "max_steps": 2},
        **{"lora_rank": 4, "lora_on": "both", "save_adapter": "true"},
    }
    assert (
        run_program(train_mpo.main, [word for key, value in settings.items() for word in (f"--{key}", str(value))]) == 0
    )
    first = next(row for row in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "loss" in row)
    assert first["loss_preference"] == pytest.approx(0.6931, abs=1e-4)
    before, after = tensors(start), tensors(run / "model")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[key], after[key]) for key in before)
    family, ids = family_of_source(str(start)), torch.arange(40, 60)[None]
    merged, base = (family.load_model(str(folder)).eval() for folder in (run / "model", start))
    assert type(merged) is type(base)
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, run / "adapter").eval()(input_ids=ids).logits
        assert (merged(input_ids=ids).logits - adapted).abs().max() < 1e-4
