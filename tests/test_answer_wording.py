"""The same answer in other words: every rewriting, and beside it what must not become the same."""

import re

import pytest

from internvl_mpo.answers import wording
from internvl_mpo.answers.comparing import Outcome, compare_answers
from internvl_mpo.answers.wording import bare_choice, reword, same_ratio, same_saying

REWORDED = r"""
two hundred and fifty metres -> 250 m ; half past two -> 2:30 ; half past 2 -> 2:30 ; quarter to 3 -> 2:45 ;
quarter past 12 -> 12:15 ; a quarter past two -> 2:15 ; ten minutes to five -> 4:50 ;
10 minutes past 5 -> 5:10 ; 10 to 5 -> 10-5 ; five to twelve -> 11:55 ; noon -> 12:00 ; Noon -> 12:00 ;
Half past two -> 2:30 ; 2.30 pm -> 14:30 pm ; 2:59 pm -> 14:59 pm ; 2:60 pm -> 2:60 pm ; 24点 -> 24:00 ;
25点 -> 25点 ; [red] and blue -> [red] and blue ; 5 ms -> 1/200 s ; midday -> 12:00 ; midnight -> 0:00 ;
2:30 -> 2:30 ; 2.30 -> 2.30 ; 2 pm -> 14:00 pm ; 2:30 p.m. -> 14:30 pm ; 12 am -> 0:00 am ; 12 pm -> 12:00 pm ;
11 A.M -> 11:00 am ; at 5 o'clock -> 5:00 ; 5 oclock -> 5:00 ; 5 o'clock -> 5:00 ; 14 hours -> 50400 s ;
14 h -> 50400 s ; 14h -> 50400 s ; 14点 -> 14:00 ; 14点30 -> 14:30 ; 14时30 -> 14:30 ; 2点30 -> 2:30 ;
24:00 -> 24:00 ; 25:00 -> 25:00 ; 2:60 -> 2:60 ; 2:59 -> 2:59 ; 5 -> 5 ; 12 -> 12 ; 3.5 -> 3.5 ; II -> II ;
IV -> IV ; ①② -> (1)(2) ; </answer>5 -> 5 ; <answer>5</answer> -> 5 ; 5</s> -> 5 ; **Answer:** 5 -> 5 ;
final answer: 5 -> 5 ; Answer： 5 -> 5 ; {"answer": "5"} -> 5 ; {'final_answer': 5} -> 5 ; ["red"] -> red ;
[red] -> red ; (5) -> 5 ; [ 5 % ] -> 5 % ; (a b) -> a b ; {"a": 5} -> {"a": 5} ; red? -> red ; red\  -> red ;
x_ -> x_ ; [" red"] -> red ; , because it is -> , because it is ; jan_ -> jan_ ;
probably red -> red ; I think red -> red ; it looks like red -> red ; this must be red -> red ;
that should be red -> red ; it's red -> red ; that's red -> red ; looks like red -> red ;
definitely clearly red -> red ; obviously red -> red ; made of wood -> wood ; the number is 5 -> 5 ;
the color red -> red ; the colour is red -> red ; the word is red -> red ; the name Bob -> Bob ;
the value 5 -> 5 ; there are only 5 -> 5 ; there is 5 -> 5 ; it is maybe red -> red ; most likely red -> red ;
apparently red -> red ; likely red -> red ; I believe red -> red ; I guess red -> red ; I would say red -> red ;
it appears to be red -> red ; it seems to be red -> red ; it was red -> red ; red because it is -> red ;
red, since it is -> red ; red as it was -> red ; red; as they are -> red ; red (like blood) -> red ;
\infty -> ∞ ; infinity -> ∞ ; +\infty -> ∞ ; + ∞ -> ∞ ; at least 5 -> ≥5 ; no less than 5 -> ≥5 ;
no fewer than 5 -> ≥5 ; 至少5 -> ≥5 ; 不少于 5 -> ≥5 ; at most 5 -> ≤5 ; no more than $5 -> ≤$5 ;
up to .5 -> ≤.5 ; 至多5 -> ≤5 ; 最多5 -> ≤5 ; 不超过5 -> ≤5 ; more than 5 -> >5 ; greater than 5 -> >5 ;
over 5 -> >5 ; above 5 -> >5 ; 大于5 -> >5 ; 超过5 -> >5 ; less than -5 -> <-5 ; fewer than 5 -> <5 ;
under 5 -> <5 ; below 5 -> <5 ; 小于5 -> <5 ; 少于5 -> <5 ; over it -> over it ; x \geq 5 -> x ≥ 5 ;
x \ge 5 -> x ≥ 5 ; x >= 5 -> x ≥ 5 ; x \leq 5 -> x ≤ 5 ; x \le 5 -> x ≤ 5 ; x <= 5 -> x ≤ 5 ;
x \neq 5 -> x ≠ 5 ; x \ne 5 -> x ≠ 5 ; x != 5 -> x ≠ 5 ; \pm 5 -> ± 5 ; +/-5 -> ±5 ; \emptyset -> ∅ ;
\varnothing -> ∅ ; \angle ABC -> ∠ABC ; \triangle ABC -> triangle ABC ; △ ABC -> triangle ABC ;
AB \parallel CD -> AB ∥ CD ; AB \mid CD -> AB ∥ CD ; AB \perp CD -> AB ⊥ CD ; \sin x -> sin x ;
\cos x -> cos x ; \tan x -> tan x ; \cot x -> cot x ; \sec x -> sec x ; \csc x -> csc x ; \log x -> log x ;
\ln x -> ln x ; \exp x -> exp x ; \sinh x -> \sinh x ; m∠ABC -> ∠ABC ; 5 – 7 -> 5-7 ; 5—7 -> 5-7 ; 5～7 -> 5~7 ;
–5 -> -5 ; —5 -> -5 ; − 5 -> -5 ; minus 5 -> -5 ; negative x -> -x ; 负5 -> -5 ; 1'234 -> 1234 ; 1’234 -> 1234 ;
12'34 -> 12'34 ; #5 -> 5 ; no. 5 -> 5 ; no 5 -> no 5 ; number 5 -> 5 ; $5$ cm -> 1/20 m ; $5/6$ m -> 5/6 m ;
5~cm -> 1/20 m ; x ≈ 5 -> x = 5 ; between 5 and 7 -> 5-7 ; from 5 to 7 -> 5-7 ; 5 to 7 -> 5-7 ;
-5 to 7.5 -> -5-7.5 ; 10^3 -> 1 x 10^3 ; -10^{-2} -> -1 x 10^-2 ; 10^123 -> 10^123 ; jan -> january ;
Jan. -> january ; feb -> february ; mar -> march ; apr -> april ; may -> may ; jun -> june ; jul -> july ;
aug -> august ; sep -> september ; sept -> september ; oct -> october ; nov -> november ; dec -> december ;
mon -> monday ; tue -> tuesday ; tues -> tuesday ; wed -> wednesday ; thu -> thursday ; thur -> thursday ;
thurs -> thursday ; fri -> friday ; sat -> saturday ; sun -> sunday ; grey -> gray ; colour -> color ;
centre -> center ; yep -> yes ; yeah -> yes ; yup -> yes ; nope -> no ; correct -> yes ; incorrect -> no ;
wrong -> no ; absolutely -> yes ; affirmative -> yes ; certainly -> yes ; USA -> united states ;
US -> united states ; UK -> united kingdom ; DNE -> does not exist ; 没有 -> 否 ; 有 -> 是 ; 1st -> first ;
2nd -> second ; 3rd -> third ; 4th -> fourth ; 5th -> fifth ; 6th -> sixth ; 7th -> seventh ; 8th -> eighth ;
9th -> ninth ; 10th -> tenth ; 11th -> 11th ; none -> 0 ; nil -> 0 ; null -> 0 ; nobody -> nobody ;
5 mm -> 1/200 m ; 5 millimeters -> 1/200 m ; 5 millimetre -> 1/200 m ; 5毫米 -> 1/200 m ; 5 cm -> 1/20 m ;
5 centimeters -> 1/20 m ; 5 centimetre -> 1/20 m ; 5 厘米 -> 1/20 m ; 5 dm -> 1/2 m ;
5 decimeter -> 5 decimeter ; 5 m -> 5 m ; 5 meters -> 5 m ; 5 米 -> 5 m ; 5 km -> 5000 m ;
5 kilometers -> 5000 m ; 5 kilometre -> 5000 m ; 5 千米 -> 5000 m ; 5 公里 -> 5000 m ; 24 in -> 2 ft ;
24 inches -> 2 ft ; 24 inch -> 2 ft ; 2 ft -> 2 ft ; 2 feet -> 2 ft ; 2 foot -> 2 ft ; 2 yd -> 6 ft ;
2 yards -> 6 ft ; 2 mi -> 2 mi ; 2 miles -> 2 mi ; 5 mg -> 1/200 g ; 5 milligrams -> 5 milligrams ; 5 g -> 5 g ;
5 grams -> 5 g ; 5 克 -> 5 g ; 5 kg -> 5000 g ; 5 kilograms -> 5000 g ; 5 kilos -> 5000 g ; 5千克 -> 5000 g ;
5 公斤 -> 5000 g ; 5 lb -> 5 lb ; 5 lbs -> 5 lb ; 5 pounds -> 5 pounds ; 5 s -> 5 s ; 5 sec -> 5 s ;
5 seconds -> 5 s ; 5 秒 -> 5 s ; 5 min -> 300 s ; 5 minutes -> 300 s ; 5 分钟 -> 300 s ; 5 h -> 18000 s ;
5 hr -> 18000 s ; 5 hrs -> 18000 s ; 5 hours -> 18000 s ; 5 小时 -> 18000 s ; 5 days -> 432000 s ; 5 d -> 5 d ;
5天 -> 432000 s ; 2 weeks -> 1209600 s ; 2 wk -> 1209600 s ; 2 周 -> 1209600 s ; 2 years -> 2 year ;
2 yr -> 2 year ; 2 年 -> 2 year ; 5 l -> 5 l ; 5 L -> 5 l ; 5 liters -> 5 l ; 5 litres -> 5 l ; 5 升 -> 5 l ;
5 ml -> 1/200 l ; 5 mL -> 1/200 l ; 5 milliliters -> 1/200 l ; 5 millilitre -> 1/200 l ; 5毫升 -> 1/200 l ;
5 mol -> 5 mol ; 5 moles -> 5 mol ; 5 N -> 5 n ; 5 newtons -> 5 n ; 5 kN -> 5000 n ; 5 J -> 5 j ;
5 joules -> 5 j ; 5 kJ -> 5000 j ; 5 kilojoule -> 5000 j ; 5 W -> 5 w ; 5 watts -> 5 w ; 5 kW -> 5000 w ;
5 V -> 5 v ; 5 volts -> 5 v ; 5 kV -> 5000 v ; 5 A -> 5 a ; 5 amps -> 5 a ; 5 amperes -> 5 a ; 5 mA -> 1/200 a ;
5 Ω -> 5 Ω ; 5 ohm -> 5 Ω ; 5 kΩ -> 5000 Ω ; 5 Hz -> 5 hz ; 5 hertz -> 5 hz ; 5 kHz -> 5000 hz ;
5 kilohertz -> 5000 hz ; 5 MHz -> 5000000 hz ; 5 megahertz -> 5000000 hz ; 5 GHz -> 5000000000 hz ;
5 gigahertz -> 5000000000 hz ; 5 MB -> 5 mb ; 5 megabytes -> 5 mb ; 5 GB -> 5 gb ; 5 gigabyte -> 5 gb ;
5 TB -> 5 tb ; 5 terabyte -> 5 tb ; 5 K -> 5 k ; 5 kelvin -> 5 k ; 50 cents -> $0.5 ; 50 cent -> $0.5 ;
50¢ -> $0.5 ; 33 cents -> $0.33 ; 36 km/h -> 10 m/s ; 36 km per hour -> 10 m/s ; 5 km/s -> 5000 m/s ;
5 m/s -> 5 m/s ; 5 m per second -> 5 m/s ; 5 cm^2 -> 1/2000 m^2 ; 5 cm^3 -> 1/200000 m^3 ;
5 km^2 -> 5000000 m^2 ; 5 square meters -> 5 m^2 ; 5 sq. cm -> 1/2000 m^2 ; 5 sq cm -> 1/2000 m^2 ;
5平方米 -> 5 m^2 ; 5 cubic cm -> 1/200000 m^3 ; 5立方米 -> 5 m^3 ; 212 °F -> 100 degC ;
212 degrees Fahrenheit -> 100 degC ; 212 F -> 212 F ; 100 °C -> 100 degC ; 100 degrees celsius -> 100 degC ;
100 degree C -> 100 degC ; 32°F -> 0 degC ; -40 F -> -40 F ; 1/2 m -> 0.5 m ; 1/3 m -> 1/3 m ;
-5 cm -> -1/20 m ; 0.5 km -> 500 m ; 2.5 apples -> 2.5 apples ; 12a -> 12a ; 12th -> 12th ; 300 BC -> 300 BC ;
1990s -> 1990s ; 90s -> 90s ; 5 x -> 5 x ; 5 sheep -> 5 sheep ; 5cm -> 1/20 m ; 5' -> 5 ft ; 5 kgs -> 5000 g ;
5 gas -> 5 gas ; it is maybe probably red -> probably red
"""
BARE = r"""
I think (B) -> (B) ; B is correct -> B ; B is the correct answer -> B ; B is right -> B ; B is true -> B ;
B is the right option -> B ; B is correct choice -> B ; B is the correct one -> B ; B is answer -> B ;
选B -> B ; 选项B -> B ; 选择B -> B ; 答案B -> B ; <B> -> B ; {B} -> B ; [B] -> B ; `B` -> B ; B选项 -> B ;
choose B -> B ; choose  B -> B ; **Answer:** choose B -> B ; pick B -> B ; select B -> B ; could be B -> B ;
may be B -> B ; B (because it is) -> B ;
B (since x) -> B ; B (as y) -> B ; B (red) -> B (red) ; B? -> B ; B! -> B ; probably B -> B ; it's B -> B ;
**Answer:** B -> B ; B</s> -> B ; B \ -> B ; 选Blue -> 选Blue ; B is blue -> B is blue ; Ｂ -> B ;
the B is correct -> the B is correct
"""
# == both ways, => only when the left one is given, != never
SAYINGS = r"""
red == red ; Red == red ; café == cafe ; ice-cream == ice cream ; ice-cream == icecream ;
St. Louis == St Louis ; it's == its ; two cats == two cat ; red color == red ; red colored == red ;
the color red => red ; on the left => left ; to the left => left ; at the left => left ; in the left => left ;
left side == left ; the left one => left ; angle != right angle ; right angle == right ; triangle != right ;
right triangle == right ; round shape == round ; north direction == north ; no one != no ; not one != not ;
any one != any ; every side != every ; some side != some ; a big red car side != a big red car ;
very big side => very big ; to the boxes => boxes ; on the left 2 => left 2 ; A, C maybe != AC ; 2:300 != 2:30 ;
X > 3 == 3 < x ; 33.3% or so != 1/3 ; 55.5% != 5/9 ; 55.6% == 5/9 ;

6.3% == 1/16 ; 6.4% != 1/16 ;
x=2 or 3 or 4 != 2,3 ; grey (x) != gray (x) ;
 very big red side != very big red ; the cat == cat ; an apple == apple ;
a cat == cat ; cat. == cat ; 红色 != 红 ; 红色的 != 红 ; colour == color ; A and C == AC ; A, C == AC ;
C, A => AC ; A&C == AC ; (A), (C) == AC ; A and B != AC ; AA != AC ; A, B, C != AC ; AC <= CA ; A + C == AC ;
A、C == AC ; A == A ; B != A ; 2:30 == 2:30 pm ; 14:30 != 2:30 ; 14:30 pm == 2:30 ; 2:30 == 14:30 pm ;
2:31 != 2:30 ; 12:30 == 0:30 am ; 12:30 == 12:30 pm ; 13:30 != 1:30 am ; 1:30 am != 13:30 pm ; 1:30 am == 1:30 ;
13:30 != 1:30 ; 12:00 == 0:00 am ; 0:00 == 12:00 pm ; IV == 4 ; 4 == IV ; VI == 6 ; XIV == 14 ; MCMXC == 1990 ;
XC == 90 ; XL == 40 ; CD == 400 ; LX == 60 ; IIII != 4 ; IX == 9 ; IV != 5 ; IV != 4.5 ; 1 < x < 3 != x > 1 ;
深红色的 == 深红 ; I != 1 ; 33.3% == 1/3 ; 33.3 % == 1/3 ; 33% != 1/3 ; 1/3 == 33.3% ; 33.4% != 1/3 ;
33.25% != 1/3 ; 66.7% == 2/3 ; 12.5% == 1/8 ; 0.0% != 1/0 ; 33.35% != 1/3 ; x > 3 == 3 < x ; x>3 == x > 3 ;
x ≥ 3 == 3 ≤ x ; x > 3 != 3 > x ; x > 3 != x < 3 ; ±2 == 2,-2 ; ±2 == 2 and -2 ; ±2 == -2,2 ; x=±2 == 2,-2 ;
x=±2 == x=2 or x=-2 ; ±2 != 2 ; x=2,x=3 == x=3 or x=2 ; x=2 or 3 == 3,2 ; 2,3 != 3,2 ; 2 or 3 != 2,3 ;
x = 2 == x=2 ; {2} == {2} ; ∅ == ∅ ; (-∞,3) == (-∞, 3) ; \left(-∞,3\right) == (-∞,3) ; 1 < x < 3 != 3 > x > 1 ;
x=2 and y=3 != x=2 or x=3 ; ±1/2 == 1/2,-1/2 ; 5 cats == 5 cat ; 12 != 13
"""
RATIOS = r"""
2:500 == 4:1000 ; 4:6x != 2:3 ; 0:0 != 2:3 ; 4:6 == 2:3 ; 2/3 => 2:3 ; 2 to 3 => 2:3 ; 2比3 => 2:3 ; 2 : 3 == 4 : 6 ;
2:3 <= 2/3 ; 3:2 != 2:3 ;
2:3 != 2:30 ; 2:45 != 2:45 ; 2:04 != 2:4 ; 0:3 == 0:5 ; 3:0 != 5:0 ; 3:0 != 3:1 ; 3:1 != 3:0 ; 1.5:3 == 1:2 ;
100:60 == 5:3 ; 5:60 != 1:12
"""


def cells(table: str) -> list[str]:
    return [cell.strip() for cell in table.replace("\n", " ").split(" ;")]


def test_an_answer_is_put_into_one_wording():
    cases = [cell.split(" -> ") for cell in cells(REWORDED)]
    assert [(given, wanted, found) for given, wanted in cases if (found := reword(given)) != wanted] == []


def test_an_option_is_freed_of_what_is_said_around_its_letter():
    cases = [cell.split(" -> ") for cell in cells(BARE)]
    assert [(given, wanted, found) for given, wanted in cases if (found := bare_choice(given)) != wanted] == []


@pytest.mark.parametrize(("table", "same"), [(SAYINGS, same_saying), (RATIOS, same_ratio)])
def test_two_answers_say_the_same_in_other_words_or_do_not(table, same):
    signs = {(True, True): "==", (True, False): "=>", (False, True): "<=", (False, False): "!="}
    for cell in cells(table):
        one, sign, other = re.split(r" (==|=>|<=|!=) ", cell, maxsplit=1)
        assert signs[same(one, other), same(other, one)] == sign, cell


def test_what_is_longer_than_an_answer_is_compared_as_it_stands():
    for length, is_read in ((300, True), (301, False)):
        text = "probably " + "x" * (length - 9)
        assert reword(text) == ("x" * (length - 9) if is_read else text)
        assert same_saying(text[:150] + " " + text[151:], text[:150] + "-" + text[151:]) is is_read
        assert same_ratio("0" * (length - 3) + "4:6", "2:3") is is_read
    assert same_saying("x" * 301, "x" * 301)
    assert reword(" Answer: 5 ") == "5" and not same_saying("", "")


def test_a_negative_power_of_ten_stays_negative():
    assert compare_answers("-10^3", "1000").outcome is Outcome.WRONG
    assert compare_answers("-10^{2}", "-100").outcome is Outcome.RIGHT


def test_a_share_that_no_float_shows_in_twelve_digits_stays_a_fraction():
    assert reword("1/3 kg") == "1000/3 g"
    assert wording._decimal(wording.Fraction(1, 3)) == "1/3"
    assert wording._decimal(wording.Fraction(1, 8)) == "0.125"
    assert wording._decimal(wording.Fraction(12)) == "12"
    assert wording._decimal(wording.Fraction(10**13)) == "10000000000000"
