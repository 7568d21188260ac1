"""The programs that prove the code on a GPU and at full size run to their end on tiny shapes, so they cannot rot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))
TOKENIZER = ROOT / "../shared/tokenizers/qwen2"

from gpu_proof import STAGES, Stage, page, run_stage  # noqa: E402
from gpu_proof import Settings as ProofSettings  # noqa: E402


def bench(name: str, *words: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "bench" / name), *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
def test_every_stage_of_the_gpu_proof_runs_on_a_cpu(tmp_path):
    bench("gpu_proof.py", "--device", "cpu", "--size", "tiny", "--minutes", "9", "--output", str(tmp_path))
    result = json.loads((tmp_path / "gpu_proof.json").read_text())
    states = {stage["name"]: stage["state"] for stage in result["stages"]}
    assert states == {stage.name: "done" for stage in STAGES}, result
    rows = {stage["name"]: stage["rows"] for stage in result["stages"]}
    checks = [row for row in rows["parity"] if "holds" in row]
    assert len(checks) >= 12
    assert all(row["holds"] for row in checks), checks
    assert {row["reference"] for row in rows["step_large"] if "ms a pair" in row} == {"cached", "live"}
    assert all(row["losses bit-identical"] for row in rows["resume"])
    text = (tmp_path / "gpu_proof.md").read_text()
    assert "only the program is tested" in text
    assert all(stage.title in text for stage in STAGES)


@pytest.mark.slow
def test_the_proof_gives_liger_the_decoder_also_where_liger_is_not_installed(monkeypatch):
    import gpu_stages
    from gpu_model import Machine

    given = []
    monkeypatch.setattr(gpu_stages.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(gpu_stages.triton_interpreter, "prepare", lambda: None)
    monkeypatch.setattr(gpu_stages, "use_liger_kernels", given.append)
    assert all(row["holds"] for row in gpu_stages.liger_parity(Machine("cpu", "tiny")))
    assert len(given) >= 4
    assert all(hasattr(decoder, "layers") for decoder in given)


@pytest.mark.skipif(not TOKENIZER.is_dir(), reason="the tokenizer of Qwen2 is not here")
@pytest.mark.slow
def test_the_rehearsal_goes_from_an_official_folder_to_a_chat(tmp_path):
    words = ["--size", "tiny", "--tokenizer", str(TOKENIZER), "--output", str(tmp_path), "--ways", "lora"]
    bench("full_size_rehearsal.py", *words)
    result = json.loads((tmp_path / "rehearsal.json").read_text())
    assert list(result["stages"]) == ["make", "publish", "train_lora", "publish_lora", "chat_lora"]
    chat = json.loads((tmp_path / "lora" / "published.json").read_text())
    assert chat["tiles"] == 13
    assert chat["answer"]
    log = (tmp_path / "lora/run/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in log if '"loss"' in line] == [1, 2]


@pytest.fixture
def stage_of_words(monkeypatch, tmp_path):
    """A stage whose process runs the given Python code."""

    def run(code: str, limit: int = 60, left: float = 60.0) -> dict:
        program = tmp_path / "program.py"
        program.write_text(code)
        monkeypatch.setattr("gpu_proof.sys.executable", sys.executable)
        monkeypatch.setattr("gpu_proof.__file__", str(program))
        return run_stage(Stage("parity", "Title", limit, 5), ProofSettings(), tmp_path, left, [])

    return run


def test_a_stage_that_is_cut_off_keeps_the_rows_it_had(stage_of_words, tmp_path):
    rows = tmp_path / "parity.jsonl"
    code = (
        f"import time; out = open({str(rows)!r}, 'w'); out.write('{{\"a\": 1}}\\n{{\"a\"'); out.flush(); time.sleep(60)"
    )
    found = stage_of_words(code, limit=6)
    assert (found["state"], found["rows"]) == ("cut off", [{"a": 1}])
    assert "stopped after" in found["note"]


def test_a_stage_that_fails_says_why_and_one_without_time_is_named(stage_of_words):
    found = stage_of_words("raise SystemExit('no such kernel')")
    assert (found["state"], found["rows"]) == ("failed", [])
    assert "no such kernel" in found["note"]
    late = stage_of_words("", left=4.0)
    assert late["state"] == "not run"
    text = page({"command": "c", "date": "d", "device": "cuda", "size": "full", "stages": [found, late]})
    assert "failed: exit code 1: no such kernel." in text
    assert "not run: 4 s were left" in text
