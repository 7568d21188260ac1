"""How a shard is written: row groups, pictures kept at hand, rejects, and what a plan of shards is cut from."""

import base64
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from PIL import Image

from internvl_mpo.errors import BadInputError, RowError
from internvl_mpo.mmpr import shard_plan
from internvl_mpo.mmpr import shard_writer as module
from internvl_mpo.mmpr.manifest import MANIFEST, file_facts, read_manifest
from internvl_mpo.mmpr.parquet import (
    FEATURES,
    _same_types,
    arrow_schema,
    prompt_messages,
    to_columns,
    to_pair,
    to_raw,
)
from internvl_mpo.mmpr.release import Subset
from internvl_mpo.mmpr.shard_plan import Options, Piece, Shard, line_start, map_in_processes
from internvl_mpo.mmpr.shard_writer import ShardPictures, ShardWriter, done_mark
from internvl_mpo.mmpr.statistics import ReleaseStatistics
from internvl_mpo.mmpr.tables import stream_table
from internvl_mpo.records import PreferencePair


def png(width: int) -> bytes:
    out = io.BytesIO()
    Image.new("L", (width, 3)).save(out, "PNG")
    return out.getvalue()


def pair_of(**changes) -> PreferencePair:
    fields = {"id": "x", "images": ("a.png",), "question": "q", "chosen": "c", "rejected": "r", "source": "s"}
    return PreferencePair(**{**fields, "rule": "correctness", **changes})


def columns_of(pair: PreferencePair, pictures: list[bytes], **row) -> dict:
    subset = Subset("s_pairs_vqa_correctness_rules", None, None, 2.5, 6, {"root": "/mnt/x/images/s"})
    return to_columns(row or pair.to_json(), pair, subset, pictures)


def write(path: Path, count: int) -> ShardWriter:
    with ShardWriter(path, arrow_schema()) as writer:
        for number in range(count):
            writer.add(columns_of(pair_of(id=str(number)), [bytes([number]) * 60]))
            assert len(writer._rows) < module.BATCH_ROWS  # so many are Python objects at a time
    return writer


@pytest.mark.parametrize(
    ("batch_rows", "group_bytes", "groups"), [(500, 120, 4), (500, 121, 3), (2, 10**6, 1), (1, 1, 7), (500, 60, 7)]
)
def test_rows_keep_their_order_in_groups_of_about_a_size(tmp_path, monkeypatch, batch_rows, group_bytes, groups):
    monkeypatch.setattr(module, "BATCH_ROWS", batch_rows)
    monkeypatch.setattr(module, "ROW_GROUP_BYTES", group_bytes)
    writer = write(tmp_path / "a.parquet", 7)
    file = pq.ParquetFile(tmp_path / "a.parquet")
    assert writer.num_rows == file.metadata.num_rows == 7 and file.num_row_groups == groups
    table = file.read()
    assert table["id"].to_pylist() == [str(number) for number in range(7)]
    assert [row[0]["bytes"] for row in table["images"].to_pylist()] == [bytes([number]) * 60 for number in range(7)]
    group = file.metadata.row_group(0)
    names = {group.column(n).path_in_schema: group.column(n) for n in range(group.num_columns)}
    picture = names["images.list.element.bytes"]
    assert all(column.has_offset_index for column in names.values())  # a reader finds a row without reading its group
    assert picture.compression == "UNCOMPRESSED" and "RLE_DICTIONARY" in picture.encodings
    assert names["question"].compression == names["chosen.list.element.content"].compression == "ZSTD"
    assert json.loads(file.metadata.metadata[b"content_defined_chunking"]) == module.CHUNKING


def test_a_writer_without_rows_and_one_that_failed_write_none(tmp_path):
    assert write(tmp_path / "a.parquet", 0).num_rows == 0
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == 0
    with pytest.raises(RuntimeError), ShardWriter(tmp_path / "b.parquet", arrow_schema()) as writer:
        writer.add(columns_of(pair_of(), [b"x"]))
        raise RuntimeError
    assert pq.ParquetFile(tmp_path / "b.parquet").metadata.num_rows == 0


def test_pictures_that_were_read_last_are_kept_and_counted_once(monkeypatch):
    files = {f"{width}.png": png(width) for width in (3, 4, 5)}
    read = []

    def content(name: str) -> bytes:
        read.append(name)
        if name not in files:
            raise RowError("is nowhere")
        return files[name]

    subset = SimpleNamespace(root="images", pictures=SimpleNamespace(read=content))
    statistics = ReleaseStatistics()
    pictures = ShardPictures(True, statistics)
    size = len(files["3.png"])
    monkeypatch.setattr(module, "CACHE_BYTES", 2 * size + 1)
    assert [pictures.read(subset, name) for name in ("3.png", "4.png", "3.png")] == [
        files[n] for n in ("3.png", "4.png", "3.png")
    ]
    assert read == ["3.png", "4.png"]
    pictures.read(subset, "5.png")  # pushes out the one that was asked for longest ago
    assert pictures.read(subset, "3.png") == files["3.png"] and read == ["3.png", "4.png", "5.png"]
    pictures.read(subset, "4.png")
    assert read[3:] == ["4.png"] and sum(statistics.image_formats.values()) == 3
    assert statistics.image_bytes == sum(map(len, files.values()))
    for _ in range(2):
        with pytest.raises(RowError, match="is nowhere"):
            pictures.read(subset, "x.png")
    assert read[4:] == ["x.png"]  # a fault is kept as well
    other = SimpleNamespace(root="other", pictures=subset.pictures)
    pictures.read(other, "4.png")
    assert read[5:] == ["4.png"]  # another folder's picture of that name
    files["5.png"] = b"no picture"
    with pytest.raises(RowError, match=r"image '5\.png' cannot be decoded"):
        ShardPictures(True, statistics).read(subset, "5.png")
    monkeypatch.setattr(module, "CACHE_BYTES", 1)
    alone = ShardPictures(False, ReleaseStatistics())
    alone.read(subset, "3.png")
    count = len(read)
    alone.read(subset, "3.png")
    assert len(read) == count  # the last one stays however large it is


def test_a_line_that_was_not_converted_is_kept_as_it_was():
    out = io.StringIO()
    module._reject(out, "a:1", RowError("bad"), "{ü}\n".encode())
    module._reject(out, "a:2", RowError("bad"), b"\xff\n")
    first, second = map(json.loads, out.getvalue().splitlines())
    assert first == {"row": "a:1", "reason": "bad", "line": "{ü}"}
    assert second == {"row": "a:2", "reason": "bad", "line_base64": base64.b64encode(b"\xff\n").decode()}


def test_a_shard_has_its_own_mark():
    assert done_mark(Path("w"), Shard("data/a/train-0.parquet", "a", [])) == Path("w/done/data__a__train-0.json")


# ---------------------------------------------------------------------------------------------------------- columns


def test_the_columns_of_a_pair_are_all_there_and_come_back():
    pair = pair_of(
        answer="5", system="be kind", history=(("<image>one?", "1"), ("two?", "2")), images=("b/a.png", "c.png"),
        question="<image>three?", provenance={"n": 1},
    )  # fmt: skip
    columns = columns_of(pair, [b"1", b"2"])
    assert list(columns) == list(FEATURES)
    assert columns["images"] == [{"bytes": b"1", "path": "b/a.png"}, {"bytes": b"2", "path": "c.png"}]
    assert columns["chosen"] == [{"role": "assistant", "content": "c"}]
    assert columns["rejected"] == [{"role": "assistant", "content": "r"}]
    assert columns["history"] == [{"question": "<image>one?", "answer": "1"}, {"question": "two?", "answer": "2"}]
    settings = {
        key: columns[key] for key in ("subset", "repeat_time", "max_dynamic_patch", "image_root", "image_paths")
    }
    assert settings == {
        "subset": "s_pairs_vqa_correctness_rules", "repeat_time": 2.5, "max_dynamic_patch": 6, "image_root": "images/s",
        "image_paths": ["b/a.png", "c.png"],
    }  # fmt: skip
    assert json.loads(columns["provenance"]) == {"n": 1} and json.loads(columns["raw"]) == {"form": "own"}
    assert to_pair(columns) == pair and to_raw(columns) == pair.to_json()
    old = {key: value for key, value in columns.items() if key not in ("system", "history")}
    assert (to_pair(old).system, to_pair(old).history) == (None, ())


def test_a_prompt_is_system_message_turns_and_question():
    image = {"type": "image", "text": None}

    def text(said: str) -> dict:
        return {"type": "text", "text": said}

    plain = pair_of(system="be kind", history=(("one?", "1"),), images=("a", "b"))
    assert prompt_messages(plain) == [
        {"role": "system", "content": [text("be kind")]},
        {"role": "user", "content": [image, image, text("one?")]},
        {"role": "assistant", "content": [text("1")]},
        {"role": "user", "content": [text("q")]},
    ]
    marked = pair_of(history=(("one?", "1"),), question="<image>q<image>", images=("a", "b"))
    assert [message["content"] for message in prompt_messages(marked)] == [
        *([text("one?")], [text("1")], [image, text("q"), image])
    ]
    assert prompt_messages(pair_of()) == [{"role": "user", "content": [image, text("q")]}]
    assert prompt_messages(pair_of(images=())) == [{"role": "user", "content": [text("q")]}]


@pytest.mark.parametrize("field", ["id", "question", "chosen", "rejected", "answer", "source", "system"])
def test_half_a_character_is_refused_wherever_it_stands(field):
    with pytest.raises(RowError, match=r"holds half a surrogate pair \(U\+D800\), which is no text"):
        columns_of(pair_of(**{field: "x\ud800"}), [b"1"])
    for changes in ({"images": ("\ud800.png",)}, {"history": (("a", "\ud800"),)}, {"history": (("\ud800", "a"),)}):
        with pytest.raises(RowError, match="surrogate"):
            columns_of(pair_of(**changes), [b"1"])


# ------------------------------------------------------------------------------------------------------ plan, manifest


def test_a_part_begins_at_the_line_that_begins_in_it(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"ab\ncd\n\ne")
    assert [line_start(path, position) for position in range(9)] == [0, 3, 3, 3, 6, 6, 6, 7, 8]


def test_a_single_piece_of_work_starts_no_process():
    assert list(map_in_processes(abs, [-1, -2], 1)) == [1, 2]
    assert list(map_in_processes(lambda text: len(text), ["a"], 4)) == [1] and list(map_in_processes(len, [], 4)) == []


def test_the_manifest_is_read_or_said_to_be_missing(tmp_path):
    with pytest.raises(BadInputError, match=r"holds no manifest\.json, so convert_mmpr\.py has not finished it"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(BadInputError, match=r"is not valid JSON .*; convert again"):
        read_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text('{"a": "ü"}', encoding="utf-8")
    assert read_manifest(tmp_path) == {"a": "ü"}
    assert file_facts(tmp_path / MANIFEST)["num_bytes"] == 11


def test_options_have_defaults_that_the_documentation_says():
    assert Options("x") == Options("x", None, 500 << 20, True, None)
    assert Piece(0, 0, 9, 1) == Piece(0, 0, 9, 1, {}, 0) and Shard("a", "b", []) == Shard("a", "b", [], 0.0)
    assert (module.ROW_GROUP_BYTES, module.CACHE_BYTES, module.BATCH_ROWS) == (64 << 20, 64 << 20, 500)


def test_values_that_are_equal_but_not_in_json_are_told_apart_wherever_they_stand():
    assert _same_types({"a": "x", "b": 1, "c": None}, {"a": "x", "b": 1, "c": None})
    for other in (1.0, True):
        for row in ({"a": 1, "b": "x"}, {"b": "x", "a": 1}, {"a": 1}):
            assert not _same_types(row, {**row, "a": other})


@pytest.mark.parametrize(
    ("data", "loaded"),
    [
        ("hub:me/pairs", (("me/pairs", None), {"revision": None})),
        ("hub:me/pairs@v1", (("me/pairs", None), {"revision": "v1"})),
        ("hub:me/pairs@v1:tiny", (("me/pairs", "tiny"), {"revision": "v1"})),
        ("hub:me/pairs:tiny", (("me/pairs", "tiny"), {"revision": None})),
        ("a/train.parquet", (("parquet",), {"data_files": "a/train.parquet"})),
        ("a/folder", (("a/folder", None), {"revision": None})),
        ("made", (("parquet",), {"data_files": ["made/data/x/train-0.parquet", "made/data/y/train-0.parquet"]})),
    ],
)
def test_a_table_is_streamed_from_where_it_lies(tmp_path, monkeypatch, data, loaded):
    monkeypatch.chdir(tmp_path)
    for name in ("y", "x"):
        (tmp_path / "made" / "data" / name).mkdir(parents=True)
        (tmp_path / "made" / "data" / name / "train-0.parquet").touch()
    monkeypatch.setattr("datasets.load_dataset", lambda *given, **more: (given, more))
    given, more = loaded
    assert stream_table(data) == (given, {"split": "train", "streaming": True, **more})


def test_a_table_that_cannot_be_loaded_is_named(monkeypatch):
    def fail(*given, **more):
        raise KeyError("no such data set")

    monkeypatch.setattr("datasets.load_dataset", fail)
    with pytest.raises(BadInputError, match="cannot load hub:me/pairs: 'no such data set'"):
        stream_table("hub:me/pairs")


def test_the_columns_of_a_data_set_are_those_that_were_published():
    """Another name or type, and `load_dataset` joins no shards of two versions."""
    message = "list<element: struct<role: string, content: string>>"
    blocks = "list<element: struct<type: string, text: string>>"
    text = dict.fromkeys(("id", "question", "answer", "system", "source", "rule", "subset", "image_root"), "string")
    types = {
        **text, **dict.fromkeys(("provenance", "raw"), "string"), **dict.fromkeys(("chosen", "rejected"), message),
        "images": "list<element: struct<bytes: binary, path: string>>",
        "prompt": f"list<element: struct<role: string, content: {blocks}>>",
        "history": "list<element: struct<question: string, answer: string>>",
        "repeat_time": "double", "max_dynamic_patch": "int32", "image_paths": "list<element: string>",
    }  # fmt: skip
    schema = arrow_schema()
    assert {field.name: str(field.type).replace("item:", "element:") for field in schema} == types
    order = "id images prompt chosen rejected question answer system history source rule subset repeat_time"
    assert schema.names == [*order.split(), "max_dynamic_patch", "image_root", "image_paths", "provenance", "raw"]
    assert json.loads(schema.metadata[b"huggingface"]) == {"info": {"features": FEATURES}}
    assert FEATURES["images"] == [{"_type": "Image"}]
    assert FEATURES["id"] == {"dtype": "string", "_type": "Value"}


def test_a_shard_is_on_the_disk_before_it_has_its_name_and_its_mark_after_that(tmp_path, monkeypatch):
    rows = [{"question": f"q{n}", "chosen": "yes", "rejected": "no" if n else "yes"} for n in range(3)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options, work, out = Options(str(tmp_path / "a.jsonl")), tmp_path / "new/work", tmp_path / "new/out"
    shard = Shard("data/a/train-0.parquet", "a", [Piece(0, 0, 10**6, 1, num_tiny=1)])
    path, seen = out / shard.path, []
    replace = os.replace
    monkeypatch.setattr(module, "sync_to_disk", lambda part: seen.append(("synced", part.is_file(), path.exists())))
    monkeypatch.setattr(
        module.os, "replace", lambda old, new: seen.append((Path(new).name, path.exists())) or replace(old, new)
    )
    for _ in range(2):  # once more over what is there
        assert module.write_shard(shard, options, str(out), str(work)) == shard.path
    mark = done_mark(work, shard)
    assert seen[:3] == [("synced", True, False), ("train-0.parquet", False), (mark.name, True)]
    assert pq.read_table(path)["question"].to_pylist() == ["q1", "q2"]
    assert pq.read_table(work / "tiny-00000.parquet")["question"].to_pylist() == ["q1"]
    done = json.loads(mark.read_text())
    entry = {"path": shard.path, "source": "a", "num_rows": 2, **file_facts(path)}
    assert (done["shard"], done["num_rejects"], done["problems"]) == (entry, 1, [])
    assert ReleaseStatistics.from_json(done["statistics"]).rows == {("a", "other"): 2}
    (reject,) = mark.with_suffix(".rejects.jsonl").read_text().splitlines()
    assert json.loads(reject)["row"] == f"{tmp_path}/a.jsonl:1"


def test_a_plan_says_how_many_pairs_have_their_tokens_counted(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"question": "q", "chosen": "yes", "rejected": "no"}\n' * 4)
    assert (shard_plan.MAX_TOKENIZED, shard_plan.TINY_ROWS, shard_plan.INDEX_BYTES) == (20_000, 200, 32 << 20)
    shown, bar = [], shard_plan.progress_bar
    monkeypatch.setattr(shard_plan, "progress_bar", lambda items, **more: shown.append(more) or bar(items, **more))
    for most, share in ((20_000, 1.0), (3, 0.75)):
        monkeypatch.setattr(shard_plan, "MAX_TOKENIZED", most)
        for tokenizer in ("t", None):
            options = Options(str(tmp_path / "a.jsonl"), tokenizer=tokenizer)
            (shard,) = shard_plan.plan(options, options.subsets(), 1)
            assert shard.sample == (share if tokenizer else 0)
            (piece,) = shard.pieces
            assert (piece.number, piece.num_tiny, sorted(piece.repeated)) == (1, 200, ["2", "3", "4"])
    assert shown[0] == {"total": 1, "unit": "part", "text": "indexing"}


@pytest.mark.parametrize("images", [[], ["a.png"], ["a.png", "b.png"]])
def test_a_plain_row_of_mmpr_needs_nothing_more_to_be_written_again(images):
    row = {"question": "q", "chosen": "c", "rejected": "r", "answer_gt": "5", "note": 1}
    row |= {"image": images[0] if len(images) == 1 else images} if images else {}
    subset = Subset("s_pairs_vqa_correctness_rules", None, None, entry={"root": "images/s"})
    columns = to_columns(row, subset.pair(row, ""), subset, [b"1"] * len(images))
    assert (columns["raw"], to_raw(columns)) == (None, row)


@pytest.mark.parametrize(
    ("row", "special"),
    [
        ({"answer_gt": 12}, {"set": {"answer_gt": 12}, "unset": []}),
        ({"answer_gt": "12", "image": []}, {"set": {"image": []}, "unset": []}),
        ({"note": 1.0, "id": "7"}, {"set": {"id": "7"}, "unset": []}),
        ({"system": " "}, {"set": {"system": " "}, "unset": []}),
        ({"answer": "12"}, {"set": {"answer": "12"}, "unset": ["answer_gt"]}),
    ],
)
def test_of_another_row_only_what_differs_is_kept_beside_the_columns(row, special):
    row = {"question": "q", "chosen": "c", "rejected": "r", **row}
    subset = Subset("s_pairs_vqa_correctness_rules", None, None, entry={"root": "images/s"})
    columns = to_columns(row, subset.pair(row, ""), subset, [])
    assert (json.loads(columns["raw"]), to_raw(columns)) == (special, row)


def test_tokens_of_a_text_are_counted_without_those_around_it(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "one": 1, "two": 2}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    count = module.token_counter(str(tmp_path))
    assert [count(text) for text in ("", "one", "one two one")] == [0, 1, 3]
    assert module.token_counter(None) is None
    with pytest.raises(BadInputError, match=r"no tokenizer\.json in .*; `python -m internvl_mpo.publish model` makes"):
        module.token_counter(str(tmp_path / "nowhere"))
