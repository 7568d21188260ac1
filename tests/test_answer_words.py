"""Numbers in words, dates, spellings: each word of the tables, and where a reading stops."""

from internvl_mpo.answers.dates import decide_date, parse_date
from internvl_mpo.answers.number_words import digits_throughout, in_digits, spoken_formula
from internvl_mpo.answers.spelling import american, singular

# given = wanted
IN_DIGITS = r"""
zero = 0; one cat = 1 cat; ninety-nine = 99; twenty one = 21; a hundred = 100; an hundred = 100;
one hundred and five cats = 105 cats; two hundred and fifty = 250; five hundred = 500; hundred = 100;
two thousand and one = 2001; a thousand five hundred = 1500; three million two hundred thousand = 3200000;
two billion and one = 2000000001; one trillion = 1000000000000; two lakh = 200000; three crore = 30000000;
a dozen = 12; two dozen = 24; a score = 20; two score = 40; three gross = 432; a gross = 144;
half a dozen = 6; half dozen = 6; half a score = 10; half an gross = 72; half dozen eggs = 6 eggs; half = 1/2;
half of it = 1/2 of it; Half = 1/2; ten five = ten five; one or half a dozen = 1 or half a dozen;
two cats and a half = 2 cats and a half; two and Half = 2 1/2; one half = 1/2; a half = 1/2; a third = 1/3;
two thirds = 2/3; three quarters = 3/4;
a quarter = 1/4; quarter = quarter; third = third; one third of it = 1/3 of it; halves = halves;
five halves = 5/2; a fifth = 1/5; ninety-nine hundred = 9900; three eighths = 3/8; two sixths = 2/6;
a seventh = 1/7; eighth = eighth;
three ninths = 3/9;
a tenth = 1/10; TWO Thirds = 2/3; x minus five = x minus five; a quarter past two = a quarter past two;
half past two = half past two; half to two = half to two; two and a half = 2 1/2; two and half = 2 1/2;
three and one third = 3 1/3; three and third = 3 and third; two and three quarters cats = 2 3/4 cats;
five six = five six; twenty thirty = twenty thirty; twenty ten = twenty ten; twenty nine = 29;
nineteen one = nineteen one; hundred hundred = hundred hundred; two hundred hundred = two hundred hundred;
one hundred twenty three = 123; three point one four = 3.14; three point five cats = 3.5 cats;
three point = 3 point; Five = 5; FIVE HUNDRED = 500; Half A Dozen = 6; A Third = 1/3; minus five = -5;
negative five = -5; Minus 5 = -5; minus x = minus x; negative 5 cats = -5 cats; minus a third = -1/3;
负5 = -5; 负五 = -5; fivefold = fivefold; five-year = 5-year; seventeen = 17; a cat = a cat;
and five = and five; two and three = 2 and three; ten and five = 10 and five; twenty and five = 20 and five;
thousand and five = 1005; million and five = 1000005; billion and five = 1000000005;
trillion and five = 1000000000000 and five; one hundred and = 100 and; dozen = 12; forty-two = 42; sixty = 60;
seventy-one = 71; eighty = 80; fifty = 50; thirty = 30; eleven = 11; twelve = 12; thirteen = 13;
fourteen = 14; fifteen = 15; sixteen = 16; eighteen = 18; twenty zero = twenty zero; zero one = 1;
two dozen and five = 24 and five; a thousand thousand = 1000000; a thousand million = 1000000000;
two million five hundred thousand and one = 2500001; one hundred one = 101; two hundred five = 205;
seven hundred thousand and one = 700001; three dozen five = 41; 五 = 5; 五个三分之一 = 5个三分之一; 十 = 10;
十二 = 12; 二十 = 20;
二十三个 = 23个; 一百 = 100; 一百零五 = 105; 两百五十元 = 250元; 三千 = 3000; 三万 = 30000; 一万二千 = 12000;
一亿 = 100000000; 一亿三千万 = 130000000; 两打 = 24; 〇 = 0; 零 = 0; 半 = 1/2; 一半 = 1/2; 半个 = 半个;
三又二分之一 = 3 1/2; 2又1/2 = 2 1/2; 5 2又1/2 = 5 2又1/2; 2又1/2个 = 2 1/2个; 一又三分之二杯 = 1 2/3杯; 百分之五 = 5%;
百分之五十 = 50%; 百分之5.5 = 5.5%; 百分之 = 百分之; 三分之一 = 1/3; 2分之1 = 1/2; 一般 = 一般; 五岁 = 5岁;
3.5万 = 35000; 3万 = 30000; 3百 = 300; 2千5 = 2005; 百2 = 102; 三点五 = 3.5; 三点五米 = 3.5米;
一亿零三百万 = 103000000; 两万亿 = 2000000000000; 三亿五千万零二十 = 350000020; 1.5万亿 = 1500000000000;
一二三 = 123; 5 = 5; 5个 = 5个; 2.5 = 2.5; 五 只 = 5 只; 五。 = 5。; 五， = 5，; 五, = 5,; 五又 = 5又; 九 = 9;
八 = 8; 七 = 7; 六 = 6; 四 = 4; 十万 = 100000; 百万 = 1000000; 万 = 10000; 亿 = 100000000; 千 = 1000;
百 = 100; 打 = 12; 两千零二十 = 2020; 一千万亿 = 1000000000000000; 3点5 = 3点5; 3.25亿 = 325000000;
1.5千 = 1500; 0.1234567890123万 = 1234.56789012; 点五 = 点五; 五人次 = 5人次; 五本 = 5本; 五张 = 5张;
五猫 = 五猫; 五_ = 五_; 3.50千x = 3.50千x; 十猫 = 十猫
"""
THROUGHOUT = r"""
there are five cats = there are 5 cats; one cat = one cat; the one and two = the one and 2;
Two hundred and five cats or six = 205 cats or 6; five-year = five-year; x five = x 5;
in 2019 five cats = in 2019 5 cats; 5 million = 5 million; 5 dozen = 5 dozen; a dozen eggs = 12 eggs;
twenty five six = twenty five six; five six = five six; three point five = 3.5; One = One;
ONE and TWO = ONE and 2
"""
SPOKEN = r"""
the square root of 9 = \sqrt{9}; square root of 9 = \sqrt{9}; sqrt 9 = \sqrt{9}; sqrt9 = \sqrt{9};
根号9 = \sqrt{9}; 根号 9 = \sqrt{9}; the cube root of 8 = \sqrt[3]{8}; cube root of -8 = \sqrt[3]{-8};
3 squared = (3)^2; 3的平方 = (3)^2; 3 的平方 = (3)^2; 3 cubed = (3)^3; 3的立方 = (3)^3; 3 factorial = (3)!;
3的阶乘 = (3)!; 3 to the power of 2 = (3)^{2}; 3 to the power 2 = (3)^{2}; -3 to the power of -2 = (-3)^{-2};
twice 4 = 2*(4); double 4 = 2*(4); two times 4 = (2)*(4); thrice 4 = 3*(4); triple 4 = 3*(4);
three times 4 = (3)*(4); half of 4 = 4/2; a half of 4 = 4/2; half 4 = 4/2; a half 4 = 4/2; 1/3 of 6 = 1/3*(6);
2 times 3 = (2)*(3); 2乘3 = (2)*(3); 2乘以3 = (2)*(3); 2 plus 3 = 2+(3); 2加3 = 2+(3); 2加上3 = 2+(3);
2 minus 3 = 2-(3); 2减3 = 2-(3); 2减去3 = 2-(3); 2 divided by 3 = (2)/(3); 2除以3 = (2)/(3);
.5 squared = (.5)^2; +3 squared = (+3)^2; 3 SQUARED = (3)^2; three squared = (3)^2; two plus three = 2+(3);
five = five; 2 plus 3 cats = 2 plus 3 cats; x squared = x squared;
the sum of two and three = the sum of 2 and 3; 2 plus -3 = 2+(-3); 2 Times .5 = (2)*(.5)
"""
DATES = r"""
2020-01-02 = 2020 1 2; 2020/1/2 = 2020 1 2; 2020.1.2 = 2020 1 2; 2020年1月2日 = 2020 1 2;
2020年1月2 = 2020 1 2; 1 January 2020 = 2020 1 1; 1st of January 2020 = 2020 1 1; 2nd Jan 2020 = 2020 1 2;
3rd-mar-2020 = 2020 3 3; 4th April, 2020 = 2020 4 4; 4 Apr. 2020 = 2020 4 4; January 1, 2020 = 2020 1 1;
Jan. 1st 2020 = 2020 1 1; jan 2nd, 2020 = 2020 1 2; march 3rd 2020 = 2020 3 3; Mar 4th 2020 = 2020 3 4;
January 2020 = 2020 1 _; Jan., 2020 = 2020 1 _; January 1 = _ 1 1; Jan. 1st = _ 1 1; may 2nd = _ 5 2;
may 3rd = _ 5 3; may 4th = _ 5 4; 1 January = _ 1 1; 1st of Jan. = _ 1 1; 2nd may = _ 5 2; 3rd may = _ 5 3;
4th of may = _ 5 4; 13/1/2020 = 2020 1 13; 1/13/2020 = 2020 1 13; 1/2/2020 = ? 1 2 2020;
12/12/20 = ? 12 12 20; 12/1/20 = ? 12 1 20; 13/13/2020 = ? 13 13 2020; 13-1-20 = 20 1 13;
13.1.2020 = 2020 1 13; 1/0/2020 = ? 1 0 2020; 12/13/20 = 20 12 13; 13/12/20 = 20 12 13; on 1 January = _ 1 1;
on Monday, 1 January 2020 = 2020 1 1; tuesday 1 january = _ 1 1; Wednesday, Jan 1 = _ 1 1;
thursday Jan 1 = _ 1 1; fri Jan 1 = none; friday Jan 1 = _ 1 1; saturday, 1 jan = _ 1 1;
sunday 1 jan 2020 = 2020 1 1; sept 5 = _ 9 5; September 5 = _ 9 5; sep 5 = _ 9 5; foo 5 = none; 5 foo = none;
foo 2020 = none; 2020 = none; 12 = none; 2020-1 = none; May = none; 2020-13-45 = 2020 13 45;
x 2020-01-02 = none; june 5 = _ 6 5; august 5 = _ 8 5; october 5 = _ 10 5; november 5 = _ 11 5; december 5 = _ 12 5;
february 5 = _ 2 5; april 5 = _ 4 5; july 5 = _ 7 5; jul 5 = _ 7 5; aug 5 = _ 8 5; oct 5 = _ 10 5; nov 5 = _ 11 5;
dec 5 = _ 12 5; feb 5 = _ 2 5
"""
AMERICAN = r"""
colour = color; colours = colors; favourite = favorite; flavour = flavor; harbour = harbor; honour = honor;
humour = humor; labour = labor; neighbour = neighbor; odour = odor; parliament = parliament; parlour = parlor;
rumour = rumor; vapour = vapor; vigour = vigor; behaviour = behavior; armour = armor; endeavour = endeavor;
splendour = splendor; four = four; pour = pour; hour = hour; tour = tour; contour = contour; grey = gray;
greys = grays; tyre = tire; tyres = tires; theatre = theater; theatres = theaters; organise = organize;
organised = organized; organiser = organizer; organises = organizes; organising = organizing;
organisation = organization; organisations = organizations; wise = wise; rise = rise; rises = rises;
promise = promize; size = size; realised = realized; glass = glass; class = class; metre = meter;
metres = meters; kilometre = kilometer; programmes = programs; licence = license; storey = story;
yoghurts = yogurts; grey's = grey's; travellers = travelers; moustaches = mustaches; dialogue = dialog;
colourful = colorful; our = our; jewellery = jewelry; iser = iser; paris = paris; basis = basis; this = this
"""
SINGULAR = r"""
cats = cat; two red buses = two red bus; boxes = box; quizzes = quizz; churches = church; dishes = dish;
cities = city; countries = country; ties = tie; pies = pie; glass = glass; bus = bus; is = is; basis = basis;
physics = physics;
news = news; lens = lens; gas = gas; series = series; species = species; texas = texas; wales = wales;
mars = mars; james = james; christmas = christmas; cat's = cat's; cat’s = cat’s; as = as; us = us; his = his;
foxes = fox; houses = hous; horses = hors; ss = ss; abs = ab; dies = die; yes = ye; octopus = octopus;
matches = match; sizes = siz
"""


def cases(table: str) -> list[list[str]]:
    return [case.split(" = ") for case in table.strip().replace("\n", " ").split("; ")]


def wrong(table: str, function) -> list[tuple[str, str, str]]:
    return [(given, wanted, found) for given, wanted in cases(table) if (found := function(given)) != wanted]


def test_a_number_in_words_is_read_to_its_end_and_no_further():
    assert wrong(IN_DIGITS, in_digits) == []


def test_a_chinese_numeral_is_one_before_a_measure_word():
    for measure in "个只条张本人岁年天次点名件块元米辆头匹座棵枝把位幅种层排列行升克吨秒周月日号度倍厘毫公千平立分小":
        assert in_digits(f"五{measure}") == f"5{measure}" or measure == "千"


def test_number_words_within_a_sentence():
    assert wrong(THROUGHOUT, digits_throughout) == []


def test_what_is_said_of_numbers_is_a_formula():
    assert wrong(SPOKEN, spoken_formula) == []


def test_a_date_is_the_same_in_every_spelling():
    assert wrong(DATES, lambda text: " ".join(part or "_" for part in parse_date(text) or ()) or "none") == []


def test_the_answer_names_the_date_that_was_asked_for():
    assert decide_date("It was 1 May 2020", "May 1, 2020", None) == (True, "date 2020-5-1, expected 2020-5-1")
    assert decide_date("2 May 2020", "May 1, 2020", None) == (False, "date 2020-5-2, expected 2020-5-1")
    assert decide_date("no date", "May 1, 2020", None) is None
    assert decide_date("May 1, 2020", "no date", None) is None


def test_british_words_are_american_and_others_stay():
    assert wrong(AMERICAN, american) == []


def test_plurals_lose_their_ending_and_no_other_word_does():
    assert wrong(SINGULAR, singular) == []
