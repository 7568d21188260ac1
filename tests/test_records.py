"""Rows on disk."""

import hashlib
import json

import pytest

from internvl_mpo.errors import BadInputError
from internvl_mpo.files import atomic_writer
from internvl_mpo.records import PreferencePair, Question, Response, RowError, content_id, read_rows, write_rows


def test_rows_survive_the_file(tmp_path):
    rows = [
        Question(images=("a.png",), question="How many?", answer="3", source="s"),
        Response(
            question_id="q", images=("a.png", "b.png"), question="How many?", response="3", provenance={"seed": 1}
        ),
        PreferencePair(question="Text only?", chosen="yes", rejected="no", rule="correctness", provenance={"k": [1]}),
    ]
    for row in rows:
        path = tmp_path / "rows.jsonl"
        write_rows([row], path)
        assert read_rows(path, type(row)) == [row]


def test_a_pair_made_of_a_response_keeps_the_whole_prompt():
    """Without its earlier turns or system message a pair would train answers to a question nobody asked."""
    asked = Response(
        question_id="q", images=("a.png", "b.png"), question="And now?", response="3", answer="3", source="s",
        system="Count.", history=(("How many?", "2"),), provenance={"seed": 1},
    )  # fmt: skip
    pair = asked.chosen_over("4", "correctness", {"made": "here"})
    expected = PreferencePair.from_json(
        {"images": ["a.png", "b.png"], "question": "And now?", "chosen": "3", "rejected": "4", "answer": "3",
         "source": "s", "system": "Count.", "history": [["How many?", "2"]], "rule": "correctness",
         "provenance": {"made": "here"}}
    )  # fmt: skip
    assert pair == expected
    assert pair.group_key == content_id(asked.images, asked.question, *asked.context)


def test_official_annotation_is_read_as_it_is(tmp_path):
    path = tmp_path / "mmpr.jsonl"
    line = {
        "image": ["a.png", "b.png"],
        "question": "q",
        "chosen": "c",
        "rejected": "r",
        "answer_gt": "12",
        "chosen_meta": 7,
    }
    path.write_text(json.dumps(line) + "\n\n")
    (row,) = read_rows(path, PreferencePair)
    assert (row.images, row.answer, row.rule, row.provenance) == (("a.png", "b.png"), "12", "other", {"chosen_meta": 7})


def test_equal_content_has_equal_id_and_other_content_another():
    first = Question(images=("a.png",), question="q", answer="1")
    assert first.id == Question(images=("a.png",), question="q", answer="1", source="elsewhere").id
    assert first.id != Question(images=("b.png",), question="q", answer="1").id


def test_samples_with_equal_text_and_other_seed_are_different_rows():
    one = Response(question_id="q", question="x", response="same", provenance={"seed": 1})
    assert one.id != Response(question_id="q", question="x", response="same", provenance={"seed": 2}).id


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q", "chosen": "c"}', "key 'rejected' is missing"),
        ('{"question": "q", "chosen": "c", "rejected": 5}', "key 'rejected' must be text, found int"),
        ('{"question": "q", "chosen": "c", "rejected": "c"}', "'chosen' equals 'rejected'"),
        ('{"question": " ", "chosen": "c", "rejected": "r"}', "the question is empty"),
        ('{"question": "q", "chosen": "c", "rejected": "r", "image": {"a": 1}}', "key 'image' must be text"),
        ('{"question": "q", "chosen": "c", "rejected": "r", "image": "[open(1)]", "rule": "luck"}', "'rule' is 'luck'"),
        ("[1]", "expected a JSON object, found list"),
        ('{"question": "q"', "not valid JSON (Expecting ',' delimiter at column 17)"),
    ],
)
def test_bad_row_is_refused_with_file_and_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "chosen": "c", "rejected": "r"}\n' + line + "\n")
    with pytest.raises(RowError) as caught:
        read_rows(path, PreferencePair)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


def test_white_space_around_a_line_and_a_line_without_its_end_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = '{"question": "q", "chosen": "c", "rejected": "r"}'
    path.write_bytes(f" {row} \r\n\n  \n\t{row}\n{row}".encode())
    assert len(read_rows(path, PreferencePair)) == 3
    path.write_text(row + row + "\n")
    with pytest.raises(RowError, match=r"1: not valid JSON \(Extra data"):
        read_rows(path, PreferencePair)


def test_missing_file_is_bad_input(tmp_path):
    with pytest.raises(BadInputError, match="cannot read"):
        read_rows(tmp_path / "none.jsonl", Question)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_writer(path) as out:
        out.write("new")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_quick_line_and_id_are_those_of_the_plain_encoder():
    odd = '"\\ \n\t\x00 \x7f \u2028 é 好 \U0001f600'
    pair = PreferencePair(
        images=("a.png", odd),
        question=odd,
        chosen="a",
        rejected=odd + "b",
        answer="1",
        source="s",
        rule="correctness",
        provenance={"seed": 1, "odd": odd, "nested": {"list": [1, None, 0.5, True]}},
    )
    assert pair.to_line() == json.dumps(pair.to_json(), ensure_ascii=False) + "\n"
    parts = [("a", odd), odd, None, 3, {"b": 1, "a": [odd]}, [odd], ()]
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    assert content_id(*parts) == hashlib.sha256(text.encode()).hexdigest()[:16]
