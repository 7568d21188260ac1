"""The `datasets` builder over raw releases: plain, streaming, over workers, resumed; equal to the Parquet form."""

import itertools
import json
from pathlib import Path

import pytest

from dataset_scripts.mmpr import MMPR
from internvl_mpo.errors import BadInputError, RowError
from internvl_mpo.mini.release import MMPRSettings, make_release
from internvl_mpo.mmpr.convert import convert
from internvl_mpo.mmpr.parquet import open_dataset
from internvl_mpo.mmpr.shard_plan import Options

NUM_ROWS = 6 * 9


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw") / "MMPR-v1.2"
    make_release(MMPRSettings(output=str(folder), num_pictures=6))
    return folder


def test_the_stream_over_zip_parts_equals_the_prepared_data_set_and_the_parquet_form(raw, tmp_path):
    builder = MMPR(raw=raw, cache_dir=str(tmp_path / "cache"))
    stream = builder.as_streaming_dataset(split="train")
    builder.download_and_prepare()
    plain = builder.as_dataset(split="train")
    convert(Options(str(raw)), tmp_path / "parquet")
    published = {row["id"]: row for row in open_dataset(tmp_path / "parquet")}
    assert len(plain) == len(published) == NUM_ROWS
    for one, other in zip(stream.decode(False), plain, strict=True):
        assert one == published[one["id"]]
        assert [picture.mode for picture in other.pop("images")] == ["L"] * len(one.pop("images"))
        assert one == other


def test_a_stream_has_a_shard_per_subset_and_resumes_inside_one(raw, tmp_path):
    stream = MMPR(raw=raw, cache_dir=str(tmp_path)).as_streaming_dataset(split="train").decode(False)
    assert stream.num_shards == 7
    ids = [row["id"] for row in stream]
    assert len(set(ids)) == NUM_ROWS
    for stop in (1, 17, 18, 19, 40, NUM_ROWS):
        first, again = (
            MMPR(raw=raw, cache_dir=str(tmp_path)).as_streaming_dataset(split="train").decode(False) for _ in range(2)
        )
        seen = [row["id"] for row in itertools.islice(first, stop)]
        again.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert seen + [row["id"] for row in again] == ids
    parts = [[row["id"] for row in stream.shard(3, index)] for index in range(3)]
    assert sorted(itertools.chain(*parts)) == sorted(ids)


def test_some_subsets_only(raw, tmp_path):
    stream = MMPR(raw=raw, subsets=["RLAIF-V"], cache_dir=str(tmp_path)).as_streaming_dataset(split="train")
    assert [row["id"] for row in stream] == [f"rlaif-{number}" for number in range(6)]
    with pytest.raises(BadInputError, match="has no subset 'RLAIF'; there are "):
        MMPR(raw=raw, subsets=["RLAIF"], cache_dir=str(tmp_path))


def test_a_bad_row_stops_with_file_and_line_or_is_left_out(tmp_path, caplog):
    make_release(MMPRSettings(output=str(tmp_path / "raw"), release="folders", num_pictures=4))
    bad = tmp_path / "raw" / "images" / "RLAIF-V" / "00001.png"
    bad.write_bytes(b"no picture")
    where = tmp_path / "raw" / "annotations" / "RLAIF-V.jsonl"
    options = {"raw": tmp_path / "raw", "subsets": ["RLAIF-V"], "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(RowError, match="cannot be decoded") as caught:
        list(MMPR(**options).as_streaming_dataset(split="train"))
    assert str(caught.value).startswith(f"{where}:2: ")
    assert "on_bad_row='skip'" in str(caught.value)
    assert len(list(MMPR(**options, on_bad_row="skip").as_streaming_dataset(split="train"))) == 3
    assert f"left out {where}:2" in caplog.text


def test_a_changed_release_is_not_answered_from_the_cache(tmp_path):
    make_release(MMPRSettings(output=str(tmp_path / "raw"), release="folders", num_pictures=4))
    options = {"raw": tmp_path / "raw", "subsets": ["geos_text_pairs_vqa_correctness_rules"]}
    counts = []
    for _ in range(2):
        builder = MMPR(**options, cache_dir=str(tmp_path / "cache"))
        builder.download_and_prepare()
        counts.append(len(builder.as_dataset(split="train")))
        with open(tmp_path / "raw/annotations/geos_text_pairs_vqa_correctness_rules.jsonl", "a") as out:
            out.write('{"question": "One more?", "chosen": "yes", "rejected": "no"}\n')
    assert counts == [4, 5]
