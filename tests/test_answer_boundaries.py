"""Answers on both sides of a limit: the last that is right, and the first that is wrong."""

import pytest

from internvl_mpo.answers.comparing import Outcome, compare_answers
from internvl_mpo.answers.texts import anls


def right(prediction: str, gold: str, source: str = "") -> bool:
    return compare_answers(prediction, gold, source=source).outcome is Outcome.RIGHT


@pytest.mark.parametrize(
    ("gold", "taken", "refused"),
    [
        ("0.5%", ["0.005", "0.5%", ".50 %"], ["0.5", "5%", "50"]),  # a share is never its percent
        ("1%", ["0.01"], ["1", "100"]),
        ("1.5%", ["1.5", "0.015"], ["15", "150%"]),  # above 1 the sign may well be missing
        ("60%", ["60", "0.6", "0.60"], ["6", "0.06", "600"]),
        ("0.5", ["50%", "0.50", "1/2"], ["0.5%", "5%", "1"]),
        ("1", ["100%", "1.0"], ["1%", "10%"]),
    ],
)
def test_a_percent_sign_is_not_lost(gold, taken, refused):
    assert [given for given in taken if not right(given, gold)] == []
    assert [given for given in refused if right(given, gold)] == []


@pytest.mark.parametrize(
    ("gold", "taken", "refused"),
    [
        ("1/3", ["0.33", "0.333", "0.3333"], ["0.3", "0.34", "0.32", "0", "0.4"]),
        ("2/3", ["0.67", "0.667"], ["0.66", "0.7", "0.6", "1"]),
        ("1/8", ["0.125", "0.1250"], ["0.13", "0.12", "0.1"]),  # three decimals are the whole of it
        ("1/1000", ["0.001"], ["0.00", "0.0011"]),
        ("1/16", ["0.0625", "0.063", "0.06"], ["0.07", "0.061", "0.064", "0.1"]),
        ("3.14", ["3.1400", "3.14159", "3.135", "3.145"], ["3.1", "3.15", "3.1349", "3.1451", "3"]),
        ("3.1", ["3.14", "3.05"], ["3.04", "3.2", "3"]),
        ("3.14159", ["3.14", "3.142"], ["3.1", "3", "3.15", "3.143"]),
        ("12", ["12.0", "12.00"], ["12.3", "11.9", "12.01"]),  # a count is not rounded to
        ("0.33", ["1/3"], ["0.3", "1/4"]),
    ],
)
def test_a_coarser_number_is_right_with_two_decimals_and_never_with_one(gold, taken, refused):
    assert [given for given in taken if not right(given, gold)] == []
    assert [given for given in refused if right(given, gold)] == []


@pytest.mark.parametrize(
    ("gold", "taken", "refused"),
    [("5 m", ["500 cm", "5000 mm", "5"], ["50 cm", "5 kg", "5 cm"]), ("2 hours", ["120 minutes"], ["2 minutes"])],
)
def test_units_are_converted_within_one_kind(gold, taken, refused):
    assert [given for given in taken if not right(given, gold)] == []
    assert [given for given in refused if right(given, gold)] == []


@pytest.mark.parametrize(
    ("gold", "taken", "refused"),
    [
        ("100", ["105", "95", "100"], ["105.1", "94.9", "-100"]),
        ("-100", ["-105", "-95"], ["-105.1", "-94.9"]),
        ("0.45", ["45%", "47.25%", "42.75%", "0.46"], ["47.3%", "42.7%", "0.48"]),
        ("45%", ["0.45", "46%", "45", "0.4725", "0.4275"], ["0.473", "0.427", "4.5"]),
        ("1.5", ["1.5%"], ["150%"]),
        ("-45%", ["-0.45", "-45"], ["-4.5"]),
        ("150%", ["150", "150%"], ["1.5"]),  # above 1 a number is percent already
        ("100%", ["1"], ["1.06", "2"]),
        ("-5", ["-5%"], ["-500%"]),
        ("1", ["100%", "104%"], ["1%", "106%"]),
        ("1900", [], ["1901", "1899"]),  # years
        ("2099", [], ["2098", "2100"]),
        ("1899", ["1900"], []),
        ("2100", ["2099"], []),
        ("1950 m", ["1951", "1950"], ["2100"]),
        ("1950.0", ["1951"], []),
        ("0", ["0.0"], ["0.01", "-0.01"]),
        ("1 kg", ["1.04 kg"], ["1 m", "1.06 kg"]),
    ],
)
def test_five_percent_of_a_chart_end_at_five_percent(gold, taken, refused):
    assert [given for given in taken if not right(given, gold, "chartqa")] == []
    assert [given for given in refused if right(given, gold, "chartqa")] == []


def test_one_letter_in_more_than_ten_is_forgiven_and_a_digit_never():
    gold = "abcdefghijk"
    assert right("abcdefghijx", gold, "docvqa")  # 1 in 11
    assert right("abcdefghijkk", gold, "docvqa") and right("abcdefghijx 12", gold + " 12", "docvqa")
    assert not right("abcdefghix", gold[:-1], "docvqa")  # 1 in 10 is exactly 0.9
    assert not right("abcdefghi", gold, "docvqa")
    assert not right("abcdefghijk lmnopqrst 12", "abcdefghijk lmnopqrst 13", "docvqa")
    assert not right("abcdefghijk lmnopqrst 1", "abcdefghijk lmnopqrst l", "docvqa")
    assert not right("abcdefghijx", gold, "gqa")


def test_anls_is_the_textbook_distance_of_words_without_case_and_spaces():
    assert anls("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert anls("sitting", "kitten") == pytest.approx(1 - 3 / 7)
    assert anls("Ab  c", "ab c") == anls("", "") == 1
    assert anls("abc", "") == anls("", "abc") == 0
    assert anls("ab", "abcd") == anls("abcd", "cd") == 0.5


def test_a_long_text_is_not_compared_letter_by_letter():
    for length, is_right in ((500, True), (501, False)):
        gold = ("ab " * 200)[: length - 1] + "x"
        assert right(gold[:40] + "q" + gold[41:], gold, "docvqa") is is_right


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("A is wrong. It is (B).", "B"),
        ("A is wrong, (B), not (C)", "B"),
        ("A is wrong. It is (B). Or (C)", None),  # what comes later counts as well
        ("A is not right, it is (B), perhaps (C)", None),
    ],
)
def test_behind_a_letter_that_is_denied_all_of_the_rest_is_read(prediction, letter):
    question = "Which?\nA. red\nB. blue\nC. green"
    found = [gold for gold in "ABC" if compare_answers(prediction, gold, question=question).outcome is Outcome.RIGHT]
    assert found == ([letter] if letter else [])
