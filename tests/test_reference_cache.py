"""Reference log-probs in folders under tmp_path. Run: pytest tests/test_reference_cache.py"""

import json
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from internvl_mpo.errors import BadInputError
from internvl_mpo.logps import attach_scoring, pair_logps
from internvl_mpo.mmpr.pairs import PairRow
from internvl_mpo.mmpr.reading import iter_pairs
from internvl_mpo.packing import Group, pack_groups
from internvl_mpo.records import PreferencePair
from internvl_mpo.training.reference_cache import ReferenceCache, model_digest

SETTINGS = {"model": "0123abcd", "template": "internlm2-chat", "max_tiles": 12, "max_length": 6144, "dtype": "float32"}


def pair(chosen: str = "two", **changes) -> PreferencePair:
    return PreferencePair(**{"question": "1+1?", "chosen": chosen, "rejected": "three", "images": ("a.png",)} | changes)


def digests(*pairs: PreferencePair) -> dict[str, str]:
    return {row.id: PairRow(row, Path("images"), None, "", "").digest for row in pairs}


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
    one, other = (PairRow(pair(), Path("images"), max_tiles, "", "").digest for max_tiles in (None, 6))
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
    one, other = (PairRow(pair(id=str(n)), root, None, "", "").digest for n, root in enumerate(roots))
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


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_value_that_is_not_finite_never_reaches_the_disk(tmp_path, value):
    row = pair()
    cache = ReferenceCache(tmp_path, SETTINGS, digests(row))
    with pytest.raises(BadInputError, match=f"gives pair {row.id} log-probs"):
        cache.add([row.id], torch.tensor([value]), torch.tensor([-1.0]))
    assert cache.missing() == [row.id]


def test_settings_are_readable(tmp_path):
    with ReferenceCache(tmp_path, SETTINGS, digests(pair())) as cache:
        cache.add([pair().id], torch.tensor([-1.0]), torch.tensor([-2.0]))
    assert json.loads((cache.folder / "settings.json").read_text()) == SETTINGS


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
