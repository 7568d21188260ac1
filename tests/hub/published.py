"""What publishing starts from: a run, an evaluation, an adapter; and a process that knows nothing of the repository."""

import json
import subprocess
import sys
from pathlib import Path

import yaml
from loopback import WRITER, LoopbackHub, environment

NO_REPOSITORY = """
import sys
class NoRepository:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_internvl_mpo", "internvl_mpo"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoRepository())
"""


def make_run(folder: Path) -> Path:
    """A run folder of `train_mpo.py` as a user has it, private paths and all."""
    folder.mkdir(parents=True)
    settings = {
        "output_dir": "/home/zebediah/runs/mpo",
        "model": "/home/zebediah/models/start",
        "data": ["/home/zebediah/data/pairs.jsonl"],
        "logging_dir": "/home/zebediah/runs",
        "hub_token": "hf_abcdefghijklmnopqrstuvwxyz",
        "preference": "dpo",
        "preference_weight": 0.8,
        "quality": "none",
        "quality_weight": 0.2,
        "generation": "sft",
        "generation_weight": 1.0,
        "beta": 0.1,
        "learning_rate": 5e-6,
        "pairs_per_step": 24,
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    rows = [
        {
            "step": step,
            "loss": 1.0 / step,
            "loss_preference": 0.69,
            "loss_quality": 0.0,
            "loss_generation": 0.2,
            "rewards/chosen": 0.01 * step,
            "rewards/rejected": -0.01 * step,
            "rewards/margin": 0.02 * step,
            "rewards/accuracy": 0.75,
        }
        for step in range(1, 13)
    ]
    rows.append({"step": 12, "eval_rewards/accuracy": 0.8})
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def make_evaluation(folder: Path, revision: str | None, model: str = "/home/zebediah/models/start") -> Path:
    """A run folder of `evaluate_mpo.py`: two benchmarks, one with a place on the Hub."""
    folder.mkdir(parents=True)
    summary = {"rule": "ours", "headline": "accuracy", "interval": [40.0, 52.0], "num_examples": 300, "num_unscored": 0}
    scores = {
        "mini": {"direct": {**summary, "accuracy": 46.0}, "cot": {**summary, "accuracy": 71.5}},
        "m3cot": {"cot": {**summary, "accuracy": 79.2}},
    }
    (folder / "scores.json").write_text(json.dumps(scores))
    (folder / "answers.jsonl").write_text(
        json.dumps({"key": "mini/cot/1", "model": model, "revision": revision}) + "\n"
    )
    return folder


def make_adapter(base: Path, folder: Path) -> Path:
    """LoRA weights that are not zero, saved by peft with the local path of the base model in it."""
    import torch
    from peft import LoraConfig, get_peft_model

    from modeling_internvl_mpo import InternVLChatModel

    torch.manual_seed(1)
    model = InternVLChatModel.from_pretrained(base)
    config = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.2)
    adapted.save_pretrained(folder)
    return folder


def run_as_stranger(
    hub: LoopbackHub, code: str, folder: Path, *arguments: str, token: str | None = WRITER
) -> subprocess.CompletedProcess:
    """Run code in an empty folder with an empty cache, against the loopback Hub, without our packages."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
    return subprocess.run(
        [sys.executable, "-I", "-c", NO_REPOSITORY + code, *arguments],
        cwd=folder,
        env={**kept, **environment(hub.url, folder / "hf_home", token)},
        capture_output=True,
        text=True,
    )
