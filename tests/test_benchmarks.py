"""Scorers: every trap in tests/cases, numbers published elsewhere, and inputs nobody meant to send."""

import json
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from internvl_mpo.benchmarks import BENCHMARKS, llava_bench, load_benchmark, m3cot, mathvision, mathvista, mmvet, pope
from internvl_mpo.benchmarks.common import Example, Score
from internvl_mpo.benchmarks.python_value import python_value
from internvl_mpo.errors import BadInputError

CASES = Path(__file__).parent / "cases"
SHARED = Path(__file__).parents[2] / "shared" / "data"
SCORED_BY_RULES = ("pope", "m3cot", "mathvista", "mathvision", "crpe")

JUDGED_ROWS = {
    "mmvet": [{"id": "v1_0", "question": "What is x?", "answer": "-1<AND>-5", "capability": ["ocr", "math"]}],
    "mmhal_bench": [{"question": "What color is it?", "gt_answer": "Red.", "image_content": ["Hat"], "image": "a.png"}],
    "llava_bench": [
        {
            "index": 0,
            "question": "What is it?",
            "category": "conv",
            "image": "a.png",
            "caption": "A hat.",
            "gpt4_ans": "A",
        }
    ],
    "mini": [{"question": "What is 1 plus 1?", "answer_gt": "2"}],
    "own": [{"question": "Which one?\nA. red\nB. blue", "answer": ["B", "blue"], "source": "mine"}],
}


def case_file(name: str) -> dict:
    return json.loads((CASES / f"{name}.json").read_text(encoding="utf-8"))


def examples_of(name: str) -> list[Example]:
    rows = JUDGED_ROWS[name] if name in JUDGED_ROWS else case_file(name)["rows"]
    return load_benchmark(name).examples(rows)


def all_cases() -> list:
    found = []
    for name in SCORED_BY_RULES:
        for case in case_file(name)["cases"]:
            wanted = case.get("want", case.get("value"))
            found += [pytest.param(name, case, rule, id=f"{name}-{rule}-{case['trap']}") for rule in wanted]
    return found


@pytest.mark.parametrize(("name", "case", "rule"), all_cases())
def test_trap(name, case, rule):
    example = {example.id: example for example in examples_of(name)}[case["id"]]
    score = load_benchmark(name).score(example, case["answer"], rule)
    if "want" in case:
        assert score.extracted == case["want"][rule], score.reason
    else:
        assert score.value == case["value"][rule], score.reason


def example_of_verdict(name: str, gold: str, choices: list[str]) -> Example:
    kind = name.partition("/")[2]
    row = {
        "pope": {"question_id": 1, "text": "?", "label": gold, "category": "random"},
        "crpe": {"question_id": 1, "text": "?\nA. a\nB. b", "category": "subject", "correct_option": gold},
        "m3cot": {"id": "1", "question": "?", "choices": choices, "answer": gold},
        "mathvision": {"id": "1", "question": "?", "options": choices, "answer": gold},
        "mathvista": {
            "pid": "1",
            "question": "?",
            "choices": choices,
            "answer": gold,
            "question_type": "multi_choice" if choices else "free_form",
            "answer_type": kind.rstrip("12"),
            "precision": int(kind[-1]) if kind[-1:].isdigit() else None,
        },
    }
    benchmark = name.partition("/")[0]
    return load_benchmark(benchmark).examples([row[benchmark]])[0]


def test_verdicts_of_the_original_programs_are_kept():
    """The file holds replies of ours and what each original function said of them, run one at a time."""
    different = []
    for name, reply, gold, choices, verdicts in json.loads((CASES / "official.json").read_text(encoding="utf-8")):
        example = example_of_verdict(name, gold, choices)
        for rule, right in verdicts.items():
            score = load_benchmark(name.partition("/")[0]).score(example, reply, rule)
            if bool(score.value) != right:
                different.append((name, rule, reply, gold, choices, right))
    assert different == []


def test_missing_answer_is_none_to_mathvista_upstream():
    example = example_of_verdict("mathvista/text", "none", ["a", "none"])
    assert mathvista.score(example, None, "official").value == 1.0
    assert mathvista.score(example, None, "ours").value == 0.0


@pytest.mark.parametrize("length", [4_001, 300_000])
def test_option_closest_to_a_long_reply_is_the_one_of_the_table(length):
    example = example_of_verdict("mathvista/text", "the cat", ["\u4e00 dog", "the cat", "7\u00b0", "cat eht"])
    reply = ("a cat sat on the mat with a dog " * (length // 32 + 1))[:length]
    scored = mathvista.score(example, reply, "official").extracted
    lengths = {choice: mathvista._distance(reply, choice) for choice in example.choices}
    assert lengths == {choice: length - held for choice, held in zip(example.choices, (4, 7, 0, 7), strict=True)}
    assert scored == "the cat"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5 or 6", 5),
        ("5^2", 7),
        ("2*a", 6),
        ("6 if 1 > 2 else 7", 7),
        ("1 < 2 < 3", True),
        ("not 0", True),
        ("0 or 0 or 8", 8),
        ("open('x')", None),
        ("6,", None),
        ("[6]", None),
        ("'6'", None),
        ("9**9**9", None),
        ("1/0", None),
        ("(" * 300 + "6" + ")" * 300, None),
        ("\x00", None),
    ],
)
def test_python_value(text, value):
    assert python_value(text, {"a": 3}) == value


# ------------------------------------------------------------------------------------------- published numbers


def shared(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"the published outputs at ../shared/data/{'/'.join(parts)} are not here")
    return path


def jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def test_pope_of_llava_13b_is_85_947():
    categories = {row["question_id"]: row["category"] for row in jsonl(shared("pope", "llava_pope_test.jsonl"))}
    answers: dict[str, list[str]] = {}
    for row in jsonl(shared("pope", "llava-v1.5-13b_answers.jsonl")):
        answers.setdefault(categories[row["question_id"]], []).append(row["text"])
    scores = []
    for category in answers:
        examples = [e for e in pope.examples(shared("pope", "e3e3926")) if e.groups["category"] == (category,)]
        scores += [pope.score(e, answer, "official") for e, answer in zip(examples, answers[category], strict=True)]
    summary = pope.summarise(scores, "official")
    assert round(summary["f1"], 3) == 85.947
    assert round(summary["f1_pooled"], 3) == 85.932
    by_category = {name: round(part["f1"], 2) for name, part in summary["breakdown"]["category"].items()}
    assert by_category == {"random": 87.14, "popular": 86.25, "adversarial": 84.46}


@pytest.mark.parametrize(
    ("run", "accuracy"),
    [
        ("gpt4", 26.1),
        ("bard", 34.8),
        ("llava_llama2_13b", 26.1),
        ("gpt4_2shot_solution_ocr", 32.1),
        ("random_guess", 17.9),
    ],
)
def test_mathvista_published_extractions(run, accuracy):
    extractions = json.loads(shared("mathvista", f"extractions_{run}.json").read_text(encoding="utf-8"))
    examples = mathvista.examples(shared("mathvista", "testmini.json"))
    scores = [mathvista.score(example, extractions[example.id], "official") for example in examples]
    assert round(mathvista.summarise(scores)["accuracy"], 1) == accuracy


def test_mathvista_query_is_the_official_one_for_all_questions():
    queries = json.loads(shared("mathvista", "testmini_query.json").read_text(encoding="utf-8"))
    examples = mathvista.examples(shared("mathvista", "testmini.json"))
    assert len(examples) == 1000
    assert {example.id: mathvista.prompt(example, "direct") for example in examples} == queries


@pytest.mark.parametrize(
    ("run", "num_right"),
    [
        ("gemini-pro-cot", 44),
        ("qwen-vl-max-cot", 42),
        ("internlm-xc2-vl-cot", 45),
        ("internlm-xc2-vl", 48),
        ("gpt4-cot-text-only", 14),
        ("random-chance", 30),
        ("llava-v1.5-13b", 40),
    ],
)
def test_mathvision_published_runs(run, num_right):
    replies = {str(row["id"]): row["response"] for row in jsonl(shared("mathvision", f"responses_{run}.jsonl"))}
    examples = mathvision.examples(shared("mathvision"))
    assert len(examples) == len(replies) == 304
    assert sum(mathvision.score(example, replies[example.id], "official").value for example in examples) == num_right


@pytest.mark.parametrize(
    ("run", "accuracy"),
    [("gpt4v-direct", 56.90), ("gemini-cot", 47.45), ("llava-13b-cot", 39.47), ("kosmos-2-dsp", 0.04)],
)
def test_m3cot_published_runs(run, accuracy):
    replies = {row["id"]: row["text"] for row in reversed(jsonl(shared("m3cot", f"predictions_{run}.jsonl")))}
    examples = m3cot.examples(shared("m3cot", "test_annotations.jsonl"))
    scores = [m3cot.score(example, replies.get(example.id), "official") for example in examples]
    summary = m3cot.summarise(scores)
    assert round(summary["accuracy"], 2) == accuracy
    assert {name: part["num_examples"] for name, part in summary["breakdown"]["domain"].items()} == {
        "science": 1622,
        "commonsense": 455,
        "mathematics": 241,
    }


@pytest.mark.parametrize(
    ("model", "total", "runs", "capabilities"),
    [
        (
            "13b",
            36.3,
            [36.1, 36.5, 36.3],
            {"rec": 40.5, "ocr": 28.4, "know": 23.5, "gen": 24.2, "spat": 35.2, "math": 8.8},
        ),
        ("7b", 31.1, [31.2, 30.8, 31.2], None),
    ],
)
def test_mmvet_published_judge_replies(model, total, runs, capabilities):
    grades = json.loads(shared("mmvet", f"llava-v1.5-{model}_gpt-4-grade-3runs.json").read_text(encoding="utf-8"))
    capability = json.loads(shared("mmvet", "capabilities.json").read_text(encoding="utf-8"))
    rows = [{"id": id, "question": "?", "answer": "", "capability": value} for id, value in capability.items()]
    scores = [
        mmvet.score(example, "?", "official", replies=grades[example.id]["content"]) for example in mmvet.examples(rows)
    ]
    summary = mmvet.summarise(scores, "official")
    assert (round(summary["total"], 1), round(summary["std"], 1)) == (total, 0.2)
    assert [round(run, 1) for run in summary["runs"]] == runs
    parts = summary["breakdown"]["capability"]
    assert {name: part["num_examples"] for name, part in parts.items()} == {
        **{"rec": 150, "ocr": 96, "know": 84, "gen": 80, "spat": 75, "math": 26}
    }
    assert len(summary["breakdown"]["combination"]) == 16
    if capabilities:
        assert {name: round(part["score"], 1) for name, part in parts.items()} == capabilities


@pytest.mark.parametrize(("model", "runs"), [("13b", [72.8, 72.7, 72.1]), ("7b", [64.7, 65.3, 66.3])])
def test_llava_bench_published_reviews(model, runs):
    examples = llava_bench.examples(shared("llava_bench"))
    reviews = [
        {
            str(row["question_id"]): row["review"]
            for row in jsonl(shared("llava_bench", f"reviews_llava-v1.5-{model}-eval{n}.jsonl"))
        }
        for n in (1, 2, 3)
    ]
    scores = [llava_bench.score(e, "?", "official", replies=[review[e.id] for review in reviews]) for e in examples]
    summary = llava_bench.summarise(scores, "official")
    assert [round(run, 1) for run in summary["runs"]] == runs
    assert {name: part["num_examples"] for name, part in summary["breakdown"]["category"].items()} == {
        "complex": 28,
        "conv": 17,
        "detail": 15,
    }


# ------------------------------------------------------------------------------------------------ the contract

HOSTILE = (
    *(
        None,
        "",
        " ",
        "\n",
        "\x00",
        "(B",
        "((((",
        "}" * 50,
        "\\boxed{" * 300,
        "{" * 5000,
        "(" * 5000,
        "10^400",
        "-" * 3000,
    ),
    *("9^{9^{9^{9}}}", "1" * 5000, "Answer:" * 3000, "answer " * 20_000, "A" * 1_000_000, " " * 1_000_000),
    *("\u202eolleh \u0627\u0644\u0625\u062c\u0627\u0628\u0629", "\ud800", "\\frac" * 500, "*_" * 200_000, "[" * 300),
    *("final answer is " * 20_000, "\\boxed{a}" * 20_000, "1, " * 100_000, "yes no " * 100_000, "rating: 5 " * 50_000),
)


@pytest.mark.parametrize("separator", [" ", "\n", ".", ",", "!", "?"])
def test_m3cot_official_finds_a_letter_between_its_separators(separator):
    (example,) = m3cot.examples([{"id": "1", "question": "?", "choices": ["red", "blue"], "answer": "B"}])
    for answer in (f"it{separator}B{separator}seems", f"B{separator}it", f"it{separator}B", f"it{separator}b"):
        assert m3cot.score(example, answer, "official").extracted == "B"
    for answer in (f"it{separator}B;", f"it\tB{separator}", f"xB{separator}"):
        assert m3cot.score(example, answer, "official").extracted is None


@pytest.mark.parametrize("name", BENCHMARKS)
def test_hostile_answers_are_scored_within_50_ms(name):
    benchmark = load_benchmark(name)
    for example in examples_of(name):
        for rule in benchmark.RULES:
            for answer in HOSTILE:
                score = benchmark.score(example, answer, rule)
                assert score.value is None or 0 <= score.value <= 6
                for _ in range(3):  # the best of three and not wall time: a busy machine must not fail the test
                    start = time.process_time()
                    benchmark.score(example, answer, rule)
                    seconds = time.process_time() - start
                    if seconds < 0.05:
                        break
                assert seconds < 0.05, (rule, str(answer)[:20])


@pytest.mark.parametrize("name", BENCHMARKS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=200) | st.from_regex(r"(\\boxed|\{|\}|\(|\)|answer:|\\frac|[A-E]|[0-9.]| ){0,12}"))
def test_any_text_is_scored(name, text):
    benchmark = load_benchmark(name)
    replies = {"replies": [text]} if hasattr(benchmark, "JUDGE_PROMPT") else {}
    for example in examples_of(name)[:2]:
        for rule in benchmark.RULES:
            score = benchmark.score(example, text, rule, **replies)
            assert isinstance(score, Score) and score.reason
            json.dumps(benchmark.summarise([score], rule), allow_nan=False)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_summary_has_what_the_table_shows(name):
    benchmark = load_benchmark(name)
    unscored = Score(id="none", value=None, extracted=None, reason="no answer generated")
    for rule in benchmark.RULES:
        scores = [benchmark.score(example, "B", rule) for example in examples_of(name)] + [unscored]
        summary = benchmark.summarise(scores, rule)
        assert summary["headline"] in summary
        assert summary["num_examples"] == len(scores) and summary["num_unscored"] >= 1
        assert {"interval", "unanswered", "breakdown"} <= summary.keys()
        benchmark.summarise([], rule)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_prompt_holds_the_question_and_asks_as_released_checkpoints_were_asked(name):
    benchmark = load_benchmark(name)
    example = examples_of(name)[0]
    for mode in benchmark.MAX_NEW_TOKENS:
        assert example.question.replace("<image1>", "").strip() in benchmark.prompt(example, mode)
    if name in ("pope", "m3cot", "mathvista", "mathvision", "crpe"):
        assert benchmark.prompt(example, "cot").startswith(
            "Your task is to answer the question below. Give step by step reasoning before you answer, and when you're "
            'ready to answer, please use the format "Final answer: .."\n\nQuestion:\n\n'
        )


def test_unknown_benchmark_is_refused_by_name():
    with pytest.raises(BadInputError, match="mmbench"):
        load_benchmark("mmbench")


@pytest.mark.slow
def test_100_000_answers_are_scored_in_a_minute():
    jobs = []
    for name in SCORED_BY_RULES:
        benchmark, examples = load_benchmark(name), {example.id: example for example in examples_of(name)}
        jobs += [
            (benchmark, examples[case["id"]], case["answer"] + f" {i}")
            for i in range(170)
            for case in case_file(name)["cases"]
        ]
    jobs = (jobs * 6)[:100_000]
    start = time.perf_counter()
    for benchmark, example, answer in jobs:
        benchmark.score(example, answer)
    assert len(jobs) == 100_000 and time.perf_counter() - start < 60
