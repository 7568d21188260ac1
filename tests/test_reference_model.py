"""A reference that is not the start model: its log-probs are those of that model, and the policy starts elsewhere.

pytest tests/test_reference_model.py
"""

import json
from pathlib import Path

import pyarrow.parquet
import pytest
from test_train_mpo import train, world  # noqa: F401 - world is a fixture

from internvl_mpo.training.reference_pass import ReferencePass

LORA = ("--lora_rank", "2", "--lora_on", "both")


def log(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def reference_logps(folder: Path) -> list[dict[str, tuple[float, float]]]:
    """Log-probs by digest of each reference in a cache."""
    found = []
    for cache in sorted(folder.iterdir()):
        rows = [row for path in cache.glob("part-*.parquet") for row in pyarrow.parquet.read_table(path).to_pylist()]
        found.append({row["digest"]: (row["chosen_logps"], row["rejected_logps"]) for row in rows})
    return found


@pytest.fixture(scope="module")
def first(world, tmp_path_factory) -> Path:
    """A first round of four steps."""
    output = tmp_path_factory.mktemp("first") / "run"
    assert train(world, output) == 0
    return output


@pytest.mark.parametrize("more", [(), pytest.param(LORA, marks=pytest.mark.slow)])
def test_a_later_round_has_the_log_probs_of_the_first_model_and_starts_at_the_policy_before(
    world,
    first,
    tmp_path,
    more,
):
    start = ("--model", str(first / "model"))
    assert train(world, tmp_path / "moved", *start, *more) == 0
    assert train(world, tmp_path / "kept", *start, "--reference_model", str(world / "start"), *more) == 0
    assert reference_logps(tmp_path / "kept" / "reference") == reference_logps(first / "reference")
    moved, kept = log(tmp_path / "moved")[0], log(tmp_path / "kept")[0]
    assert kept["loss_generation"] == moved["loss_generation"]  # of the policy alone
    assert moved["rewards/margin"] == pytest.approx(0, abs=1e-6)
    assert abs(kept["rewards/margin"]) > 0.01
    assert kept["logps/chosen"] == moved["logps/chosen"]


def test_the_first_model_is_read_only_where_log_probs_are_missing_and_none_is_taken_for_another(
    world,
    first,
    tmp_path,
    monkeypatch,
    capsys,
):
    start = ("--model", str(first / "model"), "--reference_model", str(world / "start"))
    known = ("--reference_cache", str(first / "reference"))
    with monkeypatch.context() as patch:
        patch.setattr(ReferencePass, "before", lambda *given, **more: pytest.fail("a reference pass"))
        assert train(world, tmp_path / "run", *start, *known) == 0
    assert train(world, tmp_path / "run", "--model", str(first / "model"), "--max_steps", "6") == 2
    assert "start model" in capsys.readouterr().err


def test_a_reference_that_reads_other_tokens_is_refused_before_the_pairs_are_read(world, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for path in (world / "start").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["added_tokens"][-1]["content"] = "<another>"
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert train(world, tmp_path / "run", "--reference_model", str(other)) == 2
    assert "has another vocabulary than" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("more", [("--reference_sync_steps", "2"), (*LORA, "--reference", "adapter_off")])
def test_two_references_are_refused(world, tmp_path, capsys, more):
    assert train(world, tmp_path / "run", "--reference_model", str(world / "start"), *more) == 2
    assert "reference_model stands still" in capsys.readouterr().err
