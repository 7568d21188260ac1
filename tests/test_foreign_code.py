"""A start model of a stranger: the code that lies in its folder never runs, whoever opens it.

pytest tests/test_foreign_code.py
"""

import json
from pathlib import Path

import pytest
import torch
from test_train_mpo import train
from tiny_families import tiny_llava
from tiny_world import make_model_folder, make_training_pairs

from internvl_mpo import replay
from internvl_mpo.families.registry import family_of_source
from internvl_mpo.training.policy import load_model

CLASSES = (
    *("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText"),
    *("AutoProcessor", "AutoImageProcessor"),
)


def plant(folder: Path, mark: Path) -> None:
    """Let every file of a model folder that may name code name one that leaves a mark."""
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'a').write('ran')\nclass Evil: pass\n", encoding="utf-8")
    auto_map = dict.fromkeys(CLASSES, "evil.Evil") | {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    for name in ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
        path = folder / name
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            for part in (content, content.get("llm_config"), content.get("vision_config"), content.get("text_config")):
                if isinstance(part, dict):
                    part["auto_map"] = auto_map
            path.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("make", [make_model_folder, tiny_llava])
def test_code_in_a_start_model_does_not_run(tmp_path, make):
    start, mark = make(tmp_path / "start"), tmp_path / "ran"
    plant(start, mark)
    family = family_of_source(str(start))
    family.load_processor(str(start))
    load_model(str(start), torch.float32)
    replay.load_policy(start, str(start), torch.float32)
    assert not mark.exists()


@pytest.mark.slow
def test_training_does_not_run_the_code_of_its_start_model(tmp_path, capsys):
    plant(make_model_folder(tmp_path / "start"), tmp_path / "ran")
    make_training_pairs(tmp_path)
    assert train(tmp_path, tmp_path / "run", "--max_steps", "1") == 0, capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_a_model_that_needs_its_own_code_is_refused(tmp_path, capsys):
    plant(make_model_folder(tmp_path / "start"), tmp_path / "ran")
    make_training_pairs(tmp_path)
    path = tmp_path / "start" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "unheard_of"}))
    assert train(tmp_path, tmp_path / "run") == 2
    assert "is of model_type 'unheard_of', expected one of 'internvl_chat'" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()
