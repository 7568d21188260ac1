"""Wherever shards are cut, they hold the rows of one large shard, in order and once, and stay below their limit."""

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mmpr_world import make_release
from PIL import Image

from internvl_mpo.errors import BadInputError
from internvl_mpo.mini.release import MMPRSettings
from internvl_mpo.mmpr import shard_plan
from internvl_mpo.mmpr.convert import convert
from internvl_mpo.mmpr.shard_plan import Options, Shard, plan

SIZES = {f"{number}.png": size for number, size in enumerate((0, 40, 150, 400, 900))}
NO_ROWS = [b"", b"no json", b'{"question": "q"}', b"[1]"]  # lines that are no pair, a blank one among them


def line_of(number: int, pictures: list[str], length: int) -> bytes:
    row = {"id": str(number), "question": "q" * length, "chosen": "a", "rejected": "b", "images": pictures}
    return json.dumps({**row, "question": "<image>" * len(pictures) + row["question"]}).encode()


a_line = st.one_of(
    st.tuples(st.lists(st.sampled_from(sorted(SIZES)), max_size=3), st.integers(1, 120)), st.sampled_from(NO_ROWS)
)
releases = st.lists(st.lists(a_line, max_size=12), min_size=1, max_size=3)


def write_release(folder: Path, subsets: list[list]) -> list[list[bytes]]:
    """Write subsets of one source, pictures of the sizes above; return their lines."""
    (folder / "images").mkdir(exist_ok=True)
    for name, size in SIZES.items():
        (folder / "images" / name).write_bytes(b"\0" * size)
    meta, found = {}, []
    for number, lines in enumerate(subsets):
        texts = [line if isinstance(line, bytes) else line_of(100 * number + i, *line) for i, line in enumerate(lines)]
        file = folder / f"{number}.jsonl"
        file.write_bytes(b"".join(text + b"\n" for text in texts))
        name = ("s_pairs_vqa_correctness_rules", "s_pairs_vqa_format_rules", "s_extra_pairs_vqa_format_rules")[number]
        meta[name] = {"root": "images", "annotation": file.name, "repeat_time": 1, "length": len(texts)}
        found.append(texts)
    (folder / "meta.json").write_text(json.dumps(meta))
    return found


def lines_of(folder: Path, shard: Shard) -> list[tuple[int, int, bytes]]:
    """The lines of a shard, read by nothing but offsets: (subset, line number, line)."""
    found = []
    for piece in shard.pieces:
        content = (folder / f"{piece.subset}.jsonl").read_bytes()[piece.start : piece.stop]
        assert content.endswith(b"\n")
        lines = content[:-1].split(b"\n")
        found += [(piece.subset, piece.number + index, line) for index, line in enumerate(lines)]
    return found


def cost_of(lines: list[tuple[int, int, bytes]]) -> int:
    """Bytes of text, line ends included, and of every picture once for each subset that shows it."""
    pairs = [(subset, line) for subset, _, line in lines if line not in NO_ROWS]
    shown = {(subset, name) for subset, line in pairs for name in json.loads(line)["images"]}
    return sum(len(line) + 1 for _, line in pairs) + sum(SIZES[name] for _, name in shown)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(subsets=releases, limit=st.integers(1, 3000))
@example(subsets=[[([], 1), ([], 1)]], limit=1)  # every row is larger than a shard
@example(subsets=[[(["4.png", "4.png"], 1), ([], 1)]], limit=1080)  # a row shows one picture twice
@example(subsets=[[(["4.png"], 1), (["3.png", "4.png"], 1), ([], 1)]], limit=1200)  # shown on both sides of a cut
@example(subsets=[[(["4.png"], 1), (["3.png"], 1), (["4.png"], 1)]], limit=1200)  # and again, a shard later
def test_shards_hold_every_line_once_in_order_and_as_many_as_fit(tmp_path, subsets, limit):
    texts = write_release(tmp_path, subsets)
    shard_plan.OPENED.clear()
    options = Options(str(tmp_path), shard_bytes=limit)
    shards = plan(options, options.subsets(), workers=1)
    by_source: dict[str, list[list]] = {}
    for shard in shards:
        by_source.setdefault(shard.source, []).append(lines_of(tmp_path, shard))
    found = sorted(line for groups in by_source.values() for lines in groups for line in lines)
    assert found == [(n, i, text) for n, lines in enumerate(texts) for i, text in enumerate(lines, start=1)]
    for groups in by_source.values():
        assert [line for lines in groups for line in lines] == sorted(line for lines in groups for line in lines)
        for lines, after in zip(groups, [*groups[1:], None], strict=True):
            rows = [line for line in lines if line[2] not in NO_ROWS]
            assert cost_of(lines) <= limit or len(rows) == 1
            assert after is None or cost_of([*lines, after[0]]) > limit


@pytest.mark.parametrize("index_bytes", [50, 300, 1000])
def test_parts_of_the_index_do_not_change_which_lines_there_are(tmp_path, monkeypatch, index_bytes):
    lines = [([f"{i % 5}.png"], 7 * i) if i % 4 else NO_ROWS[i // 4 % 4] for i in range(16)]
    texts = write_release(tmp_path, [lines, lines[::-1]])
    monkeypatch.setattr(shard_plan, "INDEX_BYTES", index_bytes)
    for limit in (500, 1500, 10**6):
        options = Options(str(tmp_path), shard_bytes=limit)
        shards = plan(options, options.subsets(), workers=1)
        found = sorted(line for shard in shards for line in lines_of(tmp_path, shard))
        assert found == [(n, i, text) for n, part in enumerate(texts) for i, text in enumerate(part, start=1)]
        assert not any(piece.repeated for shard in shards for piece in shard.pieces)


def test_a_repeated_id_names_the_line_that_came_first_across_parts_shards_and_subsets(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_plan, "INDEX_BYTES", 200)
    write_release(tmp_path, [[([], 50)] * 6, [([], 50)] * 4])
    for number, ids in enumerate((["a", "b", "a", "c", "b", "a"], ["d", "c", "d", "e"])):
        rows = [{"id": id, "question": f"{i}", "chosen": "a", "rejected": "b"} for i, id in enumerate(ids)]
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for limit in (100, 10**6):
        options = Options(str(tmp_path), shard_bytes=limit)
        shard_plan.OPENED.clear()
        repeated = {}
        for shard in plan(options, options.subsets(), workers=1):
            for piece in shard.pieces:
                repeated |= {(piece.subset, int(line)): where for line, where in piece.repeated.items()}
        first, second = (f"{tmp_path / name}.jsonl" for name in "01")
        expected = {(0, 3): f"{first}:1", (0, 6): f"{first}:1", (0, 5): f"{first}:2"}
        assert repeated == {**expected, (1, 2): f"{first}:4", (1, 3): f"{second}:1"}


def test_small_shards_joined_are_the_large_one(tmp_path):
    make_release(MMPRSettings(output=str(tmp_path / "raw"), release="folders", num_pictures=4))
    tables = {}
    for limit in (4000, 10**9):
        result = convert(Options(str(tmp_path / "raw"), shard_bytes=limit), tmp_path / f"out{limit}")
        assert result.num_rejects == 0
        folders = sorted((tmp_path / f"out{limit}" / "data").iterdir())
        joined = {f.name: pa.concat_tables(map(pq.read_table, sorted(f.glob("*.parquet")))) for f in folders}
        tables[limit] = {name: table.to_pylist() for name, table in joined.items()}
        counts = result.statistics.rows
        assert counts == tables.setdefault("counts", counts)
    assert tables[4000] == tables[10**9]
    assert len(list((tmp_path / "out4000").glob("data/*/*.parquet"))) > len(tables[4000])


def test_two_sources_of_one_folder_name_are_refused_before_anything_is_written(tmp_path):
    write_release(tmp_path, [[([], 1)], [([], 1)]])
    meta = json.loads((tmp_path / "meta.json").read_text())
    first, second = meta.values()
    names = {"a b_pairs_vqa_correctness_rules": first, "a_b_pairs_vqa_correctness_rules": second}
    (tmp_path / "meta.json").write_text(json.dumps(names))
    options = Options(str(tmp_path))
    with pytest.raises(BadInputError, match="two sources have the same folder name"):
        convert(options, tmp_path / "out")


def test_the_tiny_configuration_takes_the_first_rows_of_every_subset(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_plan, "TINY_ROWS", 6)
    write_release(tmp_path, [[([], i) for i in range(1, 9)], [([], i) for i in range(1, 3)], []])
    for name in SIZES:
        Image.new("L", (4, 4)).save(tmp_path / "images" / name, "PNG")
    for limit in (100, 10**6):
        convert(Options(str(tmp_path), shard_bytes=limit), tmp_path / f"out{limit}")
        rows = pq.read_table(tmp_path / f"out{limit}" / "tiny" / "train-00000-of-00001.parquet").to_pylist()
        # two of each subset, of as many as the shard has from which a subset begins
        assert [row["id"] for row in rows][:1] == ["0"]
        assert {row["id"] for row in rows} <= {"0", "1", "100", "101"}
        assert len(rows) == (2 if limit == 100 else 4)


def test_options_that_decide_bytes_are_all_in_the_fingerprint(tmp_path):
    from internvl_mpo.mmpr.convert import _fingerprint

    write_release(tmp_path, [[([], 1)], [([], 2)]])
    options = Options(str(tmp_path))
    changed = {"shard_bytes": 7, "decode": False, "tokenizer": "x"}
    assert {field.name for field in dataclasses.fields(Options)} == {"raw", "image_root", *changed}
    marks = {_fingerprint(options, options.subsets())}
    for key, value in changed.items():
        marks.add(_fingerprint(dataclasses.replace(options, **{key: value}), options.subsets()))
    content = (tmp_path / "1.jsonl").read_text()
    (tmp_path / "1.jsonl").write_text(content.replace("qq", "pp"))
    marks.add(_fingerprint(options, options.subsets()))
    (tmp_path / "1.jsonl").write_text(content)
    meta = json.loads((tmp_path / "meta.json").read_text())
    meta[next(iter(meta))]["repeat_time"] = 2
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    marks.add(_fingerprint(options, options.subsets()))
    assert len(marks) == 6
