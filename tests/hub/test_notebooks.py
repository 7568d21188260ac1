"""The notebooks run from top to bottom, on a tiny model in place of the real one."""

import json
import re
import shutil
from pathlib import Path

import nbclient
import nbformat
import pytest
from tiny_world import make_model_folder

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


PROGRAMS = ("train_mpo.py", "internvl_mpo", "modeling_internvl_mpo")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like a checkout, with a tiny model in it, so that nothing is written into this one."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    for name in PROGRAMS:
        (folder / name).symlink_to(ROOT / name)
    make_model_folder(folder / "tiny")
    return folder


def run(name: str, work: Path, model: str, monkeypatch: pytest.MonkeyPatch, last_cell: int | None = None) -> str:
    """Execute a notebook, or its first cells, in a folder; return everything it showed."""
    variables = {"MPO_MODEL": model, "MPO_STEPS": 3, "MPO_MAX_NEW_TOKENS": 8, "OMP_NUM_THREADS": 1, "HF_HUB_OFFLINE": 1}
    for key, value in variables.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.delenv("PYTHONPATH", raising=False)
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    notebook.cells = notebook.cells[: None if last_cell is None else last_cell + 1]
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(work)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text") or json.dumps(output.get("data", {})) for output in outputs)


@pytest.mark.slow
def test_use_internvl2_8b_mpo_in_its_own_folder(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run("use_internvl2_8b_mpo.ipynb", checkout / "notebooks", "../tiny", monkeypatch)
    assert "M weights on cpu" in shown
    assert "--- direct" in shown
    assert "--- cot" in shown
    assert "Counter" in shown
    assert "image/png" in shown


@pytest.mark.slow
def test_train_your_own_with_mpo_in_its_own_folder(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run("train_your_own_with_mpo.ipynb", checkout / "notebooks", "../tiny", monkeypatch)
    assert "pairs read; the first of each kind" in shown
    assert "[correctness]" in shown
    assert "step 1: loss" in shown
    assert "--- before" in shown
    assert "--- after" in shown
    assert "loaded in a clean process" in shown
    assert "training_curves.png" in shown
    assert "lora_rank: 16" in (checkout / "notebooks/mpo_run/hub/training_settings.yaml").read_text()


@pytest.mark.slow
def test_train_your_own_with_mpo_from_the_root(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the line where training starts; from there on the two are the same."""
    shown = run("train_your_own_with_mpo.ipynb", checkout, "tiny", monkeypatch, last_cell=5)
    assert "pairs read; the first of each kind" in shown
    assert (checkout / "mpo_run/pairs/meta.json").is_file()


def test_a_notebook_without_a_checkout_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(ROOT / "notebooks/train_your_own_with_mpo.ipynb", as_version=4)
    monkeypatch.chdir(tmp_path)
    code = "\n".join(cell.source for cell in notebook.cells[:3] if cell.cell_type == "code")
    with pytest.raises(SystemExit, match=r"no train_mpo.py in \., \.\., mpo: set SOURCE"):
        exec(code, {})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_hold_no_outputs_and_nothing_of_this_computer(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in notebook.cells)
    assert notebook.cells[1].metadata.tags == ["parameters"]
    assert not re.search(r"/home/|/root/|/tmp/|hf_[A-Za-z0-9]{10}", path.read_text())
