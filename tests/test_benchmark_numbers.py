"""The numbers of a benchmark: what is counted, what is left out, and what an interval resamples."""

import pytest
from test_benchmarks import case_file, example_of_verdict, examples_of, jsonl, shared

from internvl_mpo.benchmarks import llava_bench, load_benchmark, mathvision, mathvista, mmvet, pope
from internvl_mpo.benchmarks.common import bootstrap_interval
from internvl_mpo.benchmarks.latex_value import latex_value
from internvl_mpo.benchmarks.sources import shared_picture


def test_pope_unanswered_helps_neither_label():
    yes, no = pope.examples(case_file("pope")["rows"])
    scores = [pope.score(yes, "Hm."), pope.score(no, "Hm."), pope.score(yes, "Yes"), pope.score(no, "No")]
    summary = pope.summarise(scores)
    assert summary["f1"] == pytest.approx(50.0)  # one true yes, one false yes, one false no
    assert summary["unanswered"] == 50.0 and summary["accuracy"] == 50.0


def test_pope_vlmevalkit_counts_unknown_as_wrong_in_every_accuracy():
    """As upstream: accuracy is by equality, while F1 takes an unknown answer for not yes."""
    yes, no = pope.examples(case_file("pope")["rows"])
    answers = [(yes, "Yes"), (no, "No"), (no, "Hm."), (no, "Hm.")]
    summary = pope.summarise([pope.score(one, text, "vlmevalkit") for one, text in answers], "vlmevalkit")
    assert summary["accuracy"] == summary["breakdown"]["category"]["random"]["accuracy"] == 50.0
    assert summary["f1_pooled"] == 100.0


def test_mathvista_float_without_precision_has_no_normalised_answer_upstream():
    example = example_of_verdict("mathvista/float", "0", [])
    assert example.details["precision"] is None
    for rule in ("official", "internvl"):
        score = mathvista.score(example, "0.4", rule)
        assert (score.value, score.extracted) == (0.0, None)


@pytest.mark.parametrize("reply", ["x = 6", "x=6", "b=-2", "A = 6"])
def test_mathvision_vlmevalkit_takes_no_assignment_for_a_number(reply):
    gold = reply.rpartition("=")[2].strip()
    example = example_of_verdict("mathvision", gold, [])
    assert mathvision.score(example, reply, "vlmevalkit").value == 0.0
    assert mathvision.score(example, reply, "ours").value == 1.0


def test_crpe_counts_a_question_only_if_all_four_rotations_are_right():
    benchmark = load_benchmark("crpe")
    examples = examples_of("crpe")
    scores = [benchmark.score(example, answer) for example, answer in zip(examples, "ABCA", strict=True)]
    summary = benchmark.summarise(scores)
    assert (summary["circular"], summary["per_row"]) == (0.0, 75.0)
    scores[3] = benchmark.score(examples[3], "D")
    assert benchmark.summarise(scores)["circular"] == 100.0
    assert benchmark.summarise(scores[:3])["num_incomplete"] == 1


def test_failed_judge_reply_is_unscored_by_us_and_a_zero_officially():
    (example,) = examples_of("mmvet")
    assert mmvet.score(example, "x = 3", "ours", replies=["I would say half."]).value is None
    assert mmvet.score(example, "x = 3", "official", replies=["I would say half."]).value == 0.0
    assert mmvet.score(example, "x = 3", "ours", replies=["Score: **0.5**."]).value == 0.5
    assert mmvet.score(example, "x = 3", "ours", replies=["nan"]).value is None


def test_llava_bench_dead_judge_reads_100_officially_and_nothing_by_us():
    (example,) = examples_of("llava_bench")
    dead = ["HTTP 401"]
    assert (
        llava_bench.summarise([llava_bench.score(example, "?", "official", replies=dead)], "official")["relative"]
        == 100
    )
    assert llava_bench.summarise([llava_bench.score(example, "?", "ours", replies=dead)], "ours")["relative"] is None


@pytest.mark.parametrize(
    ("reply", "ours", "official"),
    [
        ("Rating: 5", 5, 5),
        ("**Rating:** 5", 5, 0),
        ("Rating: 10", None, 1),
        ("Rating: 4.5", None, 4),
        ("Rating:5", 5, 0),
        ("", None, 0),
    ],
)
def test_mmhal_rating(reply, ours, official):
    benchmark = load_benchmark("mmhal_bench")
    assert (benchmark.parse_reply(reply, "ours"), benchmark.parse_reply(reply, "official")) == (ours, official)


def test_mmhal_judges_only_what_follows_the_rationale():
    benchmark = load_benchmark("mmhal_bench")
    (example,) = examples_of("mmhal_bench")
    request = benchmark.judge_request(example, "Rationale: {gold} is blue.\nAnswer: It is red.")
    assert "It is red." in request and "blue" not in request and "Red." in request


def test_interval_covers_the_mean_and_repeats():
    values = [0.0, 1.0] * 50
    low, high = bootstrap_interval(values, lambda drawn: sum(drawn) / len(drawn))
    assert 0.38 < low < 0.45 and 0.55 < high < 0.62
    assert [low, high] == bootstrap_interval(values, lambda drawn: sum(drawn) / len(drawn))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"\frac{3\sqrt{3}}{2}", 2.598),
        (r"1/2\pi", 0.159),
        (r"$7\frac{1}{2}$", 3.5),
        ("1,234,567", 1234567),
        ("2^{-1}", 0.5),
        ("-2^2", -4),
        ("3:2", 1.5),
        ("5)", 5),
        ("e^2", 7.389),
        ("x = 6", 6),
        ("(3+4)\\%2", None),
        ("5,6", None),
        ("2x", None),
        ("sqrt(2)", None),
        (r"\ln 2", None),
        ("9^{9^{9}}", None),
        ("(" * 100 + "1" + ")" * 100, None),
        ("5 or 6", None),
    ],
)
def test_latex_value(text, value):
    assert latex_value(text) == (None if value is None else pytest.approx(value, abs=1e-3))


def test_latex_value_of_the_whole_text_refuses_a_rest():
    assert latex_value("5)", whole=True) is None and latex_value("5 < 6", whole=True) is None


@pytest.mark.slow
def test_pope_interval_draws_pictures_and_is_as_wide_as_they_make_it():
    """18 questions to a picture: by question the published answers' interval is more than a third too narrow."""
    categories = {row["question_id"]: row["category"] for row in jsonl(shared("pope", "llava_pope_test.jsonl"))}
    answers: dict[str, list[str]] = {}
    for row in jsonl(shared("pope", "llava-v1.5-13b_answers.jsonl")):
        answers.setdefault(categories[row["question_id"]], []).append(row["text"])
    examples = pope.examples(shared("pope", "e3e3926"))
    scores = []
    for category, texts in answers.items():
        asked = [example for example in examples if example.groups["category"] == (category,)]
        scores += [pope.score(example, text, "official") for example, text in zip(asked, texts, strict=True)]
    values, clusters = [score.value for score in scores], [score.cluster for score in scores]

    def width(interval: list[float]) -> float:
        return interval[1] - interval[0]

    def accuracy(sample: list[float]) -> float:
        return 100 * sum(sample) / len(sample)

    by_question = width(bootstrap_interval(values, accuracy))
    by_picture = width(bootstrap_interval(values, accuracy, clusters))
    assert by_question == pytest.approx(2 * 1.96 * 0.357, rel=0.08)
    assert by_picture == pytest.approx(2 * 1.96 * 0.559, rel=0.08)
    summary = pope.summarise(scores, "official")
    assert summary["resampled"] == {"unit": "pictures", "num": 500}
    assert width(summary["interval"]) > 1.3 * by_question


def test_crpe_rows_are_drawn_by_question_group():
    examples = examples_of("crpe")
    scores = [load_benchmark("crpe").score(example, "A") for example in examples]
    for rule in ("ours", "vlmevalkit"):
        drawn = load_benchmark("crpe").summarise(scores, rule)["resampled"]
        assert drawn == {"unit": "question groups", "num": len(examples) // 4}


def test_one_cluster_has_no_interval_and_no_cluster_means_questions():
    assert bootstrap_interval([0.0, 1.0, 1.0], sum, ["a", "a", "a"]) is None
    assert bootstrap_interval([0.0, 1.0] * 9, sum, [""] * 18) == bootstrap_interval([0.0, 1.0] * 9, sum)


@pytest.mark.parametrize(
    ("row", "picture", "name"),
    [
        ({"image_source": "COCO_1"}, b"bytes", "COCO_1"),
        ({"image": "a.png"}, "a.png", "a.png"),
        ({}, None, ""),
        ({}, lambda: b"bytes", "277089d91c0bdf4f"),
        ({}, {"bytes": b"bytes"}, "277089d91c0bdf4f"),
    ],
)
def test_questions_about_one_picture_are_known_by_it(row, picture, name):
    assert shared_picture(row, picture) == name
