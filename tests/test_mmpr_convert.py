"""Raw MMPR -> Parquet -> rows -> raw: nothing is lost, nothing comes twice, and a kill changes nothing."""

import base64
import hashlib
import io
import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from PIL import Image

from internvl_mpo.errors import BadInputError, RowError
from internvl_mpo.mini.release import MMPRSettings, make_release
from internvl_mpo.mmpr.card import write_card
from internvl_mpo.mmpr.convert import convert
from internvl_mpo.mmpr.files import read_lines
from internvl_mpo.mmpr.manifest import read_manifest
from internvl_mpo.mmpr.parquet import FEATURES, arrow_schema, prompt_blocks, to_raw
from internvl_mpo.mmpr.reading import iter_pairs
from internvl_mpo.mmpr.release import parse_line, read_subsets
from internvl_mpo.mmpr.restore import restore
from internvl_mpo.mmpr.shard_plan import Options
from internvl_mpo.records import PreferencePair
from internvl_mpo.settings import read_yaml

ROOT = Path(__file__).resolve().parents[1]
RELEASES = ("v1.0", "v1.1", "v1.2", "folders")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Every layout of the mini release under its name, and `parquet/`, made from v1.2 in several shards per source."""
    folder = tmp_path_factory.mktemp("mmpr")
    for release in RELEASES:
        make_release(MMPRSettings(output=str(folder / release), release=release, num_pictures=12))
    result = convert(Options(str(folder / "v1.2"), shard_bytes=6000), folder / "parquet")
    assert result.num_rejects == 0
    write_card(folder / "parquet", name="me/mini")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def raw_rows(release: Path) -> dict[str, list[dict]]:
    """Subset -> its rows, read by nothing but the json module."""
    return {
        subset.name: [json.loads(line) for _, _, line in read_lines(subset.annotation)]
        for subset in read_subsets(release)
    }


def raw_pictures(release: Path) -> dict[tuple[str, str], bytes]:
    found = {}
    for subset in read_subsets(release):
        for _, _, line in read_lines(subset.annotation):
            for name in subset.pair(json.loads(line), "").images:
                found[subset.name, name] = subset.pictures.read(name)
    return found


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


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


# --- bad input --------------------------------------------------------------------------------------------------------


def damaged(world: Path, folder: Path) -> Path:
    make_release(MMPRSettings(output=str(folder), release="folders", num_pictures=4))
    return folder


def annotation(folder: Path) -> Path:
    return folder / "annotations" / "CLEVR_math_digits_pairs_vqa_correctness_rules.jsonl"


def run(folder: Path, **options) -> tuple[list[dict], list[str], list[str]]:
    """Convert; return the rejects, ids converted, and problems of archives."""
    output = folder.with_name(f"{folder.name}.parquet")
    result = convert(Options(str(folder), **options), output)
    rejects = output.with_name(f"{output.name}.rejects.jsonl")
    lines = rejects.read_text().splitlines() if rejects.is_file() else []
    ids = [row for path in sorted(output.glob("data/*/*.parquet")) for row in pq.read_table(path)["id"].to_pylist()]
    assert result.num_rejects == len(lines)
    assert result.num_rows == len(ids)
    return [json.loads(line) for line in lines], ids, result.problems


def replace_line(path: Path, number: int, change) -> bytes:
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = change(lines[number - 1])
    path.write_bytes(b"\n".join(lines))
    return lines[number - 1]


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises more pixels than it holds."""
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda line: line[: len(line) // 2], "not valid JSON"),
        (lambda line: line[:20] + b"\0\0\0" + line[20:], "NUL byte at column 21"),
        (lambda line: b"\0" * 300, "NUL byte at column 1"),
        (lambda line: line[:20] + b"\xff" + line[20:], "not UTF-8 text"),
        (lambda line: b"[1, 2]", "expected a JSON object, found list"),
        (lambda line: b"[" * 100_000, "not valid JSON"),
        (lambda line: line.replace(b"00000.png", b"../../../etc/passwd"), "leads out of its folder"),
        (lambda line: line.replace(b"00000.png", b"nowhere.png"), "'nowhere.png' is not in"),
        (lambda line: line.replace(b'"answer_gt"', b'"image": {"a": 1}, "answer_gt"'), "must be text or a list"),
        (lambda line: line.replace(b"Final answer:", b"\\ud800", 1), "half a surrogate pair (U+D800)"),
    ],
)
def test_a_bad_line_is_named_and_kept_and_the_rest_converts(world, tmp_path, change, reason):
    folder = damaged(world, tmp_path / "raw")
    line = replace_line(annotation(folder), 2, change)
    (reject,), ids, _ = run(folder)
    assert reject["row"] == f"{annotation(folder)}:2"
    assert reason in reject["reason"]
    kept = reject["line"].encode() if "line" in reject else base64.b64decode(reject["line_base64"]).rstrip(b"\n")
    assert kept == line
    assert len(ids) == 4 * 9 - 1


def test_a_repeated_id_names_the_first_row_even_in_another_file(world, tmp_path):
    folder = damaged(world, tmp_path / "raw")
    other = folder / "annotations" / "RLAIF-V.jsonl"
    replace_line(annotation(folder), 3, lambda line: line[:1] + b'"id": "rlaif-1", ' + line[1:])
    replace_line(annotation(folder), 5, lambda line: annotation(folder).read_bytes().split(b"\n")[3])
    rejects, ids, _ = run(folder)
    assert [(reject["row"], reject["reason"].split("at ")[1]) for reject in rejects] == [
        (f"{annotation(folder)}:5", f"{annotation(folder)}:4"),
        (f"{other}:2", f"{annotation(folder)}:3"),
    ]
    assert len(ids) == len(set(ids)) == 4 * 9 - 2


def test_equal_names_in_two_image_folders_are_two_pictures(tmp_path):
    meta = {}
    for name, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(tmp_path / "images" / name / "1.png")
        row = {"image": "1.png", "question": "Red?", "chosen": "Yes", "rejected": "No"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
        meta[name] = {"root": f"images/{name}", "annotation": f"{name}.jsonl", "repeat_time": 1}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    rejects, ids, _ = run(tmp_path)
    assert not rejects
    assert len(set(ids)) == 2


def test_an_absolute_path_of_a_picture_is_looked_for_in_its_folder(world, tmp_path):
    folder = damaged(world, tmp_path / "raw")
    replace_line(annotation(folder), 1, lambda line: line.replace(b"00000.png", b"/mnt/x/CLEVR_digits/00000.png"))
    rejects, ids, _ = run(folder)
    assert not rejects
    assert len(ids) == 4 * 9


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be decoded"),
        (b"<html>404</html>", "cannot be decoded"),
        ("cut", "cannot be decoded"),
        (png_header(20_000, 15_000), "is a decompression bomb: over 178,956,970 pixels"),  # 300 megapixels
        (png_header(12_000, 10_000), "cannot be decoded"),  # allowed size, but the pixels are not there
    ],
)
def test_an_unusable_picture_rejects_its_rows_only(world, tmp_path, content, reason):
    folder = damaged(world, tmp_path / "raw")
    picture = folder / "images" / "CLEVR_digits" / "00001.png"
    picture.write_bytes(picture.read_bytes()[:-40] if content == "cut" else content)
    rejects, ids, _ = run(folder)
    assert len(rejects) == 3 + 1 + 1  # the subsets that show it
    assert all(reason in reject["reason"] and "00001.png" in reject["reason"] for reject in rejects)
    assert rejects[0]["row"] == f"{annotation(folder)}:4"
    assert len(ids) == 4 * 9 - 5


def test_a_missing_image_folder_rejects_rows_with_pictures_of_that_folder_only(world, tmp_path):
    folder = damaged(world, tmp_path / "raw")
    (folder / "images" / "nlvr2_digits").rename(tmp_path / "elsewhere")
    rejects, ids, _ = run(folder)
    assert len(rejects) == 4
    assert all("image folder 'MMPR/images/nlvr2_digits' does not exist below" in reject["reason"] for reject in rejects)
    assert len(ids) == 4 * 9 - 4
    (tmp_path / "other" / "nlvr2_digits").parent.mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "other" / "nlvr2_digits")
    assert convert(Options(str(folder), str(tmp_path / "other")), tmp_path / "again").num_rejects == 0


def zipped(folder: Path, parts: int = 3) -> list[Path]:
    make_release(MMPRSettings(output=str(folder), release="v1.2", num_pictures=30, num_parts=parts))
    return sorted(folder.glob("images.zip_*"))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_truncated_zip_part_loses_only_what_it_held(tmp_path, number):
    parts = zipped(tmp_path / "raw")
    content = parts[number].read_bytes()
    cut = len(content) // 2 if number == 2 else 1500  # the end of the last part is the directory, which is not needed
    parts[number].write_bytes(content[:-cut])
    rejects, ids, problems = run(tmp_path / "raw")
    assert "images.zip_a" in problems[0]
    assert "1,500 bytes are missing" in problems[0] or "it has no directory at its end" in problems[0]
    assert 0 < len(rejects) < 60
    assert all("annotations.zip/annotations/" in reject["row"] and "image" in reject["reason"] for reject in rejects)
    assert len(ids) + len(rejects) == 30 * 9


def test_a_missing_zip_part_stops_before_any_work(tmp_path):
    parts = zipped(tmp_path / "raw")
    parts[1].unlink()
    with pytest.raises(
        BadInputError, match=r"images\.zip: a part is missing between images\.zip_aa and images\.zip_ac"
    ):
        convert(Options(str(tmp_path / "raw")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_zip_entry_that_leads_out_of_its_folder_is_never_read(world, tmp_path):
    folder = damaged(world, tmp_path / "raw")
    (folder / "images" / "geos").mkdir()
    evil = folder / "more.zip"
    with zipfile.ZipFile(evil, "w") as archive:
        archive.writestr("images/CLEVR_digits/../../../evil.png", b"evil")
        archive.writestr("/images/evil.png", b"evil")
        archive.writestr("C:\\evil.png", b"evil")
        archive.writestr("images/new/1.png", (folder / "images/CLEVR_digits/00000.png").read_bytes())
    replace_line(annotation(folder), 1, lambda line: line.replace(b"00000.png", b"evil.png"))
    rejects, ids, problems = run(folder)
    assert [reject["row"] for reject in rejects] == [f"{annotation(folder)}:1"]
    assert len([problem for problem in problems if "leads out of its folder and is not read" in problem]) == 3
    assert len(ids) == 4 * 9 - 1


def test_a_decompression_bomb_in_a_zip_is_not_unpacked(world, tmp_path):
    from internvl_mpo.mmpr.archives import Archive
    from internvl_mpo.mmpr.files import MAX_FILE_BYTES

    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        archive.writestr("honest.bin", b"\0" * (MAX_FILE_BYTES + 1))
        archive.writestr("lying.bin", b"\0" * 50_000_000)
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):  # the second entry claims ten bytes
        place = content.rfind(mark)
        content[place + offset : place + offset + 4] = struct.pack("<I", 10)
    path.write_bytes(content)
    archive = Archive([path])
    with pytest.raises(BadInputError, match="unpacks to 268,435,457 bytes, over the limit"):
        archive.read(archive.find("honest.bin"), MAX_FILE_BYTES)
    with pytest.raises(BadInputError, match="does not unpack to the 10 bytes its header promises"):
        archive.read(archive.find("lying.bin"), MAX_FILE_BYTES)


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


def test_a_line_that_is_far_too_long_is_refused(monkeypatch, tmp_path):
    from internvl_mpo.mmpr import files as mmpr_files
    from internvl_mpo.mmpr import release as mmpr

    monkeypatch.setattr(mmpr_files, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(mmpr, "MAX_LINE_BYTES", 100)
    (tmp_path / "x.jsonl").write_bytes(b"a" * 1000 + b"\n{}\n")
    (_, length, long), (offset, _, short) = read_lines(tmp_path / "x.jsonl")
    assert (length, offset, short) == (1001, 1001, b"{}\n")
    with pytest.raises(RowError, match="over 100 bytes"):
        parse_line(long, "")


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
