"""JSONL files: what a kill, a second run or an odd character may do to them, and what it may not."""

import json
from multiprocessing import get_context

import pytest

from internvl_mpo.errors import BadInputError, RowError
from internvl_mpo.jsonl import AppendLog, iter_jsonl, parse_object, read_whole_lines, write_jsonl
from internvl_mpo.mmpr.release import parse_line

ODD = [{"text": "half \ud83d"}, {"text": "line\u2028separator\u0085"}, {"text": "\ufeff bom, ü, \\ud83d"}]


def test_odd_characters_come_back_and_every_file_is_utf8(tmp_path):
    write_jsonl(ODD, tmp_path / "whole.jsonl")
    with AppendLog(tmp_path / "grown.jsonl") as log:
        offsets = [log.append(row) for row in ODD]
        assert [log.read(offset) for offset in offsets] == ODD
    for name in ("whole.jsonl", "grown.jsonl"):
        (tmp_path / name).read_bytes().decode("utf-8")
        assert [row for _, row in iter_jsonl(tmp_path / name)] == ODD
        assert read_whole_lines(tmp_path / name) == ODD


@pytest.mark.parametrize("torn", [b"{", b'{"n": 3}', b"\x00" * 5000, b'"' + b"x" * 200_000, "ü".encode()[:1]])
def test_a_torn_last_line_is_cut_and_nothing_before_it(tmp_path, torn):
    path = tmp_path / "log.jsonl"
    with AppendLog(path) as log:
        for number in range(3):
            log.append({"n": number})
    with open(path, "ab") as file:
        file.write(torn)
    assert [row["n"] for row in read_whole_lines(path)] == [0, 1, 2]
    with AppendLog(path) as log:
        log.append({"n": 9})
        assert [row["n"] for _, row in log] == [0, 1, 2, 9]


@pytest.mark.parametrize("torn", [b"", b"only half", b"\x00" * 70_000])
def test_a_file_without_a_whole_line_is_empty(tmp_path, torn):
    (tmp_path / "log.jsonl").write_bytes(torn)
    assert read_whole_lines(tmp_path / "log.jsonl") == []
    with AppendLog(tmp_path / "log.jsonl") as log:
        assert list(log) == []
        assert log.append({"n": 1}) == 0


def test_a_damaged_line_in_the_middle_is_named_and_loses_nothing(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"n": 1}\n{"n": \n{"n": 3}\n')
    with pytest.raises(RowError, match=r"log\.jsonl:2: not valid JSON"):
        read_whole_lines(path)
    with AppendLog(path) as log, pytest.raises(RowError, match=r"log\.jsonl:2: not valid JSON"):
        list(log)
    assert path.read_text() == '{"n": 1}\n{"n": \n{"n": 3}\n'
    path.write_text("[1]\n")
    with pytest.raises(RowError, match="expected a JSON object, found list"):
        read_whole_lines(path)


def test_a_second_run_is_refused_until_the_first_ends(tmp_path):
    path = tmp_path / "sub" / "log.jsonl"
    with AppendLog(path) as log:
        log.append({"n": 1})
        with pytest.raises(BadInputError, match=r"another run is writing .*out.*wait for it"):
            AppendLog(path, output="out")
        assert [row for _, row in log] == [{"n": 1}]
    AppendLog(path).close()


def test_a_file_that_is_not_there_is_bad_input(tmp_path):
    for read in (read_whole_lines, lambda path: list(iter_jsonl(path))):
        with pytest.raises(BadInputError, match=r"cannot read .*none\.jsonl: No such file"):
            read(tmp_path / "none.jsonl")


def test_a_failed_block_leaves_the_former_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl([{"n": 1}], path)

    def breaks():
        yield {"n": 2}
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_jsonl(breaks(), path)
    assert json.loads(path.read_text()) == {"n": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


def test_the_lock_of_a_killed_process_is_gone(tmp_path):
    path = tmp_path / "log.jsonl"
    process = get_context("fork").Process(target=_hold_and_die, args=(path,))
    process.start()
    process.join(20)
    with AppendLog(path) as log:
        assert [row for _, row in log] == [{"n": 1}]


def _hold_and_die(path):
    import os
    import signal

    AppendLog(path).append({"n": 1})
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"question": "a", "question": "b"}', "x:1: key 'question' stands there twice; keep one of them"),
        ('{"a": {"b": 1, "b": 1}}', "key 'b' stands there twice"),
        ('{"a": ' + "[" * 1_000_000, "not valid JSON .nested too deep."),
        ('{"a": ' + '{"a": ' * 1_000_000, "not valid JSON .nested too deep."),
        ('{"a": ' + "9" * 5000 + "}", "a number of over 4,300 digits"),
    ],
)
def test_a_row_that_cannot_be_meant_gives_one_short_sentence(line, words):
    for read, text in ((parse_object, line), (parse_line, line.encode())):
        with pytest.raises(RowError, match=words) as refused:
            read(text, "x:1")
        assert len(str(refused.value)) < 200
