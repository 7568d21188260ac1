"""Formulas by value: what each sign of the grammar means, where a value ends, and which formulas are the same."""

import math
import re
from fractions import Fraction

import pytest

from internvl_mpo.answers import arithmetic
from internvl_mpo.answers.algebra import closed_value, compare_formulas
from internvl_mpo.answers.arithmetic import NoFormulaError
from internvl_mpo.answers.expressions import MAX_DEPTH
from internvl_mpo.answers.formulas import decide_math, same_formula

# ~ behind a value that is a float
VALUES = r"""
2+3*4 -> 14 ; 2-3-4 -> -5 ; 2*3/4 -> 3/2 ; 12/3/2 -> 2 ; -2^2 -> -4 ; (-2)^2 -> 4 ; 2^3^2 -> 512 ; 2^-1 -> 1/2 ;
2^{-1} -> 1/2 ; --2 -> 2 ; -+2 -> -2 ; +-2 -> -2 ; 2\frac{1}{2} -> 5/2 ; 2 \frac12 -> 5/2 ;
2\frac{ 1 }{ 2 } -> 5/2 ; 2.5\frac12 -> 5/4 ; \frac34 -> 3/4 ; \frac{3}{4} -> 3/4 ; \frac{3}4 -> 3/4 ;
\dfrac{3}{4} -> 3/4 ; \tfrac34 -> 3/4 ; \frac123 -> none ; 2\frac{1}{0} -> none ; 1/0 -> none ; 0/5 -> 0 ;
0^0 -> 1 ; 0^-1 -> none ; 5^0 -> 1 ; (1/2)^0 -> 1 ; √4 -> 2 ; √2 -> 1.41421356~ ; √(9/4) -> 3/2 ; ∛8 -> 2 ;
\sqrt[3]{27} -> 3 ; \sqrt[3]{-8} -> -2 ; \sqrt{-4} -> none ; \sqrt[4]{16} -> 2 ; \sqrt[0]{4} -> none ;
\sqrt[-2]{4} -> 0.5~ ; \sqrt[1/2]{4} -> 16~ ; 4^{1/2} -> 2 ; 8^{1/3} -> 2 ; 8^{2/3} -> 4~ ; (-8)^{1/3} -> -2 ;
2^{0.5} -> 1.41421356~ ; sqrt 9 -> 3 ; sqrt(9)+1 -> 4 ; \sqrt 9 \cdot 2 -> 6 ; 3! -> 6 ; 0! -> 1 ; -3! -> -6 ;
(1/2)! -> none ; (-3)! -> none ; 1000!/999! -> 1000 ; 1001! -> none ; 3!! -> 720 ; 3!^2 -> 36 ; 2^3! -> 40320 ;
5 × 3 -> 15 ; 5·3 -> 15 ; 5∙3 -> 15 ; 5⋅3 -> 15 ; 5\times3 -> 15 ; 5\cdot 3 -> 15 ; 5\ast 3 -> 15 ; 5*3 -> 15 ;
5**3 -> 125 ; 5 x 3 -> 15 ; 5X3 -> 15 ; 6÷3 -> 2 ; 6\div 3 -> 2 ; 6∕3 -> 2 ; 6⁄3 -> 2 ; 6:3 -> 2 ;
\left(2+3\right) -> 5 ; \displaystyle 5 -> 5 ; 2\,+\,3 -> 5 ; 2\;3 -> none ; $5$ -> 5 ; 2~+3 -> 5 ;
\pi -> 3.14159265~ ; π -> 3.14159265~ ; 2π -> 6.28318531~ ; 2\pi -> 6.28318531~ ; pi -> 3.14159265~ ;
2 pi -> 6.28318531~ ; e -> 2.71828183~ ; e^2 -> 7.3890561~ ; i -> none ; i*i -> -1~ ; i^2 -> -1~ ; ln e -> 1~ ;
\ln(e^2) -> 2~ ; ln 1 -> 0~ ; ln 0 -> none ; exp 1 -> 2.71828183~ ; \exp(2) -> 7.3890561~ ; log 100 -> 2~ ;
\log 1000 -> 3~ ; \lg 10 -> 1~ ; lg100 -> 2~ ; \log_2 8 -> 3~ ; \log_{2}8 -> 3~ ; log_2(8) -> 3~ ;
log_1 8 -> none ; log_0 8 -> none ; log_2 0 -> none ; log(-1) -> none ; \sin 0 -> 0~ ; sin(π/2) -> 1~ ;
\sin 30° -> 0.5~ ; \sin 30 -> -0.988031624~ ; \sin^2 30° -> 0.25~ ; \cos 60° -> 0.5~ ; cos 60^\circ -> 0.5~ ;
\cos 60^{\circ} -> 0.5~ ; cos 60\degree -> 0.5~ ; tan 45° -> 1~ ; cot 45° -> 1~ ; sec 60° -> 2~ ;
csc 30° -> 2~ ; \arcsin 1 -> 1.57079633~ ; \arccos 0 -> 1.57079633~ ; \arctan 1 -> 0.785398163~ ;
arcsin(1) -> 1.57079633~ ; sin 2·3 -> 2.72789228~ ; \sin π/2 -> 0~ ; \sin \frac{π}{2} -> 1~ ; \sin 2\pi -> 0~ ;
30° -> 30 ; ln 30° -> 3.40119738~ ; sin(30)° -> 0.5~ ; sin 30°+ 30° -> 30.5~ ; |-3| -> 3 ; |3-5| -> 2 ;
\vert -2\vert -> 2 ; \lvert -2\rvert -> 2 ; \mid -2 \mid -> 2 ; |3+4i| -> 5~ ; 1,234 -> 1234 ;
1,234.5 -> 2469/2 ; 1,23 -> none ; .5 -> 1/2 ; 1 2 -> none ; 1e5 -> none ; 1e-5 -> none ; 1 e -> 2.71828183~ ;
12,345,678 -> 12345678 ; 3 + 4 = 7 -> 7 ; 7 = 3+4 -> 7 ; x = 5 -> 5 ; x=2+3 -> 5 ; x_1 = 5 -> 5 ;
x_{12} = 3 -> 3 ; f(x) = 5 -> 5 ; x = y = 5 -> none ; 2:30 -> none ; 12:59 -> none ; 2:3 -> 2/3 ; 12:60 -> 1/5 ;
2=2=2 -> 2 ; 3<4 -> none ; 1<2<3 -> none ; x -> none ; x+1 -> none ; \alpha -> none ; 2 + -> none ; (2 -> none ;
2) -> none ; [2] -> 2 ; {2} -> 2 ; (2] -> none ; () -> none ; \foo 3 -> none ; \frac -> none ; \sqrt -> none ;
5_2 -> none ; a@b -> none ; 2^{ -> none ; θ -> none ; φ -> none ; 9^{9^9} -> none ; 10^{7000} -> none ;
2^{20000} -> none ; 2^{19999} -> none ; 2^{-20001} -> none ; 1.0000001^{100000} -> none ; 10^{10^{10}} -> none ;
(-1)^{10^{10}} -> 1 ; exp 1000 -> none ; \cosh 2 -> none ; 2(3) -> 6 ; 2(3)(4) -> 24 ; (2)(3) -> 6 ; 2[3] -> 6 ;
-\sqrt{-4} -> none ; 2-3i -> none ; -i -> none ;
2^+3 -> 8 ; 1+1=2=3 -> 3 ; \exp 709.7+\exp 709.7 -> none ;
 12:30+1 -> 7/5 ; \sqrt[1]{4} -> 4 ; 1^{1/2} -> 1 ; 0^{-1/2} -> none ;
(1+2)/3 -> 1 ; \frac{1+2}{3} -> 1 ; 2e -> 5.43656366~ ; 3i -> none ; 1/2e -> 1.35914091~ ; x/x -> none
"""
# == equal, != unequal, ?? both too large to say, ## one is no formula
PAIRS = r"""
(x-1)(x+1) == x^2-1 ; 2x+3 == 3+2x ; x^2 != x^3 ; |x| != x ; \sqrt{x^2} != x ; \sqrt{x^2} == |x| ;
y=2x == 2x-y=0 ; y=2x == 2x=y ; y=2x != y=3x ; y=2x == 2x ; y=2x != z=2x ; 2x-y=0 != y=3x ; y=2x != 3x-z=0 ;
x>3 == 3<x ; x>3 != x<3 ; 2x>6 == x>3 ; -x<-3 == x>3 ; -x>-3 != x>3 ; x≥3 == 3≤x ; x≥3 != 3<x ; x≥3 != x≤3 ;
x≠3 == 3≠x ; 2x≠6 == x≠3 ; -x≠-3 == x≠3 ; x+3=6 == 2x+6=12 ; x+y=1 == 2x+2y=2 ; x+y=1 == 1-x-y=0 ;
y=2x == 2x+y-y ; \alphab ## \alphab ; \sin(2)x == x\sin 2 ; \sin x\frac12 == \sin\frac{x}{2} ;
 x/0=1 != y/0=2 ; \exp 400*\exp 400 ?? \exp 500*\exp 500 ; \foo ## \bar ;
 x__1 != x_1 ; 2\frac{x}{3} == \frac{2x}{3} ; 2\frac{1}{2}x == \frac{5x}{2} ;
 0^x != 0 ; \sin{2}x == x\sin{2} ; \sin[2]x == x\sin(2) ;
x+y=1 != x+y=2 ; x^2=4 != x=2 ; x+1=4 == x=3 ; x+1=4 != 3 ; x=3 == 3 ; x=3 != y=3 ; x=3 != x=4 ;
x+1=x+1 == x+2=x+2 ; x+1=x+1 != x=3 ; \sin^2 x+\cos^2 x == 1 ; \sin^2 30° == 1/4 ; \sin^{-1} x == 1/\sin x ;
a/b != b/a ; ab == ba ; \frac{a}{b} == a/b ; x_1+x_2 == x_2+x_1 ; x_1 != x_2 ; x_{1} == x_1 ; x_12 == x_{12} ;
α+β == β+α ; \alpha+\beta == \beta+\alpha ; \alpha != \beta ; e^{x} == \exp x ; e^x e^y == e^{x+y} ;
x^2y == yx^2 ; 2^x != x^2 ; 1/2x == x/2 ; 1/(2x) != 1/2x ; \frac1x == x^{-1} ; x^{1/2} == \sqrt x ;
x^{-1/2} == 1/\sqrt{x} ; \sqrt[3]{x^3} != x ; x! != x ; (x+y)^2 == x^2+2xy+y^2 ; (x+y)^2 != x^2+y^2 ;
\ln x^2 == 2\ln|x| ; \log_2 x == \ln x/\ln 2 ; \lg x == \log x ; \ln x != \log x ; \tan x == \sin x/\cos x ;
\cot x == 1/\tan x ; \sec x == 1/\cos x ; \csc x == 1/\sin x ; \sin 2x == 2\sin x\cos x ; \sin(-x) == -\sin x ;
\arcsin x != \arccos x ; x/0 != y/0 ; 0x == 0 ; x-x == 0 ; x-x=0 == y-y=0 ; i^2 == -1 ; (1+i)^2 == 2i ;
2i != 3i ; x+1 == x+1.0000000008 ; x+1 != x+1.0000000015 ; |x|=x != -2x=0 ; 10^{400} != \sqrt2 ;
x+1 != x+1.00000001 ; 10^{12}+1 != 10^{12}+2 ; 10^{12}x == 10^{12}x+1 ; 3.0 == 3 ; 1/3 != 0.3333333333333 ;
\sqrt2 == 1.4142135624 ; 9^{9^9} ?? 8^{8^8} ; 9^{9^9} != 3 ; 3 != 9^{9^9} ; 9^{9^9}x ?? 8^{8^8}x ;
9^{9^9}x != x ; x != 9^{9^9}x ; x=9^{9^9} ?? x=8^{8^8} ; 1/0 != 1/0 ; 1/0 != 9^{9^9} ; x=x+1 ## 1 ;
x<y<z ## x<y ; x=1<2 ## 1 ; a@b ## 1 ; 3_4 ## 3_4 ; (x)_2 ## 2(x)_4 ; 1,23 ## 5 ; 2:30 ## 5/2 ; 1 < 2 == 2 > 1 ;
1 = 2 == 3 = 2 ; x > y == y < x ; x > y != y > x ; xy > 1 == 1 < yx ; x==y ## x=y ; 2=x == x=2 ; π=x == x=π ;
|x-1|<2 == 2>|x-1| ; x \le 5 == x <= 5 ; x \leq 5 == x \leqslant 5 ; x \ge 5 == x >= 5 ;
x \geq 5 == x \geqslant 5 ; x \lt 5 == x < 5 ; x \gt 5 == x > 5 ; x \neq 5 == x!=5 ; x \ne 5 == x ≠ 5
"""


def test_a_formula_has_its_value_and_what_is_none_has_none():
    for cell in VALUES.replace("\n", " ").split(" ;"):
        text, wanted = cell.strip().split(" -> ")
        found = closed_value(text)
        if wanted.endswith("~"):
            assert type(found) is float and found == pytest.approx(float(wanted[:-1]), rel=1e-8, abs=1e-9), text
        else:
            assert found == (None if wanted == "none" else Fraction(wanted)), text
            assert not isinstance(found, float), text


def compared(one: str, other: str) -> str:
    try:
        found = compare_formulas(one, other)
    except NoFormulaError:
        return "##"
    return "??" if found is None else "==" if found.equal else "!="


def test_formulas_are_the_same_or_not_whichever_is_given():
    for cell in PAIRS.replace("\n", " ").split(" ;"):
        one, sign, other = re.split(r" (==|!=|\?\?|##) ", cell.strip())
        assert compared(one, other) == compared(other, one) == sign, cell


@pytest.mark.parametrize(
    ("largest", "too_large"),
    [
        ("2^{10000}", "2^{10001}"),
        ("2^{-9999}", "2^{-10001}"),
        ("(1/2)^{9999}", "(1/2)^{10001}"),
        ("1000!", "1001!"),
        ("2^{9999}*2^{9999}*2", "2^{9999}*2^{9999}*4"),
        ("2^{-9999}*2^{-9999}/2", "2^{-9999}*2^{-9999}/4"),
        ("1" * 100 + "+1", "1" * 200 + "+1"),
        ("\\exp 700", "\\exp 710"),
        ("(1)" * (MAX_DEPTH + 1), "(1)" * 5 + "(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH),
        ("(" * (MAX_DEPTH - 1) + "1" + ")" * (MAX_DEPTH - 1), "(" * MAX_DEPTH + "1" + ")" * MAX_DEPTH),
    ],
)
def test_a_value_that_no_computer_should_hold_is_seen_before_it_is_calculated(largest, too_large):
    assert closed_value(largest) is not None
    assert closed_value(too_large) is None


def test_a_formula_of_more_than_200_characters_is_none():
    for length, is_read in ((200, True), (201, False)):
        assert (closed_value("1" * length) is not None) is is_read
    assert closed_value(" x = 5 ") == 5 and closed_value(" 12:30 ") is None
    assert arithmetic.fraction("1,234") == 1234 and arithmetic.fraction(".5") == Fraction(1, 2)


def test_roots_are_exact_where_they_are_numbers():
    for degree in (2, 3, 7, 64):
        assert closed_value(f"\\sqrt[{degree}]{{{2**degree}/{3**degree}}}") == Fraction(2, 3)
    assert type(closed_value("\\sqrt[65]{1}")) is float
    assert closed_value("\\sqrt{0}") == 0 and type(closed_value("\\sqrt{0}")) is Fraction
    assert type(closed_value("\\sqrt{10^{400}}")) is not Fraction
    assert closed_value("\\sqrt[3]{-27/8}") == Fraction(-3, 2)
    assert closed_value("\\sqrt{1/2^{902}}") == pytest.approx(2.0**-451, rel=1e-9)
    assert closed_value("\\sqrt[3]{-2}") == pytest.approx(-(2 ** (1 / 3)))


def test_the_same_formula_is_looked_for_where_one_may_be():
    assert same_formula("2x", "x*2") and same_formula("twice 3", "2*3") and same_formula("|x|", "|x|")
    assert not same_formula("2x", "3x")
    assert not same_formula("cats", "cats")  # no sign of a formula
    assert not same_formula("a@b", "2^x")
    assert not same_formula("9^{9^{9}}", "8^{8^{8}}")
    assert not same_formula("1.41", "\\sqrt{2}")
    x = "+".join(["x"] * 200)
    assert not same_formula(x + "+0", x)  # longer than a formula
    assert not same_formula("x+" + "y" * 400, "y" * 400 + "+x")


@pytest.mark.parametrize(
    ("prediction", "gold", "right", "reason"),
    [
        ("2x", "x+x", True, "equal formulas"),
        ("2x", "3x", False, "unequal formulas"),
        ("1.41", "\\sqrt{2}", True, "decimal value of the formula"),
        ("\\sqrt{2}", "1.41", True, "decimal value of the formula"),
        ("1.4", "\\sqrt{2}", False, "unequal formulas"),
        ("1.42", "\\sqrt{2}", False, "unequal formulas"),
        ("2\\sqrt{3} cm", "\\sqrt{12} cm", True, "equal formulas"),
        ("2\\sqrt{3} cm", "\\sqrt{12}", True, "equal formulas"),
        ("2\\sqrt{3}", "\\sqrt{12} cm", True, "equal formulas"),
        ("2\\sqrt{3} cm", "2\\sqrt{3} km", False, "cm, expected km"),
        ("9^{9^{9}}", "8^{8^{8}}", None, "both are too large to compare"),
        ("at least \\sqrt{4}", "\\sqrt{4}", "none", ""),
        ("\\sqrt{4}", "at least \\sqrt{4}", "none", ""),
        ("x>3", "3<x", True, "equal formulas"),
        ("cats", "dogs", "none", ""),
        ("a@b", "2^x", "none", ""),
        ("2x", "3.14", False, "unequal formulas"),
        ("twice 3", "2*3", True, "equal formulas"),
        ("2*3", "twice 3", True, "equal formulas"),
        ("x^2", "x" * 401, "none", ""),
    ],
)
def test_the_rule_for_formulas(prediction, gold, right, reason):
    assert decide_math(prediction, gold, None) == (None if right == "none" else (right, reason))


@pytest.mark.parametrize(
    "text",
    [
        *("\\x", "2^x", "√x", "π", "x=y", "x*y", "x+y", "x/y", "x<y", "x>y", "x≤y", "x≥y", "x≠y", "|x|", "2 a", "2a"),
        *("2 pi", "sqrt x", "log x", "ln x", "lg x", "sin x", "cos x", "tan x", "3!", "root x"),
    ],
)
def test_each_sign_of_a_formula_makes_one(text):
    from internvl_mpo.answers.formulas import _are_formulas

    assert _are_formulas(text, "x") and _are_formulas("x", text)
    assert not _are_formulas("x", "logs") and not _are_formulas("x", "pin") and not _are_formulas("5", "roots")


def test_a_greek_letter_is_a_letter():
    names = "alpha beta gamma delta theta lambda mu phi omega sigma tau rho epsilon"
    for name in names.split():
        letter = f"\\{name}"
        assert compared(f"2{letter}", f"{letter}+{letter}") == "==" and compared(letter, f"2{letter}") == "!="


def test_letters_of_a_point_are_all_different():
    from internvl_mpo.answers.algebra import POINTS, _point

    letters = list("abcdefg")
    for number in range(len(POINTS)):
        assert len({round(abs(value), 9) for value in _point(letters, number).values()}) == len(letters)
    assert math.isclose(abs(_point(["x"], 0)["x"]), POINTS[0])
