"""Each choice of pairing on its own: what is left out and why, caps, bands, balance, and what a pair remembers."""

import math
from dataclasses import dataclass, replace

import pytest
from test_pairing import WAYS, build, response

from internvl_mpo.pairing import (
    PairingStatistics,
    PairRules,
    _diagonal,
    choose_balanced,
    correctness_pairs,
    group_key,
    judge_responses,
)


def many_words(number: int, count: int = 60) -> str:
    return " ".join(f"{number}word{i}" for i in range(count))


def test_every_response_that_is_left_out_is_counted_with_its_reason():
    long = many_words(0)
    responses = [
        *(response("12", way=long), response("12", way=long, seed=1), response("12", way=long + " end")),
        *(response("12", way=many_words(1), finish_reason="length"), response("12", way="the same thing " * 40)),
        response("12", way="我数了一下图中的物体，左边有五个，右边有七个，所以一共是十二个。"),
        *(response("13", way=many_words(2)), response("13", way=many_words(2), seed=1), response("12 or 13")),
        response(None, way=many_words(3)),
    ]
    stats = PairingStatistics()
    pairs, question = correctness_pairs(responses, PairRules(), stats)
    counts = dict(stats.counts["geo170k"])
    ratio = counts.pop("log length ratio")
    # which of the three long ones is met first is drawn
    assert sorted([counts.pop("drop copies"), counts.pop("drop near copies")]) == [1, 2]
    assert counts == {
        **{"right": 6, "wrong": 3, "unparsable": 1, "undecided": 0, "questions": 1, "responses": 10},
        **{"drop chosen cut at the token limit": 1},
        **{"drop chosen that repeat themselves": 1, "drop chosen in another language than the question": 1},
        **{"drop pairs whose wrong answer contains the right one": 1, "correctness": 1, "format": 1},
    }
    assert question is None and [pair.rule for pair in pairs] == ["correctness", "format"]
    assert ratio == pytest.approx(sum(math.log(len(pair.chosen) / len(pair.rejected)) for pair in pairs))
    other = PairingStatistics()
    other.merge(stats)
    other.merge(stats)
    other.add("another", "questions")
    head, first, second, total, left = other.table().splitlines()
    columns = "source questions responses right wrong unparsable all wrong correctness format length c/r pass rate"
    assert head.split() == columns.split()
    assert first.split() == ["another", "1", *["0"] * 7, "nan", "nan"]
    assert second.split() == ["geo170k", "2", "20", "12", "6", "2", "0", "2", "2", f"{math.exp(ratio / 2):.2f}", "0.60"]
    assert total.split()[:3] == ["total", "3", "20"]
    assert left.startswith("left out: 2 chosen cut at the token limit, 2 chosen in another language")
    assert len({len(line) for line in (head, first, second, total)}) == 1
    assert "left out" not in PairingStatistics().table()


def test_a_question_without_a_right_answer_is_counted():
    stats = PairingStatistics()
    wrong = [response("13", system="s"), response("14", original_question="How many?")]
    wrong = [replace(row, history=(("a", "b"),)) for row in wrong]
    pairs, question = correctness_pairs(wrong, PairRules(), stats)
    assert pairs == [] and stats.counts["geo170k"]["all wrong"] == 1
    assert question.provenance == {"responses": 2} and question.source == "geo170k"
    assert (question.history, question.question) == ((("a", "b"),), "How many?")
    assert correctness_pairs(wrong[::-1], PairRules(), stats)[1] == question


def test_the_band_of_pass_rates_holds_its_ends():
    responses = [response("12"), response("13", way=WAYS[1]), response("14", way=WAYS[2]), response("15", way="Hm.")]
    assert len(build(responses, min_pass_rate=0.25)) == len(build(responses, max_pass_rate=0.25)) == 3
    assert build(responses, min_pass_rate=0.26) == build(responses, max_pass_rate=0.24) == []
    stats = PairingStatistics()
    assert correctness_pairs(responses, PairRules(max_pass_rate=0.1), stats) == ([], None)
    assert stats.counts["geo170k"]["drop questions outside the pass-rate band"] == 1


def test_each_rule_has_its_own_cap():
    responses = [response("12")] + [response(str(20 + i), way=many_words(i)) for i in range(20)]
    responses += [response(None, way=many_words(50 + i)) for i in range(20)]

    def caps(**rules) -> list[int]:
        pairs = build(responses, **rules)
        return [sum(pair.rule == rule for pair in pairs) for rule in ("correctness", "format")]

    assert caps() == [15, 15]
    assert caps(pairs_per_question=2) == [2, 15] and caps(format_pairs_per_question=3) == [15, 3]
    assert caps(pairs_per_question=0, format_pairs_per_question=0) == [0, 0]


def test_a_cut_response_may_be_chosen_where_it_is_allowed():
    responses = [response("12", finish_reason="length"), response("13", way=WAYS[1], finish_reason="length")]
    assert build(responses) == []
    assert len(build(responses, keep_truncated=True)) == 1
    assert len(build([response("12"), responses[1]])) == 1  # a rejected one may be cut


def test_how_similar_two_chosen_may_be_is_a_setting():
    one, other = many_words(0), many_words(0, 59) + " end"
    responses = [response("12", way=one), response("12", way=other), response("13", way=many_words(1)), response("14")]
    assert len({pair.chosen for pair in build(responses)}) == 1
    assert len({pair.chosen for pair in build(responses, max_similarity=0.92)}) == 2
    assert len({pair.chosen for pair in build(responses, max_similarity=1.0)}) == 2
    same = [response("12"), response("12", seed=1), response("13", way=many_words(1)), response("14")]
    assert len({pair.chosen for pair in build(same, max_similarity=1.0)}) == 1  # exact copies go even then


def test_blank_responses_are_passed_over():
    blank = replace(response("13"), response=" \n ", id="")
    pairs = build([response("12"), blank, response(None, way=WAYS[1])])
    assert [pair.rejected for pair in pairs] == [response(None, way=WAYS[1]).response]


def test_the_format_is_that_of_the_prompts_style_unless_it_is_given():
    boxed = replace(response("12"), response=f"{many_words(0)} \\boxed{{12}}", id="")
    rules = PairRules(answer_format="boxed")
    assert [item.outcome.value for item in judge_responses([boxed], PairRules())] == ["unparsable"]
    assert [(item.outcome.value, item.answer) for item in judge_responses([boxed], rules)] == [("right", "12")]
    direct = replace(boxed, response="12", provenance={"style": "direct"}, id="")
    assert [item.outcome.value for item in judge_responses([direct], PairRules())] == ["right"]
    unknown = replace(response("12"), provenance={"style": "x"}, id="")
    assert [item.outcome.value for item in judge_responses([unknown, direct], PairRules())] == ["right", "right"]


def test_equal_answers_of_two_sources_are_judged_apart():
    chart = replace(response("12.5"), source="chartqa", id="")
    found = judge_responses([response("12.5"), chart, chart, response("12.5", seed=1)], PairRules())
    assert [item.outcome.value for item in found] == ["wrong", "right", "right", "wrong"]
    assert found[0].verdict is found[3].verdict
    assert found[0].log_length == math.log(len(found[0].text)) and found[1].answer == "12.5"
    assert judge_responses([replace(response("12"), response="", id="")], PairRules())[0].log_length == 0


def test_a_pair_keeps_where_both_responses_come_from():
    made = {"engine": "e", "model": "m", "revision": "r", "style": "cot", "language": "en", "temperature": 0.7}
    made |= {"top_k": 5, "top_p": 0.9, "max_tiles": 6}
    right = response("12", seed=3, finish_reason="stop", **made)
    wrong = [response("13", way=WAYS[1], seed=4), response("14", way=WAYS[2], seed=5)]
    del wrong[0].provenance["seed"]
    pair = next(pair for pair in build([right, *wrong]) if "13" in pair.rejected)
    assert pair.provenance == {
        **made,
        "pass_rate": 0.3333,
        "chosen_response": {"id": right.id, "answer": "12", "rule": "same", "seed": 3},
        "rejected_response": {"id": wrong[0].id, "answer": "13", "rule": "number"},
    }


@dataclass
class Text:
    """Something with a length."""

    log_length: float


def test_of_the_next_eight_pairs_the_one_that_balances_best_is_taken():
    def choose(ratios: list[float], cap: int) -> list[float]:
        pairs = [(Text(ratio), Text(0.0)) for ratio in ratios]
        taken, balance = choose_balanced(iter(pairs), cap, lambda right, other: right.log_length < 50)
        assert balance == pytest.approx(sum(right.log_length for right, _ in taken))
        return [right.log_length for right, _ in taken]

    assert choose([2, -2, 3, 1], 4) == [1, -2, 2, 3]
    assert choose([5.0] * 7 + [1], 1) == [1] and choose([5.0] * 8 + [1], 1) == [5]
    assert choose([5.0] * 8 + [-5], 2) == [5, -5]  # the window moves on
    assert choose([99, 99, 4, 99], 3) == [4] and choose([], 3) == [] and choose([1], 0) == []
    assert choose([1, -1, 1], 2) == [1, -1]  # of equals the first


@pytest.mark.parametrize(("num_rows", "num_columns"), [(1, 1), (2, 2), (2, 4), (3, 4), (4, 6), (1, 5)])
def test_combinations_run_through_both_sides_before_one_repeats(num_rows, num_columns):
    pairs = list(_diagonal(list(range(num_rows)), list(range(num_columns))))
    assert sorted(pairs) == [(row, column) for row in range(num_rows) for column in range(num_columns)]
    for number in range(1, len(pairs) + 1):
        assert len({row for row, _ in pairs[:number]}) == min(number, num_rows)
        assert len({column for _, column in pairs[:number]}) == min(number, num_columns)
    assert list(_diagonal([], [1])) == list(_diagonal([1], [])) == []


def test_a_group_is_all_that_was_asked_and_nothing_else():
    row = response("12", seed=1)
    others = [
        *(replace(row, system="s"), replace(row, history=(("a", "b"),)), replace(row, images=("a.png", "b.png"))),
        *(replace(row, images=("a.png\x1fb.png",)), replace(row, answer=None), replace(row, images=())),
    ]
    keys = [group_key(one) for one in (row, *others)]
    assert len(set(keys)) == 7 - 1  # names are joined by a sign that no name holds
    moved = replace(row, images=("a.png",), question="b.png\x1fHow many?")
    assert group_key(moved) != group_key(replace(row, images=("a.png", "b.png")))
    assert group_key(response("13", way=WAYS[1], seed=2)) == keys[0] and len(keys[0]) == 16
