"""What public CI and the commit hooks run is what the README and the Makefile name."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


def test_ci_runs_the_commands_of_the_readme_and_the_makefile_has_them():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    steps = [step for job in yaml.safe_load(workflow)["jobs"].values() for step in job["steps"]]
    runs = " ".join(step.get("run", "") for step in steps)
    targets = set(re.findall(r"make ([\w-]+)", runs))
    assert targets == {"lint", "test-fast", "quickstart"}
    assert targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"make {target}" in readme for target in targets - {"lint"})


def test_commit_hooks_are_make_lint_with_the_same_ruff():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    pinned = re.search(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert repository["rev"] == f"v{pinned}"
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert re.findall(r"ruff (\w+)", lint) == [hook["id"].removeprefix("ruff-") for hook in repository["hooks"]]


def make_environment(folder: Path, *variables: str) -> subprocess.CompletedProcess:
    if shutil.which("make") is None:
        pytest.skip("no make here")
    target = f"{folder / '.venv'}/bin/pip"
    command = ["make", "-C", str(ROOT), target, f"VENV={folder / '.venv'}", *variables]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def write_program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_a_python_without_pip_gets_one_sentence_and_leaves_nothing_that_a_retry_trips_over(tmp_path):
    half = write_program(
        tmp_path / "half", '[ "$1" = -c ] && exit 0; mkdir -p "$3/bin"; touch "$3/bin/python"; echo no pip; exit 1'
    )
    done = make_environment(tmp_path, f"PYTHON={half}", "UV=")
    assert done.returncode == 2
    assert "install venv with pip (Debian, Ubuntu: apt install python3-venv) or uv" in done.stderr
    assert not (tmp_path / ".venv").exists()

    (tmp_path / ".venv/bin").mkdir(parents=True)  # as an earlier attempt left it
    (tmp_path / ".venv/bin/python").touch()
    whole = write_program(tmp_path / "whole", '[ "$1" = -c ] && exit 0; mkdir -p "$3/bin"; touch "$3/bin/pip"')
    assert make_environment(tmp_path, f"PYTHON={whole}", "UV=").returncode == 0
    assert (tmp_path / ".venv/bin/pip").exists()


def test_uv_makes_the_environment_where_it_is_installed(tmp_path):
    uv = write_program(tmp_path / "uv", f'echo "$@" > {tmp_path}/asked; for last; do :; done; mkdir -p $last/bin')
    assert make_environment(tmp_path, f"UV={uv}").returncode == 0
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("venv --quiet --seed")  # --seed brings pip
    assert asked.strip().endswith(str(tmp_path / ".venv"))
