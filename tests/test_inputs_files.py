"""Pictures, paths and text files as people have them: used as they say, or refused by name."""

import codecs
import json
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_inputs_rows import PAIR, pair, reasons, write_rows
from tiny import tiny_processor

from internvl_mpo.encoding import encode_group, measure_group
from internvl_mpo.errors import BadInputError, RowError
from internvl_mpo.jsonl import iter_jsonl
from internvl_mpo.mmpr import lines as mmpr_lines
from internvl_mpo.mmpr.check import check
from internvl_mpo.mmpr.convert import convert
from internvl_mpo.mmpr.reading import iter_pairs
from internvl_mpo.mmpr.shard_plan import Options


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (96, 48), (90, 30, 200)).save(tmp_path / name)
    return tmp_path


def odd_picture(path: Path, kind: str) -> None:
    values = np.linspace(0, 1, 96 * 48, dtype=np.float32).reshape(48, 96)
    if kind == "float":
        Image.fromarray(values).save(path)
    elif kind == "wide":
        Image.fromarray((values * 1e6).astype(np.int32)).save(path)
    elif kind == "lab":
        Image.new("LAB", (96, 48)).save(path)
    else:
        Image.fromarray((values * 65535).astype(np.uint16)).save(path)


@pytest.mark.parametrize("kind", ["float", "wide", "lab", "16 bits"])
@pytest.mark.parametrize("decode", [False, True])
def test_what_the_encoder_refuses_pre_flight_and_check_find(folder, kind, decode):
    odd_picture(folder / "odd.tiff", kind)
    rows = [pair(image="odd.tiff")]
    is_refused = False
    try:
        encode_group(tiny_processor(), rows, folder)
    except RowError:
        is_refused = True
    assert is_refused == (kind in ("float", "wide"))
    if is_refused:
        with pytest.raises(RowError, match=r"odd\.tiff"):
            measure_group(tiny_processor(), rows, folder, decode=decode)
    else:
        measure_group(tiny_processor(), rows, folder, decode=decode)
    data = write_rows(folder / "pairs.jsonl", {**PAIR, "image": "odd.tiff"}, {**PAIR, "image": "a.png"})
    assert sum(number for (name, _), number in check(str(data), decode=decode).kinds.items() if name == "picture") == (
        is_refused
    )


# --- paths of another machine -----------------------------------------------------------------------------------------


def test_one_absolute_path_is_found_by_its_last_folders(folder):
    data = write_rows(folder / "pairs.jsonl", {**PAIR, "image": "/data/setA/a.png"}, {**PAIR, "image": "b.png"})
    assert [row.pair.images for row in iter_pairs(data)] == [("a.png",), ("b.png",)]


@pytest.mark.parametrize("other", ["/data/setB/a.png", "s3://setB/a.png", "\\\\host\\setB\\a.png", "/a.png"])
def test_two_absolute_paths_never_become_one_picture(folder, other):
    data = write_rows(folder / "pairs.jsonl", {**PAIR, "image": "/data/setA/a.png"}, {**PAIR, "image": other})
    found = reasons(data)
    assert len(found) == 2
    assert all("/data/setA/a.png" in reason and repr(other)[1:-1].replace("\\\\", "\\") in reason for reason in found)
    result = convert(Options(str(data)), folder / "out")
    assert (result.num_rows, result.num_rejects) == (0, 2)


def test_an_absolute_path_with_two_candidates_is_refused_with_both(folder):
    (folder / "setA").mkdir()
    Image.new("RGB", (30, 30)).save(folder / "setA" / "a.png")
    data = write_rows(folder / "pairs.jsonl", {**PAIR, "image": "/data/setA/a.png"})
    (reason,) = reasons(data)
    assert "'setA/a.png'" in reason and "'a.png'" in reason


def test_two_subsets_with_one_folder_share_no_picture_by_accident(folder):
    entries = {}
    for name in ("one", "two"):
        write_rows(folder / f"{name}.jsonl", {**PAIR, "image": f"/data/{name}/a.png"})
        entries[name] = {"root": ".", "annotation": f"{name}.jsonl", "repeat_time": 1}
    (folder / "meta.json").write_text(json.dumps(entries))
    assert len(reasons(folder / "meta.json")) == 2


@pytest.mark.parametrize("key", ["root", "annotation"])
def test_two_names_in_meta_json_never_become_one_file(folder, key):
    (folder / "set").mkdir()
    write_rows(folder / "x.jsonl", PAIR)
    write_rows(folder / "y.jsonl", PAIR)
    names = {"root": "set", "annotation": "x.jsonl"}
    entries = {
        "one": {"root": "set", "annotation": "x.jsonl", "repeat_time": 1, key: f"/one/{names[key]}"},
        "two": {"root": "set", "annotation": "y.jsonl", "repeat_time": 1, key: f"/two/{names[key]}"},
    }
    (folder / "meta.json").write_text(json.dumps(entries))
    with pytest.raises(BadInputError, match=r"/one/.*/two/"):
        list(iter_pairs(folder / "meta.json"))


# --- text files -------------------------------------------------------------------------------------------------------


def test_a_byte_order_mark_is_passed_over(folder):
    entry = {"root": ".", "annotation": "x.jsonl", "repeat_time": 1}
    write_rows(folder / "x.jsonl", {**PAIR, "image": "a.png"})
    (folder / "meta.json").write_bytes(codecs.BOM_UTF8 + json.dumps({"x": entry}).encode())
    (folder / "x.jsonl").write_bytes(codecs.BOM_UTF8 + (folder / "x.jsonl").read_bytes())
    assert [row.pair.images for row in iter_pairs(folder / "meta.json")] == [("a.png",)]
    assert [row["question"] for _, row in iter_jsonl(folder / "x.jsonl")] == ["How many?"]


@pytest.mark.parametrize("zipped", [False, True])
def test_an_endless_line_is_refused_in_little_memory_and_the_rest_is_read(folder, monkeypatch, zipped):
    monkeypatch.setattr(mmpr_lines, "MAX_LINE_BYTES", 1 << 20)
    from internvl_mpo.mmpr import release

    monkeypatch.setattr(release, "MAX_LINE_BYTES", 1 << 20)
    endless = json.dumps({**PAIR, "chosen": "a" * (48 << 20)})
    lines = f"{json.dumps(PAIR)}\n{endless}\n{json.dumps({**PAIR, 'chosen': '9'})}\n"
    entry = {"root": ".", "annotation": "x.jsonl", "repeat_time": 1}
    (folder / "meta.json").write_text(json.dumps({"x": entry}))
    if zipped:
        with zipfile.ZipFile(folder / "annotations.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("x.jsonl", lines)
    else:
        (folder / "x.jsonl").write_text(lines)
    del endless, lines
    tracemalloc.start()
    rows = list(iter_pairs(folder / "meta.json"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [isinstance(row, RowError) for row in rows] == [False, True, False]
    assert "over 1,048,576 bytes" in str(rows[1])
    assert peak < 16 << 20


# --- ways out of a release --------------------------------------------------------------------------------------------


@pytest.fixture
def release(tmp_path) -> Path:
    """A release with one picture, and a picture outside it."""
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (40, 40)).save(tmp_path / "elsewhere" / "secret.png")
    (tmp_path / "release" / "images").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "release" / "images" / "a.png")
    return tmp_path / "release"


def write_release(release: Path, root: str, image: str) -> None:
    write_rows(release / "x.jsonl", {**PAIR, "image": image})
    entry = {"root": root, "annotation": "x.jsonl", "repeat_time": 1}
    (release / "meta.json").write_text(json.dumps({"x": entry}))


def way_out(release: Path, way: str) -> None:
    outside = release.parent / "elsewhere"
    if way == "root":
        write_release(release, "../elsewhere", "secret.png")
    elif way == "absolute root":
        write_release(release, str(outside), "secret.png")
    elif way == "linked file":
        (release / "images" / "b.png").symlink_to(outside / "secret.png")
        write_release(release, "images", "b.png")
    elif way == "linked folder":
        (release / "images" / "more").symlink_to(outside)
        write_release(release, "images", "more/secret.png")
    elif way == "linked root":
        (release / "other").symlink_to(outside)
        write_release(release, "other", "secret.png")
    else:
        write_release(release, "images", "../../elsewhere/secret.png")


@pytest.mark.parametrize("way", ["root", "absolute root", "linked file", "linked folder", "linked root", "image"])
def test_no_picture_from_outside_is_packed(release, way):
    way_out(release, way)
    result = convert(Options(str(release)), release.parent / "out")
    assert (result.num_rows, result.num_rejects) == (0, 1)
    rejects = (release.parent / "out.rejects.jsonl").read_text()
    assert "leads out of" in rejects and ("secret.png" in rejects or "b.png" in rejects)
    assert sum(n for (kind, _), n in check(str(release)).kinds.items() if kind == "picture") == 1


def test_a_folder_given_by_hand_is_part_of_the_release(release):
    way_out(release, "linked folder")
    options = Options(str(release), image_root=str(release.parent / "elsewhere"))
    assert convert(options, release.parent / "out").num_rows == 1


@pytest.mark.parametrize("way", ["../elsewhere/y.jsonl", "link.jsonl"])
def test_no_annotation_from_outside_is_read(release, way):
    write_rows(release.parent / "elsewhere" / "y.jsonl", PAIR)
    (release / "link.jsonl").symlink_to(release.parent / "elsewhere" / "y.jsonl")
    (release / "meta.json").write_text(json.dumps({"x": {"root": "images", "annotation": way, "repeat_time": 1}}))
    with pytest.raises(BadInputError, match="leads out"):
        convert(Options(str(release)), release.parent / "out")


def test_the_links_of_the_hubs_cache_stay_inside(tmp_path):
    snapshot, blobs = tmp_path / "datasets--me--x" / "snapshots" / "abc", tmp_path / "datasets--me--x" / "blobs"
    (snapshot / "images").mkdir(parents=True)
    blobs.mkdir()
    Image.new("RGB", (40, 40)).save(blobs / "1", "PNG")
    write_rows(blobs / "2", {**PAIR, "image": "a.png"})
    (snapshot / "images" / "a.png").symlink_to(blobs / "1")
    (snapshot / "x.jsonl").symlink_to(blobs / "2")
    (snapshot / "meta.json").write_text(
        json.dumps({"x": {"root": "images", "annotation": "x.jsonl", "repeat_time": 1}})
    )
    assert convert(Options(str(snapshot)), tmp_path / "out").num_rows == 1
