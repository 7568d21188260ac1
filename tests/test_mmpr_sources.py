"""Sources of pairs in blocks, tables of other projects, and Parquet by row groups: every row once, under its number."""

import json
import pickle
import zipfile
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from internvl_mpo.errors import BadInputError, RowError
from internvl_mpo.mmpr import parquet, release
from internvl_mpo.mmpr import sources as module
from internvl_mpo.mmpr.lines import read_lines
from internvl_mpo.mmpr.manifest import MANIFEST
from internvl_mpo.mmpr.parquet import EmbeddedPictures, arrow_schema, check_columns, prompt_blocks, to_columns
from internvl_mpo.mmpr.reading import forms_found, iter_questions
from internvl_mpo.mmpr.release import Subset, read_subsets
from internvl_mpo.mmpr.row_groups import ParquetTable, open_table
from internvl_mpo.mmpr.sources import Block, open_sources
from internvl_mpo.mmpr.tables import RowPictures, TablePictures, TableRows, columns_of, is_table
from internvl_mpo.records import PreferencePair


def rows(count: int) -> list[dict]:
    return [{"question": f"q{n}", "chosen": f"c{n}", "rejected": f"r{n}", "id": str(n)} for n in range(count)]


def jsonl(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows(count)))
    return path


def ids(source, blocks) -> list[tuple[int, str]]:
    return [(number, row.pair.id) for block in blocks for number, row in source.rows(block)]


@pytest.mark.parametrize(("num_rows", "num_bytes"), [(3, 10**6), (10**6, 100), (1, 10**6), (10**6, 1)])
def test_a_file_in_blocks_of_any_size_gives_its_lines_once_under_their_numbers(
    tmp_path, monkeypatch, num_rows, num_bytes
):
    # a part is named after its block: cut elsewhere, every row of every user would be looked at anew
    assert (module.BLOCK_BYTES, module.BLOCK_ROWS, module.TABLE_ROWS) == (8 << 20, 8192, 1 << 16)
    monkeypatch.setattr(module, "BLOCK_ROWS", num_rows)
    monkeypatch.setattr(module, "BLOCK_BYTES", num_bytes)
    path = jsonl(tmp_path / "a.jsonl", 7)
    (source,) = open_sources(path)
    blocks = list(source.blocks())
    assert ids(source, blocks) == [(n + 1, str(n)) for n in range(7)]
    assert sum(block.num_bytes for block in blocks) == source.num_bytes == path.stat().st_size
    assert [block.first for block in blocks] == [1 + sum(b.num_rows for b in blocks[:n]) for n in range(len(blocks))]
    length = path.stat().st_size // 7
    wanted = {3: [3, 3, 1], 1: [1] * 7}.get(num_rows) or ([1] * 7 if num_bytes == 1 else None)
    if wanted is None:  # a block is full with the line that reaches its bytes
        per = -(-100 // length)
        wanted = [per] * (7 // per) + ([7 % per] if 7 % per else [])
    assert [block.num_rows for block in blocks] == wanted


def test_blank_and_bad_lines_keep_the_numbers_of_the_others(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", 2)
    path.write_text("\n  \nno json\n" + path.read_text())
    (source,) = open_sources(path)
    (block,) = source.blocks()
    found = list(source.rows(block))
    assert [number for number, _ in found] == [3, 4, 5] and isinstance(found[0][1], RowError)
    assert str(found[0][1]).startswith(f"{path}:3") and source.where(3) == f"{path}:3"
    row = found[1][1]
    assert (row.where, row.subset, row.repeat_time, row.max_tiles) == (f"{path}:4", "a", 1.0, None)
    assert row.image_root == tmp_path and source.pictures("", 4) == tmp_path


def test_what_comes_before_a_broken_place_is_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows(3))[:-1] + ', {"broken"')
    (source,) = open_sources(path)
    blocks = source.blocks()
    first = next(blocks)
    assert [number for number, _ in source.rows(first)] == [1, 2, 3, 4]
    with pytest.raises(BadInputError, match="is broken or too long"):
        next(blocks)


def test_facts_and_settings_differ_when_a_row_may(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", 2)
    (source,) = open_sources(path)
    place, facts = source.facts()
    assert (place, facts[:2]) == (str(path), [str(path), path.stat().st_size]) and facts[2] == path.stat().st_mtime_ns
    assert source.settings() == ["a", {}, str(tmp_path), None, 1.0, None]
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.write(path, "b.jsonl")
        archive.writestr("images/1.png", b"1")
    meta = {"s": {"root": "images", "annotation": "b.jsonl", "repeat_time": 0.5, "max_dynamic_patch": 6}}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    (source,) = open_sources(tmp_path)
    size = (tmp_path / "x.zip").stat().st_size
    assert source.settings() == ["s", meta["s"], "images", 6, 0.5, str(size)]
    assert source.facts()[1][:2] == [str(tmp_path / "x.zip"), size] and source.num_bytes == path.stat().st_size
    (block,) = source.blocks()
    (_, row), _ = source.rows(block)
    assert (row.max_tiles, row.repeat_time, row.subset, str(row.image_root)) == (6, 0.5, "s", "images")


@pytest.fixture
def table(tmp_path) -> Path:
    """Seven rows in two shards, groups of two rows at most; pictures inside some rows."""
    (tmp_path / "t").mkdir()
    made = rows(7)
    for number, row in enumerate(made):
        content = bytes([number // 2]) * 10
        row["images"] = [{"bytes": content, "path": "a/1.png"}, {"bytes": None, "path": "2.png"}][: 1 + number % 2]
    for shard, part in enumerate((made[:4], made[4:])):
        pq.write_table(pa.Table.from_pylist(part), tmp_path / "t" / f"{shard}.parquet", row_group_size=2)
    return tmp_path / "t"


def test_row_groups_are_numbered_over_files(table):
    found = ParquetTable(str(table))
    assert len(found) == 7 and str(found) == str(table)
    assert [(g.shard, g.group, g.first, g.num_rows) for g in found.groups] == [
        (0, 0, 0, 2),
        (0, 1, 2, 2),
        (1, 0, 4, 2),
        (1, 1, 6, 1),
    ]
    assert [(number, row["id"]) for number, row in found.rows(1, 5, ["id"])] == [(n, str(n)) for n in range(1, 5)]
    assert list(found.rows(3, 3, ["id"])) == [] and next(found.rows(6, 99, ["id"]))[0] == 6
    assert [found.value(number, "id") for number in (6, 0, 3, 4)] == ["6", "0", "3", "4"]
    stats = [(table / f"{n}.parquet").stat() for n in (0, 1)]
    assert found.facts == [[str(table / f"{n}.parquet"), s.st_size, s.st_mtime_ns] for n, s in enumerate(stats)]
    assert pickle.loads(pickle.dumps(found)).shards == found.shards
    assert open_table(str(table)) is open_table(str(table))
    assert found.read(found.groups[1], ["id"]).column_names == ["id"]


def test_files_with_other_columns_and_no_files_are_refused(table, tmp_path):
    pq.write_table(pa.table({"x": [1]}), table / "2.parquet")
    with pytest.raises(BadInputError, match=r"2\.parquet has other columns than .*0\.parquet; give one of them"):
        len(ParquetTable(str(table)))
    (table / "1.parquet").write_bytes(b"no parquet")
    with pytest.raises(BadInputError, match=r"1\.parquet cannot be read as Parquet"):
        len(ParquetTable(str(table)))
    with pytest.raises(BadInputError):
        ParquetTable(str(tmp_path / "nothing"))


def test_a_table_in_blocks_is_the_same_rows_numbered_from_one(table, monkeypatch):
    (source,) = open_sources(table)
    assert module.TABLE_ROWS == 1 << 16  # as above
    for size in (1, 2, 100):
        monkeypatch.setattr(module, "TABLE_ROWS", size)
        blocks = list(source.blocks())
        assert ids(source, blocks) == [(n + 1, str(n)) for n in range(7)]
        assert len(blocks) == (7 if size == 1 else 4)
        assert [block.first for block in blocks] == ([*range(1, 8)] if size == 1 else [1, 3, 5, 7])
    assert source.num_bytes == sum(block.num_bytes for block in blocks) > 0
    assert source.facts() == [str(table), json.dumps(open_table(str(table)).facts)]
    assert list(module._blocks(open_table(str(table)), first=0))[1] == Block(2, 2, blocks[1].num_bytes)


def test_a_picture_of_a_table_is_found_by_its_content_in_its_row(table):
    found = TableRows(str(table))
    lines = [json.loads(line) for _, _, line in found.lines()]
    assert found.picture_columns == ["images"] and found.version == json.dumps(found.table.facts)
    first, second = lines[1]["images"]
    assert second == "2.png" and first.endswith(".png") and len(first) == 24 + 4
    assert lines[0]["images"] == [first] and lines[2]["images"][0] != first
    assert [number for number, _, _ in found.lines(2, 4)] == [2, 3]
    assert list(read_lines(found, 2, 4)) == list(found.lines(2, 4))
    assert found.picture(first) == b"\0" * 10 and found.picture("2.png") is None
    assert TableRows(str(table)).picture(lines[6]["images"][0]) == b"\3" * 10  # before any row was read
    assert found.picture_of_row(first, 1) == b"\0" * 10 and found.picture_of_row(first, 2) is None
    assert found.places[first] == (0, "images", 0)
    (subset,) = read_subsets(table)
    pictures = subset.pictures
    assert isinstance(pictures, TablePictures)
    assert (str(pictures), pictures.path, pictures.root) == (str(table), None, ".")
    assert pictures.version == found.version and pictures.size(first) == 10 and pictures.size("2.png") == 0
    (table / "2.png").write_bytes(b"on disk")
    assert pictures.read("2.png") == b"on disk" and pictures.size("2.png") == 7
    row = pickle.loads(pickle.dumps(RowPictures(pictures, 1)))
    assert (row.read(first), row.read("2.png"), row.version, str(row)) == (
        b"\0" * 10,
        b"on disk",
        found.version,
        str(table),
    )
    with pytest.raises(RowError):
        RowPictures(pictures, 2).read(first)


def test_pictures_that_a_table_names_lie_beside_it_or_here(tmp_path, monkeypatch):
    (tmp_path / "t").mkdir()
    pq.write_table(pa.Table.from_pylist([{**rows(1)[0], "image": "1.png"}]), tmp_path / "t/a.parquet")
    (tmp_path / "t/1.png").write_bytes(b"1")
    for data in (tmp_path / "t", tmp_path / "t/a.parquet"):
        (subset,) = read_subsets(data)
        assert (subset.name, subset.root, subset.pictures.read("1.png")) == (data.stem, tmp_path / "t", b"1")
    (tmp_path / "other").mkdir()
    (subset,) = read_subsets(tmp_path / "t", tmp_path / "other")
    assert subset.root == tmp_path / "other"
    monkeypatch.chdir(tmp_path / "t")
    monkeypatch.setattr(release, "TableRows", lambda data: SimpleNamespace(picture_columns=[]))
    (subset,) = read_subsets("hub:me/pairs")
    assert (subset.name, subset.pictures.read("1.png")) == ("pairs", b"1")


def test_pictures_are_found_in_columns_of_every_kind_that_holds_files(tmp_path):
    files = {name: f"file {name}".encode() for name in "abcdefgh"}
    struct = pa.struct({"path": pa.string(), "bytes": pa.binary()})
    columns = {
        "one": (pa.binary(), files["a"]), "large": (pa.large_binary(), files["b"]),
        "many": (pa.list_(pa.binary()), [files["c"], files["d"]]),
        "large_many": (pa.large_list(pa.large_binary()), [files["e"]]),
        "named": (struct, {"path": "x/f.jpg", "bytes": files["f"]}),
        "several": (pa.list_(struct), [{"path": None, "bytes": files["g"]}, {"path": "h.png", "bytes": None}]),
        "text": (pa.string(), "words"), "texts": (pa.list_(pa.string()), ["more"]),
        "other": (pa.struct({"path": pa.string()}), {"path": "p"}),
    }  # fmt: skip
    schema = pa.schema({name: kind for name, (kind, _) in columns.items()})
    pq.write_table(
        pa.Table.from_pylist([{name: value for name, (_, value) in columns.items()}], schema), tmp_path / "t.parquet"
    )
    found = TableRows(str(tmp_path / "t.parquet"))
    assert found.picture_columns == ["one", "large", "many", "large_many", "named", "several"]
    ((number, length, line),) = found.lines()
    row = json.loads(line)
    assert (number, length) == (0, 1)
    names = [row["one"], row["large"], *row["many"], *row["large_many"], row["named"], row["several"][0]]
    assert [found.picture(name) for name in names] == [files[letter] for letter in "abcdefg"]
    assert [found.picture_of_row(name, 0) for name in names] == [files[letter] for letter in "abcdefg"]
    assert [PurePosixPath(name).suffix for name in names] == [""] * 5 + [".jpg", ""]
    assert (row["several"][1], found.picture("h.png")) == ("h.png", None)
    assert (row["text"], row["texts"], row["other"]) == ("words", ["more"], {"path": "p"})
    places = {"one": 0, "large": 0, "large_many": 0, "named": 0, "several": 0}
    kept = {column: place for _, column, place in found.places.values() if column != "many"}
    assert kept == places


def test_parquet_is_told_from_a_release(table, tmp_path):
    assert is_table(table) and is_table(table / "0.parquet") and is_table("hub:me/x") and is_table("nowhere.parquet")
    assert not is_table(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").touch()
    assert not is_table(tmp_path / "a.jsonl")
    assert columns_of(table) == columns_of(table / "1.parquet") == ["question", "chosen", "rejected", "id", "images"]
    (table / "0.parquet").write_bytes(b"x")
    assert columns_of(table) is None
    (table / "meta.json").write_text("{}")
    assert not is_table(table)
    (tmp_path / "empty").mkdir()
    assert not is_table(tmp_path / "empty")


def test_the_form_of_data_is_named_parquet_among_them(table, tmp_path):
    lines = [{"question": "q", "chosen": "a", "rejected": "b"}] * 2
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n \n")
    assert forms_found(tmp_path / "a.jsonl") == f"{tmp_path}/a.jsonl: MMPR"
    other = {"messages": [{"role": "user", "content": "q"}], "chosen": "a", "rejected": "b"}
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, [lines[0]] * 99 + [{"x": 1}, lines[0], other])))
    assert forms_found(tmp_path / "c.jsonl") == f"{tmp_path}/c.jsonl: MMPR"  # those of the first hundred
    (tmp_path / "b.jsonl").write_text('{"x": 1}\n')
    assert forms_found(tmp_path / "b.jsonl") == f"{tmp_path}/b.jsonl: no form that is read"
    (table / MANIFEST).write_text("{}")
    assert forms_found(table) == f"{table}: MMPR as Parquet"


def test_columns_that_are_missing_are_named():
    with pytest.raises(BadInputError, match=r"x has no column 'prompt', so it was not made by convert_mmpr\.py"):
        check_columns("x", ["id", "images"])


def test_pictures_inside_a_row_are_read_by_their_path(table):
    found = open_table(str(table))
    pictures = EmbeddedPictures(found, 1, "folder")
    assert str(pictures) == "folder" and pictures.version == json.dumps(found.facts)
    assert pictures.read("a/1.png") == b"\0" * 10
    for name in ("2.png", "3.png"):  # a path alone is no picture
        with pytest.raises(RowError, match=f"image '{name}' is not among those of row 1 of folder"):
            pictures.read(name)


@pytest.mark.parametrize(
    ("question", "count", "kinds"),
    [
        ("what?", 0, ["what?"]),
        ("what?", 1, [None, "what?"]),
        ("what?", 2, [None, None, "what?"]),
        ("<image>\nwhat?", 1, [None, "\nwhat?"]),
        ("a<image>b<image>", 2, ["a", None, "b", None]),
        ("a<image>b", 2, [None, None, "a<image>b"]),
        ("", 1, [None]),
    ],
)
def test_a_picture_stands_where_its_placeholder_stood(question, count, kinds):
    blocks = prompt_blocks(question, count)
    assert [block["text"] for block in blocks] == kinds
    assert [block["type"] for block in blocks] == ["image" if kind is None else "text" for kind in kinds]


def test_a_row_of_mmpr_as_parquet_has_its_number_and_its_settings_or_says_what_is_wrong(tmp_path):
    subset = Subset("s_pairs_vqa_correctness_rules", None, None, 0.5, 6, {"root": "/mnt/x/images/s"})
    made = []
    for number in range(3):
        pair = PreferencePair(question=f"q{number}", images=("1.png",), chosen="c", rejected="r", source="s")
        made.append(to_columns(pair.to_json(), pair, subset, [bytes([number])]))
    made[1]["rejected"] = made[1]["chosen"]
    made[2]["provenance"] = "no JSON"
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(made, arrow_schema()), path, row_group_size=2)
    (source,) = open_sources(path)
    assert source.settings() == [str(path), [[str(path), path.stat().st_size, path.stat().st_mtime_ns]]]
    assert (source.facts(), source.versions()) == ([], {})
    assert source.num_bytes == sum(group.num_bytes for group in source.table.groups) > 0
    found = [one for block in source.blocks() for one in source.rows(block)]
    assert [number for number, _ in found] == [0, 1, 2]
    row, equal, broken = (one for _, one in found)
    assert row.pair.question == "q0"
    assert (row.where, row.subset, row.repeat_time, row.max_tiles) == (f"{path}, row 0", subset.name, 0.5, 6)
    assert (str(row.image_root), row.image_root.read("1.png")) == (f"{path}/images/s", b"\0")
    assert str(equal).startswith(f"{path}, row 1: 'chosen' equals 'rejected'")
    assert str(broken).startswith(f"{path}, row 2: not a pair (Expecting value")


def test_a_row_of_a_source_is_its_pictures_of_this_folder(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/1.png").write_bytes(b"1")
    row = {"question": "q", "chosen": "c", "rejected": "r", "images": ["/mnt/x/b/1.png"]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    (source,) = open_sources(tmp_path / "a.jsonl")
    ((_, found),) = (one for block in source.blocks() for one in source.rows(block))
    assert found.pair.images == ("b/1.png",)
    assert (source.versions(), source.where(9)) == ({}, f"{tmp_path}/a.jsonl:9")


def test_questions_are_numbered_with_blank_lines_and_named_after_their_file(tmp_path):
    path = tmp_path / "asked.jsonl"
    path.write_text('\n{"question": "one?", "answer": "1"}\n{"question": "two?", "source": "s"}\n')
    (first, pictures), (second, _) = iter_questions(path)
    assert (first.question, first.answer, first.source, second.source) == ("one?", "1", "asked", "s")
    assert pictures.path == tmp_path
    path.write_text("\n{}\n")
    with pytest.raises(RowError, match=f"^{path}:2: "):
        list(iter_questions(path))
    path.write_text("\n[]\n")
    with pytest.raises(RowError, match=f"^{path}:2: expected a JSON object"):
        list(iter_questions(path))


def test_a_data_set_without_the_columns_of_mmpr_is_refused_before_a_row_is_read(monkeypatch):
    streams = {"hub:me/x": SimpleNamespace(features={"id": 1}), "hub:me/y": SimpleNamespace(features=None)}
    monkeypatch.setattr(parquet, "stream_table", streams.get)
    for data in streams:
        with pytest.raises(BadInputError, match=f"^{data} has no column '"):
            parquet.open_dataset(data)


def test_a_folder_with_a_manifest_and_other_columns_is_refused(table):
    (table / MANIFEST).write_text("{}")
    with pytest.raises(BadInputError, match=f"^{table} has no column '"):
        open_sources(table)


def test_a_meta_json_may_be_named_by_a_text(tmp_path):
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "meta.json").write_text('{"s": {"root": "x", "annotation": "a.jsonl", "repeat_time": 1}}')
    (subset,) = release.read_meta(str(tmp_path / "meta.json"))
    assert subset.annotation == tmp_path / "a.jsonl"


def test_two_absolute_paths_that_are_one_picture_here_are_refused(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/1.png").write_bytes(b"1")
    made = [{**row, "image": f"/{place}/b/1.png"} for row, place in zip(rows(3), ("x", "y", "x"), strict=True)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    (subset,) = read_subsets(tmp_path / "a.jsonl")
    for row, other in zip(made, ("/y/b/1.png", "/x/b/1.png", "/y/b/1.png"), strict=True):
        said = f"images '{row['image']}' and '{other}' are both 'b/1.png' here; write their paths relative to the"
        with pytest.raises(RowError, match=f"^a:1: {said}"):
            subset.pair(row, "a:1")
