"""Training on a data set on the Hub, read by row groups: connections that drop, a stop in the middle, other content.

pytest tests/hub/test_stream_training.py
"""

import json
from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from huggingface_hub import HfFileSystem, constants
from loopback import LoopbackHub
from test_row_groups import rows
from test_train_mpo import arguments, losses
from tiny_world import make_model_folder

import train_mpo
from internvl_mpo.errors import run_program
from internvl_mpo.mmpr import row_groups
from internvl_mpo.training import trainer

DATA = "hub:ada/pairs"


@pytest.fixture
def hub(monkeypatch, tmp_path) -> Iterator[LoopbackHub]:
    """A Hub on which this process streams, and on which `put` is at home."""
    with LoopbackHub() as server:
        for module, name in ((constants, "ENDPOINT"), (datasets.config, "HF_ENDPOINT")):
            monkeypatch.setattr(module, name, server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        yield server
    forget()


def forget() -> None:
    """What a process keeps of a data set: a new start knows nothing."""
    row_groups.open_table.cache_clear()
    row_groups._kept.cache_clear()
    row_groups._file.cache_clear()
    HfFileSystem.clear_instance_cache()


@pytest.fixture
def world(hub, tmp_path) -> Path:
    """A start model, twelve pairs as two shards in `data` and on the Hub."""
    make_model_folder(tmp_path / "start")
    (tmp_path / "data").mkdir()
    put(hub, tmp_path, 0, rows(6))
    put(hub, tmp_path, 1, rows(6, 6))
    return tmp_path


def put(hub: LoopbackHub, folder: Path, shard: int, pairs: list[dict]) -> None:
    """Write a shard of row groups of four rows and push it."""
    path = folder / "data" / f"{shard}.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(pairs), path, row_group_size=4)
    upload(hub, path, path.name)


def upload(hub: LoopbackHub, content: Path | bytes, name: str) -> None:
    api = huggingface_hub.HfApi(endpoint=hub.url, token="hf_loopbackwriter")
    api.create_repo("ada/pairs", repo_type="dataset", exist_ok=True)
    api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id="ada/pairs", repo_type="dataset")


def train(world: Path, output: str, *more: str, data: str = DATA) -> int:
    forget()
    words = ("--data", data, "--preflight_workers", "0", "--save_steps", "1", *more)
    return run_program(train_mpo.main, arguments(world, world / output, *words))


@pytest.fixture
def expected(world) -> dict[int, float]:
    """Losses of the same pairs on the disk."""
    assert train(world, "here", data=str(world / "data")) == 0
    return losses(world / "here")


class Killed(BaseException):
    """The process ends here."""


def killed_after(world: Path, step: int, monkeypatch) -> None:
    """Begin the run on the Hub's data and end it in the step after this one."""
    plain, calls = trainer.score_pairs, []

    def score_pairs(*args, **options):
        calls.append(1)
        if len(calls) > step:
            raise Killed
        return plain(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer, "score_pairs", score_pairs)
        train(world, "run")


@pytest.mark.slow
def test_a_run_that_loses_its_connection_and_is_killed_ends_in_the_losses_of_the_same_pairs_here(
    hub, world, expected, monkeypatch
):
    hub.fail("GET", r"/resolve/.*parquet", reply_bytes=300)
    killed_after(world, 2, monkeypatch)
    hub.fail("GET", r"/resolve/.*parquet", lose_reply=True)
    assert train(world, "run") == 0
    assert not hub.faults
    assert losses(world / "run") == expected


@pytest.mark.slow
def test_without_a_network_a_run_goes_on_with_the_files_in_the_cache_and_without_them_is_refused(
    hub, world, expected, monkeypatch, capsys
):
    killed_after(world, 2, monkeypatch)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    capsys.readouterr()
    assert train(world, "run") == 2
    assert f"cannot load {DATA}" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    huggingface_hub.snapshot_download("ada/pairs", repo_type="dataset")
    downloaded = len(hub.requests)
    assert downloaded > asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert train(world, "run") == 0
    assert len(hub.requests) == downloaded
    assert losses(world / "run") == expected


@pytest.mark.slow
def test_other_content_of_a_shard_is_refused_by_its_name_and_another_card_is_not(hub, world, monkeypatch, capsys):
    killed_after(world, 1, monkeypatch)
    upload(hub, b"# Pairs\n", "README.md")
    killed_after(world, 1, monkeypatch)  # one more step
    pairs = rows(6, 6)
    pairs[0]["images"][0]["bytes"] = rows(1)[0]["images"][0]["bytes"]  # another picture under the same name
    put(hub, world, 1, pairs)
    capsys.readouterr()
    assert train(world, "run") == 2
    said = capsys.readouterr().err
    assert f"checkpoint-2 was made with another {DATA}/1.parquet" in said
    assert json.loads((world / "run" / "checkpoint-2" / "mpo_state.json").read_text())["global_step"] == 2
