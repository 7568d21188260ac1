"""What is wrong with a release is named with file and line, and costs nothing but its own rows."""

import base64
import json
import struct
import zipfile
from pathlib import Path

import pytest
from mmpr_world import annotation, damaged, make_world, png_header, replace_line, run, zipped
from PIL import Image

from internvl_mpo.errors import BadInputError, RowError
from internvl_mpo.mmpr.convert import convert
from internvl_mpo.mmpr.lines import read_lines
from internvl_mpo.mmpr.release import parse_line
from internvl_mpo.mmpr.shard_plan import Options


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("mmpr"))


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
        (lambda line: json.dumps(json.loads(line) | {"image": {"a": 1}}).encode(), "must be text or a list"),
        (lambda line: line.replace(b'"answer_gt"', b'"question": "?", "answer_gt"'), "'question' stands there twice"),
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


def test_a_line_that_is_far_too_long_is_refused(monkeypatch, tmp_path):
    from internvl_mpo.mmpr import lines as mmpr_lines
    from internvl_mpo.mmpr import release as mmpr

    monkeypatch.setattr(mmpr_lines, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(mmpr, "MAX_LINE_BYTES", 100)
    (tmp_path / "x.jsonl").write_bytes(b"a" * 1000 + b"\n{}\n")
    (_, length, long), (offset, _, short) = read_lines(tmp_path / "x.jsonl")
    assert (length, offset, short) == (1001, 1001, b"{}\n")
    with pytest.raises(RowError, match="over 100 bytes"):
        parse_line(long, "")
