"""Pairs by correctness and by Dropout-NTP, without a model."""

import json
import random
from dataclasses import replace
from itertools import groupby

import pytest

from internvl_mpo import pairing
from internvl_mpo.mmpr.release import subset_name, write_meta
from internvl_mpo.pairing import PairingStatistics, PairRules, correctness_pairs, group_key, match_responses, pair_lines
from internvl_mpo.records import Response
from internvl_mpo.text_checks import cut_prefix, entails, is_repetitive, without_images

WAYS = ("I count them one by one.", "First the left ones, then the right ones.", "There are some here and there.")


def response(answer: str | None, *, gold: str = "12", way: str = WAYS[0], seed: int = 0, **provenance) -> Response:
    text = f"{way} That makes it so.\n" + (f"Final answer: {answer}" if answer is not None else "I do not know.")
    return Response(
        question_id="q",
        images=("a.png",),
        question="How many?",
        answer=gold,
        source="geo170k",
        response=text,
        provenance={"style": "cot", "seed": seed, **provenance},
    )


def build(responses: list[Response], **rules) -> list:
    return correctness_pairs(responses, PairRules(**rules), PairingStatistics())[0]


def test_right_is_chosen_over_wrong_and_over_unparsable():
    pairs = build([response("12"), response("13", way=WAYS[1]), response(None, way=WAYS[2])])
    assert [(pair.rule, "12" in pair.chosen) for pair in pairs] == [("correctness", True), ("format", True)]
    assert "Final answer: 13" in pairs[0].rejected
    assert "I do not know" in pairs[1].rejected


def test_table_tells_how_much_longer_the_chosen_are():
    stats = PairingStatistics()
    right, wrong = response("12", way=" ".join(map(str, range(80)))), response("13")
    correctness_pairs([right, wrong], PairRules(), stats)
    assert f"{len(right.response) / len(wrong.response):.2f}" in stats.table().splitlines()[1].split()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"images": ()},
        {"images": ("a.png", '\u56fe "2".png')},
        {"source": "", "question": 'Wie "viele"?\n\u2028'},
        {"system": "Z\u00e4hle.", "history": (("How many trees?", 'three "firs"'),)},
        {"provenance": {"style": "cot", "seed": "s", "temperature": 0.7, "top_k": None, "top_p": True, "other": 1}},
    ],
)
def test_lines_of_pairs_are_those_of_the_rows(changes):
    rows = [response(str(12 + i % 3), way=f"{WAYS[i % 3]} \u00fc\\ {i}\ud800", seed=i) for i in range(9)]
    rows += [response(None, way=WAYS[2], model="m", revision="\u00e9")]
    rows = [replace(row, **({**changes, "id": ""} if changes else {})) for row in rows]
    matches, _ = match_responses(rows, PairRules(), PairingStatistics())
    pairs = build(rows)
    assert {pair.rule for pair in pairs} == {"correctness", "format"}
    runs = groupby(pairs, key=lambda pair: (pair.source, pair.rule))
    assert list(pair_lines(matches)) == [(*key, "".join(pair.to_line() for pair in run)) for key, run in runs]


def test_order_of_responses_decides_nothing():
    responses = [
        response(str(9 + i % 6), way=f"{WAYS[i % 3]} Then {i} more things are seen.", seed=i) for i in range(24)
    ]
    expected = build(responses, pairs_per_question=5)
    assert len(expected) == 5
    for order in range(5):
        random.Random(order).shuffle(responses)
        assert build(responses, pairs_per_question=5) == expected
    assert build(responses, pairs_per_question=5, seed=1) != expected


def test_w4_entailment_works_on_words():
    assert not entails("12", "1")
    assert not entails("none", "no")
    assert entails("12 or 13", "12")
    assert entails("No, there is none", "no")
    assert len(build([response("12"), response("121", way=WAYS[1])])) == 1
    assert build([response("12"), response("12 or 13", way=WAYS[1])]) == []


@pytest.mark.parametrize("gold", ["No", "N", "O", "one", "on"])
def test_w4_short_answers_keep_their_format_pairs(gold):
    pairs = build([response(gold, gold=gold), response(None, gold=gold, way=WAYS[1])])
    assert [pair.rule for pair in pairs] == ["format"]


def test_every_response_is_used_before_one_is_used_twice():
    responses = [response("12", way=f"{way} Way {i}.") for i, way in enumerate(WAYS)]
    responses += [response(str(20 + i), way=f"{way} Slip {i}.") for i, way in enumerate(WAYS)]
    pairs = build(responses, pairs_per_question=3, max_similarity=1.0)
    assert len({pair.chosen for pair in pairs}) == 3
    assert len({pair.rejected for pair in pairs}) == 3


def test_different_wrong_answers_come_first():
    responses = [response("12")] + [response("13", way=f"{WAYS[0]} Slip {i}.") for i in range(6)] + [response("14")]
    pairs = build(responses, pairs_per_question=2, max_similarity=1.0)
    assert {pair.provenance["rejected_response"]["answer"] for pair in pairs} == {"13", "14"}


def test_copies_and_near_copies_count_once():
    long = " ".join(f"word{i}" for i in range(60))
    responses = [response("12", way=long), response("12", way=long, seed=1), response("12", way=long + " end")]
    assert len(build([*responses, response("13")])) == 1


def test_wrong_texts_with_different_answers_are_no_copies_of_one_another():
    long = " ".join(f"word{i}" for i in range(60))
    wrong = [response(answer, way=long) for answer in ("13", "14", "15")]
    assert len(build([response("12"), *wrong])) == 3
    again = [response("13", way=long + " end")]
    assert len(build([response("12"), *wrong, *again])) == 3


def test_truncated_repetitive_and_foreign_texts_are_not_chosen():
    assert is_repetitive("the same thing again " * 30)
    assert not is_repetitive(" ".join(f"word{i}" for i in range(60)))
    for bad in (
        response("12", finish_reason="length"),
        response("12", way="the same thing again " * 30),
        response("12", way="我数了一下图中的物体，左边有五个，右边有七个，所以一共是十二个。"),
    ):
        assert build([bad, response("13", way=WAYS[1])]) == []
        pairs = build([bad, response("12"), response("13", way=WAYS[1])])
        assert [pair.chosen for pair in pairs] == [response("12").response]
    assert len(build([response("12", finish_reason="length"), response("13", way=WAYS[1])], keep_truncated=True)) == 1


def test_pass_rate_band_and_length_ratio():
    responses = [response("12"), response("13", way=WAYS[1]), response("14", way=WAYS[2]), response("15", way="Hm.")]
    assert build(responses, min_pass_rate=0.3) == []
    assert len(build(responses, min_pass_rate=0.2, max_pass_rate=0.3)) == 3
    short = build([response("12", way=WAYS[0] * 9), response("13")], max_length_ratio=2.0)
    assert short == []


def test_lengths_are_balanced_where_there_is_a_choice():
    ways = ["Seen. " + "It goes on for long. " * repeats for repeats in (1, 4, 7)]
    responses = [response(answer, way=way) for way in ways for answer in ("12", "13")]
    for seed in range(5):
        (pair,) = build(responses, pairs_per_question=1, max_similarity=1.0, seed=seed)
        assert len(pair.chosen) == len(pair.rejected)


def test_a_longer_chosen_is_followed_by_a_longer_rejected():
    def way(number: int, num_words: int) -> str:
        return " ".join(f"{number}word{i}" for i in range(num_words))

    right = response("12", way=way(0, 40))
    wrong = [response(str(13 + i), way=way(1 + i, 10 if i % 2 else 160)) for i in range(6)]
    for seed in range(5):
        pairs = build([right, *wrong], pairs_per_question=6, seed=seed)
        is_longer = [len(pair.chosen) > len(pair.rejected) for pair in pairs]
        assert [is_longer[i] != is_longer[i + 1] for i in (0, 2, 4)] == [True] * 3


@pytest.mark.parametrize("long_side", ["chosen", "rejected"])
def test_the_length_limit_holds_whichever_side_is_long(long_side):
    long, short = ("12", "13") if long_side == "chosen" else ("13", "12")
    pair = [response(long, way=" ".join(f"word{i}" for i in range(60))), response(short)]
    ratio = len(pair[0].response) / len(pair[1].response)
    assert build(pair, max_length_ratio=ratio * 0.999) == []
    assert len(build(pair, max_length_ratio=ratio * 1.001)) == 1
    assert len(build(pair)) == 1  # 0 is off


def test_question_without_right_answer_is_handed_on_as_it_was():
    stats = PairingStatistics()
    asked = response("13", original_question="How many?\nAnswer the question using a single word or phrase.")
    pairs, question = correctness_pairs([asked], PairRules(), stats)
    assert pairs == []
    assert (question.id, question.answer, question.images) == ("q", "12", ("a.png",))
    assert question.question.endswith("single word or phrase.")
    assert "geo170k" in stats.table()


def test_pairs_say_where_they_come_from():
    (pair,) = build([response("12", model="m", temperature=0.7), response("13", way=WAYS[1])])
    assert pair.provenance["model"] == "m"
    assert pair.provenance["temperature"] == 0.7
    assert pair.provenance["pass_rate"] == 0.5
    assert pair.provenance["rejected_response"]["answer"] == "13"


def test_group_key_depends_on_pictures_prompt_and_truth():
    row = response("12")
    keys = {group_key(row)}
    for change in ({"images": ("b.png",)}, {"question": "Why?"}, {"answer": "13"}):
        keys.add(group_key(replace(row, **change)))
    assert len(keys) == 4
    assert group_key(replace(row, response="other")) in keys


# Dropout-NTP


def test_prefix_is_cut_between_words_without_the_space():
    assert cut_prefix("The cat sat on the mat", 0.5) == "The cat sat"
    assert cut_prefix("One\ntwo  three\tfour", 0.5) == "One\ntwo"
    assert cut_prefix("a b c", 0.34) == "a"
    assert cut_prefix("word", 0.5) == ""
    assert cut_prefix("The cat sat", 0.0) == ""
    assert cut_prefix("The cat sat", 0.99) == "The cat"


def test_w11_chinese_is_cut_by_characters():
    assert cut_prefix("图中有一只白色的猫", 0.5) == "图中有一"
    assert cut_prefix("图中有3只cat。", 0.5) == "图中有"


def test_image_placeholders_leave_no_trace():
    assert without_images("<image>\nWhat is it?") == "What is it?"
    assert without_images("Image-1: <image>\nImage-2: <image>\nSame?") == "Same?"
    assert without_images("What is <image> doing?") == "What is doing?"


# MMPR layout


def test_subset_names_follow_the_suffix_grammar():
    assert subset_name("m3cot_train", "correctness") == "m3cot_train_pairs_vqa_correctness_rules"
    assert subset_name("m3cot_train", "format") == "m3cot_train_pairs_vqa_format_rules"
    assert subset_name("gqa", "dropout_ntp", ratio=0.5) == "gqa_prefix_pair_sr0.5_wo_image"
    assert subset_name("gqa", "prefix_with_image", ratio=0.0, with_image=True) == "gqa_prefix_pair_sr0.0_with_image"
    assert subset_name("../evil name", "correctness") == "_.._evil_name_pairs_vqa_correctness_rules".replace(
        "_..", "..", 1
    )


def test_meta_is_relative_and_counts(tmp_path):
    (tmp_path / "release" / "annotations").mkdir(parents=True)
    (tmp_path / "release" / "images").mkdir()
    annotation = tmp_path / "release" / "annotations" / "a.jsonl"
    annotation.write_text("{}\n{}\n")
    meta = tmp_path / "release" / "meta.json"
    write_meta(meta, {"a_pairs_vqa_correctness_rules": {"root": tmp_path / "release/images", "annotation": annotation}})
    assert json.loads(meta.read_text()) == {
        "a_pairs_vqa_correctness_rules": {
            "root": "images",
            "annotation": "annotations/a.jsonl",
            "data_augment": False,
            "length": 2,
            "repeat_time": 1,
        }
    }


def test_equal_texts_and_equal_answers_are_judged_once(monkeypatch):
    read, compared = [], []
    parse, compare = pairing.parse_answer, pairing.compare_answers
    monkeypatch.setattr(pairing, "parse_answer", lambda text, form: read.append(text) or parse(text, form))
    monkeypatch.setattr(
        pairing, "compare_answers", lambda given, *rest, **more: compared.append(given) or compare(given, *rest, **more)
    )
    rows = [response("12"), response("13"), response("12", way=WAYS[1]), response("12"), response(None), response("13")]
    judged = pairing.judge_responses(rows, PairRules())
    assert [one.response for one in judged] == rows
    outcomes = [one.outcome.name for one in judged]
    assert outcomes == ["RIGHT", "WRONG", "RIGHT", "RIGHT", "UNPARSABLE", "WRONG"]
    assert (len(read), compared) == (4, ["12", "13"])


def test_why_a_pair_is_unfit_is_counted_under_its_name():
    rules = PairRules(max_length_ratio=2.0)
    right, same, longer = (
        pairing.judge_responses([row], PairRules())[0]
        for row in (response("12"), response("12"), response("13", way=WAYS[0] * 9))
    )
    assert pairing._unfit_pair(right, same, rules) == "pairs of equal texts"
    assert pairing._unfit_pair(right, longer, rules) == "pairs of too different lengths"
    assert pairing._unfit_pair(right, longer, replace(rules, max_length_ratio=0)) is None
    (inside,) = pairing.judge_responses([response("12 or 13", way=WAYS[1])], PairRules())
    assert pairing._unfit_pair(right, inside, rules) == "pairs whose wrong answer contains the right one"


def test_meta_json_counts_rows_that_are_none_blank_and_keeps_what_it_is_given(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n\n {}\n \n")
    files = {"root": tmp_path / "images", "annotation": tmp_path / "a.jsonl"}
    write_meta(tmp_path / "meta.json", {"ü": files, "b": {**files, "length": 9, "repeat_time": 0.5}})
    (tmp_path / "link").mkdir()
    (tmp_path / "link/here").symlink_to(tmp_path)
    write_meta(tmp_path / "link/here/again.json", {"ü": files, "b": {**files, "length": 9, "repeat_time": 0.5}})
    text = (tmp_path / "meta.json").read_text(encoding="utf-8")
    assert (tmp_path / "again.json").read_text(encoding="utf-8") == text
    assert text.startswith('{\n  "ü": {\n    "root": "images",\n    "annotation": "a.jsonl",\n') and text[-2:] == "}\n"
    first, second = json.loads(text).values()
    assert first == {"root": "images", "annotation": "a.jsonl", "data_augment": False, "length": 2, "repeat_time": 1}
    assert second == {**first, "length": 9, "repeat_time": 0.5}


def test_pairs_are_made_by_the_published_rules_unless_others_are_given():
    defaults = {"pairs_per_question": 15, "format_pairs_per_question": 15, "seed": 0, "min_pass_rate": 0.0,
                "max_pass_rate": 1.0, "max_length_ratio": 0.0, "max_similarity": 0.9, "answer_format": "",
                "keep_truncated": False}  # fmt: skip
    assert vars(PairRules()) == defaults
    ways = [" ".join(f"{letter}{number}" for number in range(40)) for letter in "abcdefghijklmnopqrstu"]
    rows = [response("12", way=way) for way in ways[:4]]
    rows += [response(str(20 + number), way=way) for number, way in enumerate(ways[4:12])]
    rows += [response(None, way=way) for way in ways[12:20]]
    rules = [pair.rule for pair in build(rows)]
    assert (rules.count("correctness"), rules.count("format")) == (15, 15)


def test_a_response_without_an_answer_says_so_and_why():
    (judged,) = pairing.judge_responses([response(None)], PairRules())
    assert (judged.verdict.rule, judged.answer, bool(judged.verdict.reason)) == ("parse", None, True)
    pairs = build([response("12"), response(None, way=WAYS[1])])
    assert pairs[0].provenance["rejected_response"]["rule"] == "parse"


def test_draws_and_groups_depend_on_every_letter():
    rows = [response("12", way=way) for way in ("ü", "ä", "u", "\ud800")]
    assert len(set(pairing._draws(pairing.judge_responses(rows, PairRules()), 0))) == 4
    assert len({group_key(replace(row, question=row.response)) for row in rows}) == 4


def test_the_next_eight_pairs_are_looked_at_for_one_that_balances():
    class Text:
        def __init__(self, log_length):
            self.log_length = log_length

    long, short = Text(2.0), Text(0.0)
    candidates = [(long, short)] * 7 + [(short, short)] + [(long, short)] * 9
    looked = []
    taken, balance = pairing.choose_balanced(iter(candidates), 1, lambda *pair: looked.append(pair) or True)
    assert (taken, balance, len(looked)) == ([(short, short)], 0, 8)


def test_no_pairs_come_of_one_side_alone():
    assert list(pairing._diagonal([], [1, 2])) == list(pairing._diagonal([1], [])) == list(pairing._diagonal([], []))
    assert list(pairing._diagonal([1, 2], [3, 4])) == [(1, 3), (2, 4), (1, 4), (2, 3)]


def test_a_response_to_a_question_without_a_truth_is_not_right():
    (judged,) = pairing.judge_responses([replace(response("12"), answer=None)], PairRules())
    assert judged.outcome is pairing.Outcome.WRONG
