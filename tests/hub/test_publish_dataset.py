"""A data set goes to the Hub and comes back: plain, streaming, from a pull request; unfinished ones stay here."""

import hashlib
import io
import json
import os
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Features, Image, List, Value
from loopback import READER, LoopbackHub
from PIL import Image as Picture
from published import run_as_stranger

from internvl_mpo.errors import BadInputError
from internvl_mpo.publish.__main__ import main
from internvl_mpo.publish.dataset import published_files
from internvl_mpo.publish.hygiene import check_nothing_private
from internvl_mpo.publish.picture_names import shorten, shorten_names

NAME = "digits/MMPR-tiny"
# One of each kind of key, in halves: this file must not look like a leak itself.
SECRETS = {
    "Hugging Face": "hf_" + "aB3" * 8,
    "OpenAI": "sk-" + "a1B2" * 8,
    "GitHub": "ghp_" + "c3D4" * 9,
    "AWS": "AKIA" + "A1B2" * 4,
    "GitLab": "glpat-" + "x9Y8" * 5,
    "Slack": "xoxb-" + "1234567890-",
    "private key": "-----BEGIN OPENSSH " + "PRIVATE KEY-----",
}
FEATURES = Features(
    {"id": Value("string"), "images": List(Image()), "question": Value("string"), "image_root": Value("string")}
)
CARD = """\
---
configs:
- config_name: default
  data_files: [{split: train, path: data/*/train-*.parquet}]
  default: true
- config_name: tiny
  data_files: [{split: train, path: tiny/train-*.parquet}]
---
# MMPR

    load_dataset("org/MMPR", "tiny")
"""


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Picture.new("RGB", (20 + number, 10), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_shard(path: Path, numbers: range, root: str = "MMPR/images/digits") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "id": f"{number:04d}",
            "images": [{"bytes": picture(number), "path": f"{number}.png"}] if number % 3 else [],
            "question": f"What is {number}?",
            "image_root": root,
        }
        for number in numbers
    ]
    Dataset.from_list(rows, features=FEATURES).to_parquet(path)


def write_manifest(folder: Path) -> None:
    shards = [
        {
            "path": path.relative_to(folder).as_posix(),
            "num_bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in sorted(folder.rglob("*.parquet"))
    ]
    meta = {"digits": {"root": "MMPR/images/digits", "annotation": "/mnt/cluster/share/annotations/digits.jsonl"}}
    (folder / "manifest.json").write_text(json.dumps({"version": 1, "shards": shards, "meta": meta}))


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    """Three shards, a card, a manifest, as convert_mmpr.py leaves them."""
    folder = tmp_path / "converted"
    write_shard(folder / "data/digits/train-00000-of-00002.parquet", range(0, 30))
    write_shard(folder / "data/digits/train-00001-of-00002.parquet", range(30, 60))
    write_shard(folder / "tiny/train-00000-of-00001.parquet", range(0, 6))
    (folder / "README.md").write_text(CARD)
    write_manifest(folder)
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.parquet"))


def publish(source: Path, output: Path, *options: str) -> int:
    return main(["dataset", str(source), "--output", str(output), *options])


@pytest.mark.slow
def test_a_stranger_loads_it_whole_and_streaming(
    hub: LoopbackHub, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    hub.fail("PUT", "/lfs/", times=2, cut_after=100)  # the network is not at its best today
    assert publish(converted, tmp_path / "built", "--push", NAME, "--private") == 0
    out = capsys.readouterr().out
    assert "read back from the folder: 26 rows of 2 configurations streamed, 'tiny' loaded whole (6 rows)" in out
    assert f"read back from {NAME}: 26 rows of 2 configurations streamed, 'tiny' loaded whole (6 rows)" in out
    assert f'load_dataset("{NAME}", "tiny")' in hub.text("datasets", NAME, "README.md")
    assert "/mnt/cluster" not in hub.text("datasets", NAME, "manifest.json")
    code = f"""
import json
from datasets import load_dataset
stream = load_dataset("{NAME}", split="train", streaming=True)
whole = load_dataset("{NAME}", split="train")
print(json.dumps([[row["id"] for row in rows] for rows in (stream, whole)]))
print(json.dumps([picture.size for picture in whole[59 - 1]["images"]]))
"""
    asked = len(hub.requests)
    done = run_as_stranger(hub, code, tmp_path / "stranger")
    assert done.returncode == 0, done.stderr[-2000:]
    ids, size = map(json.loads, done.stdout.strip().splitlines()[-2:])
    assert ids == [[f"{number:04d}" for number in range(60)]] * 2
    assert size == [[20 + 58, 10]]
    assert 206 in {status for _, path, status, _ in hub.requests[asked:] if path.endswith(".parquet")}  # ranges
    assert run_as_stranger(hub, code, tmp_path / "visitor", token=READER).returncode != 0  # it is private


@pytest.mark.slow
def test_a_pull_request_is_read_back_too(
    hub: LoopbackHub, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert publish(converted, tmp_path / "built", "--push", NAME, "--create-pr", "--num_rows", "3") == 0
    assert "6 rows of 2 configurations streamed" in capsys.readouterr().out.split("discussions/1")[1]
    assert hub.repository("datasets", NAME).paths() == set()
    assert "tiny/train-00000-of-00001.parquet" in hub.repository("datasets", NAME).paths("refs/pr/1")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("cut", r"train-00001-of-00002.parquet is not the file that manifest.json describes"),
        ("missing", r"is in manifest.json but not there; run convert_mmpr.py again"),
        ("surplus", r"train-00009-of-00009.parquet is not in manifest.json"),
        ("script", r"MMPR.py would stop load_dataset"),
        ("card", r"has no README.md with `configs`"),
        ("header", r"names no `configs`"),
        ("promise", r"names a configuration 'more', but data/more/\*.parquet is not there"),
        ("secret", r"looks like a secret key"),
    ],
)
def test_what_is_not_fit_to_publish_is_named(converted: Path, tmp_path: Path, damage: str, message: str) -> None:
    shard = converted / "data/digits/train-00001-of-00002.parquet"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-100])
    elif damage == "missing":
        shard.unlink()
    elif damage == "surplus":
        write_shard(converted / "data/digits/train-00009-of-00009.parquet", range(3))
    elif damage == "script":
        (converted / "MMPR.py").write_text("import datasets\n")
    elif damage == "card":
        (converted / "README.md").unlink()
    elif damage == "header":
        (converted / "README.md").write_text("---\nlicense: mit\n---\n# MMPR\n")
    elif damage == "promise":
        more = "- config_name: more\n  data_files: [{split: train, path: data/more/*.parquet}]\n---\n# MMPR"
        (converted / "README.md").write_text(CARD.replace("---\n# MMPR", more))
    else:
        (converted / "LICENSE").write_text("hf_abcdefghijklmnopqrstuvw")
    with pytest.raises(BadInputError, match=message):
        publish(converted, tmp_path / "built")
    assert not (tmp_path / "built").exists()


@pytest.mark.parametrize(
    "name",
    [
        *(".env", ".netrc", "id_rsa", "run.sh", "notes.ipynb", "train.log", "data/.env.local", "notes.txt"),
        *(
            "data/digits/rows.jsonl",
            ".ssh/config",
            "weights.bin",
            "code/.keys.py",
            "data/digits/.train.parquet",
            "key.pem",
        ),
    ],
)
def test_what_the_card_does_not_name_stays_at_home(converted: Path, name: str) -> None:
    path = converted / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("nothing secret")
    with pytest.raises(BadInputError, match=f"holds {re.escape(name)}, which the card does not name"):
        published_files(converted)


def test_what_a_card_shows_goes_along(converted: Path) -> None:
    for name in ("pictures/length.png", "code/build.py", "LICENSE", "docs/how.md"):
        (converted / name).parent.mkdir(exist_ok=True)
        (converted / name).write_text("x")
    card = CARD + '![lengths](pictures/length.png) <a href="./docs/how.md">how</a> [site](https://example.com/a.md)\n'
    (converted / "README.md").write_text(card)
    extra = set(published_files(converted)) - {path.relative_to(converted).as_posix() for path in shards(converted)}
    assert extra == {"README.md", "manifest.json", "pictures/length.png", "code/build.py", "LICENSE", "docs/how.md"}


def test_a_link_that_leads_out_is_refused_and_one_inside_is_not(converted: Path, tmp_path: Path) -> None:
    (converted / "LICENSE").symlink_to(converted / "README.md")
    assert "LICENSE" in published_files(converted)
    (tmp_path / "private.txt").write_text("mine")
    for target in (tmp_path / "private.txt", tmp_path, tmp_path / "nothing"):  # a file, a folder, nothing
        (converted / "NOTICE").symlink_to(target)
        with pytest.raises(BadInputError, match=r"NOTICE is a link that leads out"):
            published_files(converted)
        (converted / "NOTICE").unlink()


@pytest.mark.parametrize("kind", sorted(SECRETS))
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-16-be"])
def test_every_kind_of_key_is_found_in_every_encoding(tmp_path: Path, kind: str, encoding: str) -> None:
    folder = tmp_path / "built"
    folder.mkdir()
    text = f"a line\nkey: {SECRETS[kind]}\nanother line\n"
    (folder / "LICENSE").write_bytes(text.encode(encoding))
    with pytest.raises(BadInputError, match="LICENSE holds what looks like a secret key"):
        check_nothing_private(folder)


@pytest.mark.parametrize("name", ["run.sh", "a.log", "notes.ipynb", ".env", "noext", "plot.png", "a.csv"])
def test_no_name_keeps_a_file_from_being_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x89PNG\x00\x01 " + SECRETS["Hugging Face"].encode())
    with pytest.raises(BadInputError, match="looks like a secret key"):
        check_nothing_private(tmp_path)


def test_places_on_a_cluster_are_not_told(tmp_path: Path) -> None:
    shard, source = tmp_path / "out.parquet", tmp_path / "in.parquet"
    write_shard(source, range(0, 6))
    assert not shorten_names(source)  # nothing to do, and nothing is written
    write_shard(source, range(0, 6), root="/gpfs/projects/zebediah/digits")
    before = source.read_bytes()
    os.link(source, shard)
    assert shorten_names(shard)
    assert source.read_bytes() == before  # the link was cut first
    rows, originals = (pq.read_table(path).to_pylist() for path in (shard, source))
    assert {row["image_root"] for row in rows} == {shorten("/gpfs/projects/zebediah/digits")}
    for row, original in zip(rows, originals, strict=True):
        assert {**row, "image_root": ""} == {**original, "image_root": ""}
    assert pq.read_schema(shard).metadata[b"huggingface"] == pq.read_schema(source).metadata[b"huggingface"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("coco/train2014/1.jpg", "coco/train2014/1.jpg"),
        ("/mnt/petrelfs/share/MMPR/images/coco/1.jpg", "coco/1.jpg"),
        (r"C:\\Users\\zeb\\images\\1.jpg", "1.jpg"),
        ("s3://bucket/images/x/1.jpg", "x/1.jpg"),
        ("/home/zebediah/1.jpg", r"[0-9a-f]{8}/1.jpg"),
    ],
)
def test_names_of_pictures_are_shortened(name: str, expected: str) -> None:
    assert re.fullmatch(expected, shorten(name))
    assert shorten("/home/a/1.jpg") != shorten("/home/b/1.jpg")


def test_pictures_named_by_path_only_are_refused(converted: Path, tmp_path: Path) -> None:
    """Such a file loads where it was made and nowhere else."""
    from internvl_mpo.publish.clean_rows import digest

    inside = {"id": "1", "images": [{"bytes": picture(1), "path": "1.png"}]}
    assert digest(inside) == digest({**inside, "images": [{"bytes": picture(1), "path": "elsewhere/1.png"}]})
    assert digest(inside) != digest({**inside, "images": [{"bytes": picture(2), "path": "1.png"}]})
    with pytest.raises(SystemExit, match="a picture is not inside its row"):
        digest({"id": "1", "images": [{"bytes": None, "path": "1.png"}]})
