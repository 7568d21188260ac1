"""Raw MMPR -> Parquet -> rows -> raw: nothing is lost, nothing comes twice, and a kill changes nothing."""

import hashlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from mmpr_world import (
    RELEASES,
    ROOT,
    annotation,
    damaged,
    hashes,
    make_world,
    raw_pictures,
    raw_rows,
    replace_line,
)
from PIL import Image

from internvl_mpo.errors import BadInputError
from internvl_mpo.mini.release import MMPRSettings, make_release
from internvl_mpo.mmpr.card import write_card
from internvl_mpo.mmpr.convert import convert
from internvl_mpo.mmpr.manifest import read_manifest
from internvl_mpo.mmpr.parquet import FEATURES, arrow_schema, prompt_blocks, to_raw
from internvl_mpo.mmpr.reading import iter_pairs
from internvl_mpo.mmpr.restore import restore
from internvl_mpo.mmpr.shard_plan import Options
from internvl_mpo.records import PreferencePair
from internvl_mpo.settings import read_yaml


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("mmpr"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


# --- reading what was published ---------------------------------------------------------------------------------------


def test_every_layout_gives_the_same_rows_and_pictures(world):
    expected_rows, expected_pictures = raw_rows(world / "folders"), raw_pictures(world / "folders")
    assert sum(map(len, expected_rows.values())) == 12 * 9
    for release in RELEASES[:3]:
        assert raw_rows(world / release) == expected_rows
        assert raw_pictures(world / release) == expected_pictures


def test_the_mini_release_has_the_oddities_it_is_made_for(world):
    rows = raw_rows(world / "v1.2")
    images = [row.get("image", "absent") for found in rows.values() for row in found]
    kinds = {f"list of {len(image)}" if isinstance(image, list) else "one" if image else image for image in images}
    assert kinds == {"list of 1", "list of 2", "", None, "one"}
    assert "absent" in images
    meta = json.loads((world / "v1.2" / "meta.json").read_text())
    assert {entry["repeat_time"] for entry in meta.values()} == {0.25, 0.5, 1, 2.5, 3}
    assert all(entry["annotation"].startswith("/mnt/") for entry in meta.values())
    assert sorted(path.name for path in (world / "v1.2").glob("*.zip*")) == [
        "annotations.zip",
        "images.zip_aa",
        "images.zip_ab",
        "images.zip_ac",
    ]


# --- the round trip ---------------------------------------------------------------------------------------------------


def test_raw_to_parquet_to_load_dataset_to_raw_is_equal_in_every_field_and_byte(world, tmp_path):
    rows, pictures = raw_rows(world / "v1.2"), raw_pictures(world / "v1.2")
    table = datasets.load_dataset(str(world / "parquet"), split="train")
    table = table.cast_column("images", datasets.List(datasets.Image(decode=False)))
    found: dict[str, list[dict]] = {}
    for row in table:
        found.setdefault(row["subset"], []).append(to_raw(row))
        assert [picture["path"] for picture in row["images"]] == row["image_paths"]
        for picture in row["images"]:
            assert picture["bytes"] == pictures[row["subset"], picture["path"]]
    assert {name: [json.dumps(row, sort_keys=True) for row in found[name]] for name in found} == {
        name: [json.dumps(row, sort_keys=True) for row in rows[name]] for name in rows
    }
    restore(str(world / "parquet"), tmp_path / "raw")
    assert raw_rows(tmp_path / "raw") == rows
    assert raw_pictures(tmp_path / "raw") == pictures
    meta = json.loads((world / "v1.2/meta.json").read_text())
    for entry in meta.values():  # the only thing that is not given back: paths of the cluster
        entry["annotation"] = entry["annotation"].removeprefix("/mnt/cluster/share/MMPR/")
    assert json.loads((tmp_path / "raw" / "meta.json").read_text()) == meta
    for path in (world / "parquet").rglob("*"):
        assert path.is_dir() or b"/mnt/cluster" not in path.read_bytes()


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "chosen": "a", "rejected": "b", "answer_gt": 12},
        {"question": "q", "chosen": "a", "rejected": "b", "answer_gt": 12.0, "image": ["x.png"]},
        {"question": "q", "chosen": "a", "rejected": "b", "answer_gt": None, "image": []},
        {"question": "q", "chosen": "a", "rejected": "b", "answer_gt": ["1", "2"], "images": ["x.png", "y.png"]},
        {"question": "q", "chosen": "a", "rejected": "b", "answer": "12", "chosen_meta": True},
        {"question": "q", "chosen": "a", "rejected": "b", "id": 7, "source": "s", "rule": "vote", "video_id": "v"},
        {"question": "q\u0000", "chosen": " a\n", "rejected": "b", "id": "", "clip": None, "rule": None},
    ],
)
def test_odd_spellings_of_a_row_come_back_as_they_were(row):
    from internvl_mpo.mmpr.parquet import to_columns
    from internvl_mpo.mmpr.release import Subset

    subset = Subset("s_pairs_vqa_correctness_rules", None, Path("x.jsonl"), entry={"root": "images/s"})
    pair = subset.pair(row, "")
    columns = to_columns(row, pair, subset, [b"picture"] * len(pair.images))
    assert json.dumps(to_raw(columns), sort_keys=True) == json.dumps(row, sort_keys=True)


def test_rows_of_this_package_cost_nothing_extra_to_restore():
    from internvl_mpo.mmpr.parquet import to_columns
    from internvl_mpo.mmpr.release import Subset

    pair = PreferencePair(question="q", chosen="a", rejected="b", source="s", rule="format", provenance={"seed": [1]})
    columns = to_columns(pair.to_json(), pair, Subset("s", None, Path("x.jsonl")), [])
    assert columns["raw"] == '{"form":"own"}'
    assert to_raw(columns) == pair.to_json()


def test_pictures_are_inside_the_files_once_per_row_group_and_not_encoded_again(world):
    original = raw_pictures(world / "v1.2")["CLEVR_math_digits_pairs_vqa_correctness_rules", "00000.png"]
    files = [path.read_bytes() for path in (world / "parquet/data/CLEVR_math_digits").glob("*.parquet")]
    assert sum(content.count(original) for content in files) < 3 + 1  # three pairs of one subset, one of the other
    assert any(original in content for content in files)


def test_features_are_those_datasets_reads(world):
    path = next((world / "parquet").glob("data/*/*.parquet"))
    found = datasets.Features.from_arrow_schema(pq.read_schema(path))
    assert found == datasets.Features.from_dict(FEATURES)
    assert found["images"] == datasets.List(datasets.Image())
    assert b'"List"' not in arrow_schema().metadata[b"huggingface"]  # datasets 3 does not know that word
    assert "content_defined_chunking" in str(pq.read_metadata(path).metadata)


# --- load_dataset -----------------------------------------------------------------------------------------------------


def test_streaming_gives_what_plain_loading_gives(world):
    plain = datasets.load_dataset(str(world / "parquet"), split="train")
    stream = datasets.load_dataset(str(world / "parquet"), split="train", streaming=True)
    count = 0
    for one, other in zip(plain, stream, strict=True):
        assert [picture.tobytes() for picture in one.pop("images")] == [p.tobytes() for p in other.pop("images")]
        assert one == other
        count += 1
    assert count == 12 * 9


def test_configurations_cover_every_row(world):
    head = read_yaml_head(world / "parquet" / "README.md")
    names = [config["config_name"] for config in head["configs"]]
    assert names[0] == "default" and names[-1] == "tiny"
    assert {"mathematics", "general_vqa", "CLEVR_math_digits", "RLAIF-V"} <= set(names)

    def ids(name: str) -> set[str]:
        return set(datasets.load_dataset(str(world / "parquet"), name, split="train")["id"])

    everything = ids("default")
    assert len(everything) == 12 * 9
    sources = ("CLEVR_math_digits", "m3cot_digits", "nlvr2_digits_ov", "vqav2_digits", "geos_text", "RLAIF-V")
    assert set().union(*map(ids, sources)) == everything
    assert ids("mathematics") == ids("CLEVR_math_digits") | ids("geos_text")
    assert ids("tiny") <= everything
    only = datasets.load_dataset(
        "parquet", data_files=str(world / "parquet/data/RLAIF-V/*.parquet"), split="train", columns=["id", "rule"]
    )
    assert set(only["id"]) == ids("RLAIF-V")


def read_yaml_head(path: Path) -> dict:
    head = path.with_suffix(".yaml")
    head.write_text(path.read_text().split("---")[1])
    found = read_yaml(head)
    head.unlink()
    return found


@pytest.mark.slow
def test_a_stream_resumed_anywhere_gives_the_remaining_rows_exactly_once(world):
    stream = datasets.load_dataset(str(world / "parquet"), split="train", streaming=True)
    stream = stream.select_columns(["id"])
    assert stream.num_shards > 6
    ids = [row["id"] for row in stream]
    for stop in range(0, len(ids) + 1, 7):
        first, again = (
            datasets.load_dataset(str(world / "parquet"), split="train", streaming=True).select_columns(["id"])
            for _ in range(2)
        )
        seen = [row["id"] for row in itertools.islice(first, stop)]
        again.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert seen + [row["id"] for row in again] == ids


# --- kill and go on ---------------------------------------------------------------------------------------------------


def test_workers_do_not_change_a_byte_and_a_rerun_does_nothing(world, tmp_path):
    options = Options(str(world / "folders"), shard_bytes=6000)
    convert(options, tmp_path / "out", workers=2)
    write_card(tmp_path / "out", name="me/mini")
    found = hashes(tmp_path / "out")
    expected = hashes(world / "parquet")
    del found["manifest.json"], expected["manifest.json"]  # says where annotations were
    assert found == expected
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    assert convert(options, tmp_path / "out").num_rows == 12 * 9
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.parquet")}
    for shard in read_manifest(tmp_path / "out")["shards"]:
        assert hashlib.sha256((tmp_path / "out" / shard["path"]).read_bytes()).hexdigest() == shard["sha256"]


def test_a_folder_that_only_has_the_name_of_the_work_folder_stays(world, tmp_path):
    (tmp_path / "out.work").mkdir()
    (tmp_path / "out.work" / "thesis.tex").write_text("years of work")
    with pytest.raises(BadInputError, match=r"out\.work holds other things"):
        convert(Options(str(world / "folders")), tmp_path / "out")
    assert (tmp_path / "out.work" / "thesis.tex").exists()
    assert not (tmp_path / "out").exists()


def test_tokens_are_counted_with_a_tokenizer_and_no_code_of_its_folder_is_run(world, tmp_path):
    from tiny import tiny_tokenizer

    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoConfig": "evil.Evil"}}')
    (tmp_path / "tokenizer" / "evil.py").write_text("raise SystemExit(3)")
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "rows.jsonl").write_text('{"question": "four", "chosen": "three", "rejected": "no"}\n')
    options = Options(str(raw / "rows.jsonl"), tokenizer=str(tmp_path / "tokenizer"))
    sums = convert(options, tmp_path / "out").statistics.sums
    assert [sums["tokens", side]["tokens"] for side in ("question", "chosen", "rejected")] == [4, 5, 2]  # one per byte
    with pytest.raises(BadInputError, match=r"no tokenizer\.json in"):
        convert(Options(str(raw / "rows.jsonl"), tokenizer=str(raw)), tmp_path / "none")
    assert not list(tmp_path.glob("none*")), "refused before any work"
    assert not (tmp_path / "none").exists()


def test_another_release_or_setting_is_refused_for_the_same_output(world, tmp_path):
    convert(Options(str(world / "folders")), tmp_path / "out")
    with pytest.raises(BadInputError, match="was made from another release or with other settings"):
        convert(Options(str(world / "folders"), shard_bytes=5000), tmp_path / "out")


@pytest.mark.slow
def test_killed_at_random_and_run_again_the_shards_have_the_same_bytes(world, tmp_path):
    make_release(MMPRSettings(output=str(tmp_path / "raw"), release="v1.1", num_pictures=300))
    program = [sys.executable, str(ROOT / "dataset_scripts/convert_mmpr.py"), str(tmp_path / "raw"), "--shard_mb", "1"]
    convert(Options(str(tmp_path / "raw"), shard_bytes=1 << 20), tmp_path / "whole")
    write_card(tmp_path / "whole")
    kills = 0
    for delay in (1.2, 1.5, 1.8, 2.1, 2.4):
        process = subprocess.Popen(
            [*program, "--output", str(tmp_path / "out")],
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        time.sleep(delay)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills
    subprocess.run([*program, "--output", str(tmp_path / "out")], check=True, capture_output=True)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert not (tmp_path / "out.work").exists()


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_finds_pictures_of_absolute_paths_in_unpacked_folders(world, tmp_path):
    folder = damaged(world, tmp_path / "raw")
    file = annotation(folder)
    usual = list(iter_pairs(folder))
    there = str(next(folder.rglob("CLEVR_digits")) / "00000.png")  # exists on this machine: stays as it is
    for number, path in ((1, "/mnt/x/CLEVR_digits/00000.png"), (2, "s3://x/00001.png"), (3, there), (4, "/mnt/no.png")):
        row = json.loads(file.read_text().splitlines()[number - 1])
        line = json.dumps({**row, "image": path}).encode()
        replace_line(file, number, lambda _, line=line: line)
    rows = [row for row in iter_pairs(folder) if row.where.startswith(f"{file}:")]
    names = [row.pair.images for row in rows[:4]]
    assert names == [("00000.png",), ("00001.png",), (there,), ("/mnt/no.png",)]
    assert [row.pair.images for row in rows[4:]] == [
        row.pair.images for row in usual if row.where.startswith(f"{file}:")
    ][4:]


def test_training_sees_the_same_pairs_and_tiles_in_raw_and_in_parquet(world):
    from tiny import tiny_model, tiny_processor

    from internvl_mpo.encoding import encode_group

    raw = {row.pair.id: row for row in iter_pairs(world / "v1.2")}
    rows = list(iter_pairs(world / "parquet"))
    assert len(raw) == len(rows) == 12 * 9
    processor = tiny_processor(tiny_model().config)
    for row in rows:
        other = raw[row.pair.id]
        assert row.pair == other.pair
        assert (row.subset, row.repeat_time, row.max_tiles) == (other.subset, other.repeat_time, other.max_tiles)
    for row in rows[::13]:
        other = raw[row.pair.id]
        mine = encode_group(processor, [row.pair], row.image_root, max_length=4000)
        theirs = encode_group(processor, [other.pair], other.image_root, max_length=4000)
        assert (mine.prompt_ids, mine.responses) == (theirs.prompt_ids, theirs.responses)
        assert (mine.tiles is None) == (theirs.tiles is None)
        assert mine.tiles is None or bool((mine.tiles == theirs.tiles).all())
    keys = Counter(row.key for row in rows)
    assert sorted(keys.values()) == sorted(Counter(row.key for row in raw.values()).values())


def test_blocks_keep_pictures_where_the_placeholders_were():
    image = {"type": "image", "text": None}
    assert prompt_blocks("q", 0) == [{"type": "text", "text": "q"}]
    assert prompt_blocks("q", 1) == [image, {"type": "text", "text": "q"}]
    assert prompt_blocks("a <image> b <image>", 2) == [
        {"type": "text", "text": "a "},
        image,
        {"type": "text", "text": " b "},
        image,
    ]


def test_a_picture_needs_no_folder_of_its_own(tmp_path):
    content = io.BytesIO()
    Image.new("L", (4, 4)).save(content, "PNG")
    (tmp_path / "1.png").write_bytes(content.getvalue())
    row = {"image": "1.png", "question": "q", "chosen": "a", "rejected": "b"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    result = convert(Options(str(tmp_path / "rows.jsonl")), tmp_path / "out")
    assert result.num_rows == 1
    restore(str(tmp_path / "out"), tmp_path / "raw")
    assert (tmp_path / "raw" / "images" / "1.png").read_bytes() == content.getvalue()
    assert [row.pair.question for row in iter_pairs(tmp_path / "raw")] == ["q"]
