"""The journal of replies by itself: what it holds, what a finished file brings along, when it goes.

pytest tests/test_journal.py
"""

import json
from pathlib import Path

import pytest

from internvl_mpo.engines import Reply
from internvl_mpo.engines.journal import Journal, collect_replies, report_missing, sample_seed
from internvl_mpo.errors import BadInputError


def reply(id: str, text: str = "yes", **changes) -> Reply:
    return Reply(**{"id": id, "text": text, "finish_reason": "stop", "num_tokens": 1, **changes})


def reply_of(row) -> Reply:
    return reply(row["id"], row["response"])


def rows(*ids: str) -> list[dict]:
    return [{"id": id, "response": f"to {id}"} for id in ids]


def test_replies_are_read_back_whole_in_any_order_and_by_the_next_run(tmp_path):
    replies = [reply("a", "eins\n\u2028 好"), reply("b", finish_reason="length", num_tokens=7)]
    with Journal(tmp_path / "out.jsonl") as journal:
        for one in replies:
            journal.append(one)
    with Journal(tmp_path / "out.jsonl") as journal:
        assert [journal[one.id] for one in reversed(replies)] == replies[::-1]
        assert len(journal) == 2
        assert "a" in journal and "c" not in journal
    with pytest.raises(ValueError, match="closed"):
        journal["a"]


def test_a_finished_file_is_extended_and_what_the_journal_holds_counts_more(tmp_path):
    output = tmp_path / "out.jsonl"
    with Journal(output, reply_of) as journal:
        journal.append(reply("a", "to a"))
        assert journal.finish(rows("a")) == 1
        assert not journal.path.exists()
    with Journal(output, reply_of) as journal:
        assert journal["a"] == reply("a", "to a")
        assert len(journal.path.read_text().splitlines()) == 1
    with Journal(output, reply_of) as journal:  # now both hold it
        assert len(journal) == len(journal.path.read_text().splitlines()) == 1


def test_a_journal_stays_as_long_as_the_rows_do_not_hold_all_its_replies(tmp_path):
    for reading, kept in ((reply_of, False), (None, True)):  # without `reply_of` rows do not hold their replies
        output = tmp_path / f"{kept}.jsonl"
        with Journal(output, reading) as journal:
            journal.append(reply("a"))
            journal.append(reply("b"))
            assert journal.finish(rows("a")) == 1
            assert journal.path.exists()
        with Journal(output, reading) as journal:
            assert journal.finish(rows("a", "b")) == 2
            assert journal.path.exists() == kept
        assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == ["a", "b"]


def test_a_second_run_is_kept_away_until_the_first_has_finished(tmp_path):
    for reading in (reply_of, None):
        first = Journal(tmp_path / "out.jsonl", reading)
        assert first.path == tmp_path / "out.jsonl.part"
        with pytest.raises(BadInputError, match=r"another run is writing .*out\.jsonl;"):
            Journal(tmp_path / "out.jsonl")
        first.finish([])
        Journal(tmp_path / "out.jsonl").__exit__()


@pytest.mark.parametrize("row", [{"id": "a"}, {"id": ["a"], "response": None}])
def test_rows_of_another_program_are_refused_by_line(tmp_path, row):
    (tmp_path / "out.jsonl").write_text(json.dumps(rows("x")[0]) + "\n" + json.dumps(row) + "\n")

    def read(row):
        hash(row["id"])
        return reply_of(row)

    with pytest.raises(BadInputError, match=r"out\.jsonl:2 was not written by this program; give another --output"):
        Journal(tmp_path / "out.jsonl", read)


def test_replies_to_other_questions_are_counted_and_refused(tmp_path):
    with Journal(tmp_path / "out.jsonl") as journal:
        for id in "abc":
            journal.append(reply(id))
        journal.check(["a", "b", "c", "d"])
        with pytest.raises(BadInputError, match="holds 2 replies to other questions or settings"):
            journal.check(["a", "d", "e", "f"])


def test_what_did_not_come_is_no_reply_and_says_why(tmp_path):
    class Engine:
        name = "some"

        def generate(self, requests, done):
            assert "a" in done and "b" not in done
            yield reply("b", error="no server")
            yield reply("c")

    with Journal(tmp_path / "out.jsonl") as journal:
        journal.append(reply("a"))
        assert collect_replies(Engine(), [], 3, journal) == {"b": "no server"}
        assert ["a" in journal, "b" in journal, "c" in journal] == [True, False, True]


def test_missing_replies_are_listed_in_a_file_that_goes_when_they_came(tmp_path, capsys):
    output = str(tmp_path / "out.jsonl")
    listed = Path(f"{output}.missing.jsonl")
    assert report_missing({}, output) == 0
    assert report_missing({"b": "no server", "c": "late"}, output) == 1
    assert [json.loads(line) for line in listed.read_text().splitlines()] == [
        {"id": "b", "reason": "no server"}, {"id": "c", "reason": "late"}
    ]  # fmt: skip
    assert "2 replies are missing" in capsys.readouterr().err
    assert report_missing({}, output) == 0
    assert not listed.exists()


def test_seeds_stay_the_same_between_versions_and_servers_take_them():
    """Another seed would draw other answers to a run that goes on."""
    assert sample_seed(0, "9c0e5a1b2c3d4e5f", 0) == 103018916
    seeds = {sample_seed(seed, id, number) for seed in range(4) for id in "ab" for number in range(100)}
    assert len(seeds) == 800
    assert 2**30 < max(seeds) < 2**31
