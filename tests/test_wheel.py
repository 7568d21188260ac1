"""The wheel is the whole product: built from a source archive, installed where this repository cannot be imported.

The new environment borrows the packages of this one through a `.pth` file; the `.pth` files among them, an editable
installation of this repository's for one, are not read.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from test_train_mpo import arguments, losses, world  # noqa: F401 - `world` is a fixture

from internvl_mpo.programs import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("internvl_mpo", "modeling_internvl_mpo")
SOURCES = (*PACKAGES, "dataset_scripts", "runs", "configs", "README.md", "LICENSE", "MANIFEST.in")
SLOW_TO_START = {"train", "demo", "memory", "replay"}  # their settings need torch


def test_every_program_has_a_command_and_every_command_a_program():
    package = ROOT / "internvl_mpo"
    modules = [path for path in package.rglob("*.py") if "run_program(main)" in path.read_text(encoding="utf-8")]
    names = {".".join(path.relative_to(package).with_suffix("").parts).removesuffix(".__main__") for path in modules}
    programs = {f"-m internvl_mpo.{name}" for name in names - {"__main__"}}
    programs |= {path.name for path in ROOT.glob("*.py")} - {"setup.py"}
    folders = ("dataset_scripts", "runs")
    programs |= {f"{folder}/{path.name}" for folder in folders for path in (ROOT / folder).glob("*.py")}
    programs -= {"dataset_scripts/mmpr.py", "-m internvl_mpo.ablation"}  # a `datasets` builder; what runs/ starts
    assert programs == {started for started, _ in COMMANDS.values()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from the source archive, as package indexes do it, in a copy: a build leaves files beside setup.py."""
    copy = tmp_path_factory.mktemp("source") / "copy"
    ignored = shutil.ignore_patterns("__pycache__")
    copy.mkdir()
    for name in (*SOURCES, "pyproject.toml", *(path.name for path in ROOT.glob("*.py"))):
        place = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        place(ROOT / name, copy / name, **({"ignore": ignored} if (ROOT / name).is_dir() else {}))
    run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", str(copy.parent)], copy)
    (archive,) = copy.parent.glob("*.tar.gz")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(copy.parent)]
    run([sys.executable, "-m", "pip", "wheel", "--quiet", *options, str(archive)], copy.parent)
    return next(copy.parent.glob("*.whl"))


@pytest.fixture(scope="module")
def scripts(wheel, tmp_path_factory) -> Path:
    """Folder of the interpreter and the console command of a new environment."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder.parent)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    run([*pip, str(wheel)], folder.parent)
    (inside,) = folder.glob("lib/python*/site-packages")
    (inside / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n", encoding="utf-8")
    return folder / "bin"


def run(command: list[str], folder: Path, expected: int = 0) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == expected, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


@pytest.mark.slow
def test_programs_and_run_files_come_along_and_nothing_else_becomes_importable(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)
    programs = ("*.py", "dataset_scripts/*.py", "runs/*.py", "configs/**/*")
    for pattern in (*programs, "internvl_mpo/**/*.html", "internvl_mpo/**/*.css"):
        for path in ROOT.glob(pattern):
            name = str(path.relative_to(ROOT))
            if path.is_file() and name != "setup.py":
                assert (name if name.startswith("internvl_mpo/") else f"internvl_mpo/checkout/{name}") in names


@pytest.mark.slow
def test_help_of_every_command_says_what_can_be_typed(scripts, tmp_path):
    text = run([str(scripts / "internvl-mpo"), "--help"], tmp_path)
    assert all(f"  {name} " in text for name in COMMANDS)
    for name in set(COMMANDS) - SLOW_TO_START:
        text = run([str(scripts / "internvl-mpo"), name, "--help"], tmp_path)
        assert f" internvl-mpo {name} " in text
        assert not re.search(r"python (-m internvl_mpo|\w+/?\w+\.py)", text), name
    assert "expected one of quickstart, train" in run([str(scripts / "internvl-mpo"), "trian"], tmp_path, expected=2)


@pytest.mark.slow
def test_quickstart_finds_its_programs_and_its_run_file(scripts, tmp_path):
    files = [ROOT / "internvl_mpo" / "quickstart.py", ROOT / "internvl_mpo" / "rounds" / "lanes.py"]
    source = "".join(path.read_text(encoding="utf-8") for path in files)
    names = sorted(set(re.findall(r'program\("([^"]+)"\)', source)))
    assert len(names) >= 6
    code = (
        "from pathlib import Path; from internvl_mpo import programs, quickstart, settings, stages\n"
        f"assert all(n.startswith('-m ') or Path(programs.program(n)[1]).is_file() for n in {names})\n"
        "config = quickstart.QuickstartSettings().config\n"
        "assert settings.read_yaml(config)['max_steps'] == 100\n"
        "print(stages._short(quickstart.training_command(Path('o'), config, Path('m'), Path('d'), 0)))"
    )
    assert "internvl-mpo train --config configs/mini.yaml" in run([str(scripts / "python"), "-c", code], tmp_path)


@pytest.mark.slow
def test_a_world_is_made_and_a_training_runs_outside_the_checkout(scripts, world, tmp_path):
    command = str(scripts / "internvl-mpo")
    sizes = ["--num_annotated", "3", "--num_drills", "1", "--num_questions", "2", "--num_open", "1", "--num_test", "2"]
    run([command, "mini", "world", "--output", "world", *sizes], tmp_path)
    assert (tmp_path / "world" / "test.jsonl").is_file()
    more = ["--config", "configs/mini.yaml", "--max_steps", "1", "--model_dir", "trained", "--held_out_share", "0"]
    given = arguments(world, tmp_path / "run", *more, "--image_root", str(world), "--reference_cache", "none")
    run([str(scripts / "python"), "-m", "internvl_mpo", "train", *given], tmp_path)
    assert len(losses(tmp_path / "run")) == 1
    assert (tmp_path / "trained" / "config.json").is_file()
    wrong = run([command, "train", "--config", "configs/none.yaml"], tmp_path, expected=2)
    assert "cannot read config file configs/none.yaml: No such file" in wrong
