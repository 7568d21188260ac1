"""Rows on disk."""

import hashlib
import json

import pytest

from internvl_mpo.errors import BadInputError
from internvl_mpo.files import atomic_writer
from internvl_mpo.records import (
    PairLines,
    PreferencePair,
    Question,
    Response,
    RowError,
    content_id,
    json_quoted,
    read_rows,
    to_json_text,
    write_rows,
)


def test_rows_survive_the_file(tmp_path):
    rows = [
        Question(images=("a.png",), question="How many?", answer="3", source="s"),
        Response(
            question_id="q", images=("a.png", "b.png"), question="How many?", response="3", provenance={"seed": 1}
        ),
        PreferencePair(question="Text only?", chosen="yes", rejected="no", rule="correctness", provenance={"k": [1]}),
    ]
    assert Response(question_id="q", images=["a.png"], question="x", response="y").images == ("a.png",)
    with pytest.raises(RowError, match="the question is empty"):
        Response(question_id="q", question=" ", response="y")
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
    assert [row.source for row in read_rows(path, PreferencePair, source="MMPR")] == ["MMPR"]


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
    parts = [("a", odd), odd, None, 3, {"b": 1, "a": [odd]}, [odd], (), [odd, None], (None, 3, True), [[odd], "b"]]
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    assert content_id(*parts) == hashlib.sha256(text.encode()).hexdigest()[:16]


def test_ids_hold_all_that_makes_a_row_another_one():
    """Rows are known by their ids: two that differ in what a model sees or what is right may not share one."""
    asked = {"images": ("a.png",), "question": "q", "answer": "1", "system": "s", "history": (("h", "i"),)}
    others = {"images": ("b.png",), "question": "r", "answer": "2", "system": "t", "history": (("h", "j"),)}
    kinds = (
        (Question, {}, {}),
        (Response, {"question_id": "1", "response": "c"}, {"question_id": "2", "response": "d"}),
        (PreferencePair, {"chosen": "c", "rejected": "d"}, {"chosen": "e", "rejected": "f"}),
    )
    for kind, own, other in kinds:
        first = kind(**asked, **own)
        # images and answer of a response are those of its question, whose id it holds
        keys = {**others, **other}.keys() - ({"images", "answer"} if kind is Response else set())
        changed = [kind(**{**asked, **own, key: {**others, **other}[key]}) for key in sorted(keys)]
        assert len({row.id for row in (first, *changed)}) == 1 + len(keys), kind
        assert kind(**asked, **own, source="elsewhere").id == first.id
    keys = [PreferencePair(**{**asked, "chosen": "c", "rejected": "d", key: others[key]}).group_key for key in asked]
    assert len(set(keys)) == len(asked)  # the answer alone is no other prompt
    assert keys[2] == PreferencePair(**asked, chosen="e", rejected="f", rule="format").group_key


def test_every_rule_of_a_pair_is_known():
    for rule in ("correctness", "format", "direct", "dropout_ntp", "prefix_with_image", "vote", "judged", "other"):
        assert PreferencePair(question="q", chosen="c", rejected="r", rule=rule).rule == rule


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"id": 7}, {"id": "7"}),
        ({"source": ""}, {"source": "the file"}),
        ({"source": "row"}, {"source": "row"}),
        ({"answer_gt": ""}, {"answer": ""}),
        ({"answer": " "}, {"answer": " "}),
        ({"answer_gt": None}, {"answer": None}),
        ({"answer_gt": [], "answer": None}, {"answer": None}),
        ({"answer_gt": "7", "answer": "7"}, {"answer": "7"}),
        ({"answer": 0.5}, {"answer": "0.5"}),
        ({"provenance": None, "note": 1}, {"provenance": {"note": 1}}),
        ({"provenance": {"note": 1, "seed": 2}, "note": 3}, {"provenance": {"note": 3, "seed": 2}}),
        ({"rule": None}, {"rule": "other"}),
        ({"rule": "vote"}, {"rule": "vote"}),
        ({"system": " "}, {"system": None}),
        ({"history": None}, {"history": ()}),
        ({"history": (("h", "i"),)}, {"history": (("h", "i"),)}),
        ({"image": ["a.png"]}, {"images": ("a.png",)}),
    ],
)
def test_what_a_key_of_a_row_says(row, expected):
    pair = PreferencePair.from_json({"question": "q", "chosen": "c", "rejected": "r", **row}, source="the file")
    assert {name: getattr(pair, name) for name in expected} == expected
    assert PreferencePair.from_json(pair.to_json(), source="the file") == pair


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"image": ["a.png", ""]}, "key 'image' must be text or a list of texts"),
        ({"image": ["a.png", 7]}, "key 'image' must be text or a list of texts"),
        ({"provenance": "seed 1"}, "key 'provenance' must be an object"),
        ({"rule": 7}, "key 'rule' must be text, found int"),
        ({"system": 7}, "key 'system' must be text, found int"),
        ({"chosen": " \n"}, "'chosen' is empty"),
        ({"rejected": ""}, "'rejected' is empty"),
        ({"question": "\u3000"}, "the question is empty"),
        ({"history": [["<video>", "a"]]}, "a place for <video>"),
    ],
)
def test_a_key_that_cannot_be_meant_is_refused(row, words):
    with pytest.raises(RowError, match=words):
        PreferencePair.from_json({"question": "q", "chosen": "c", "rejected": "r", **row}, where="here")


def test_pictures_given_as_a_list_are_the_same_row():
    one, other = (Question(images=images, question="q") for images in (["a.png"], ("a.png",)))
    assert one == other
    assert one.images == ("a.png",)


@pytest.mark.parametrize("changes", [
    {}, {"images": ("a.png",)}, {"images": ("a.png", "b.png")}, {"answer": "好"}, {"system": "Count \ud83d."},
    {"history": (("h", "i"), ("j", "k"))}, {"answer": "1", "system": "s", "history": (("h", "i"),)},
])  # fmt: skip
@pytest.mark.parametrize("source", ["", "s"])
def test_lines_of_pairs_made_from_pieces_are_those_of_whole_pairs(changes, source):
    asked = Question(**{"question": 'How "many"?\u2028', **changes})
    lines = PairLines(asked)
    for rule, chosen in (("correctness", "3 é"), ("format", "4"), ("correctness", "5")):
        pair = PreferencePair(
            question=asked.question,
            chosen=chosen,
            rejected='"no"',
            source=source,
            rule=rule,
            provenance={"n": 1},
            **changes,
        )
        made = lines.line(json_quoted(chosen), json_quoted('"no"'), source, rule, json.dumps({"n": 1}))
        assert made == pair.to_line()
        assert to_json_text(pair.provenance) == json.dumps(pair.provenance)
    for value in (None, True, 7, "é", 0.5, (), ("é", "b"), ["é"], ["b", None], (("é", "b"),)):
        assert to_json_text(value) == json.dumps(value, ensure_ascii=False)
