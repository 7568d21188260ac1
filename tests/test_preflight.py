"""The pass over all pairs before training: what it finds, in which order, and what it does not do twice.

pytest tests/test_preflight.py
"""

import json
import os
from pathlib import Path

import pytest
from PIL import Image
from tiny import tiny_processor

from internvl_mpo.encoding import encode_group
from internvl_mpo.errors import BadInputError
from internvl_mpo.mmpr.pairs import PairRow
from internvl_mpo.mmpr.reading import iter_pairs
from internvl_mpo.pack_plan import PairSize
from internvl_mpo.records import PreferencePair, RowError
from internvl_mpo.training import preflight as module
from internvl_mpo.training.lengths import length_report, show_lengths
from internvl_mpo.training.preflight import Preflight, same_id_twice

LIMITS = {"max_tiles": 4, "max_length": 700}


@pytest.fixture
def rows(tmp_path) -> list[PairRow]:
    """Text-only rows, one and two pictures, and three rows that are unusable for different reasons."""
    for number in range(3):
        Image.new("RGB", (28 * (number + 1), 28), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
    lines = []
    for number in range(150):
        row = {"question": f"Question {number}?", "chosen": "yes " * (1 + number % 5), "rejected": f"no {number}"}
        if number % 3:
            row["image"] = f"{number % 3}.png" if number % 2 else ["0.png", "1.png"]
            if isinstance(row["image"], list):
                row["question"] = "<image> and <image> " + row["question"]
        if number == 41:
            row["image"] = "absent.png"
        if number == 69:
            row["question"] = "long " * 300
        lines.append(json.dumps(row))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return list(iter_pairs(tmp_path / "pairs.jsonl"))


def new(folder: Path, **options) -> Preflight:
    return Preflight(tiny_processor(), folder, **{**LIMITS, "num_workers": 0, **options})


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """Ids of the pairs that were really looked at in this process."""
    ids: list[str] = []
    real = module._measure_row
    monkeypatch.setattr(module, "_measure_row", lambda row, *more: ids.append(row.pair.id) or real(row, *more))
    return ids


def plain(results: list) -> list:
    return [str(result) if isinstance(result, RowError) else result for result in results]


def test_sizes_are_those_of_the_encoded_pairs(rows, tmp_path):
    results = new(tmp_path / "cache").run(rows)
    bad = {index: result for index, result in enumerate(results) if isinstance(result, RowError)}
    assert list(bad) == [41, 69]
    assert "pairs.jsonl:42" in str(bad[41])
    assert "absent.png' does not exist" in str(bad[41])
    assert "no response fits" in str(bad[69])
    for row, size in list(zip(rows, results, strict=True))[:30]:
        group = encode_group(tiny_processor(), [row.pair], row.image_root, **LIMITS)
        assert size.prompt == len(group.prompt_ids)
        assert [size.chosen, size.rejected] == [len(response) for response in group.responses]
        assert size.num_tokens == group.num_tokens
        assert size.num_tiles == (0 if group.tiles is None else len(group.tiles))


def test_workers_change_neither_order_nor_result(rows, tmp_path):
    alone = new(tmp_path / "one").run(rows)
    assert plain(new(tmp_path / "three", num_workers=3).run(rows)) == plain(alone)


def test_a_second_start_looks_at_nothing_again(rows, tmp_path, measured):
    first = new(tmp_path / "cache").run(rows)
    assert len(measured) == 150
    measured.clear()
    assert plain(new(tmp_path / "cache").run(rows)) == plain(first)
    assert measured == []


def test_only_what_changed_is_looked_at_again(rows, tmp_path, measured):
    new(tmp_path / "cache").run(rows)
    measured.clear()
    Image.new("RGB", (84, 28)).save(tmp_path / "1.png")
    os.utime(tmp_path / "1.png", ns=(1, 1))  # a picture rewritten within the clock's resolution still differs
    edited = PreferencePair.from_json({**rows[0].pair.to_json(), "chosen": "another answer"})
    rows[0] = PairRow(edited, *(getattr(rows[0], n) for n in ("image_root", "max_tiles", "where", "subset")))
    after = new(tmp_path / "cache").run(rows)
    expected = {rows[0].pair.id} | {row.pair.id for row in rows if "1.png" in row.pair.images}
    assert set(measured) == expected
    assert plain(after) == plain(new(tmp_path / "fresh").run(rows))


@pytest.mark.parametrize("change", [{"max_tiles": 2}, {"max_length": 650}, {"verify_images": "full"}])
def test_another_tiling_limit_or_depth_starts_anew(rows, tmp_path, measured, change):
    new(tmp_path / "cache").run(rows)
    measured.clear()
    new(tmp_path / "cache", **change).run(rows)
    assert len(measured) == 150


def test_another_template_starts_anew(rows, tmp_path, measured):
    new(tmp_path / "cache").run(rows)
    measured.clear()
    other = tiny_processor()
    other.chat_template = "{# another one #}" + other.chat_template
    Preflight(other, tmp_path / "cache", **LIMITS, num_workers=0).run(rows)
    assert len(measured) == 150


def test_an_interrupted_pass_goes_on_where_it_stopped(rows, tmp_path, measured, monkeypatch):
    counted = module._measure_row

    def fail_late(row, *more):
        if len(measured) == 130:
            raise KeyboardInterrupt
        return counted(row, *more)

    monkeypatch.setattr(module, "_measure_row", fail_late)
    monkeypatch.setattr(module, "_SHARD", 50)
    with pytest.raises(KeyboardInterrupt):
        new(tmp_path / "cache").run(rows)
    monkeypatch.setattr(module, "_measure_row", counted)
    measured.clear()
    assert len(new(tmp_path / "cache").run(rows)) == 150
    assert 0 < len(measured) <= 150 - 100  # two shards were whole


def test_a_picture_cut_off_behind_its_header_is_found_when_asked_for(rows, tmp_path):
    noise = Image.effect_noise((56, 56), 100).convert("RGB")
    noise.save(tmp_path / "2.png")
    whole = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(whole[: len(whole) // 2])
    wanted = [index for index, row in enumerate(rows) if row.pair.images == ("2.png",)]
    trusting = new(tmp_path / "cache").run(rows)
    assert not any(isinstance(trusting[index], RowError) for index in wanted)
    thorough = new(tmp_path / "cache", verify_images="full").run(rows)
    assert all("2.png' cannot be decoded" in str(thorough[index]) for index in wanted)


def test_other_ranks_get_the_first_ranks_findings(rows, tmp_path, measured):
    first, other = new(tmp_path / "cache"), new(tmp_path / "cache")
    token = first.reopen()
    results = first.run(rows)
    first.finish()
    measured.clear()
    assert plain(other.wait(rows, token)) == plain(results)
    assert measured == []


def test_a_folder_that_is_not_shared_is_named_instead_of_waited_for(rows, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 0.3)
    first, other = new(tmp_path / "one_node"), new(tmp_path / "other_node")
    token = first.reopen()
    with pytest.raises(BadInputError, match=r"other_node.* is not the folder the first rank works in"):
        other.wait(rows, token)
    other.reopen()  # an earlier run, which this node was the first rank of
    other.finish()
    with pytest.raises(BadInputError, match=r"other_node.* is not the folder the first rank works in"):
        other.wait(rows, token)


def test_one_id_for_two_contents_is_refused(rows):
    twin = PreferencePair(question="other", chosen="a", rejected="b", id=rows[3].pair.id)
    clashing = PairRow(twin, rows[0].image_root, None, "more.jsonl:1", "more")
    clashes = same_id_twice([*rows, rows[3], clashing])
    assert list(clashes) == [151]  # the same pair twice is fine
    assert "pairs.jsonl:4" in clashes[151]


def test_the_histogram_holds_every_pair():
    sizes = [PairSize(prompt, 10, 12, 1, prompt > 4000) for prompt in (5, 80, 90, 700, 4100)]
    report = length_report(sizes)
    assert sum(report["histogram"]["counts"]) == 5
    width = report["histogram"]["bin_width"]
    assert report["histogram"]["counts"][4120 // width] == 1
    assert report["pair"] == {"mean": 1015.0, "min": 25, "p50": 110, "p90": 4120, "p99": 4120, "max": 4120}
    shown = show_lengths(report)
    assert "4,120" in shown
    assert "1 responses are cut" in shown
