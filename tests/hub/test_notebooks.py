"""The notebooks run from top to bottom, on a tiny model in place of the real one."""

import json
import os
import re
from pathlib import Path

import nbclient
import nbformat
import pytest
from tiny_world import make_model_folder

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Execute a notebook in an empty folder; return everything it showed."""
    variables = {"MPO_MODEL": make_model_folder(folder / "tiny"), "MPO_CHECKOUT": ROOT, "MPO_STEPS": 3}
    variables |= {"MPO_MAX_NEW_TOKENS": 8, "OMP_NUM_THREADS": 1, "HF_HUB_OFFLINE": 1}
    for key, value in variables.items():
        monkeypatch.setenv(key, str(value))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    work = folder / "work"
    work.mkdir()
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(work)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.get("text") or json.dumps(output.get("data", {})) for output in outputs)


@pytest.mark.slow
def test_use_internvl2_8b_mpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run("use_internvl2_8b_mpo.ipynb", tmp_path, monkeypatch)
    assert "M weights on cpu" in shown
    assert "--- direct" in shown
    assert "--- cot" in shown
    assert "Counter" in shown
    assert "image/png" in shown


@pytest.mark.slow
def test_train_your_own_with_mpo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = run("train_your_own_with_mpo.ipynb", tmp_path, monkeypatch)
    assert "pairs read; the first of each kind" in shown
    assert "[correctness]" in shown
    assert "step 1: loss" in shown
    assert "--- before" in shown
    assert "--- after" in shown
    assert "loaded in a clean process" in shown
    assert "training_curves.png" in shown
    assert "lora_rank: 16" in (tmp_path / "work/mpo_run/hub/training_settings.yaml").read_text()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_hold_no_outputs_and_nothing_of_this_computer(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") and not cell.get("execution_count") for cell in notebook.cells)
    assert notebook.cells[1].metadata.tags == ["parameters"]
    assert not re.search(r"/home/|/root/|/tmp/|hf_[A-Za-z0-9]{10}", path.read_text())
