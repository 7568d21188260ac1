"""data -> Hub -> load_dataset -> train -> evaluate -> Hub -> from_pretrained -> demo, from empty caches."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[2]
STAGES = (
    "data: preference pairs",
    "data: a stranger loads it",
    "start model",
    "train: model and pairs come from the Hub",
    "evaluate",
    "model: a stranger asks it",
    "demo: built, started",
    "done: ada/MMPR-mini, ada/start-mini-MPO and the Space ada/demo",
)


@pytest.mark.slow
def test_the_whole_life(tmp_path: Path) -> None:
    out = tmp_path / "zebediah"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    done = subprocess.run(
        ["bash", str(ROOT / "runs/whole_life.sh"), str(out)],
        cwd=tmp_path,
        env={**kept, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "START_STEPS": "20", "USER": "zebediah"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    positions = [done.stdout.index(f"== {stage}") for stage in STAGES]
    assert positions == sorted(positions)
    assert "read back from ada/MMPR-mini" in done.stdout
    assert "both models answered" in done.stdout

    folders = {path.name: path for path in (out / "hub").iterdir() if path.is_dir()}
    assert folders.keys() == {"MMPR-mini", "start-mini", "start-mini-MPO", "demo"}
    card = (folders["start-mini-MPO"] / "README.md").read_text()
    assert "base_model: ada/start-mini" in card
    assert "| Mini world | cot | accuracy |" in card
    for path in (out / "hub").rglob("*"):
        if path.is_file():
            assert_nothing_private(path, str(tmp_path))


def assert_nothing_private(path: Path, here: str) -> None:
    """The words are looked for in everything a reader gets out of a file."""
    texts = [path.read_bytes()]
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        texts = [repr(table.schema.metadata).encode()]
        for row in table.to_pylist():
            row["images"] = [picture["path"] for picture in row["images"]]
            texts.append(repr(row).encode())
    for text in texts:
        for word in ("zebediah", "hf_loopbackwriter", here, "/mnt/cluster", "/home/"):
            assert word.encode() not in text, (path, word)
