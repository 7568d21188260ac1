"""What a verdict says: outcome, answer, rule and reason, on each of the ways to it."""

import pytest

from internvl_mpo import answers
from internvl_mpo.answers import choices
from internvl_mpo.answers.choices import FROM_THE_START, parse_options, read_option
from internvl_mpo.answers.common import Asked
from internvl_mpo.answers.comparing import (
    EXACT_RULES,
    Outcome,
    Verdict,
    accepted_answers,
    asked_yes_or_no,
    compare_answers,
    judge_response,
    rules_of_source,
)
from internvl_mpo.errors import BadInputError

RIGHT, WRONG, UNPARSABLE, UNDECIDED = Outcome


def test_the_outcomes_are_words_that_files_keep():
    assert list(map(str, Outcome)) == ["right", "wrong", "unparsable", "undecided"]
    assert (RIGHT, WRONG, UNPARSABLE, UNDECIDED) == (
        Outcome.RIGHT,
        Outcome.WRONG,
        Outcome.UNPARSABLE,
        Outcome.UNDECIDED,
    )


@pytest.mark.parametrize(
    ("prediction", "gold", "verdict"),
    [
        ("cat", "cat", (RIGHT, "cat", "same", "same text")),
        ("**cat**", "cat", (RIGHT, "cat", "same", "same text")),
        ("5.0", "5", (RIGHT, "5.0", "number", "5, expected 5")),
        ("6", "5", (WRONG, "6", "number", "6, expected 5")),
        ("The cat", "a cat", (RIGHT, "The cat", "text", "same words")),
        ("dog", "cat", (WRONG, "dog", "none", "no rule finds 'dog' equal to 'cat'")),
        ("café", "cafe", (RIGHT, "café", "wording", "says 'cafe' in other words")),
        ("2 to 3", "2:3", (RIGHT, "2 to 3", "wording", "says '2:3' in other words")),
        ("2:3", "2 to 3", (WRONG, "2:3", "none", "no rule finds '2:3' equal to '2 to 3'")),
        ("5 ms", "0.005 s", (RIGHT, "5 ms", "number", "5, expected 0.005 s")),
        ("at least 5", "≥5", (RIGHT, "at least 5", "text", "in other words: same words")),
        ("**", "cat", (UNPARSABLE, "**", "parse", "the answer is empty")),
        ("<think>cat", "cat", (UNPARSABLE, None, "parse", "the think block never closes")),
        ("<think>dog</think>cat", "cat", (RIGHT, "cat", "same", "same text")),
        ("9^{9^9}", "8^{8^8}", (UNDECIDED, "9^{9^9}", "math", "both are too large to compare")),
        ("yes", "no", (WRONG, "yes", "yes_no", "says yes, expected no")),
        ("x" * 301, "cat", (UNPARSABLE, None, "parse", "301 characters are no final answer")),
        ("x" * 301, "y" * 151, (WRONG, "x" * 301, "none", f"no rule finds '{'x' * 40}' equal to '{'y' * 40}'")),
        ("</s>", "cat", (WRONG, "</s>", "none", "no rule finds '</s>' equal to 'cat'")),
        ("A", "B", (WRONG, "A", "choice", "option A, expected B")),
        ("4", "IV", (RIGHT, "4", "wording", "says 'IV' in other words")),
        ("probably 1/8", "0.13", (RIGHT, "probably 1/8", "number", "in other words: 0.125, expected 0.13")),
        ("probably 0.13", "1/8", (WRONG, "probably 0.13", "number", "0.13, expected 1/8")),
        ("?", "\\", (WRONG, "?", "none", "no rule finds '?' equal to '\\'")),  # nothing is left of both
        ("<THINK>dog</THINK>cat", "cat", (RIGHT, "cat", "same", "same text")),
        ("x" * 300, "cat", (WRONG, "x" * 300, "none", f"no rule finds '{'x' * 40}' equal to 'cat'")),
        ("CA", "AC", (RIGHT, "CA", "wording", "says 'AC' in other words")),
        ("AC", "CA", (WRONG, "AC", "none", "no rule finds 'AC' equal to 'CA'")),  # an order, maybe
    ],
)
def test_a_verdict_says_why(prediction, gold, verdict):
    assert compare_answers(prediction, gold) == Verdict(*verdict)


def test_a_response_without_an_answer_says_what_is_missing():
    assert judge_response("five", "5") == (UNPARSABLE, None, "parse", "no 'Final answer:'")
    assert judge_response("x Final answer: five", "5").outcome is RIGHT
    assert judge_response("104", "100", answer_format="text", source="chartqa").outcome is RIGHT
    assert judge_response("B", "red", answer_format="text", question="Which?\nA. blue\nB. red").outcome is RIGHT


def test_one_of_several_truths_is_enough_and_each_gets_its_rules():
    assert compare_answers("104", ["cat", "100"], source="chartqa") == (
        RIGHT,
        "104",
        "relaxed",
        "off by 4 %, 5 % allowed",
    )
    assert compare_answers("2016", "2015", source="chartqa")[2:] == ("relaxed", "exact for a year or zero")
    assert compare_answers("B", ["blue", "red"], question="Which?\nA. blue\nB. red").outcome is RIGHT
    assert compare_answers("dog", ["cat", "cow"]).reason == "no rule finds 'dog' equal to 'cat'"
    assert compare_answers("B. it is so\nThe car is red", "B", question="Which?\nA. red\nB. blue").outcome is RIGHT
    assert compare_answers("There is a dog", "Yes", question="Is there a dog?").outcome is RIGHT
    assert compare_answers("b", '["a", "b"]').rule == "same"
    with pytest.raises(BadInputError, match="is dict"):
        compare_answers("b", '{"a": 1}')
    assert compare_answers("5", ["5"]).outcome is RIGHT and compare_answers("5", 5).outcome is RIGHT


@pytest.mark.parametrize(
    ("gold", "accepted"),
    [
        *(("cat", ("cat",)), ("[1, 2]", ("[1, 2]",)), ('["a", "b"]', ("a", "b")), (' [ "a"]', (' [ "a"]',))),
        *(
            ('["a', ('["a',)),
            ('[ "a", 1]', ("a", "1")),
            (["a", "a", 2], ("a", "2")),
            (5, ("5",)),
            (0.5, ("0.5",)),
            ([0.5, "a"], ("0.5", "a")),
        ),
        ('[["a"]]', ('[["a"]]',)),
    ],
)
def test_a_truth_is_a_text_a_number_or_a_list_of_texts(gold, accepted):
    found = accepted_answers(gold.strip() if accepted == (' [ "a"]',) else gold)
    assert found == (("a",) if accepted == (' [ "a"]',) else accepted)


@pytest.mark.parametrize(
    ("gold", "kind"),
    [([], "list"), (None, "NoneType"), (True, "bool"), ([None], "list"), (["a", None], "list"), ('{"a": 1}', "dict")],
)
def test_any_other_truth_is_refused(gold, kind):
    with pytest.raises(BadInputError, match=f"is {kind}; give a text, a number or a list of texts"):
        accepted_answers(gold)


@pytest.mark.parametrize("source", ["chartqa", "my_ChartQA_5k", "plotqa"])
def test_charts_are_relaxed(source):
    assert rules_of_source(source) == ("choice", "yes_no", "relaxed", "number", "date", "text", "list")


@pytest.mark.parametrize("source", "docvqa infographic infovqa sroie ocrvqa textvqa my_stvqa_2 stvqa2".split())  # noqa: SIM905
def test_transcribed_text_may_slip(source):
    assert rules_of_source(source) == (*EXACT_RULES, "anls")
    assert compare_answers("Universty of California", "University of California", source=source).rule == "anls"
    assert rules_of_source("geo170k") == EXACT_RULES == ("choice", "yes_no", "number", "date", "text", "list", "math")


def test_the_question_for_yes_or_no_is_the_last_of_a_prompt():
    assert asked_yes_or_no("Look. Is it red? Is it blue? Answer yes or no.") == "Is it blue?"
    assert asked_yes_or_no("What is it?\nIs it red?\nSay it") == "Is it red?" and asked_yes_or_no("What is it?") == ""
    for length, found in ((8000, "Is it red?"), (8001, "")):
        assert asked_yes_or_no("x" * (length - 12) + ". Is it red?") == found


# ------------------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("Which?\nA. red\nB. blue", {"A": "red", "B": "blue"}),
        (" (A) red \n(B) blue", {"A": "red", "B": "blue"}),
        ("A: red\nB： blue", {"A": "red", "B": "blue"}),
        ("A) red\nB) blue\nC) green", {"A": "red", "B": "blue", "C": "green"}),
        ("Which? (A) red (B) blue", {"A": "red", "B": "blue"}),
        ("A. red", {}),
        ("A. red\nC. blue", {}),
        ("B. red\nC. blue", {}),
        ("A. red\nB.", {}),
        ("", {}),
    ],
)
def test_options_are_letters_in_their_order(question, options):
    assert parse_options(question) == options


COLOURS = {"A": "red", "B": "blue", "C": "dark green"}
# answer -> (letter, how)
COLOUR_ANSWERS = {
    "A": ("A", "letter"),
    "a": ("A", "letter"),
    "(B)": ("B", "letter"),
    "B.": ("B", "letter"),
    "**B**": ("B", "letter"),
    "B</s>": ("B", "letter"),
    "D": (None, "no option in the answer"),
    "D. green": (None, "no option D"),
    "I think B": ("B", "letter"),
    "Option B": ("B", "letter"),
    "The correct option is B": ("B", "letter"),
    "选B": ("B", "letter"),
    "B. blue": ("B", "letter and text of the option"),
    "B. blue because it is": ("B", "letter and text of the option"),
    "B. blue or (A)": (None, "several options"),
    "B. red": (None, "a letter with the text of another option"),
    "A or B": (None, "several options"),
    "A, B": (None, "several options"),
    "A and B": (None, "several options"),
    "A is wrong. It is (B).": ("B", "letter"),
    "A is not it": (None, "denies what it names"),
    "A because it is so": ("A", "letter first"),
    "A: it is so": ("A", "letter first"),
    "A: wait, (B)": (None, "several options"),
    "A: it is so. Actually no": (None, "several options"),
    "red": ("A", "text of the option"),
    "Red.": ("A", "text of the option"),
    "the red": ("A", "text of the option"),
    "dark green (C)": ("C", "text and letter"),
    "dark green (A)": (None, "a letter with the text of another option"),
    "It is (B)": ("B", "letter"),
    "It is (B) or (C)": (None, "several options"),
    "It is (B) red": (None, "a letter with the text of another option"),
    "I would go for B": ("B", "letter on its own"),
    "it is blue here": ("B", "text of one option in the answer"),
    "it is blue and red": (None, "several options in the answer"),
    "it is yellowish blue": (None, "no option in the answer"),
    "not red": (None, "denies what it names"),
    "not red but blue": ("B", "text of the option"),
    "nothing of it": (None, "no option in the answer"),
    "red [A]": ("A", "text and letter"),
    "we go for A, then choose B": (None, "several options"),
    "D: green": (None, "no option D"),
    "D) green": (None, "no option D"),
    "B: 5 of them": ("B", "letter first"),
    "B. it is so\nThe car is red": ("B", "letter first"),
    "A is wrong but it is (B)": ("B", "letter"),
    "B. blue, see (A)": (None, "several options"),
    "we see (A) is not it": (None, "denies what it names"),
    "I: it is blue": ("B", "text of one option in the answer"),
    "A: see (b)": (None, "several options"),
    "图里 blue": ("B", "text of one option in the answer"),
    "we see (a) with (b)": (None, "several options"),
    "we take (B) red": (None, "a letter with the text of another option"),
    "d. green": (None, "no option in the answer"),
    "could be B": ("B", "letter"),
    "it (x) is blue": ("B", "text of one option in the answer"),
    "I see option A since (B) is small": ("A", "letter on its own"),
    "因为 it is blue": ("B", "text of one option in the answer"),
    "B. The car is red": (None, "a letter with the text of another option"),
    "B. The car is blue": ("B", "letter first"),
    "B. red in the sun": (None, "a letter with the text of another option"),
    "A does not equal B,C": (None, "denies what it names"),
}


@pytest.mark.parametrize("text", COLOUR_ANSWERS)
def test_the_option_an_answer_settles_on(text):
    assert read_option(text, COLOURS) == COLOUR_ANSWERS[text]


@pytest.mark.parametrize(
    "text", ["we take (b) here", "we take （B） here", "we take [ b ] here", "see (b) blue", "is it (b), blue"]
)
def test_a_letter_in_parentheses_is_an_option(text):
    assert read_option(text, COLOURS)[0] == "B"
    assert (
        read_option(text.replace("(b)", "b").replace("（B）", "b").replace("[ b ]", "b"), {"A": "x", "B": "y"})[0]
        is None
    )


def test_an_option_is_mentioned_in_a_line_and_not_in_an_essay():
    for length, letter, how in ((240, "B", "text of one option in the answer"), (241, None, "no option in the answer")):
        text = "we see blue now" + " x" * 112 + "y" * (length - 239)
        assert len(text) == length and read_option(text, COLOURS) == (letter, how)
        assert read_option("café" + "x" * (length - 4), {"A": "cafe" + "x" * (length - 4)})[0] == (letter and "A")


@pytest.mark.parametrize(
    "text", ["B. blue or A", "B. blue or A here", "B. blue and (A)", "A nor it", "A or so", "A and more", "A, B or so"]
)
def test_several_letters_name_nothing(text):
    assert read_option(text, COLOURS) == (None, "several options")


def test_a_letter_with_its_own_text_behind_it_may_deny():
    options = {"A": "not red", "B": "blue"}
    assert read_option("we see (A) not red", options) == ("A", "letter and text of the option")


@pytest.mark.parametrize(
    ("text", "options", "chosen"),
    [
        ("B. *", {"A": "*", "B": "`"}, (None, "a letter with the text of another option")),
        ("vitamins C", {"A": "vitamin C", "B": "vitamin D"}, ("A", "text of the option")),
        ("0.33", {"A": "1/3", "B": "2/3"}, ("A", "text of the option")),
        ("\\frac{\\pi}{12}", {"A": "\\frac{\\pi}{12} turn", "B": "\\frac{\\pi}{6} turn"}, ("A", "text of the option")),
        ("it must be \\frac{1}{8}", {"A": "0.13", "B": "0.2"}, ("A", "number of one option")),
        ("it must be 0.13", {"A": "1/8", "B": "0.2"}, (None, "no option in the answer")),
        (
            "it is very small car here",
            {"A": "small car", "B": "very small car"},
            ("B", "text of one option in the answer"),
        ),
        ("on the left", {"A": "left", "B": "right"}, ("A", "text of the option")),
        ("B. 6", {"A": "4", "B": "5"}, (None, "a letter with the text of another option")),
        ("B. two", {"A": "1", "B": "2"}, ("B", "letter and text of the option")),
        ("A. red car", {"A": "red", "B": "red car"}, (None, "a letter with the text of another option")),
        ("1/8", {"A": "0.13", "B": "0.2"}, ("A", "text of the option")),
        ("0.13", {"A": "1/8", "B": "0.2"}, (None, "no option in the answer")),
        ("A. 0.50", {"A": "0.5", "B": "1/2"}, ("A", "letter first")),
        ("C minor", {"A": "C minors", "B": "x"}, (None, "no option in the answer")),  # a letter, maybe
        ("0.50", {"A": "0.5", "B": "1/2"}, (None, "no option in the answer")),
        ("we see (B) not blue", {"A": "red", "B": "not blue"}, ("B", "letter and text of the option")),
        ("it is not (A) not red", {"A": "not red", "B": "blue"}, (None, "denies what it names")),
        ("H", {}, ("H", "letter")),
        ("I", {}, (None, "no option in the answer")),
        ("Z. x", {}, (None, "no option in the answer")),
    ],
)
def test_the_text_or_number_of_one_option_names_it(text, options, chosen):
    assert read_option(text, options) == chosen


def test_what_stands_behind_the_text_of_an_option_that_a_text_begins_with():
    assert choices._after("(red) or A", "red") == ") or A" and choices._after("it is red or A", "red") == ""


@pytest.mark.parametrize(
    ("prediction", "gold", "options", "decided"),
    [
        ("nothing", "B", COLOURS, (False, "names no option (no option in the answer), expected B")),
        ("B", "(B)", COLOURS, (True, "option B, expected B")),
        ("red", "D", COLOURS, None),
        ("red", "yellow", COLOURS, None),
        ("hmm", "B", {"A": "√2", "B": "cats"}, (False, "names no option (no option in the answer), expected B")),
    ],
)
def test_the_rule_for_options_decides_where_the_truth_is_one(prediction, gold, options, decided):
    assert choices.decide_choice(prediction, gold, Asked("", options)) == decided


def test_what_an_answer_says_from_its_start_is_known_to_the_benchmarks():
    assert {read_option(text, COLOURS)[1] for text in ("A because", "A. red", "red")} == FROM_THE_START


def test_yes_and_no_are_options_only_where_all_are():
    assert read_option("There is a dog", {"A": "No", "B": "Yes"}, "Is there a dog?") == ("B", "says yes")
    assert read_option("There is a dog", {"A": "Yes", "B": "It depends"}, "Is there a dog?")[0] is None
    assert read_option("There is a dog", {"A": "Yes", "B": "true"}, "Is there a dog?")[0] is None


def test_the_front_page_offers_what_it_names():
    names = (
        "FORMATS Outcome Verdict anls clean_answer compare_answers judge_response parse_answer parse_date parse_number"
    )
    assert answers.__all__ == [*names.split(), "parse_options", "rules_of_source"]
    assert all(hasattr(answers, name) for name in answers.__all__)
