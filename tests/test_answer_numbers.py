"""What is a number, what it is worth, and when two of them say the same: each line of the grammar on its own."""

from fractions import Fraction

import pytest

from internvl_mpo.answers.comparing import Outcome, compare_answers
from internvl_mpo.answers.numbers import (
    Number,
    assigned_name,
    decide_number,
    equal_numbers,
    is_close,
    number_in_sentence,
    number_value_of_formula,
    parse_number,
    read_number,
    rounds_to,
    shown,
    split_unit,
    value_of,
)


def right(prediction: str, gold: str, source: str = "") -> bool:
    return compare_answers(prediction, gold, source=source).outcome is Outcome.RIGHT


# text -> value, unit, decimals
NUMBERS = r"""
12 -> 12, , 0 ; -12 -> -12, , 0 ; +12 -> 12, , 0 ; .5 -> 0.5, , 1 ; -.5 -> -0.5, , 1 ; 1,234 -> 1234, , 0 ;
1'234’567 -> 1234567, , 0 ; 1 234 567 -> 1234567, , 0 ; 1 234.5 -> 1234.5, , 1 ; 12,34,567 -> 1234567, , 0 ;
12,34,567.8 -> 1234567.8, , 1 ; 1,234.50 -> 1234.5, , 2 ; 3/4 -> 3/4, , exact ; -3/4 -> -3/4, , exact ;
3 / 4 -> 3/4, , exact ; 3/0.5 -> 6, , exact ; 1 1/2 -> 3/2, , exact ; -1 1/2 -> -3/2, , exact ;
1 and 1/2 -> 3/2, , exact ; 2\frac{1}{3} -> 7/3, , exact ; 2\frac13 -> 7/3, , exact ;
2 \dfrac 1 3 -> 7/3, , exact ; \frac{ 3 }{ 4 } -> 3/4, , exact ; \frac{-3}{4} -> -3/4, , exact ;
\tfrac34 -> 3/4, , exact ; -\frac34 -> -3/4, , exact ; 2e3 -> 2000, , 0 ; 2.5e3 -> 2500, , 0 ;
2.5 x 10^3 -> 2500, , 0 ; 2.5 × 10^{-2} -> 0.025, , 3 ; 2.5*10^+1 -> 25, , 0 ; 2.55 \times 10 -> none ;
1.5 \cdot 10^{2} -> 150, , 0 ; 1.5678e2 -> 156.78, , 2 ; 2 million -> 2000000, , -6 ;
2.5 million -> 2500000, , -5 ; 2.5 Millions -> 2500000, , -5 ; 3 dozen -> 36, , -1 ; 3 dozens -> 36, , -1 ;
2 score -> 40, , -1 ; 2 gross -> 288, , -2 ; 2 Gross -> 288, , -2 ; 5 hundred -> 500, , -2 ; 5k -> 5000, , -3 ;
5 K -> 5000, , -3 ;
5M -> 5000000, , -6 ; 5 m -> 5, m, 0 ; 5mn -> 5000000, , -6 ; 5mil -> 5000000, , -6 ; 5B -> 5000000000, , -9 ;
5bn -> 5000000000, , -9 ; 5 billion -> 5000000000, , -9 ; 5 trillion -> 5000000000000, , -12 ;
2 lakh -> 200000, , -5 ; 2 crore -> 20000000, , -7 ; 2 hundred thousand -> 200000, , -5 ;
1,234百 -> 123400, , -2 ; 1,234千 -> 1234000, , -3 ; 3万 -> 30000, , 0 ; 1,234万 -> 12340000, , -4 ;
1,234亿 -> 123400000000, , -8 ; 1千米 -> 1000, 米, 0 ; 1 千克 -> 1000, 克, -3 ; 1,200打 -> 14400, , -1 ;
$5 -> 5, $, 0 ; -$5 -> -5, $, 0 ; $-5 -> -5, $, 0 ; US$ 5 -> 5, $, 0 ; 5 USD -> 5, $, 0 ; 5 dollars -> 5, $, 0 ;
$5 dollars -> 5, $, 0 ; $5 USD -> 5, $, 0 ; $5 euros -> none ; $5 apples -> none ; €5.50 -> 5.5, €, 2 ;
5 eur -> 5, €, 0 ; 5 euros -> 5, €, 0 ; £5 -> 5, £, 0 ; 5 pounds -> 5, £, 0 ; ¥5 -> 5, ¥, 0 ;
5 yuan -> 5, ¥, 0 ; 5 rmb -> 5, ¥, 0 ; 5元 -> 5, ¥, 0 ; ₹5 -> 5, ₹, 0 ; Rs. 5 -> 5, ₹, 0 ; Rs 5 -> 5, ₹, 0 ;
RM5 -> 5, RM, 0 ; 5% -> 5, percent, 0 ; 5 percent -> 5, percent, 0 ; 5 per cent -> 5, percent, 0 ;
5 pct -> 5, percent, 0 ; 5 PERCENT -> 5, percent, 0 ; 1/2 % -> 1/2, percent, exact ; 5 cm -> 5, cm, 0 ;
5 Cm -> 5, cm, 0 ; 5 (cm) -> 5, cm, 0 ; 5 [cm] -> 5, cm, 0 ; 5 cm. -> 5, cm, 0 ; 5 cats . -> 5, cat, 0 ;
5 cm_ -> none ; 5{cm} -> 5, cm, 0 ;
5 hours -> 5, hour, 0 ; 90° -> 90, °, 0 ; 90^\circ -> 90, ^\circ, 0 ; 90^{\circ} -> 90, ^{\circ}, 0 ;
5 red cubes -> 5, red cube, 0 ; 5 square meters -> 5, sq meter, 0 ; 5 cm^2 -> 5, cm^2, 0 ;
5 cm^{2} -> 5, cm^2, 0 ; 5 km/h -> 5, km/h, 0 ; 5 m/s^2 -> 5, m/s^2, 0 ; 5 只 -> 5, 只, 0 ;
5 buses -> 5, buse, 0 ; 5 bus -> 5, bus, 0 ; 5 glass -> 5, glass, 0 ; five -> 5, , 0 ; minus five -> -5, , 0 ;
half -> 1/2, , exact ; 五 -> 5, , 0 ; x = 5 -> 5, , 0 ; AB = 5 -> 5, , 0 ; area = 5 -> 5, , 0 ;
\angle ABC = 50 -> 50, , 0 ; ∠A = 50 -> 50, , 0 ; x == 5 -> none ; x = y = 5 -> none ; x -> none ; - -> none ;
5 or 6 -> none ; 5 to 6 -> none ; 5 and 6 -> none ; 5 - 3 -> none ; 5x -> none ; 5\pi -> none ; 5 more -> none ;
5 times -> 5, time, 0 ; not 5 -> none ; 5 not -> none ; 1990s -> none ; 5th -> none ; 3rd place -> none ;
21st -> none ; 22nd -> none ; 300 BC -> none ; 300 B.C.E. -> none ; 300BCE -> none ; 12+ -> none ;
5 am -> none ; 5pm -> none ; 5 p.m. -> none ; 5 a.m -> none ; 3/0 -> none ; 1 1/0 -> none ;
\frac{1}{0} -> none ; 1,23 -> none ; 12:30 -> none ; 5 isn't -> none ; 5 cm or so -> none
"""
AROUND = {" 12.50 ": ("12.5", "", 2), " x = 5 ": ("5", "", 0), " five ": ("5", "", 0), "": None}


def cells(table: str) -> dict[str, str]:
    return dict(cell.strip().split(" -> ") for cell in table.replace("\n", " ").split(" ;"))


def test_a_number_is_read_with_its_unit_and_decimals():
    cases: dict = {**AROUND}
    for text, wanted in cells(NUMBERS).items():
        value, unit, decimals = wanted.split(", ") if wanted != "none" else ("", "", "")
        cases[text] = (value, unit, None if decimals == "exact" else int(decimals)) if value else None
    for text, wanted in cases.items():
        assert parse_number(text) == (wanted and Number(Fraction(wanted[0]), *wanted[1:])), text


def test_a_number_of_a_thousand_digits_is_one_and_a_longer_one_text():
    assert parse_number("1" * 1000) == (int("1" * 1000), "", 0)
    assert parse_number("1" * 1001) is None
    assert parse_number("1" * 15) == (int("1" * 15), "", 0)
    assert parse_number(f"0.{'1' * 16}") == (Fraction(f"0.{'1' * 16}"), "", 16)


WORDS_THAT_ARE_NO_UNIT = (
    "is are was were be been has have does do can may might no not never nor or and to than least most more less fewer "
    "greater higher lower over under above below between from except excluding without but plus minus by squared cubed "
    "factorial power root half halves third thirds quarter quarters wrong incorrect false maybe if pi sqrt infinity "
    "mill"
)


@pytest.mark.parametrize("word", WORDS_THAT_ARE_NO_UNIT.split())
def test_a_word_that_goes_on_with_a_sentence_is_no_unit(word):
    assert parse_number(f"5 things {word}") is None
    assert parse_number(f"5 {word} things") is None
    assert parse_number(f"5 x{word}y") is not None  # inside another word


@pytest.mark.parametrize("letter", "的十几不非没无是或和与至到超多余以约错除负半")
def test_a_chinese_word_that_changes_a_number_is_no_unit(letter):
    assert parse_number(f"5 {letter}个") is None
    assert parse_number("5 个") == (5, "个", 0)


def test_only_x_equals_names_what_it_gives_a_value():
    assert [assigned_name(text) for text in ("x = 5", " \\x1 =5", "AB=2", "x == 5", "5", "area = 5")] == [
        *("x", "x1", "AB", None, None, None)
    ]


@pytest.mark.parametrize(
    ("text", "formula", "unit"),
    [
        ("2√3 cm", "2√3", "cm"),
        ("2√3cm", "2√3", "cm"),
        ("2\\sqrt{3} meters", "2\\sqrt{3}", "meter"),
        ("6π cm^2", "6π", "cm"),
        ("6π cm2", "6π", "cm"),
        ("3! kg", "3!", "kg"),
        ("(2+3) km", "(2+3)", "km"),
        ("12 percent", "12", "percent"),
        ("12i ms", "12i", "ms"),
        ("30° deg", "30°", "deg"),
        ("2√3", "2√3", ""),
        ("x cm", "x cm", ""),
        ("2√3 apples", "2√3 apples", ""),
        ("2√3 m", "2√3 m", ""),
    ],
)
def test_a_formula_is_parted_from_its_unit(text, formula, unit):
    assert split_unit(text) == (formula, unit)


# ---------------------------------------------------------------------------------------------------- in sentences

SENTENCES = r"""
There are 5 cats -> 5 ; In the picture, there are 5 cats -> 5 ; there is only 1 cat on 2 mats -> 1 ;
there was exactly 3 cats of 4 -> 3 ; there were a total of 3 cats of 4 -> 3 ; there are 5 or 6 cats -> none ;
there are 5 to 6 cats -> none ; there are 5 and 6 cats -> none ; The sum of 2 and 3 is 5 -> 5 ;
The sum of 2 and 3 is about 5 -> 5 ; The sum of 2 and 3 is exactly 5 -> 5 ; The sum of 2 and 3 is only 5 -> 5 ;
The sum of 2 and 3 is approximately 5 -> 5 ; The sum of 2 and 3 is around 5 -> 5 ;
The sum of 2 and 3 is roughly 5 -> 5 ; The sum of 2 and 3 equals 5 -> 5 ;
The sum of 2 and 3 is equal to 5. -> 5 ; 2 and 3 equal 5 -> 5 ; 2 and 3 equal to 5 -> 5 ; 2 and 3 are 5 -> 5 ;
2 and 3 were -5 -> -5 ; of 2 the price was $5 -> 5 ; of 2 it must be \frac{1}{2} -> 1/2 ; 5 is the answer -> 5 ;
5 is my answer -> 5 ; 5 is the final answer -> 5 ; 5 is the correct answer -> 5 ; 5 is the right answer -> 5 ;
1/2 is the answer -> 1/2 ; The sum of 2 and 3 is 5_ -> none ;
 2*3 is my answer -> 6 ;
5 cats with all 3 dogs -> 5 ; 5 cats which all 3 dogs see -> 5 ; 5 cats where all 3 dogs are -> 5 ;
5 cats when all 3 dogs bark -> 5 ; 5 cats for 3 dogs -> none ; 5 cats for all 3 dogs -> 5 ;
5 cats in all 3 rooms -> 5 ; 5 cats on all 3 mats -> 5 ; 5 cats at all 3 doors -> 5 ;
5 cats at least with all -> none ; I see 5 cats -> 5 ; I see 5 cats because 3 left -> 5 ; I see five cats -> 5 ;
I see $5 there -> 5 ; I see 5% there -> 5 ; I see -5 there -> -5 ; I see 5 million there -> 5000000 ;
not 4 but 5 -> 5 ; I see 5 cats and 3 dogs -> none ; I see at least 5 cats -> none ; it is at least 5 -> none ;
it is up to 5 -> none ; it is no more than 5 -> none ; it is no less than 5 -> none ;
it is greater than or equal to 5 -> none ; the number 3 squared -> none ; see the 1990s -> none ;
see it in 300 BC -> none ; with 2 it is 2*3. -> 6 ; There are 5 million people -> 5000000 ;
There are 2 dozen eggs -> 24 ; The sum is 5 hundred -> 500 ; I see 5 thousand cats -> 5000 ;
the page A5 -> none ; I see 1/2 a cat -> none ; 图中 5 只猫 -> 5 ; I5 -> none ; it is not 5 -> none
"""


def test_the_number_a_sentence_answers_with():
    for text, wanted in {**cells(SENTENCES), "": "none"}.items():
        found = number_in_sentence(text)
        assert (found and found.value) == (None if wanted == "none" else Fraction(wanted)), text


def test_a_long_text_answers_with_no_number():
    text = "I see 5 cats" + " there" * 48
    assert len(text) == 300 and number_in_sentence(text).value == 5
    assert number_in_sentence(text + "s") is None


BOUNDS = (
    "5 than, at least 5, at most 5, over 5, under 5, above 5, below 5, up to 5, minimum 5, maximum 5, exceed 5, "
    "exceeds 5, exceeding 5, between 5 x, from 5, too 5, enough 5, except 5, without 5, plus or minus 5, 5 per, <5, "
    ">5, ≤5, ≥5, ≠5, ±5, \\ge 5, \\geq 5, \\le 5, \\leq 5, \\ne 5, \\neq 5, \\pm 5, \\gt 5, \\lt 5, +/-5, !=5, 5+, 5 +."
)
BOUNDS_IN_CHINESE = "至少 至多 最多 最少 大于 小于 超过 不到 以上 以下 以内 少于 多于 多 余 几 低于 高于 正负 或 之间"


@pytest.mark.parametrize("text", [*BOUNDS.split(", "), *BOUNDS_IN_CHINESE.split()])
def test_a_bound_is_no_number(text):
    sentence = f"cats {text}" if "5" in text else f"猫 {text} 5 只"
    assert number_in_sentence(sentence) is None
    assert not right(sentence, "5")
    for more in ("more", "less", "fewer", "so", "over", "above", "below", "under", "higher", "lower"):
        assert number_in_sentence(f"I see 5 or {more}") is None


OPERATIONS = (
    "sqrt root roots log ln lg sin cos tan squared cubed factorial twice thrice double triple times plus minus "
    "negative half halves third thirds quarter quarters past divided multiplied power b z x = * ^ \\ √ ! { } | 平方 "
    "立方 根号 倍 除 乘 负 的倍"
)


@pytest.mark.parametrize("text", OPERATIONS.split())
def test_what_is_worked_with_is_no_lone_number(text):
    assert number_in_sentence(f"see {text} 5 there") is None
    assert number_in_sentence("see it 5 there").value == 5


@pytest.mark.parametrize(
    "text", ["see 5 + x", "see 5 - x", "see 5 / x", "see 5 × x", "see 5 ÷ x", "see 5 · x", "is it 5?", "see 5 a.m. it"]
)
def test_a_sign_behind_a_number_goes_on_with_it(text):
    assert number_in_sentence(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("3 squared", 9),
        ("√9", 3),
        ("2 x 3", 6),
        ("2^3", 8),
        ("2 - 5 cats", None),
        ("5-7", None),  # a range
        ("5.5 – 7", None),
        ("5 - 7", None),
        ("5-7+1", -1),  # begins with a range
        ("|-3|", 3),
        ("(3)", 3),
        ("3!", 6),
        ("twice 4", 8),
        ("hello", None),
        ("log 100", 2),
        ("5 cats", 5),
        ("I see 5 cats", 5),
        ("x = 2·3", 6),
        ("<5", None),
        ("\\le 5", None),
        ("\\geq 5", None),
        ("\\pm 5", None),
        ("~5", None),
        ("~ 5 cats", None),
    ],
)
def test_the_value_of_a_final_answer(text, value):
    found = value_of(text)
    assert found is None if value is None else found == pytest.approx(value)


def test_an_irrational_value_is_a_value_and_no_number():
    assert read_number("√2") is None and value_of("√2") == pytest.approx(2**0.5)
    assert number_value_of_formula("√2") == pytest.approx(2**0.5)
    assert number_value_of_formula("12") is None
    assert read_number("√9") == (3, "", None) and read_number("the first n with n \\ge 4 is 5") == (5, "", 0)


# ------------------------------------------------------------------------------------------------------- comparing


def number(text: str) -> Number:
    return parse_number(text)


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("5 cm", "0.05 m", True),
        ("5 cm", "0.06 m", False),
        ("5 cm", "50 mm", True),
        ("5 cm", "5", True),
        ("5 cm", "5 kg", False),
        ("5 length", "5 m", False),  # the name of a dimension is no unit of it
        ("5 apples", "5 pears", False),
        ("5 apples", "5 apple", True),
        ("5 cm", "5 apples", False),
        ("50%", "0.5", True),
        ("0.5", "50%", True),
        ("0.5%", "0.5", False),
        ("0.5", "0.5%", False),
        ("1%", "1", False),
        ("-0.5", "-0.5%", False),
        ("2%", "2", True),
        ("2", "2%", True),
        ("-2", "-2%", True),
        ("5%", "5 cm", False),
        ("3.14", "3.14159", True),
        ("3.14159", "3.14", True),
        ("3.1", "3.14159", False),
        ("3.15", "3.14159", False),
        ("1/3", "0.33", True),
        ("0.33", "1/3", True),
        ("0.3", "1/3", False),
        ("0.3", "0.3", True),
        ("1/8", "0.13", True),
        ("0.13", "1/8", False),  # an eighth has three decimals, and all may be given
        ("12.3", "12", False),
        ("12", "12.3", False),
        ("12.0", "12", True),
        ("1200", "1.2 thousand", True),
        ("0.005", "0.01", True),
        ("0.0049", "0.01", False),
    ],
)
def test_two_numbers_are_the_same_where_the_finer_rounds_to_the_coarser(one, other, equal):
    assert equal_numbers(number(one), number(other)) is equal


MEASURES = """
1/1000 m = mm millimeter millimetre 毫米
1/100 m = cm centimeter centimetre 厘米
1 m = meter metre 米
1000 m = km kilometer kilometre 公里
1/1000 g = mg
1 g = gram 克
1000 g = kg kilogram 公斤
1/1000 s = ms
1 s = sec second 秒
60 s = min minute 分钟
3600 s = h hr hour 小时
1/1000 l = ml milliliter
1 l = liter litre
1 ° = degree deg ^\\circ ^{\\circ} 度
"""


@pytest.mark.parametrize("line", MEASURES.strip().splitlines())
def test_each_unit_is_so_many_of_its_base(line):
    (size, base), names = line.split(" = ")[0].split(" "), line.split(" = ")[1].split(" ")
    wanted = Number(Fraction(size), base, None)
    for name in names:
        assert parse_number(f"1 {name}") == (1, name, 0)
        assert equal_numbers(Number(Fraction(1), name, 0), wanted)
        assert equal_numbers(wanted, Number(Fraction(1), name, 0))
        for other in ("m", "g", "s", "l", "°"):
            assert equal_numbers(Number(Fraction(7), name, 0), Number(7 * Fraction(size), other, None)) is (
                base == other
            )


def test_no_number_equals_none():
    assert not equal_numbers(None, number("5")) and not equal_numbers(number("5"), None)
    assert not equal_numbers(None, None)


@pytest.mark.parametrize("kind", [Fraction, float])
def test_close_is_a_share_of_the_second_or_of_one(kind):
    for given, wanted, close in (
        *((105, 100, True), (95, 100, True), (106, 100, False), (94, 100, False), (100, 106, False)),
        *((-105, -100, True), (0.04, 0, True), (0.06, 0, False), (0.5, 0.46, True), (0.5, 0.44, False)),
    ):
        assert is_close(kind(given), kind(wanted), 0.0501) is close
    assert not is_close(Fraction(10) ** 400, 1.0, 0.05)
    assert is_close(Fraction(10) ** 400, Fraction(10) ** 400, 0.0)


def test_a_half_rounds_both_ways():
    for fine, is_rounded in (("3.135", True), ("3.145", True), ("3.1349", False), ("3.1451", False)):
        assert rounds_to(Fraction(fine), number("3.14")) is is_rounded
    assert rounds_to(Fraction("2.5"), Number(Fraction(3), "", None)) and not rounds_to(Fraction("2.4"), number("3"))
    assert rounds_to(Fraction(2_450_000), number("2.5 million"))
    assert not rounds_to(Fraction(2_449_999), number("2.5 million"))


def test_a_value_is_shown_in_few_characters():
    assert shown(Fraction(1, 3)) == "0.333333333333"
    assert shown(Fraction(10) ** 400) == "a number beyond 10^308"


@pytest.mark.parametrize(
    "text", ["2^x", "√x", "πx", "x=y", "x*y", "x+y", "x/y", "sqrt x", "2 pi x", "2:3", "2 : 3", "\\x"]
)
def test_what_may_be_a_formula_is_left_to_formulas(text):
    assert decide_number(text, "5", None) is None
    assert decide_number(f"at least {text}", "5", None) == (False, "no number, expected 5")


def test_words_are_no_number_and_it_is_said():
    assert decide_number("cats", "5", None) == (False, "no number, expected 5")
    assert decide_number("a 2:3 mix", "5", None) == (False, "no number, expected 5")
    assert decide_number("pink", "5", None) == (False, "no number, expected 5")
    assert decide_number("5.0", "5", None) == (True, "5, expected 5")
    assert decide_number("6", "5", None) == (False, "6, expected 5")
    assert decide_number("6", "five cats and dogs", None) is None
