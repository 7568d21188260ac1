"""Rows of text files, line by line: JSONL and arrays, cut anywhere, on disk or inside an archive."""

import codecs
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from internvl_mpo.errors import BadInputError, RowError
from internvl_mpo.mmpr import lines as module
from internvl_mpo.mmpr.archives import Archive
from internvl_mpo.mmpr.lines import Member, cuts, is_array, read_lines
from internvl_mpo.mmpr.release import Subset, parse_line, read_subsets, split_subset_name, subset_name
from internvl_mpo.records import PreferencePair, content_id

ROWS = [{"a": 1}, {"b": "ü,]"}, 5, "x", [1, 2], {"c": {"d": []}}]


def in_archive(path: Path) -> Member:
    """The same file inside a zip."""
    with zipfile.ZipFile(path.with_suffix(".zip"), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(path, f"in/{path.name}")
    found = Archive([path.with_suffix(".zip")])
    return Member(found, found.find(f"in/{path.name}"))


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("end", [b"\n", b""])
def test_lines_have_their_place_and_length_and_none_is_missing(tmp_path, end):
    content = b'{"a": 1}\n\n  \n{"b": 2}' + end
    path = write(tmp_path / "a.jsonl", content)
    wanted = [(0, 9, b'{"a": 1}\n'), (9, 1, b"\n"), (10, 3, b"  \n"), (13, 8 + len(end), b'{"b": 2}' + end)]
    for text in (path, in_archive(path)):
        assert list(read_lines(text)) == wanted
        assert list(read_lines(text, 9)) == wanted[1:]
        assert list(read_lines(text, 9, 10)) == wanted[1:2]
        assert list(read_lines(text, 9, 11)) == wanted[1:3]  # a line belongs to the part that it begins in
        assert list(read_lines(text, 0, 0)) == []
    assert list(read_lines(write(tmp_path / "b.jsonl", b""))) == []


def test_a_line_that_is_too_long_is_cut_and_the_next_one_read(tmp_path, monkeypatch):
    assert module.MAX_LINE_BYTES == 64 << 20  # what messages say
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 10)
    for length, cut in ((9, 9), (10, 10), (11, 11), (12, 11), (20, 11), (21, 11), (35, 11)):
        path = write(tmp_path / "a.jsonl", b"x" * (length - 1) + b"\nnext\n")
        first, second = read_lines(path)
        assert first == (0, length, (b"x" * (length - 1) + b"\n")[:cut])
        assert second == (length, 5, b"next\n")
        (only,) = read_lines(write(tmp_path / "a.jsonl", b"x" * length))
        assert only == (0, length, b"x" * cut)


@pytest.mark.parametrize("step", [1, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", [b"", codecs.BOM_UTF8])
def test_the_items_of_an_array_are_its_lines(tmp_path, monkeypatch, step, indent, mark):
    monkeypatch.setattr(module, "_STEP", step)
    content = mark + b" \n" + json.dumps(ROWS, indent=indent, ensure_ascii=False).encode() + b"\n"
    path = write(tmp_path / "a.json", content)
    assert is_array(path)
    for text in (path, in_archive(path)):
        found = list(read_lines(text))
        assert [json.loads(line) for _, _, line in found] == ROWS
        assert all(content[offset : offset + length] == line for offset, length, line in found)
        for number, (offset, _, _) in enumerate(found):
            if number:
                assert list(read_lines(text, offset)) == found[number:]
            assert list(read_lines(text, 0, offset)) == found[:number]
    assert cuts(path, 5) == cuts(in_archive(path), 5) == [(0, None)]


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (b"[]", []),
        (b"[ ]", []),
        (b"[1]", [1]),
        (b"[1 , 2]", [1, 2]),
        (b'["a","b"] and more', ["a", "b"]),
        (b"[12", []),
        (b'[{"a": 1}, {"b"', [{"a": 1}]),
        (b"[1, 2", [1]),
        (b'["a", "b"', ["a", "b"]),
        (b"[[1], nan]", [[1]]),
    ],
)
def test_an_array_is_read_up_to_where_it_breaks(tmp_path, content, rows):
    path, found = write(tmp_path / "a.json", content), []
    try:
        for _, _, line in read_lines(path):
            found.append(line)
    except BadInputError as error:
        assert f"{path}: the item at byte " in str(error) and "is broken or too long" in str(error)
        found.pop()  # what is left of the broken one
    assert [json.loads(line) for line in found] == rows


def test_an_item_that_is_too_long_ends_the_reading(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_LINE_BYTES", 10)
    monkeypatch.setattr(module, "_STEP", 4)
    path = write(tmp_path / "a.json", b'["12345678", "123456789012345678901234567890"]')
    found = []
    with pytest.raises(BadInputError, match="the item at byte 13 is broken or too long"):
        for row in read_lines(path):
            found.append(row)
    assert found[0] == (1, 10, b'"12345678"')
    assert found[1] == (13, 11, b'"1234567890')


def test_what_is_no_text_is_named(tmp_path):
    path = write(tmp_path / "a.json", b'["a", "\xff\xff"]')
    with pytest.raises(BadInputError, match=rf"{path} is not UTF-8 text \(near byte"):
        list(read_lines(path))
    with pytest.raises(BadInputError, match=f"cannot read {tmp_path}: Is a directory"):
        list(read_lines(tmp_path))
    assert not is_array(write(tmp_path / "b.json", b"{}")) and not is_array(write(tmp_path / "c.jsonl", b"[]"))
    assert is_array(write(tmp_path / "b.json", codecs.BOM_UTF8 + b" \n["))


def test_a_file_is_cut_into_parts_of_about_a_size(tmp_path):
    path = write(tmp_path / "a.jsonl", b"x" * 10)
    assert (
        cuts(path, 4) == [(0, 4), (4, 8), (8, 10)]
        and cuts(path, 5) == [(0, 5), (5, 10)]
        and cuts(path, 10) == [(0, 10)]
    )
    assert cuts(write(tmp_path / "b.jsonl", b""), 4) == [(0, 0)]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{}\n", None),
        (codecs.BOM_UTF8 + b"{}", None),
        (b'{"a": "\\ud800"}', None),
        (b"x" * 101, "the line has over 100 bytes"),
        (b"{}" + b" " * 98, None),
        (b'{"a\0"}', "the line holds a NUL byte at column 4"),
        (b'{"\xff"}', "not UTF-8 text (byte 3 of the line)"),
        (b"[]", "not an object"),
    ],
)
def test_a_line_that_is_no_row_says_why(monkeypatch, line, reason):
    from internvl_mpo.mmpr import release

    monkeypatch.setattr(release, "MAX_LINE_BYTES", 100)
    if reason is None:
        assert isinstance(parse_line(line, "a:1"), dict)
        return
    with pytest.raises(RowError) as caught:
        parse_line(line, "a:1")
    assert caught.value.reason == reason or reason == "not an object"
    assert str(caught.value).startswith("a:1")


# -------------------------------------------------------------------------------------------------------- meta.json


@pytest.mark.parametrize(
    ("name", "source", "rule"),
    [
        ("a_pairs_vqa_correctness_rules", "a", "correctness"),
        ("a_pairs_vqa_format_rules", "a", "format"),
        ("a_pairs_vqa_direct_rules", "a", "direct"),
        ("a_prefix_pair_sr0.5_wo_image", "a", "dropout_ntp"),
        ("a_prefix_pair_sr0.25_with_image", "a", "prefix_with_image"),
        ("a_pairs_vqa_format_rules_2", "a_pairs_vqa_format_rules_2", "other"),
        ("a", "a", "other"),
    ],
)
def test_a_subset_is_named_after_its_source_and_rule(name, source, rule):
    assert split_subset_name(name) == (source, rule)
    if rule != "other":
        made = subset_name("a b", rule, with_image=rule == "prefix_with_image")
        assert split_subset_name(made) == ("a_b", rule)
    assert subset_name("", "direct") == "unnamed_pairs_vqa_direct_rules" and subset_name("a", "x") == "a_x"
    assert subset_name("a", "dropout_ntp", ratio=0.25) == "a_prefix_pair_sr0.25_wo_image"
    assert subset_name("a", "prefix_with_image", with_image=True) == "a_prefix_pair_sr0.5_with_image"


def release_of(folder: Path, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "a.jsonl").write_text('{"question": "q", "chosen": "a", "rejected": "b"}\n')
    entry = {"root": "images", "annotation": "a.jsonl", "repeat_time": 1, **changes}
    (folder / "meta.json").write_text(
        json.dumps({"s": {key: value for key, value in entry.items() if value != "gone"}})
    )
    return folder


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"annotation": "gone"}, "key 'annotation' is missing"),
        ({"repeat_time": "gone"}, "key 'repeat_time' is missing"),
        ({"root": 5}, "key 'root' has the wrong type, int"),
        ({"annotation": None}, "key 'annotation' has the wrong type, NoneType"),
        ({"repeat_time": True}, "key 'repeat_time' has the wrong type, bool"),
        ({"repeat_time": "1"}, "key 'repeat_time' has the wrong type, str"),
        ({"repeat_time": -0.1}, "repeat_time is -0.1, expected 0 or more"),
        ({"repeat_time": float("inf")}, "repeat_time is inf, expected 0 or more"),
        ({"repeat_time": float("nan")}, "repeat_time is nan, expected 0 or more"),
        ({"max_dynamic_patch": 0}, "max_dynamic_patch is 0, expected a whole number of 1 or more"),
        ({"max_dynamic_patch": 1.5}, "max_dynamic_patch is 1.5, expected"),
        ({"annotation": "b.jsonl"}, "b.jsonl does not exist, nor does it lie elsewhere"),
    ],
)
def test_an_entry_of_meta_json_that_is_wrong_is_named(tmp_path, changes, reason):
    with pytest.raises(BadInputError) as caught:
        read_subsets(release_of(tmp_path, **changes))
    assert reason in str(caught.value) and str(caught.value).startswith(f"{tmp_path}/meta.json, subset 's': ")


def test_an_entry_of_meta_json_is_read_as_it_stands(tmp_path):
    (subset,) = read_subsets(release_of(tmp_path, repeat_time=0, max_dynamic_patch=1))
    assert (subset.name, subset.repeat_time, subset.max_tiles) == ("s", 0.0, 1)
    assert (subset.annotation, str(subset.root)) == (tmp_path / "a.jsonl", "images")
    assert subset.pictures.annotations == [tmp_path / "a.jsonl"]
    (subset,) = read_subsets(release_of(tmp_path, repeat_time=2.5))
    assert (subset.repeat_time, subset.max_tiles) == (2.5, None)
    (subset,) = read_subsets(tmp_path / "a.jsonl")
    assert (subset.name, subset.repeat_time, dict(subset.entry), subset.root) == ("a", 1.0, {}, tmp_path)


@pytest.mark.parametrize("content", ["5", "no json"])
def test_a_meta_json_without_subsets_is_refused(tmp_path, content):
    (tmp_path / "meta.json").write_text(content)
    with pytest.raises(BadInputError, match=r"meta\.json"):
        read_subsets(tmp_path / "meta.json")


def test_a_folder_of_a_release_may_hold_it_one_level_down(tmp_path):
    with pytest.raises(BadInputError, match=r"holds no meta\.json, so it is no MMPR release"):
        read_subsets(tmp_path)
    release_of(tmp_path / "inner")
    assert read_subsets(tmp_path)[0].annotation == tmp_path / "inner/a.jsonl"
    release_of(tmp_path, repeat_time=3)
    assert read_subsets(tmp_path)[0].repeat_time == 3
    with pytest.raises(BadInputError, match=r"data file '.*nowhere\.jsonl' does not exist"):
        read_subsets(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize("room", [1, 2, 100])
def test_a_stream_of_pieces_is_read_from_any_byte_on(room):
    pieces = [b"ab", b"", b"cde", b"f", b"ghij"]
    for start in range(12):
        stream, found, buffer = module._Unpacked(iter(pieces), start), b"", bytearray(room)
        while count := stream.readinto(memoryview(buffer)):
            found += buffer[:count]
        assert found == b"".join(pieces)[start:]


def test_an_array_is_one_of_rows_whatever_its_first_item_is(tmp_path):
    pair = {"question": "q", "chosen": "a", "rejected": "b"}
    for items in ([5, pair], [{**pair, "more": {"root": "x"}}], []):
        path = write(tmp_path / "a.json", json.dumps(items).encode())
        (subset,) = read_subsets(path)
        assert [json.loads(line) for _, _, line in read_lines(subset.annotation)] == items
    for content in (b"", b"5"):  # what is neither rows nor subsets
        with pytest.raises(BadInputError, match=r"a\.json"):
            read_subsets(write(path, content))


def test_a_pair_has_source_and_rule_of_its_subset_unless_the_row_names_them_and_an_id_of_its_content_and_folder():
    name, row = "a_pairs_vqa_format_rules", {"question": "q", "chosen": "c", "rejected": "r", "answer_gt": "1"}
    subset = Subset(name, None, None, entry={"root": "/mnt/x/images/s"})
    pair = subset.pair(row, "")
    assert (pair.source, pair.rule, subset.source) == ("a", "format", "a")
    named = subset.pair({**row, "rule": "vote", "source": "b", "id": "7"}, "")
    assert (named.source, named.rule, named.id) == ("b", "vote", "7")
    assert pair.id == content_id("s", [None, "q", "1", "c", "r"])  # a table of an earlier version knows it so
    others = [("/y/s", {}), ("t", {}), ("s", {"image": "1.png"}), ("s", {"question": "p"}), ("s", {"answer_gt": "2"})]
    others += [("s", {"chosen": "d"}), ("s", {"rejected": "s"})]
    others += [("s", {"images": ["1.png"]}), ("s", {"images": ["2.png"]}), ("s", {"system": "be kind"})]
    others += [("s", {"history": [["h", "i"]]}), ("s", {"answer_gt": None, "answer": "1"})]
    pictures = SimpleNamespace(meant=lambda name: name)
    ids = [Subset(name, pictures, None, entry={"root": root}).pair({**row, **more}, "").id for root, more in others]
    assert ids[0] == pair.id and len(set(ids)) == len(others)
    assert subset.pair({**row, "images": [], "answer": None, "system": " "}, "").id == pair.id  # nothing is said
    assert Subset(name, None, None).pair(row, "").id == PreferencePair.from_json({**row, "rule": "format"}).id
    with pytest.raises(RowError, match=r"^a:1: key 'rejected' is missing"):
        subset.pair({"question": "q", "chosen": "c"}, "a:1")
