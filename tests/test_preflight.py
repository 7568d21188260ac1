"""The pass over all pairs before training: what it finds, in which order, and what it does not do twice.

pytest tests/test_preflight.py
"""

import json
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image
from tiny import tiny_processor

from internvl_mpo.encoding import encode_group, measure_group, pair_size
from internvl_mpo.errors import BadInputError
from internvl_mpo.measuring import PairMeter
from internvl_mpo.mmpr import sources
from internvl_mpo.mmpr.pairs import PairRow
from internvl_mpo.mmpr.reading import iter_pairs
from internvl_mpo.training import preflight as module
from internvl_mpo.training.pair_table import PairTable
from internvl_mpo.training.preflight import Preflight

LIMITS = {"max_tiles": 4, "max_length": 700}


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """Rows without, with one and with two pictures, and three that are unusable for different reasons; blocks of 20."""
    monkeypatch.setattr(sources, "BLOCK_ROWS", 20)
    for number in range(3):
        Image.new("RGB", (28 * (number + 1), 28), (80 * number, 0, 0)).save(tmp_path / f"{number}.png")
    lines = []
    for number in range(150):
        asked = number // 3
        row = {"question": f"Question {asked}?", "chosen": "yes " * (1 + number % 5), "rejected": f"no {number}"}
        if asked % 3:
            row["image"] = f"{asked % 3}.png" if asked % 2 else ["0.png", "1.png"]
            if isinstance(row["image"], list):
                row["question"] = "<image> and <image> " + row["question"]
        if number == 41:
            row["image"] = "absent.png"
        if number == 69:
            row["question"] = "long " * 300
        if number == 90:
            row["rejected"] = row["chosen"]
        lines.append(json.dumps(row))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "pairs.jsonl"


def new(data: Path, cache: str = "cache", **options) -> Preflight:
    return Preflight(tiny_processor(), data.parent / cache, [data], **{**LIMITS, "num_workers": 0, **options})


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """Ids of the pairs that were really looked at in this process."""
    ids: list[str] = []
    real = PairMeter.measure

    def measure(meter, pairs):
        ids.extend(asked.pair.id for asked in pairs)
        return real(meter, pairs)

    monkeypatch.setattr(PairMeter, "measure", measure)
    return ids


def plain(table: PairTable) -> list:
    """Everything a table says."""
    unusable = [(table.sources[source].where(number), reason) for source, number, reason in table.unusable]
    columns = {name: column.tolist() for name, column in table.columns.items()}
    rows = [(row.pair, str(row.image_root), row.max_tiles, row.where) for row in map(table.row, range(len(table)))]
    return [unusable, table.clashes, columns, rows]


def change(data: Path, number: int, **keys) -> None:
    lines = data.read_text().splitlines()
    lines[number] = json.dumps({**json.loads(lines[number]), **keys})
    data.write_text("\n".join(lines) + "\n")


def test_the_table_holds_what_reading_and_encoding_one_by_one_give(data):
    table = new(data).run()
    rows = list(iter_pairs(data))
    reasons = {table.sources[source].where(number): reason for source, number, reason in table.unusable}
    assert [where.rpartition(":")[2] for where in reasons] == ["42", "70", "91"]
    assert "absent.png' does not exist" in reasons[f"{data}:42"]
    assert "no response fits" in reasons[f"{data}:70"]
    assert "'chosen' equals 'rejected'" in reasons[f"{data}:91"]
    good = [row for row in rows if isinstance(row, PairRow) and row.where not in reasons]
    assert [table.row(index) for index in range(len(table))] == good
    assert [table.pair_id(index) for index in range(len(table))] == [row.pair.id for row in good]
    assert [f"{digest:016x}" for digest in table.columns["digest"].tolist()] == [row.digest for row in good]
    keys = dict(zip((row.key for row in good), table.columns["key"].tolist(), strict=True))
    assert [keys[row.key] for row in good] == table.columns["key"].tolist()
    assert len(set(keys.values())) == len(keys) < len(good)
    for index, row in enumerate(good):
        size = pair_size(measure_group(tiny_processor(), [row.pair], row.image_root, **LIMITS))
        assert table.size(index) == size
        assert table.columns["num_tokens"][index] == size.num_tokens


def test_sizes_are_those_of_the_encoded_pairs(data):
    table = new(data).run()
    for index in range(30):
        row, size = table.row(index), table.size(index)
        group = encode_group(tiny_processor(), [row.pair], row.image_root, **LIMITS)
        assert size.prompt == len(group.prompt_ids)
        assert [size.chosen, size.rejected] == [len(response) for response in group.responses]
        assert size.num_tokens == group.num_tokens
        assert size.num_tiles == (0 if group.tiles is None else len(group.tiles))


def test_workers_change_neither_order_nor_result(data):
    assert plain(new(data, "three", num_workers=3).run()) == plain(new(data, "one").run())


def test_a_second_start_reads_no_row(data, measured, monkeypatch):
    first = new(data).run()
    assert len(measured) == 149  # one is no pair
    monkeypatch.setattr(sources.SubsetSource, "blocks", lambda source: pytest.fail("a row was read"))
    assert plain(new(data).run()) == plain(first)


def test_texts_numbers_and_other_ranks_share_the_files(data):
    table = pickle.loads(pickle.dumps(new(data).run()))
    assert len(pickle.dumps(table)) < 2000
    assert not table.columns["prompt"].flags.owndata
    assert not table.columns["prompt"].flags.writeable


def test_only_the_parts_that_changed_are_looked_at_again(data, measured):
    new(data).run()
    measured.clear()
    change(data, 0, chosen="another answer")
    assert plain(new(data).run()) == plain(new(data, "fresh").run())
    assert len(measured) == 20 + 149


def test_a_row_put_in_front_moves_the_numbers_of_parts_that_stay(data, monkeypatch):
    new(data).run()
    data.write_text("".join(["\n"] * 20) + data.read_text())
    assert plain(new(data).run()) == plain(new(data, "fresh").run())


def test_a_picture_that_changed_or_came_is_looked_at_again(data, measured):
    new(data).run()
    measured.clear()
    Image.new("RGB", (84, 28)).save(data.parent / "absent.png")
    table = new(data).run()
    assert len(measured) == 20
    assert [number for _, number, _ in table.unusable] == [70, 91]
    Image.new("RGB", (84, 28)).save(data.parent / "1.png")
    os.utime(data.parent / "1.png", ns=(1, 1))  # a picture rewritten within the clock's resolution still differs
    after = plain(new(data).run())
    assert after == plain(new(data, "fresh").run()) != plain(table)


def test_a_picture_that_changes_while_its_rows_are_looked_at_is_looked_at_again(data, measured, monkeypatch):
    real = PairMeter.measure

    def measure(meter, pairs):
        found = list(real(meter, pairs))
        os.utime(data.parent / "1.png", ns=(1, 1))
        return iter(found)

    monkeypatch.setattr(PairMeter, "measure", measure)
    new(data).run()
    measured.clear()
    new(data).run()
    assert len(measured) == 20  # the first block; the others found the picture as it is


@pytest.mark.parametrize("option", [{"max_tiles": 2}, {"max_length": 650}, {"verify_images": "full"}])
def test_another_tiling_limit_or_depth_starts_anew(data, measured, option):
    new(data).run()
    measured.clear()
    new(data, **option).run()
    assert len(measured) == 149


def test_another_tiling_of_a_subset_starts_anew(data, measured):
    meta = data.parent / "meta.json"
    for tiles in (2, 1):
        measured.clear()
        entry = {"root": str(data.parent), "annotation": str(data), "max_dynamic_patch": tiles, "repeat_time": 1}
        meta.write_text(json.dumps({"pairs": entry}))
        table = new(meta).run()
        assert (len(measured), table.row(0).max_tiles) == (149, tiles)


def test_another_template_starts_anew(data, measured):
    new(data).run()
    measured.clear()
    other = tiny_processor()
    other.chat_template = "{# another one #}" + other.chat_template
    Preflight(other, data.parent / "cache", [data], **LIMITS, num_workers=0).run()
    assert len(measured) == 149


def test_another_vocabulary_starts_anew(data, measured):
    new(data).run()
    measured.clear()
    other = tiny_processor()
    other.tokenizer.add_tokens(["yes yes"])
    Preflight(other, data.parent / "cache", [data], **LIMITS, num_workers=0).run()
    assert len(measured) == 149


def test_all_that_the_number_of_tokens_depends_on_is_told_apart(monkeypatch):
    """Of a tokenizer without a fast form the vocabulary counts, in whatever order it is listed."""
    monkeypatch.setattr(module, "family_of_processor", lambda processor: processor)

    def digest(vocabulary=None, template="t", cost=(1, "2"), **tokenizer) -> str:
        tokenizer.setdefault("get_vocab", lambda: vocabulary or {"a": 0, "b": 1})
        cost_settings = lambda processor: cost  # noqa: E731
        return module._processor_digest(
            SimpleNamespace(tokenizer=SimpleNamespace(**tokenizer), chat_template=template, cost_settings=cost_settings)
        )

    fast = [SimpleNamespace(to_str=lambda text=text: text) for text in ("one", "other")]
    different = [
        *(digest(), digest({"a": 1, "b": 0}), digest(template="s"), digest(cost=(2, "2")), digest(cost=(1, "3"))),
        *(digest(backend_tokenizer=backend) for backend in fast),
    ]
    assert len(set(different)) == len(different)
    assert digest({"b": 1, "a": 0}) == digest(backend_tokenizer=None) == different[0]


def test_an_interrupted_pass_goes_on_where_it_stopped(data, measured, monkeypatch):
    whole = plain(new(data, "whole").run())
    real = PairMeter.measure
    measured.clear()

    def fail_late(meter, pairs):
        if len(measured) == 119:
            raise KeyboardInterrupt
        return real(meter, pairs)

    monkeypatch.setattr(PairMeter, "measure", fail_late)
    with pytest.raises(KeyboardInterrupt):
        new(data).run()
    monkeypatch.setattr(PairMeter, "measure", real)
    measured.clear()
    assert plain(new(data).run()) == whole
    assert len(measured) == 30


def test_parts_of_data_that_is_gone_do_not_pile_up_and_what_others_write_now_stays(data):
    first = new(data)
    first.run()
    for name in (".5b0e.arrow.node7.1.part", ".table.json", "notes.txt"):
        (first.folder / name).write_text("somebody writes it now")
    kept = len(list(first.folder.iterdir()))
    for number in range(3):
        change(data, 0, chosen=f"answer {number}")
        new(data).run()
    assert len(list(first.folder.iterdir())) == kept
    assert len(list(first.folder.glob("[!.]*.json"))) == 9  # of eight blocks, and table.json


def test_a_block_without_a_usable_pair_is_passed_over(data, measured):
    lines = data.read_text().splitlines()
    for number in range(20, 40):
        lines[number] = json.dumps({"question": "Equal?", "chosen": "same", "rejected": "same"})
    data.write_text("\n".join(lines) + "\n")
    table = new(data).run()
    assert [number for _, number, _ in table.unusable] == [*range(21, 41), 42, 70, 91]
    assert [table.row(index).where for index in (19, 20)] == [f"{data}:20", f"{data}:41"]
    measured.clear()
    assert plain(new(data).run()) == plain(table)
    assert measured == []


def test_a_file_of_the_table_that_is_gone_is_made_again_and_a_damaged_one_named(data):
    whole = plain(new(data).run())
    gone = sorted(new(data).folder.glob("[0-9a-f]*.json"))[0]
    gone.unlink()
    assert plain(new(data).run()) == whole
    (columns,) = new(data).folder.glob("columns-*.arrow")
    columns.write_bytes(columns.read_bytes()[:100])
    with pytest.raises(BadInputError, match=r"columns-.*\.arrow cannot be read .*; delete the folder .*cache"):
        new(data).run()


def test_a_picture_cut_off_behind_its_header_is_found_when_asked_for(data):
    noise = Image.effect_noise((56, 56), 100).convert("RGB")
    noise.save(data.parent / "2.png")
    whole = (data.parent / "2.png").read_bytes()
    (data.parent / "2.png").write_bytes(whole[: len(whole) // 2])
    assert len(new(data).run().unusable) == 3
    reasons = [reason for *_, reason in new(data, verify_images="full").run().unusable]
    assert sum("2.png' cannot be decoded" in reason for reason in reasons) > 10


def test_other_ranks_get_the_first_ranks_findings(data, measured):
    first, other = new(data), new(data)
    token = first.reopen()
    table = first.run()
    first.finish()
    measured.clear()
    assert plain(other.wait(token)) == plain(table)
    assert measured == []


def test_a_new_pass_forgets_that_an_earlier_one_was_completed(data):
    first = new(data)
    tokens = {first.reopen(), first.reopen()}
    assert len(tokens) == 2
    first.finish()
    assert (first.folder / "done").exists()
    first.reopen()
    assert not (first.folder / "done").exists()


@pytest.fixture
def waiting(data, monkeypatch):
    """A rank that waits for the first one, and what happens each time it has looked."""
    monkeypatch.setattr(module, "_SILENCE", 0.0)
    first, other = new(data), new(data)
    token = first.reopen()
    first.run()
    looks: list[int] = []

    def wait(happens) -> list[int]:
        def sleep(seconds: float) -> None:
            assert seconds < 1
            looks.append(len(looks))
            if len(looks) > 9:
                pytest.fail("it waits on and on")
            happens(first, len(looks))

        monkeypatch.setattr(module.time, "sleep", sleep)
        assert plain(other.wait(token)) == plain(first.run())
        return looks

    return wait


def test_other_ranks_wait_as_long_as_the_first_shows_life(waiting):
    def happens(first, num_looks):
        os.utime(first.folder / "started", ns=(num_looks, num_looks))  # another time than before, whatever the clock
        if num_looks == 5:
            first.finish()

    assert len(waiting(happens)) == 5


def test_a_sign_of_life_is_the_time_of_the_mark(data):
    first = new(data)
    first.reopen()
    os.utime(first.folder / "started", ns=(1, 1))
    first._show_life(1)
    assert (first.folder / "started").stat().st_mtime_ns > 1


def test_a_first_rank_without_a_sign_of_life_is_not_waited_for(waiting):
    with pytest.raises(BadInputError, match=r"has shown no sign of life in .*; start the command again"):
        waiting(lambda first, num_looks: None)


@pytest.mark.parametrize(("is_marked", "seconds"), [(False, 120), (True, 600)])
def test_ranks_wait_two_minutes_for_the_folder_and_ten_for_a_sign_of_life(data, monkeypatch, is_marked, seconds):
    """Less would end runs on slow disks, more would keep devices waiting for a program that is gone."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(module.time, "sleep", lambda length: setattr(clock, "now", clock.now + length))
    first = new(data)
    token = first.reopen()
    with pytest.raises(BadInputError):
        new(data).wait(token if is_marked else "another")
    assert clock.now - 1000 == pytest.approx(seconds, abs=1)


def test_a_rank_without_its_launcher_does_not_wait(waiting, monkeypatch):
    monkeypatch.setattr(module, "_SILENCE", 600.0)
    with pytest.raises(BadInputError, match="the launcher of this rank is gone"):
        waiting(lambda first, num_looks: monkeypatch.setattr(os, "getppid", lambda: 1))


def test_a_worker_that_dies_is_one_sentence(data, monkeypatch):
    monkeypatch.setattr(module.PartWriter, "write", lambda *args: os._exit(1))
    with pytest.raises(BadInputError, match=r"a process that checks pairs died, .* --preflight_workers"):
        new(data, num_workers=1).run()


def test_blocks_that_wait_for_workers_hold_no_lines_and_workers_start_no_threads(data, monkeypatch):
    first = new(data, num_workers=1)
    first.reopen()
    blocks = [(0, block) for block in first.sources[0].blocks()]
    made = list(first._make_in_workers(iter(blocks), 1))
    assert [(number, block.first) for number, block, *_ in made] == [(0, block.first) for _, block in blocks]
    assert all(block.lines is None for _, block, *_ in made) and all(block.lines for _, block in blocks)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    monkeypatch.setattr(module.gc, "freeze", lambda: None)
    monkeypatch.setattr(module, "_worker", None)
    module._start_worker(tiny_processor(), first.folder, first.sources, first.options)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert module._make_part(*blocks[0]) == made[0][2:]


@pytest.mark.parametrize(
    ("num_workers", "num_rows", "num_cores", "made"),
    [
        (0, 150, 40, "here"),
        (None, 20, 40, "here"),  # one block: starting processes takes longer than the work
        (None, 21, 40, 16),
        (None, 150, 3, 3),
        (5, 20, 40, 5),
    ],
)
def test_processes_are_started_where_that_pays(data, monkeypatch, num_workers, num_rows, num_cores, made):
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:num_rows]))
    chosen = []
    monkeypatch.setattr(module, "_num_cores", lambda: num_cores)
    monkeypatch.setattr(Preflight, "_make_here", lambda self, blocks: chosen.append((list(blocks), "here")) or [])
    monkeypatch.setattr(
        Preflight, "_make_in_workers", lambda self, blocks, workers: chosen.append((list(blocks), workers)) or []
    )
    assert list(new(data, num_workers=num_workers)._parts()) == []
    ((blocks, how),) = chosen
    assert how == made
    assert [block.first for _, block in blocks] == list(range(1, num_rows + 1, 20))


def test_a_folder_that_is_not_shared_is_named_instead_of_waited_for(data, monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE", 0.3)
    first, other = new(data, "one_node"), new(data, "other_node")
    token = first.reopen()
    with pytest.raises(BadInputError, match=r"other_node.* is not the folder the first rank works in"):
        other.wait(token)
    other.reopen()  # an earlier run, which this node was the first rank of
    other.finish()
    with pytest.raises(BadInputError, match=r"other_node.* is not the folder the first rank works in"):
        other.wait(token)
