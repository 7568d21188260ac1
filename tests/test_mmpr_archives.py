"""Zip archives read in place: every layout of the index, and what is damaged is named and never half read."""

import io
import pickle
import random
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import pytest

from internvl_mpo.errors import BadInputError
from internvl_mpo.mmpr import archives
from internvl_mpo.mmpr.archives import Archive, leaves_folder
from internvl_mpo.mmpr.joined_parts import JoinedParts, find_archives

FILES = {"a.jsonl": b"{}\n" * 7, "x/one.png": bytes(range(256)) * 3, "x/y/empty": b"", "x/y/z.json": b"[1, 2]"}
END = b"PK\x05\x06"


def write_zip(
    path: Path, files: dict = FILES, method: int = zipfile.ZIP_DEFLATED, comment=b"", zip64=False, pipe=False
) -> bytes:
    with zipfile.ZipFile(Pipe(path) if pipe else path, "w", method) as archive:
        for name, content in files.items():
            with archive.open(name, "w", force_zip64=zip64) as file:
                file.write(content)
        archive.comment = comment
    return path.read_bytes()


class Pipe:
    """A file that can only be written on, to which a zip writes sizes behind each entry."""

    def __init__(self, path: Path):
        self.file = path.open("wb", buffering=0)
        self.write, self.flush = self.file.write, self.file.flush


def contents(archive: Archive, files: dict[str, bytes] = FILES) -> dict[str, bytes]:
    """What the archive gives for each name, read at once and piece by piece."""
    found = {name: archive.read(archive.find(name), 10**6) for name in files if archive.find(name)}
    assert {name: b"".join(archive.stream(archive.find(name))) for name in found} == found
    return found


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "a.zip"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_folders_texts_and_files_are_those_of_the_archive(path, method):
    write_zip(path, {**FILES, "x/folder/": b""}, method, comment=b"with a comment")
    archive = Archive([path])
    assert len(archive) == 4
    assert contents(archive) == FILES
    assert archive.texts == ["a.jsonl", "x/y/z.json"]
    assert archive.folders == {"", "x", "x/y"}
    assert archive.problems == []
    assert archive.find("x/two.png") is None and archive.find("") is None
    assert contents(pickle.loads(pickle.dumps(archive))) == FILES


def test_what_repeats_after_32_kilobytes_is_unpacked(path):
    """So far back a packer may point, no shorter memory will do."""
    noise = random.Random(0).randbytes(32_500)
    write_zip(path, {"a": noise * 2}, zipfile.ZIP_DEFLATED)
    archive = Archive([path])
    assert path.stat().st_size < 40_000
    assert contents(archive, {"a": noise * 2}) == {"a": noise * 2}


@pytest.mark.parametrize("more", [0, 5, 163, 300])
def test_what_the_unpacker_still_holds_after_the_last_byte_comes_out(more):
    """A match that goes on over the end of a step leaves bytes behind when the input is used up."""
    content = bytes(archives._STEP + more)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = packer.compress(content) + packer.flush()
    assert b"".join(archives._unpacked(iter([packed]))) == content


def test_an_empty_archive_holds_nothing(path):
    write_zip(path, {})
    archive = Archive([path])
    assert len(archive) == 0 and archive.find("a") is None and archive.problems == []


def test_of_two_entries_of_one_name_the_last_counts(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", b"old")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.txt", b"newer")
    archive = Archive([path])
    assert archive.read(archive.find("a.txt"), 100) == b"newer"


@pytest.mark.parametrize("marked", ["length", "start", "number", "all"])
def test_the_end_record_may_leave_any_of_its_numbers_to_zip64(path, monkeypatch, marked):
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)  # writes a ZIP64 end record beside the plain one
    content = bytearray(write_zip(path))
    end = content.rfind(END)
    assert content[end - 20 : end - 16] == b"PK\x06\x07"
    for name, place, mark in (("number", 10, b"\xff\xff"), ("length", 12, b"\xff" * 4), ("start", 16, b"\xff" * 4)):
        if marked in (name, "all"):
            content[end + place : end + place + len(mark)] = mark
    path.write_bytes(content)
    archive = Archive([path])
    assert contents(archive) == FILES and archive.problems == []
    path.write_bytes(b"before" + content)  # the locator points six bytes too low
    archive = Archive([path])
    assert contents(archive) == FILES
    assert archive.problems == [f"{path}: 6 bytes too many before its directory; a part is not as it was published"]


def test_a_zip64_record_with_data_of_its_own_is_found_where_its_locator_says(path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 1)
    content = bytearray(write_zip(path))
    record, locator = content.rfind(b"PK\x06\x06"), content.rfind(b"PK\x06\x07")
    assert locator - record == 56
    content[record + 4 : record + 12] = struct.pack("<Q", 56 - 12 + 8)
    content[locator:locator] = b"8 bytes!"
    path.write_bytes(content)
    archive = Archive([path])
    assert contents(archive) == FILES and archive.problems == []


def test_65535_entries_are_a_number_and_65535_without_zip64_as_well(path, monkeypatch):
    content = bytearray(write_zip(path))
    end = content.rfind(END)
    content[end + 10 : end + 12] = b"\xff\xff"  # no ZIP64 record follows: these are its entries, as far as they go
    path.write_bytes(content)
    archive = Archive([path])
    assert contents(archive) == FILES
    assert archive.problems == [f"{path}: its directory ends after 4 of 65,535 entries"]


def test_sizes_and_offsets_of_an_entry_are_taken_from_zip64_one_by_one(path, monkeypatch):
    for limit in (0, 100, 500):  # larger numbers are written as 0xFFFFFFFF, the number itself in the extra field
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", limit)
        content = write_zip(path, zip64=True)
        assert b"\xff\xff\xff\xff" in content
        archive = Archive([path])
        assert contents(archive) == FILES and archive.problems == []


@pytest.mark.parametrize("place", [20, 24, 42])  # packed size, size, offset
def test_a_single_number_of_an_entry_may_be_in_zip64(path, place):
    content = bytearray(write_zip(path, {"1.png": b"one" * 9}, zipfile.ZIP_STORED))
    entry, end = content.rfind(b"PK\x01\x02"), content.rfind(END)
    length = struct.unpack("<I", content[end + 12 : end + 16])[0]
    content[end + 12 : end + 16] = struct.pack("<I", length + 12)
    extra = struct.pack("<HHQ", 1, 8, struct.unpack("<I", content[entry + place : entry + place + 4])[0])
    content[entry + place : entry + place + 4] = b"\xff" * 4
    content[entry + 30 : entry + 32] = struct.pack("<H", len(extra))
    content[entry + 46 + 5 : entry + 46 + 5] = extra
    path.write_bytes(content)
    archive = Archive([path])
    assert contents(archive, {"1.png": b"one" * 9}) == {"1.png": b"one" * 9}
    assert archive.problems == []


def test_zip64_values_stand_behind_other_extra_fields():
    other = struct.pack("<HH3s", 0x5455, 3, b"abc")
    size, packed, header = 1 << 33, 1 << 34, 1 << 35
    mark = 0xFFFFFFFF
    field = struct.pack("<HHQQQ", 1, 24, size, packed, header)
    assert archives._zip64(other + field + other, mark, mark, mark) == (size, packed, header)
    assert archives._zip64(other + struct.pack("<HHQ", 1, 8, header), 5, 6, mark) == (5, 6, header)
    assert archives._zip64(other + struct.pack("<HHQ", 1, 8, packed), 5, mark, 7) == (5, packed, 7)
    assert archives._zip64(struct.pack("<HHQ", 1, 8, size), mark, mark, 7) == (size, mark, 7)  # too short a field
    assert archives._zip64(other, mark, 6, 7) == (mark, 6, 7)
    assert archives._zip64(b"\x01\x00\x00", mark, 6, 7) == (mark, 6, 7)
    assert archives._zip64(b"\x01\x00\x00\x00", mark, 6, 7) == (mark, 6, 7)


def cut(content: bytes) -> bytes:
    """An archive without its directory."""
    return content[: content.find(b"PK\x01\x02")]


@pytest.mark.parametrize("step", [33, 64, 4 << 20])
@pytest.mark.parametrize("follow", [False, True])
def test_without_its_directory_an_archive_gives_the_entries_that_are_whole(path, monkeypatch, step, follow):
    monkeypatch.setattr(archives, "_SCAN_STEP", step)
    if follow:  # sizes come behind each entry, as where a zip is written to a pipe
        whole = write_zip(path, pipe=True)
    else:
        whole = write_zip(path)
    starts = [place for place in range(len(whole)) if whole[place : place + 4] == b"PK\x03\x04"]
    path.write_bytes(cut(whole))
    archive = Archive([path])
    names = list(FILES)
    wanted = names[:-1] if follow else names  # of the last one the size is not known
    assert list(contents(archive)) == wanted
    assert contents(archive) == {name: FILES[name] for name in wanted}
    assert archive.problems == [
        f"{path} is cut off: it has no directory at its end; the {len(wanted)} whole entries "
        "before the cut are read, download the last part again"
    ]
    for end in (len(cut(whole)) - 1, starts[-1] + 29, starts[-1] + 4, starts[-1] + 3):  # the last entry lacks bytes
        path.write_bytes(whole[:end])
        num_lost = 2 if follow and end == starts[-1] + 3 else 1  # nothing shows where the one before it ends
        assert list(contents(Archive([path]))) == names[:-num_lost]
    if not follow:  # else a broken header is taken for the end of what stands before it, and that is refused
        damaged = bytearray(cut(whole))
        damaged[starts[1] : starts[1] + 4] = b"xxxx"  # what follows a broken header is found
        path.write_bytes(damaged)
        assert list(contents(Archive([path]))) == [names[0], *names[2:]]


def test_a_size_that_zip64_holds_is_found_without_the_directory(path):
    content = write_zip(path, zip64=True)
    assert content[18:26] == b"\xff" * 8
    path.write_bytes(cut(content))
    assert contents(Archive([path])) == FILES


def test_a_file_that_begins_like_an_entry_is_one_file(path):
    files = {"a.zip": b"PK\x03\x04 is how archives begin", "b.txt": b"behind", "c": b"c"}
    path.write_bytes(cut(write_zip(path, files, zipfile.ZIP_STORED, pipe=True)))
    assert contents(Archive([path]), files) == {name: files[name] for name in ("a.zip", "b.txt")}


@pytest.mark.parametrize("content", [b"", b"PK", b"no zip", b"PK\x03\x05" + b"\0" * 40])
def test_what_is_no_zip_file_is_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(BadInputError, match="is not a zip file"):
        Archive([path])


def change(path: Path, mark: bytes, offset: int, value: bytes, number: int = 0) -> None:
    """Write over the header of an entry."""
    content = bytearray(path.read_bytes())
    place = -1
    for _ in range(number + 1):
        place = content.find(mark, place + 1)
    content[place + offset : place + offset + len(value)] = value
    path.write_bytes(content)


CENTRAL = b"PK\x01\x02"


@pytest.mark.parametrize(
    ("method", "offset", "value", "reason"),
    [
        (8, 16, b"\0\0\0\0", "its checksum differs"),
        (0, 16, b"\0\0\0\0", "its checksum differs"),
        (8, 10, struct.pack("<H", 12), "packed with method 12; only stored and deflated are read"),
        (8, 24, struct.pack("<I", 20), "does not unpack to the 20 bytes its header promises"),
        (8, 24, struct.pack("<I", 22), "does not unpack to the 22 bytes its header promises"),
        (8, 24, struct.pack("<I", 200), "unpacks to 200 bytes, over the limit of 100"),
        (8, 24, struct.pack("<I", 101), "unpacks to 101 bytes, over the limit of 100"),
        (8, 20, struct.pack("<I", 1 << 20), "is cut off: the archive ends inside it"),
        (0, 20, struct.pack("<I", 1 << 20), "is cut off: the archive ends inside it"),
        (0, 20, struct.pack("<I", 20), "does not unpack to the 21 bytes its header promises"),
        (8, 42, struct.pack("<I", 5), "is not where the archive's directory says; a part is cut off or missing"),
        (8, 10, struct.pack("<H", 0), "does not unpack to the 21 bytes"),
        (0, 10, struct.pack("<H", 8), "is damaged"),
    ],
)
def test_an_entry_that_is_not_as_its_header_says_is_never_read(path, method, offset, value, reason):
    write_zip(path, {"a.txt": b"abcabcabcabcabcabcabc", "b.txt": b"b"}, method)
    change(path, CENTRAL, offset, value)
    archive = Archive([path])
    with pytest.raises(BadInputError, match=reason) as caught:
        archive.read(archive.find("a.txt"), 100)
    assert str(caught.value).startswith(f"a.txt in {path} ")
    assert archive.read(archive.find("b.txt"), 1) == b"b"
    if "limit" not in reason:
        with pytest.raises(BadInputError, match=f"a.txt in {path} "):
            list(archive.stream(archive.find("a.txt")))


def test_a_stream_stops_where_more_comes_than_was_promised(path, monkeypatch):
    monkeypatch.setattr(archives, "_STEP", 1000)
    write_zip(path, {"a.txt": b"\0" * 50_000})
    change(path, CENTRAL, 24, struct.pack("<I", 2500))
    archive = Archive([path])
    taken = []
    with pytest.raises(BadInputError, match="its length or checksum differs"):
        for piece in archive.stream(archive.find("a.txt")):
            taken.append(len(piece))
    assert taken == [1000, 1000]


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_stream_is_the_same_in_pieces_of_any_size(path, monkeypatch, step):
    monkeypatch.setattr(archives, "_STEP", step)
    content = zlib.compress(bytes(range(200)))
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        write_zip(path, {"a.bin": content, "b": b"behind"}, method)
        archive = Archive([path])
        pieces = list(archive.stream(archive.find("a.bin")))
        assert b"".join(pieces) == content
        assert max(map(len, pieces)) <= step


def test_encrypted_entries_are_named_and_not_read(path):
    write_zip(path, {"a.txt": b"a", "b.txt": b"b"})
    change(path, CENTRAL, 8, struct.pack("<H", 1))
    archive = Archive([path])
    assert archive.find("a.txt") is None and archive.find("b.txt") is not None
    assert archive.problems == [f"{path}: entry 'a.txt' is encrypted and not read"]


def test_a_directory_that_breaks_off_is_said_and_the_rest_read(path):
    write_zip(path)
    change(path, CENTRAL, 0, b"XXXX", number=2)
    archive = Archive([path])
    assert list(contents(archive)) == list(FILES)[:2]
    assert archive.problems == [f"{path}: its directory ends after 2 of 4 entries"]


def test_names_without_the_utf_8_flag_are_utf_8_all_the_same_or_else_the_old_code_page(path):
    write_zip(path, {"bild_xx.png": b"1", "foto_x.png": b"2"})
    content = path.read_bytes().replace(b"bild_xx.png", "bild_ä.png".encode()).replace(b"foto_x", b"foto_\x84")
    path.write_bytes(content)
    archive = Archive([path])
    assert archive.read(archive.find("bild_ä.png"), 9) == b"1"
    assert archive.read(archive.find("foto_ä.png"), 9) == b"2"
    change(path, CENTRAL, 8, struct.pack("<H", 0x800), number=1)
    change(path, b"PK\x03\x04", 6, struct.pack("<H", 0x800), number=1)  # says UTF-8 and is none
    archive = Archive([path])
    assert archive.read(archive.find("foto_\udc84.png"), 9) == b"2"


@pytest.mark.parametrize("name", ["../a", "a/../b", "/a", "\\a", "a\\..\\b", "C:/a", "C:a", "a\0b", ".."])
def test_a_name_that_leaves_its_folder_on_any_system_is_seen(name):
    assert leaves_folder(name)


@pytest.mark.parametrize("name", ["a", "a/b", "a..b", "..a/b", "a/b:c", "./a"])
def test_a_name_that_stays_in_its_folder_is_taken(name):
    assert not leaves_folder(name)


# ---------------------------------------------------------------------------------------------------- joined parts


def cut_in_parts(folder: Path, content: bytes, sizes: list[int], names: list[str]) -> list[Path]:
    paths = []
    for size, name in zip(sizes, names, strict=True):
        (folder / name).write_bytes(content[:size])
        content = content[size:]
        paths.append(folder / name)
    return paths


@pytest.mark.parametrize("sizes", [[1000], [1, 999], [999, 1], [300, 0, 700], [333, 333, 334]])
def test_parts_read_as_the_file_they_were(tmp_path, sizes):
    content = bytes(number * 7 % 251 for number in range(1000))
    file = JoinedParts(cut_in_parts(tmp_path, content, sizes, [f"{n}" for n in range(len(sizes))]))
    assert file.size == 1000 and file.seekable() and file.readable()
    plain = io.BytesIO(content)
    buffered = io.BufferedReader(file, 64)
    for offset, whence in ((0, 0), (332, 0), (-1, 2), (-1000, 2), (5, 1), (998, 0), (1000, 0), (1001, 0), (-3, 1)):
        assert file.seek(offset, whence) == plain.seek(offset, whence) == file.tell()
        assert file.readall() == plain.read()
        assert file.tell() == plain.tell()
    file.close_part()
    assert file.seek(0) == 0 and file.readall() == content, "a part that was closed is opened again"
    assert file.seek(-5, 1) == 995 and file.seek(-5) == 0
    assert buffered.seek(0) == 0 and buffered.read() == content
    file.close()
    assert file.closed


@pytest.mark.parametrize("position", range(0, 700, 40))
def test_an_archive_in_two_parts_is_whole_wherever_it_is_cut(tmp_path, position):
    content = write_zip(tmp_path / "whole")
    sizes = [position, len(content) - position]
    parts = cut_in_parts(tmp_path, content, sizes, ["i.zip_a", "i.zip_b"])
    archive = Archive(parts)
    assert archive.name == f"{parts[0]} .. i.zip_b"
    assert contents(archive) == FILES and archive.problems == []


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("i.zip", [["i.zip"]]),
        ("i.ZIP", [["i.ZIP"]]),
        ("i.zip_a i.zip_b", [["i.zip_a", "i.zip_b"]]),
        ("i.zip_aa i.zip_ab", [["i.zip_aa", "i.zip_ab"]]),
        ("i.zip_az i.zip_ba i.zip_aa", "missing between i.zip_aa and i.zip_az"),
        ("i.zip.001 i.zip.002", [["i.zip.001", "i.zip.002"]]),
        ("i.zip.00 i.zip.01", [["i.zip.00", "i.zip.01"]]),
        ("i.zip.9998 i.zip.9999", "the first part is missing, i.zip.9998 is not the first"),
        ("i.zip_b i.zip_c", "the first part is missing, i.zip_b is not the first"),
        ("i.zip.002 i.zip.003", "the first part is missing, i.zip.002 is not the first"),
        ("i.zip_a i.zip_c", "a part is missing between i.zip_a and i.zip_c"),
        ("i.zip i.zip_a", [["i.zip"]]),  # somebody joined them already
        ("a.zip b.zip_a b.zip_b", [["a.zip"], ["b.zip_a", "b.zip_b"]]),
        ("i.zip.1 i.zip_aaaa i.zip.bak zip i.tar", []),
    ],
)
def test_parts_are_found_in_their_order_and_none_may_be_missing(tmp_path, names, found):
    for name in names.split():
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.zip").mkdir()
    if isinstance(found, str):
        with pytest.raises(BadInputError, match=found.replace(".", r"\.")):
            find_archives(tmp_path)
    else:
        assert [[path.name for path in parts] for parts in find_archives(tmp_path)] == found


def test_26_parts_are_followed_by_the_27th(tmp_path):
    names = [f"i.zip_{first}{second}" for first in "ab" for second in "abcdefghijklmnopqrstuvwxyz"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in find_archives(tmp_path)[0]] == names


def test_of_many_entries_of_one_name_the_last_counts(tmp_path):
    """As in a folder that they are unpacked to, one after the other."""
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "a.zip", "w") as made:
        warnings.simplefilter("ignore")
        for number in range(200):
            made.writestr("1.png" if number % 3 else f"{number}.png", str(number))
    archive = Archive([tmp_path / "a.zip"])
    assert archive.read(archive.find("1.png"), 10) == b"199"
    assert len(archive) == 200


@pytest.mark.parametrize("first", [0, 1])
def test_numbered_parts_are_counted_beyond_nine(tmp_path, first):
    for number in range(first, 13):
        (tmp_path / f"images.zip.{number:03d}").touch()
    (parts,) = find_archives(tmp_path)
    assert [part.suffix for part in parts] == [f".{number:03d}" for number in range(first, 13)]
    (tmp_path / "images.zip.010").unlink()
    with pytest.raises(BadInputError, match=r"a part is missing between images\.zip\.009 and images\.zip\.011"):
        find_archives(tmp_path)
