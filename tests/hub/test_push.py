"""Pushing: once is enough, a cut is resumed, and nobody ever sees half of it."""

import errno
import hashlib
import random
from pathlib import Path

import pytest
from huggingface_hub import constants
from loopback import READER, LoopbackHub

from internvl_mpo.engines.revision import model_revision
from internvl_mpo.errors import BadInputError
from internvl_mpo.publish.hub import check_access, preview, push_folder

NAME = "ada/model"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two large files, a card and a configuration."""
    root = tmp_path / "folder"
    (root / "pictures").mkdir(parents=True)
    rng = random.Random(0)
    for number in (1, 2):
        (root / f"model-0000{number}-of-00002.safetensors").write_bytes(rng.randbytes(300_000))
    (root / "pictures" / "curves.png").write_bytes(rng.randbytes(2_000))
    (root / "config.json").write_text('{"model_type": "internvl_chat"}')
    (root / "README.md").write_text("---\nlicense: mit\n---\n# Model\n")
    return root


def push(folder: Path, **options) -> str:
    return push_folder(folder, NAME, repo_type="model", **options).address


def put(hub: LoopbackHub) -> int:
    """Bytes of large files that arrived so far."""
    return sum(size for method, path, status, size in hub.requests if method == "PUT" and status == 200)


def content(hub: LoopbackHub, revision: str = "main") -> set[str]:
    return hub.repository("models", NAME).paths(revision)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_everything_comes_in_one_commit(hub: LoopbackHub, folder: Path) -> None:
    assert push(folder) == f"{hub.url}/{NAME}"
    assert content(hub) == names(folder)
    commits = hub.repository("models", NAME).refs["main"]
    assert [commit.title for commit in commits] == ["initial commit", "Publish model (5 files)"]
    assert hub.blobs[commits[-1].files["config.json"].sha256] == (folder / "config.json").read_bytes()


def test_publishing_again_changes_nothing(hub: LoopbackHub, folder: Path, capsys: pytest.CaptureFixture) -> None:
    push(folder)
    commits, sent = len(hub.repository("models", NAME).refs["main"]), put(hub)
    push(folder)
    assert "holds exactly this folder already" in capsys.readouterr().out
    assert len(hub.repository("models", NAME).refs["main"]) == commits
    assert put(hub) == sent


def test_a_cut_upload_is_taken_up_where_it_ended(hub: LoopbackHub, folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    hub.fail("PUT", hashlib.sha256(shard.read_bytes()).hexdigest(), times=100, cut_after=1000)
    with pytest.raises(BadInputError, match=r"the connection to the Hub broke.*the same command goes on") as caught:
        push(folder, attempts=2)
    assert "\n" not in str(caught.value)
    assert content(hub) == set()  # nothing is visible, though one large file has arrived
    assert 300_000 < put(hub) < 600_000
    hub.faults.clear()
    push(folder)
    assert content(hub) == names(folder)
    assert put(hub) == 602_000  # each large file once


@pytest.mark.parametrize("seed", range(6))
def test_connections_cut_at_random_never_show_half_a_repository(hub: LoopbackHub, folder: Path, seed: int) -> None:
    hub.cut_at_random(0.35, seed)
    seen = []
    for _ in range(20):
        try:
            push(folder, attempts=2)
        except BadInputError as error:
            assert "\n" not in str(error)
            if ("models", NAME) in hub.repositories:
                seen.append(content(hub))
        else:
            break
    else:
        pytest.fail("never finished")
    assert content(hub) == names(folder)
    assert all(paths in (set(), names(folder)) for paths in seen)
    assert len(hub.repository("models", NAME).refs["main"]) == 2


def test_a_lost_confirmation_is_not_a_second_commit(hub: LoopbackHub, folder: Path) -> None:
    hub.fail("POST", "/commit/", lose_reply=True)
    push(folder)
    assert len(hub.repository("models", NAME).refs["main"]) == 2


def test_server_errors_are_waited_for(hub: LoopbackHub, folder: Path, capsys: pytest.CaptureFixture) -> None:
    hub.fail("POST", "/api/repos/create", status=500)
    hub.fail("POST", "/commit/", status=503)
    push(folder)
    assert content(hub) == names(folder)
    errors = capsys.readouterr().err
    assert errors.count("the Hub failed") == 2
    assert len(hub.pauses) >= 2


def test_a_server_that_stays_down_is_given_up(hub: LoopbackHub, folder: Path) -> None:
    hub.fail("POST", "/commit/", times=100, status=500)
    with pytest.raises(BadInputError, match=r"the Hub failed \(status 500\) \(3 attempts\)"):
        push(folder, attempts=3)
    assert content(hub) == set()
    hub.faults.clear()
    sent = put(hub)
    push(folder)
    assert put(hub) == sent


def test_retry_after_is_honoured(hub: LoopbackHub, folder: Path) -> None:
    hub.fail("POST", "/commit/", status=429, headers={"Retry-After": "37"})
    push(folder)
    assert 37 in hub.pauses
    hub.fail("POST", "/api/repos/create", status=429, headers={"Retry-After": "4000"})
    with pytest.raises(BadInputError, match="asks to wait 4000 s"):
        push(folder)


@pytest.mark.parametrize(
    ("token", "name", "message"),
    [
        ("hf_wrongwrongwrong", NAME, "does not accept the token"),
        (READER, "bob/model", "may not write to bob/model"),
        (None, NAME, "there is no Hub token"),
        (READER, NAME, "may not write to ada/model"),
    ],
)
def test_tokens_without_rights(
    hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch, token: str | None, name: str, message: str
) -> None:
    push(folder)
    requests = len(hub.requests)
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    (folder / "config.json").write_text("{}")
    with pytest.raises(BadInputError, match=message) as caught:
        push_folder(folder, name, repo_type="model", overwrite=True)
    assert not token or token not in str(caught.value)
    assert not [path for method, path, *_ in hub.requests[requests:] if method == "PUT"]
    assert hub.text("models", NAME, "config.json") == '{"model_type": "internvl_chat"}'


def test_no_room_left_on_the_hub(hub: LoopbackHub, folder: Path) -> None:
    hub.quota_bytes = 400_000
    with pytest.raises(BadInputError, match="the Hub has no room left: Storage limit reached"):
        push(folder)
    assert content(hub) == set()
    hub.quota_bytes = None
    push(folder)
    assert content(hub) == names(folder)


def test_a_full_disk_is_named(hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_, **__) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi.preupload_lfs_files", full)
        with pytest.raises(BadInputError, match="the disk is full"):
            push(folder)
    push(folder)
    assert content(hub) == names(folder)


def test_other_content_is_neither_replaced_nor_removed_unasked(hub: LoopbackHub, folder: Path) -> None:
    push(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    (folder / "config.json").write_text("{}")
    before = hub.repository("models", NAME).head("main")
    with pytest.raises(BadInputError, match=r"config.json would be replaced \(2 files in all\).*--overwrite"):
        push(folder)
    assert hub.repository("models", NAME).head("main") is before
    push(folder, overwrite=True)
    assert content(hub) == names(folder)


def test_a_preview_tells_what_would_change(hub: LoopbackHub, folder: Path) -> None:
    push(folder)
    (folder / "config.json").write_text("{}")
    (folder / "pictures/curves.png").rename(folder / "curves.png")
    requests = len(hub.requests)
    plan = preview(folder, NAME, repo_type="model")
    assert [(change.kind, change.path) for change in plan.changes if change.kind != "same"] == [
        *(("changed", "config.json"), ("new", "curves.png"), ("gone", "pictures/curves.png"))
    ]
    assert str(plan).endswith("1 new, 1 changed, 3 same, 1 gone; 2.0 kB to send")
    assert {method for method, *_ in hub.requests[requests:]} == {"GET"}
    hub.fail("GET", "/api/models", times=100, status=500)
    with pytest.raises(BadInputError, match=r"the Hub failed \(status 500\)"):
        preview(folder, NAME, repo_type="model")


def test_somebody_else_commits_during_the_upload(
    hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    push(folder)
    (folder / "config.json").write_text("{}")
    original = HfApi.preupload_lfs_files

    def interrupted(self, *arguments, **options):
        monkeypatch.setattr(HfApi, "preupload_lfs_files", original)
        self.upload_file(path_or_fileobj=b"x", path_in_repo="theirs.txt", repo_id=NAME)
        return original(self, *arguments, **options)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", interrupted)
    with pytest.raises(BadInputError, match="somebody else changed ada/model"):
        push(folder, overwrite=True)
    assert "theirs.txt" in content(hub)


def test_pull_requests_leave_main_alone(hub: LoopbackHub, folder: Path) -> None:
    push(folder)
    (folder / "config.json").write_text("{}")
    assert push(folder, create_pr=True) == f"{hub.url}/{NAME}/discussions/1"
    assert hub.text("models", NAME, "config.json") == '{"model_type": "internvl_chat"}'
    assert hub.text("models", NAME, "config.json", "refs/pr/1") == "{}"
    (folder / "config.json").write_text('{"again": 1}')
    push(folder, revision="refs/pr/1", overwrite=True)
    assert hub.text("models", NAME, "config.json", "refs/pr/1") == '{"again": 1}'
    hub.fail("POST", "/commit/", lose_reply=True)
    with pytest.raises(BadInputError, match=r"look for it at .*/discussions"):
        push(folder, create_pr=True)
    assert set(hub.repository("models", NAME).refs) == {"main", "refs/pr/1", "refs/pr/2"}


def test_branches_are_made(hub: LoopbackHub, folder: Path) -> None:
    push(folder, revision="v1.0")
    assert content(hub, "v1.0") == names(folder)
    assert content(hub) == set()


def test_private_stays_private(hub: LoopbackHub, folder: Path) -> None:
    push(folder, private=True)
    assert hub.repository("models", NAME).is_private
    push_folder(folder, "digits/model", repo_type="model")
    with pytest.raises(BadInputError, match="exists and is public"):
        check_access("digits/model", repo_type="model", private=True)


@pytest.mark.parametrize("name", ["model", "a/b/c", "ada/-", "ada/mo del"])
def test_impossible_names_are_refused_without_a_request(hub: LoopbackHub, folder: Path, name: str) -> None:
    with pytest.raises(BadInputError, match="--push OWNER/NAME"):
        push_folder(folder, name, repo_type="model")
    assert not hub.requests


def test_xet_uploads_in_chunks_and_a_second_time_not_at_all(
    hub: LoopbackHub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.xet_folder = tmp_path / "cas"
    push(folder)
    assert content(hub) == names(folder)
    assert put(hub) == 0  # nothing went the other way
    stored = {path: path.stat().st_size for path in hub.xet_folder.rglob("*") if path.is_file()}
    assert sum(stored.values()) > 600_000
    push(folder)
    shards = sorted(folder.glob("*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes() + b"more")
    push(folder, overwrite=True)
    grown = sum(path.stat().st_size for path in hub.xet_folder.rglob("*") if path.is_file()) - sum(stored.values())
    assert grown < 250_000  # only the chunk that changed


def test_a_model_of_the_hub_is_known_by_its_commit(
    hub: LoopbackHub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference log-probs and answers are kept under it; our configuration does not carry `_commit_hash`."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    push(folder)
    first = hub.repository("models", NAME).head("main").oid
    assert model_revision(NAME) == first
    (folder / "config.json").write_text("{}")
    push(folder, overwrite=True)
    assert model_revision(NAME) == hub.repository("models", NAME).head("main").oid != first
