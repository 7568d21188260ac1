"""The table of pairs on disk: whose id is whose, where a pair is found, what its parts and keys are called.

pytest tests/test_pair_table.py
"""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from test_preflight import LIMITS, change, data, new  # noqa: F401 - data is a fixture
from tiny import tiny_processor

from internvl_mpo.encoding import measure_group, pair_size, response_key
from internvl_mpo.mmpr.convert import convert
from internvl_mpo.mmpr.pairs import PairRow
from internvl_mpo.mmpr.shard_plan import Options
from internvl_mpo.mmpr.sources import Block
from internvl_mpo.records import PreferencePair
from internvl_mpo.training import preflight
from internvl_mpo.training.lengths import length_report, show_lengths
from internvl_mpo.training.pair_table import pair_of_text, text_hash, text_of_pair
from internvl_mpo.training.pairs import PairDigests
from internvl_mpo.training.preflight import Preflight
from internvl_mpo.training.table_parts import PartWriter, question_share


def test_one_id_for_two_contents_is_refused(data):
    lines = data.read_text().splitlines()
    change(data, 3, id="same")
    twice = data.read_text().splitlines()[3]
    changed = json.dumps({**json.loads(twice), "chosen": "other"})
    data.write_text("\n".join([*data.read_text().splitlines(), twice, changed]) + "\n")
    table = new(data).run()
    (clash,) = table.clashes  # the same pair twice is fine
    assert table.where(clash) == f"{data}:{len(lines) + 2}"
    assert table.clashes[clash] == f"id 'same' is also that of {data}:4, with other content"


def test_one_id_for_pictures_of_two_folders_is_refused_and_every_row_keeps_its_own(tmp_path):
    """The same words about another `1.png`: reference log-probs, which go by id, would be those of the first."""
    lines = [{"id": str(number), "image": "1.png", "question": "Which?", "chosen": "red", "rejected": f"{number}"}
             for number in range(3)]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    meta = {}
    for number, name in enumerate(("left", "right")):
        (tmp_path / name / "images").mkdir(parents=True)
        Image.new("RGB", (28 * (number + 1), 28)).save(tmp_path / name / "images" / "1.png")
        meta[name] = {"root": f"{name}/images", "annotation": "pairs.jsonl", "repeat_time": number + 1}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    table = new(tmp_path / "meta.json").run()
    found = [(row.subset, row.image_root.parent.name, row.repeat_time) for row in map(table.row, range(6))]
    assert found == [("left", "left", 1)] * 3 + [("right", "right", 2)] * 3
    assert [table.size(index).num_tiles for index in range(6)] == [1, 1, 1, 3, 3, 3]
    assert list(table.clashes) == [3, 4, 5]  # in the order of the data
    assert [reason[:6] for reason in table.clashes.values()] == ["id '0'", "id '1'", "id '2'"]


def test_one_question_about_pictures_of_one_name_or_under_two_caps_is_two_within_one_block(tmp_path):
    """Rows of several subsets may stand in one row group: as one question they would share pictures and sizes."""
    line = {"image": "1.png", "question": "Which?", "chosen": "red", "rejected": "blue"}
    meta = {}
    for number, (name, folder, cap) in enumerate([("a", "left", 4), ("b", "right", 4), ("c", "right", 2)]):
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.new("RGB", (28 if folder == "left" else 112, 28)).save(tmp_path / folder / "1.png")
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"id": str(number), **line}) + "\n")
        meta[name] = {"root": folder, "annotation": f"{name}.jsonl", "repeat_time": 1, "max_dynamic_patch": cap}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    convert(Options(str(tmp_path / "meta.json")), tmp_path / "parquet")
    shards = sorted((tmp_path / "parquet").glob("data/**/*.parquet"))
    (tmp_path / "one").mkdir()
    whole = pyarrow.concat_tables(map(pyarrow.parquet.read_table, shards))
    pyarrow.parquet.write_table(whole, tmp_path / "one" / "train.parquet", row_group_size=3)
    table = Preflight(tiny_processor(), tmp_path / "found", [tmp_path / "one"], **LIMITS, num_workers=0).run()
    rows = [table.row(index) for index in range(3)]
    assert [(row.subset, row.max_tiles) for row in rows] == [("a", 4), ("b", 4), ("c", 2)]
    assert [table.size(index).num_tiles for index in range(3)] == [1, 5, 3]
    assert len(set(table.columns["key"].tolist())) == len({row.key for row in rows}) == 3
    for index, row in enumerate(rows):
        limits = {**LIMITS, "max_tiles": row.max_tiles}
        size = pair_size(measure_group(tiny_processor(), [row.pair], row.image_root, **limits))
        assert table.size(index) == size


def test_a_table_of_an_earlier_version_is_found_again(tmp_path):
    """Another name of a part would cost a look at all rows, another key of a question would hold out others."""
    row = {"id": "7", "image": "1.png", "question": "Which?", "chosen": "red", "rejected": "blue"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    pair = PairRow(PreferencePair.from_json(row), Path("images"), 6, "", "", 1.0)
    block = Block(1, 2, 30, [b"one", b"other"])
    names = []
    for settings in (["a"], ["b"]):
        source = SimpleNamespace(settings=lambda settings=settings: settings)
        writer = PartWriter(tiny_processor(), tmp_path, [source], **LIMITS, decode=False)
        blocks = [block, block._replace(lines=[b"one"]), Block(1, 2, 30), Block(2, 2, 30), Block(1, 3, 30)]
        names += [writer._name(0, one) for one in blocks]
    assert len(set(names)) == 10
    assert names[0] == "92d502ef8375a1dcf57d3ab3"
    assert names[2] == "9a6f5bf4f4930ec255f2bd2d"
    assert question_share(pair.key[0]) == 59667658348773470 < 2**56
    assert text_hash("7 \ud83d") == 7988727930781299298
    assert response_key([1, 2, 70000]) == 17076530471059366 < 2**56


def test_half_a_character_is_refused_by_name_in_a_text_and_kept_elsewhere(data):
    change(data, 0, provenance={"note": "half \ud83d of one"}, id="\ud83d")
    change(data, 1, chosen="half \ud83d of one")
    change(data, 2, question="half \ud83d of one")
    table = new(data).run()
    assert table.row(0).pair.id == "\ud83d"
    assert table.row(0).pair.provenance == {"note": "half \ud83d of one"}
    reasons = [reason for _, number, reason in table.unusable if number < 4]
    assert ["'chosen' holds half a surrogate pair (U+D83D)" in reasons[0], "'question' holds" in reasons[1]] == [
        True
    ] * 2


def test_pairs_are_found_by_their_ids(data):
    table = new(data).run()
    digests = PairDigests(table, np.arange(10, 100, 3))
    rows = [table.row(index) for index in range(10, 100, 3)]
    assert dict(digests.items()) == {row.pair.id: row.digest for row in rows}
    assert all(digests[row.pair.id] == row.digest for row in rows)
    with pytest.raises(KeyError):
        digests[table.pair_id(0)]


def test_the_histogram_holds_every_pair():
    prompts = np.array([5, 80, 90, 700, 4100])
    same = {name: np.full(5, value) for name, value in (("chosen", 10), ("rejected", 12), ("num_tiles", 1))}
    report = length_report({"prompt": prompts, "num_tokens": prompts + 20, "num_cut": prompts > 4000, **same})
    assert sum(report["histogram"]["counts"]) == 5
    width = report["histogram"]["bin_width"]
    assert report["histogram"]["counts"][4120 // width] == 1
    assert report["pair"] == {"mean": 1015.0, "min": 25, "p50": 110, "p90": 4120, "p99": 4120, "max": 4120}
    shown = show_lengths(report)
    assert "4,120" in shown
    assert "1 responses are cut" in shown


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"images": ("a.png", "b.png"), "answer": "", "source": ""},
        {"answer": "0", "system": "", "history": (("h", "i"), ("j", "k")), "source": "s", "rule": "vote", "id": "0"},
        {"provenance": {"seed": 1, "none": None, "list": [0.5, [], "ü"], "nan": 1e999, "large": 10**30}},
        {"question": 'half \ud83d, "quoted", \\, \n\x07\u2028'},
    ],
)
def test_a_pair_comes_back_from_the_table_as_it_was(fields):
    """Texts of earlier tables, which also hold what is not there, are read as well."""
    pair = PreferencePair(**{"question": "q", "chosen": "yes", "rejected": "no", **fields})
    assert pair_of_text(text_of_pair(pair).decode()) == pair
    assert pair_of_text(json.dumps(vars(pair))) == pair


def test_the_progress_of_a_look_shows_pairs_and_bytes(data, monkeypatch):
    shown = []

    class Bar(SimpleNamespace):
        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def set_postfix_str(self, text, refresh):
            shown.append(text)

        def update(self, num_bytes):
            shown.append(num_bytes)

    monkeypatch.setattr(preflight, "tqdm", lambda **more: shown.append(more["total"]) or Bar())
    first = new(data)
    parts = list(first._parts())
    counts = itertools.accumulate(part.num_pairs for part in parts)
    blocks = [block.num_bytes for block in first.sources[0].blocks()]
    total = data.stat().st_size
    assert shown == [total, *itertools.chain(*zip((f"{count} pairs" for count in counts), blocks, strict=True))]
    assert sum(blocks) == total
