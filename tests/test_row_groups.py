"""Parquet read by row groups, on a disk and through a remote file system: the same rows, and no second copy of them.

pytest tests/test_row_groups.py
"""

import io
from pathlib import Path
from types import SimpleNamespace

import datasets
import fsspec
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image
from tiny import tiny_processor

from internvl_mpo.encoding import encode_group
from internvl_mpo.errors import BadInputError
from internvl_mpo.mmpr import row_groups, sources
from internvl_mpo.mmpr.reading import iter_pairs
from internvl_mpo.mmpr.row_groups import ParquetTable, open_table
from internvl_mpo.training.preflight import Preflight

LIMITS = {"max_tiles": 4, "max_length": 2000}


def picture(width: int) -> bytes:
    out = io.BytesIO()
    Image.effect_noise((28 * width, 28), 90).convert("RGB").save(out, "PNG")
    return out.getvalue()


PICTURES = [picture(width) for width in (1, 2, 3)]


def rows(count: int, first: int = 0) -> list[dict]:
    """Pairs in TRL's words, three of each question, pictures inside."""
    return [
        {
            "images": [{"bytes": PICTURES[number // 3 % 3], "path": f"{number // 3 % 3}.png"}],
            "prompt": f"Question {number // 3}?",
            "chosen": f"yes {number}",
            "rejected": "no " * (1 + number % 4),
        }
        for number in range(first, first + count)
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Two shards of several row groups; `datasets` may load nothing."""
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: pytest.fail("datasets made a copy"))
    (tmp_path / "data").mkdir()
    for shard, (count, first) in enumerate(((50, 0), (31, 50))):
        table = pyarrow.Table.from_pylist(rows(count, first))
        pyarrow.parquet.write_table(table, tmp_path / "data" / f"{shard}.parquet", row_group_size=20)
    return tmp_path / "data"


def test_rows_are_numbered_over_groups_and_shards(folder):
    table = ParquetTable(str(folder))
    assert [(group.shard, group.first, group.num_rows) for group in table.groups] == [
        *((0, 0, 20), (0, 20, 20), (0, 40, 10), (1, 50, 20), (1, 70, 11))
    ]
    assert len(table) == 81
    assert list(table.rows(35, 75, ["chosen"])) == [(n, {"chosen": f"yes {n}"}) for n in range(35, 75)]
    assert [table.value(number, "chosen") for number in (80, 0, 49, 50)] == ["yes 80", "yes 0", "yes 49", "yes 50"]


def test_a_picture_that_many_rows_show_is_in_memory_once(folder):
    group = ParquetTable(str(folder)).groups[0]
    shown = ParquetTable(str(folder)).read(group, ["images"])
    assert shown.nbytes < sum(map(len, PICTURES)) + 100 * group.num_rows < 3 * sum(map(len, PICTURES))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_table_gives_the_tokens_and_tiles_of_the_rows(folder, tmp_path, monkeypatch, num_workers):
    monkeypatch.setattr(sources, "TABLE_ROWS", 8)  # groups are cut
    made = Preflight(tiny_processor(), tmp_path / "cache", [folder], **LIMITS, num_workers=num_workers).run()
    read = list(iter_pairs(folder))
    assert not made.unusable
    assert [made.row(index).pair for index in range(81)] == [row.pair for row in read]
    assert [made.row(index).where for index in range(81)] == [row.where for row in read]
    for index in range(0, 81, 7):
        groups = [
            encode_group(tiny_processor(), [row.pair], row.image_root, **LIMITS)
            for row in (read[index], made.row(index))
        ]
        assert groups[0].prompt_ids == groups[1].prompt_ids
        assert groups[0].tiles.equal(groups[1].tiles)
        assert len(groups[0].tiles) == made.columns["num_tiles"][index]


def test_data_on_the_hub_is_read_over_its_file_system(folder, tmp_path, monkeypatch):
    here = Preflight(tiny_processor(), tmp_path / "here", [folder], **LIMITS, num_workers=0).run()
    files = fsspec.filesystem("memory")
    for path in folder.iterdir():
        files.pipe(f"/me/data@c0ffee/{path.name}", path.read_bytes())
    monkeypatch.setattr(
        row_groups, "_hub_shards", lambda data: [f"memory://me/data@c0ffee/{n}.parquet" for n in range(2)]
    )
    open_table.cache_clear()
    there = Preflight(tiny_processor(), tmp_path / "there", ["hub:me/data"], **LIMITS, num_workers=0).run()
    assert there.columns["prompt"].tolist() == here.columns["prompt"].tolist()
    assert [there.row(index).pair.chosen for index in range(81)] == [f"yes {number}" for number in range(81)]
    row = there.row(5)
    assert row.image_root.read(row.pair.images[0]) == PICTURES[1]
    open_table.cache_clear()


def test_a_connection_that_stays_away_is_one_sentence(folder, monkeypatch):
    class LostError(Exception):
        """As those of HTTP clients, no OSError."""

    def lose(*args, **options):
        raise LostError("no route to host")

    monkeypatch.setattr(row_groups, "_hub_shards", lambda data: ["hf://datasets/me/data@c0ffee/0.parquet"])
    table = ParquetTable("hub:me/data")
    with monkeypatch.context() as patch, pytest.raises(BadInputError) as lost:
        patch.setattr(row_groups, "_open", lose)
        len(table)
    assert str(lost.value) == "hf://datasets/me/data@c0ffee/0.parquet cannot be read as Parquet: no route to host"
    monkeypatch.setattr(row_groups, "_open", lambda path: str(folder / "0.parquet"))
    group = table.groups[1]
    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "read_row_group", lose)
    with pytest.raises(BadInputError, match=r"@c0ffee/0\.parquet: row group 1 cannot be read \(no route to host\)"):
        table.read(group)


def test_a_shard_that_changed_is_read_again(folder, tmp_path):
    def run():
        open_table.cache_clear()
        return Preflight(tiny_processor(), tmp_path / "cache", [folder], **LIMITS, num_workers=0).run()

    assert len(run()) == 81
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(9)), folder / "1.parquet")
    assert len(run()) == 59


def test_what_cannot_be_read_is_named(folder):
    (folder / "1.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(BadInputError, match=r"1\.parquet cannot be read as Parquet"):
        len(ParquetTable(str(folder)))
    pyarrow.parquet.write_table(pyarrow.table({"other": [1]}), folder / "1.parquet")
    with pytest.raises(BadInputError, match=r"1\.parquet has other columns than .*0\.parquet"):
        len(ParquetTable(str(folder)))
    with pytest.raises(BadInputError, match="there is no Parquet file"):
        ParquetTable(str(folder.parent / "empty"))


def test_a_reason_that_is_a_sentence_already_is_not_wrapped_in_another(folder, monkeypatch):
    table = ParquetTable(str(folder))
    group = table.groups[0]

    def fail(shard):
        raise BadInputError("the shard is gone; load it again")

    monkeypatch.setattr(table, "_file", fail)
    for shard in (table.shards[0], "hf://datasets/me/pairs/0.parquet"):  # a Hub's client raises anything
        table.shards[0] = shard
        with pytest.raises(BadInputError, match=r"^the shard is gone; load it again$"):
            table.read(group)


@pytest.mark.parametrize(
    ("info", "version"),
    [
        ({"lfs": {"sha256": "5ha"}, "blob_id": "b10b"}, "5ha"),
        ({"lfs": None, "blob_id": "b10b"}, "b10b"),
        ({"blob_id": "b10b"}, "b10b"),
        ({}, "hf://datasets/me/data@c0ffee/data/0.parquet"),
    ],
)
def test_a_shard_of_the_hub_is_known_by_the_hash_of_its_content(monkeypatch, info, version):
    asked = []

    class Files:
        def info(self, path: str) -> dict:
            asked.append(path)
            return info

    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda address: (Files(), address.removeprefix("hf://")))
    shard = "hf://datasets/me/data@c0ffee/data/0.parquet"
    assert row_groups._place_and_version(shard) == ("data/0.parquet", version)
    assert asked == ["datasets/me/data@c0ffee/data/0.parquet"]


def test_a_shard_in_the_cache_of_the_hub_is_known_by_what_it_links_to(tmp_path, monkeypatch):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/5ha").touch()
    (tmp_path / "snapshots/c0ffee/data").mkdir(parents=True)
    link = tmp_path / "snapshots/c0ffee/data/0.parquet"
    link.symlink_to(tmp_path / "blobs/5ha")
    assert row_groups._place_and_version(str(link)) == ("data/0.parquet", "5ha")
    monkeypatch.setattr(row_groups, "_hub_shards", lambda data: [str(link)])
    table = ParquetTable("hub:me/data@v1:tiny")
    assert table.versions == {"hub:me/data/data/0.parquet": "5ha"}
    assert table.facts == [("hub:me/data/data/0.parquet", "5ha")]
    assert ParquetTable(str(link)).versions == {}


@pytest.mark.parametrize(
    ("data", "asked", "given"),
    [
        ("hub:me/x", ("me/x", None), {"revision": None}),
        ("hub:me/x@v1", ("me/x", None), {"revision": "v1"}),
        ("hub:me/x@v1:tiny", ("me/x", "tiny"), {"revision": "v1"}),
    ],
)
def test_the_shards_of_a_revision_are_those_of_its_split_train(monkeypatch, data, asked, given):
    files, seen = ["a.parquet", "b.parquet"], []

    def builder(*names, **options):
        seen.append((names, options))
        return SimpleNamespace(config=SimpleNamespace(data_files={"train": files, "test": ["c.parquet"]}))

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert row_groups._hub_shards(data) == files
    assert seen.pop() == (asked, given)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    kept = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *name, **more: kept.append((name, more)) or "here")
    assert row_groups._hub_shards(data) == files
    options = {"repo_type": "dataset", "revision": given["revision"], "local_files_only": True}
    assert (kept, seen) == ([(asked[:1], options)], [(("here", asked[1]), {"revision": None})])
    for others in (["a.parquet", "b.json"], []):
        files[:] = others
        with pytest.raises(BadInputError, match=f"cannot load {data}: its split train is not Parquet; download it, or"):
            row_groups._hub_shards(data)


def test_a_group_of_many_rows_is_read_whole(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"n": list(range(300))}), tmp_path / "a.parquet", row_group_size=200)
    table = ParquetTable(str(tmp_path / "a.parquet"))
    for start, stop in ((0, 300), (1, 65), (63, 193), (199, 201)):
        assert list(table.rows(start, stop, ["n"])) == [(number, {"n": number}) for number in range(start, stop)]
