"""Run files and shell files: every key is known, every figure is the command's, and the shell files really train.

pytest tests/test_recipes.py
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_train_mpo import arguments, losses, world  # noqa: F401 - `world` is a fixture

import train_mpo
from internvl_mpo import memory_estimate
from internvl_mpo.errors import run_program
from internvl_mpo.families import shapes

ROOT = Path(__file__).resolve().parents[1]
OTHER = {"mini", "rounds_mini", "ablation", "ablation_reduced"}  # run files that are no recipe for a released model
RECIPES = sorted(path for path in (ROOT / "configs").glob("*.yaml") if path.stem not in OTHER)
SHELL = sorted(path for path in (ROOT / "runs").iterdir() if path.suffix != ".py")


def test_there_is_a_recipe_for_every_size():
    sizes = {path.stem.removeprefix("internvl2_") for path in RECIPES}
    assert sizes >= set(shapes.SHAPES)
    models = {yaml.safe_load(path.read_text())["model"].rpartition("/")[2].lower() for path in RECIPES}
    assert models >= set(shapes.NATIVE_SHAPES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_holds_settings_there_are_and_says_what_it_needs(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    values = yaml.safe_load(path.read_text())
    deepspeed = values.pop("deepspeed", None)
    assert deepspeed is None or json.loads(Path(deepspeed).read_text())["zero_optimization"]["stage"] in (1, 2, 3)
    given = [word for key, value in values.items() for word in (f"--{key}", settings_word(value))]
    settings = train_mpo.read_settings([*given, "--bf16", "false", "--use_cpu", "true", "--report_to", "none"])
    assert settings.pairs_per_step >= 64
    text = path.read_text()
    assert re.search(r"^# Memory of (a|the) GPU: \d+\.\d GiB, calculated by$", text, re.MULTILINE)
    assert f"--run configs/{path.name}" in text
    assert "ever run here" in text
    assert (ROOT / re.search(r"runs/\w+\.\w+", text).group()).is_file()


def settings_word(value: object) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["internvl2_1b", "internvl2_2b_lora"])
def test_the_memory_in_a_recipe_is_what_the_command_prints(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    said = re.search(r"GPU: (\d+\.\d) GiB", text).group(1)
    command = re.search(r"internvl_mpo\.memory_estimate (.*)", text).group(1)
    assert run_program(memory_estimate.main, command.split()) == 0
    assert re.search(r"total\s+(\d+\.\d) GiB", capsys.readouterr().out).group(1) == said


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_a_shell_file_parses_and_names_files_there_are(path):
    assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
    if shutil.which("shellcheck"):
        result = subprocess.run(
            ["shellcheck", "--severity=warning", str(path)], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout
    for name in re.findall(r"(?:configs|runs)/[\w.]+\.\w+", path.read_text()):
        assert (ROOT / name).is_file(), name


def run_shell(world: Path, output: Path, name: str, *more: str, **environment: str) -> str:
    config = output.with_suffix(".yaml")
    config.write_text("report_to: none\n")
    # other words than the shell file's own win, as on a user's command line
    result = subprocess.run(
        ["bash", str(ROOT / "runs" / name), *arguments(world, output, *more)],
        env={**os.environ, "PYTHON": sys.executable, "CONFIG": str(config), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, check=False, timeout=300, cwd="/",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
def test_one_gpu_lora_trains(world, tmp_path):
    run_shell(world, tmp_path / "run", "one_gpu_lora.sh", "--lora_rank", "2", "--max_steps", "2")
    assert len(losses(tmp_path / "run")) == 2
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_one_node_trains_on_two_ranks(world, tmp_path):
    out = run_shell(world, tmp_path / "run", "one_node.sh", "--max_steps", "2", NUM_GPUS="2", LAUNCHER="torchrun")
    assert "in 2 x" in out  # two ranks
    assert len(losses(tmp_path / "run")) == 2


def test_a_slurm_job_has_a_log_on_a_fresh_clone_and_all_its_cores():
    text = (ROOT / "runs/many_nodes.slurm").read_text()
    assert "#SBATCH --open-mode=append" in text  # a requeued job writes on, and its first log is what tells why
    log = re.search(r"^#SBATCH --output=(.*)", text, re.MULTILINE).group(1)
    assert "/" not in log  # Slurm makes no folder, and outputs/ is not in the repository
    assert "export SRUN_CPUS_PER_TASK=" in text.partition("\nsrun ")[0]


def test_the_nodes_of_a_hostfile_fail_fast(tmp_path, monkeypatch):
    runner = pytest.importorskip("deepspeed.launcher.runner")
    text = (ROOT / "runs/many_nodes_hostfile.sh").read_text()
    words = re.search(r"launcher\.runner (.*) \\", text).group(1).replace('"', "").replace("$PORT", "29500").split()
    args = runner.parse_args([*words, "train_mpo.py"])
    pdsh = runner.PDSHRunner(args, "world")
    command = pdsh.get_cmd({}, {"node1": [0], "node2": [0]})[0]
    assert command[: command.index("cd " + os.path.abspath(".") + ";")].count("-k") == 1


def test_an_unknown_launcher_is_refused():
    environment = {**os.environ, "LAUNCHER": "mpirun"}
    result = subprocess.run(
        ["bash", str(ROOT / "runs" / "one_node.sh")], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "expected torchrun, deepspeed or accelerate" in result.stderr
