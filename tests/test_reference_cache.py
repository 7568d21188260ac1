"""Reference log-probs in folders under tmp_path. Run: pytest tests/test_reference_cache.py"""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
import torch
from tiny import tiny_model

from internvl_mpo import files
from internvl_mpo.errors import BadInputError
from internvl_mpo.logps import attach_scoring, pair_logps
from internvl_mpo.mmpr.pairs import PairRow
from internvl_mpo.mmpr.reading import iter_pairs
from internvl_mpo.packing import Group, pack_groups
from internvl_mpo.records import PreferencePair
from internvl_mpo.training import reference_cache
from internvl_mpo.training.reference_cache import ReferenceCache, model_digest

SETTINGS = {"model": "0123abcd", "template": "书生", "max_tiles": 12, "max_length": 6144, "dtype": "float32"}


def pair(chosen: str = "two", **changes) -> PreferencePair:
    return PreferencePair(**{"question": "1+1?", "chosen": chosen, "rejected": "three", "images": ("a.png",)} | changes)


def digests(*pairs: PreferencePair) -> dict[str, str]:
    return {row.id: PairRow(row, Path("images"), None, "", "", 1.0).digest for row in pairs}


def test_what_was_added_is_found_by_another_process(tmp_path):
    rows = [pair("two"), pair("2")]
    ids = [row.id for row in rows]
    with ReferenceCache(tmp_path, SETTINGS, digests(*rows)) as cache:
        assert cache.missing() == ids
        cache.add(ids, torch.tensor([-1.5, -2.25]), torch.tensor([-3.0, -4.125]))
    again = ReferenceCache(tmp_path, SETTINGS, digests(*rows))
    assert again.missing() == []
    chosen, rejected = again.lookup(ids[::-1])
    assert chosen.tolist() == [-2.25, -1.5]
    assert rejected.tolist() == [-4.125, -3.0]


def test_float32_comes_back_bit_for_bit(tmp_path):
    row = pair()
    value = torch.tensor([-1445.0123])
    with ReferenceCache(tmp_path, SETTINGS, digests(row)) as cache:
        cache.add([row.id], value, value)
    assert torch.equal(ReferenceCache(tmp_path, SETTINGS, digests(row)).lookup([row.id])[0], value)


@pytest.mark.parametrize("key", SETTINGS)
def test_every_setting_has_a_cache_of_its_own(tmp_path, key):
    row = pair()
    with ReferenceCache(tmp_path, SETTINGS, digests(row)) as cache:
        cache.add([row.id], torch.tensor([-1.0]), torch.tensor([-2.0]))
    other = ReferenceCache(tmp_path, SETTINGS | {key: "other"}, digests(row))
    assert other.name != cache.name
    assert other.missing() == [row.id]


@pytest.mark.parametrize(
    "change", [{"chosen": "deux"}, {"rejected": "4"}, {"question": "1+2?"}, {"images": ("b.png",)}, {"images": ()}]
)
def test_an_edited_pair_that_kept_its_id_is_missing(tmp_path, change):
    with ReferenceCache(tmp_path, SETTINGS, digests(pair(id="7"))) as cache:
        cache.add(["7"], torch.tensor([-1.0]), torch.tensor([-2.0]))
    assert ReferenceCache(tmp_path, SETTINGS, digests(pair(**{"id": "7"} | change))).missing() == ["7"]


def test_another_cap_on_tiles_is_another_pair():
    one, other = (PairRow(pair(), Path("images"), max_tiles, "", "", 1.0).digest for max_tiles in (None, 6))
    assert one != other


def two_subsets(folder: Path, **ids: str) -> Path:
    """Two subsets with one and the same row, each with a `1.png` of its own; return the meta.json."""
    meta = {}
    for name in ("left", "right"):
        row = {"image": "1.png", "question": "Which colour?", "chosen": "It is red.", "rejected": "None."}
        (folder / "images" / name).mkdir(parents=True)
        (folder / "images" / name / "1.png").write_bytes(name.encode())
        (folder / f"{name}.jsonl").write_text(json.dumps(row | ({"id": ids[name]} if ids else {})) + "\n")
        meta[name] = {"root": f"images/{name}", "annotation": f"{name}.jsonl", "repeat_time": 1}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder / "meta.json"


@pytest.mark.parametrize("ids", [{}, {"left": "7", "right": "8"}])
def test_the_same_words_about_a_picture_of_the_same_name_in_another_folder_are_another_pair(tmp_path, ids):
    left, right = iter_pairs(two_subsets(tmp_path / "data", **ids))
    with ReferenceCache(tmp_path, SETTINGS, {left.pair.id: left.digest}) as cache:
        cache.add([left.pair.id], torch.tensor([-1.0]), torch.tensor([-2.0]))
    assert ReferenceCache(tmp_path, SETTINGS, {right.pair.id: right.digest}).missing() == [right.pair.id]


def test_folders_of_one_name_are_told_apart_by_the_ids(tmp_path):
    roots = (tmp_path / "train" / "images", tmp_path / "more" / "images")
    one, other = (PairRow(pair(id=str(n)), root, None, "", "", 1.0).digest for n, root in enumerate(roots))
    assert one != other


def test_data_that_was_moved_is_still_known(tmp_path):
    here = [row.digest for row in iter_pairs(two_subsets(tmp_path / "here"))]
    (tmp_path / "here").rename(tmp_path / "there")
    assert [row.digest for row in iter_pairs(tmp_path / "there" / "meta.json")] == here


def test_a_gap_names_the_first_ids_and_the_way_out(tmp_path):
    rows = [pair(str(number)) for number in range(5)]
    ids = [row.id for row in rows]
    cache = ReferenceCache(tmp_path, SETTINGS, digests(*rows))
    cache.add(ids[:1], torch.tensor([-1.0]), torch.tensor([-2.0]))
    with pytest.raises(BadInputError) as error:
        cache.lookup(ids)
    assert "4 of 5 pairs have no reference log-probs" in str(error.value)
    assert f"({ids[1]}, {ids[2]}, {ids[3]}, ...)" in str(error.value)
    assert "run the training command again to fill the gap" in str(error.value)
    with pytest.raises(BadInputError, match=rf"3 of 3 pairs .* \({ids[1]}, {ids[2]}, {ids[3]}\);"):
        cache.lookup(ids[1:4])


def test_a_pair_of_another_run_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="pair stranger is not among the 1 pairs"):
        ReferenceCache(tmp_path, SETTINGS, digests(pair())).lookup(["stranger"])


def test_an_interrupted_fill_keeps_its_whole_shards(tmp_path):
    rows = [pair(str(number)) for number in range(5)]
    cache = ReferenceCache(tmp_path, SETTINGS, digests(*rows), shard_size=2)
    for row in rows[:3]:  # then the process dies: no flush
        cache.add([row.id], torch.tensor([-1.0]), torch.tensor([-2.0]))
    (cache.folder / ".part-00000-dead.parquet.part").write_bytes(b"half a shard")
    again = ReferenceCache(tmp_path, SETTINGS, digests(*rows))
    assert again.missing() == [row.id for row in rows[2:]]


def test_an_exception_still_writes_what_was_computed(tmp_path):
    row = pair()
    with pytest.raises(RuntimeError), ReferenceCache(tmp_path, SETTINGS, digests(row)) as cache:
        cache.add([row.id], torch.tensor([-1.0]), torch.tensor([-2.0]))
        raise RuntimeError
    assert ReferenceCache(tmp_path, SETTINGS, digests(row)).missing() == []


def test_refresh_reads_the_shards_of_other_ranks(tmp_path, monkeypatch):
    rows = [pair("two"), pair("2")]
    caches = [ReferenceCache(tmp_path, SETTINGS, digests(*rows)) for _ in range(2)]
    for rank, (cache, row) in enumerate(zip(caches, rows, strict=True)):
        monkeypatch.setenv("RANK", str(rank))
        cache.add([row.id], torch.tensor([-1.0 - rank]), torch.tensor([-2.0]))
        cache.flush()
    for cache in caches:
        cache.refresh()
        assert cache.lookup([row.id for row in rows])[0].tolist() == [-1.0, -2.0]


def test_a_damaged_shard_is_named(tmp_path):
    row = pair()
    with ReferenceCache(tmp_path, SETTINGS, digests(row)) as cache:
        cache.add([row.id], torch.tensor([-1.0]), torch.tensor([-2.0]))
    (shard,) = cache.folder.glob("part-*.parquet")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(BadInputError, match=f"{shard.name} cannot be read .* delete the file"):
        ReferenceCache(tmp_path, SETTINGS, digests(row))


@pytest.mark.parametrize("is_chosen", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_value_that_is_not_finite_never_reaches_the_disk(tmp_path, value, is_chosen):
    row = pair()
    cache = ReferenceCache(tmp_path, SETTINGS, digests(row))
    logps = [torch.tensor([value]), torch.tensor([-1.0])]
    with pytest.raises(BadInputError, match=f"gives pair {row.id} log-probs"):
        cache.add([row.id], *(logps if is_chosen else logps[::-1]))
    assert cache.missing() == [row.id]


def test_settings_are_readable(tmp_path):
    with ReferenceCache(tmp_path, SETTINGS, digests(pair())) as cache:
        cache.add([pair().id], torch.tensor([-1.0]), torch.tensor([-2.0]))
    shown = (cache.folder / "settings.json").read_text()
    assert shown == json.dumps(SETTINGS, indent=2, ensure_ascii=False, sort_keys=True)


def filled(folder: Path, *values: tuple[str, float, float], rows: list[PreferencePair]) -> ReferenceCache:
    """A cache on the disk that holds (chosen text, log-prob of chosen, of rejected) of some of the pairs."""
    ids = {row.chosen: row.id for row in rows}
    with ReferenceCache(folder, SETTINGS, digests(*rows)) as cache:
        for chosen, *logps in values:
            cache.add([ids[chosen]], *(torch.tensor([value]) for value in logps))
    return cache


def test_a_cache_of_an_earlier_version_is_found_again(tmp_path):
    """Its name and the digests of its pairs may not change, or days of work are done once more."""
    row = pair(id="7", system="Count.", history=(("1?", "one"),))
    assert ReferenceCache(tmp_path, SETTINGS, {}).name == "cac40bd4049d5e9f"
    assert digests(row) == {"7": "0e6a1efec1b810ee"}
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "tokenizer.json").write_text("{}")
    assert model_digest(tmp_path) == "30e2146889dbbc8b"


def test_a_run_that_computes_nothing_leaves_no_file(tmp_path):
    filled(tmp_path / "cache", rows=[pair()])
    assert not (tmp_path / "cache").exists()


def test_every_pair_is_written_once_and_not_read_again_by_who_wrote_it(tmp_path, monkeypatch):
    rows = [pair(str(number)) for number in range(5)]
    with ReferenceCache(tmp_path, SETTINGS, digests(*rows), shard_size=2) as cache:
        for number, row in enumerate(rows):
            cache.add([row.id], torch.tensor([-1.0 - number]), torch.tensor([-2.0]))
    monkeypatch.setattr(pyarrow.parquet, "read_table", lambda path: pytest.fail("an own shard is read"))
    cache.refresh()
    monkeypatch.undo()
    shards = [pyarrow.parquet.read_table(path) for path in cache.folder.glob("part-00000-*.parquet")]
    assert sorted(map(len, shards)) == [1, 2, 2]
    assert sorted(digest for shard in shards for digest in shard["digest"].to_pylist()) == sorted(
        cache.digests.values()
    )


def test_what_another_rank_found_last_counts(tmp_path):
    rows = [pair("two"), pair("2")]
    filled(tmp_path, ("two", -1.0, -2.0), rows=rows)
    mine = ReferenceCache(tmp_path, SETTINGS, digests(*rows))
    filled(tmp_path, ("two", -5.0, -6.0), ("2", -7.0, -8.0), rows=rows)
    assert [logps.tolist() for logps in mine.lookup([rows[0].id])] == [[-1.0], [-2.0]]
    mine.refresh()
    assert [logps.tolist() for logps in mine.lookup([row.id for row in rows])] == [[-5.0, -7.0], [-6.0, -8.0]]
    mine.take(np.array([int(mine.digests[rows[1].id], 16)], np.uint64), np.array([[-9.0, -10.0]]))
    assert [logps.tolist() for logps in mine.lookup([row.id for row in rows])] == [[-5.0, -9.0], [-6.0, -10.0]]


def test_what_one_rank_adds_another_can_take(tmp_path):
    rows = [pair("two"), pair("2"), pair("deux")]
    mine, other = (ReferenceCache(tmp_path, SETTINGS, digests(*rows)) for _ in range(2))
    found = mine.add([rows[2].id, rows[0].id], torch.tensor([-1.5, -0.1]), torch.tensor([-3.0, -4.0]))
    assert (found[0].dtype, found[1].dtype) == (np.uint64, np.float64)
    other.take(*found)
    assert other.missing() == [rows[1].id]
    assert other.missing([rows[1].id, rows[0].id]) == [rows[1].id]
    assert other.missing([]) == []
    ids = [rows[0].id, rows[2].id]
    assert [logps.tolist() for logps in other.lookup(ids, torch.float64)] == [
        logps.tolist() for logps in mine.lookup(ids, torch.float64)
    ]
    assert not list(tmp_path.rglob("*.parquet"))  # whoever added it writes it


def test_many_pairs_become_numbers_in_arrays_and_stay_known(tmp_path, monkeypatch):
    """Before they are on the disk they may not: they would never get there."""
    monkeypatch.setattr(reference_cache, "_RECENT", 3)
    rows = [pair(str(number)) for number in range(9)]
    cache = ReferenceCache(tmp_path, SETTINGS, digests(*rows), shard_size=5)
    for number, row in enumerate(rows):
        cache.add([row.id], torch.tensor([-1.0 - number]), torch.tensor([-20.0 + number]))
        assert cache.missing() == [other.id for other in rows[number + 1 :]]
    assert (len(cache._digests), len(cache._recent)) == (5, 4)
    cache.flush()
    assert (len(cache._digests), len(cache._recent)) == (9, 0)
    for known in (cache, ReferenceCache(tmp_path, SETTINGS, digests(*rows))):
        chosen, rejected = known.lookup([row.id for row in rows])
        assert chosen.tolist() == [-1.0 - number for number in range(9)]
        assert rejected.tolist() == [-20.0 + number for number in range(9)]


def test_pairs_of_another_rank_become_numbers_too_but_not_before_the_own_ones_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(reference_cache, "_RECENT", 3)
    rows = [pair(str(number)) for number in range(9)]
    cache, other = (ReferenceCache(tmp_path, SETTINGS, digests(*rows)) for _ in range(2))
    found = other.add([row.id for row in rows[:4]], torch.arange(4.0), torch.arange(4.0))
    cache.add([rows[8].id], torch.tensor([-1.0]), torch.tensor([-2.0]))
    cache.take(*found)
    assert (len(cache._digests), len(cache._recent)) == (0, 5)
    cache.flush()
    assert (len(cache._digests), len(cache._recent)) == (5, 0)
    cache.take(found[0] + np.uint64(1), found[1])
    assert (len(cache._digests), len(cache._recent)) == (9, 0)
    assert cache.missing() == [row.id for row in rows[4:8]]


def test_log_probs_come_as_float32_unless_more_is_asked_for(tmp_path):
    row, value = pair(), torch.tensor([-1445.0123456789], dtype=torch.float64)
    cache = filled(tmp_path, rows=[row])
    cache.add([row.id], value, value)
    assert cache.lookup([row.id])[0].dtype == torch.float32
    assert torch.equal(cache.lookup([row.id], torch.float64)[0], value)


def test_what_is_half_written_by_a_program_that_is_gone_is_removed(tmp_path):
    folder = ReferenceCache(tmp_path, SETTINGS, {}).folder
    folder.mkdir()
    left = folder / f".part-00000-1.parquet.{files._HOST}.999999999.part"
    left.write_bytes(b"half")
    ReferenceCache(tmp_path, SETTINGS, {})
    assert not left.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "config.json", "tokenizer.model", "merges.txt"])
def test_every_file_that_a_model_is_loaded_from_counts(tmp_path, name):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    seen = {model_digest(tmp_path)}
    for content in ("one", "other"):
        (tmp_path / name).write_text(content)
        seen.add(model_digest(tmp_path))
    (tmp_path / name).rename(tmp_path / f"renamed_{name}")
    seen.add(model_digest(tmp_path))
    assert len(seen) == 4


def test_old_weights_are_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
    assert model_digest(str(tmp_path)) == model_digest(tmp_path)


def test_a_model_digest_takes_the_files_by_their_names_in_every_process(tmp_path):
    names = sorted([*(f"{letter}.txt" for letter in "hgfedcba"), "model.bin"])
    total = hashlib.sha256()
    for name in names:
        (tmp_path / name).write_text(name)
        total.update(f"{name}\n{hashlib.sha256(name.encode()).hexdigest()}\n".encode())
    assert model_digest(tmp_path) == total.hexdigest()[:16]


def test_model_digest_follows_weights_and_tokenizer(tmp_path):
    with pytest.raises(BadInputError, match="holds no weights"):
        model_digest(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "tokenizer.json").write_text("{}")
    seen = {model_digest(tmp_path)}
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    seen.add(model_digest(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"a": 1}')
    seen.add(model_digest(tmp_path))
    (tmp_path / "README.md").write_text("no part of the model")
    seen.add(model_digest(tmp_path))
    assert len(seen) == 3


def test_cached_equals_live(tmp_path):
    rows = [pair("two"), pair("2")]
    ids = [row.id for row in rows]
    model = attach_scoring(tiny_model())
    pack = pack_groups([Group([1, 2, 3], [[4, 5], [6], [7, 8]], [(0, 1), (2, 1)], ids)])
    with torch.no_grad():
        live = pair_logps(model, pack)
    with ReferenceCache(tmp_path, SETTINGS, digests(*rows)) as cache:
        cache.add(pack.pair_ids, *live)
    cached = ReferenceCache(tmp_path, SETTINGS, digests(*rows)).lookup(pack.pair_ids)
    assert all(torch.equal(a, b) for a, b in zip(cached, live, strict=True))
