"""Answers as every rule reads them: cleaned, without what is denied, in plain words, as yes or no, as text or list."""

import pytest

from internvl_mpo.answers.common import NOTHING_ASKED, affirmed, clean_answer, plain_words, said_values, without_reason
from internvl_mpo.answers.finding import last_boxed, parse_answer, without_thinking
from internvl_mpo.answers.texts import decide_list, decide_text, same_item, same_marks
from internvl_mpo.answers.yes_no import decide_yes_no, is_yes_no_question, yes_or_no

# given -> wanted
CLEANED = r"""
１２ -> 12 ;; a b -> a b ;; −5 -> -5 ;; ‐5 -> -5 ;; ‑5 -> -5 ;; 5‒6 -> 5-6 ;; ﹣5 -> -5 ;; 5。 -> 5 ;; 90º -> 90° ;;
90˚ -> 90° ;; 1⁄2 -> 1/2 ;; 1∕2 -> 1/2 ;; ½ -> 1/2 ;; 2½ -> 2 1/2 ;; ¼ -> 1/4 ;; ¾ -> 3/4 ;; ⅓ -> 1/3 ;; x² -> x^2 ;;
10⁻ -> 10⁻ ;; x⁰ -> x^0 ;; x⁹ -> x^9 ;; –5 -> -5 ;; — 5 -> -5 ;; = –5 -> -5 ;; (–5) -> (-5) ;; $–5 -> $-5 ;;
3, –5 -> 3,-5 ;; a – 5 -> a – 5 ;; a–b -> a–b ;; 3–5 -> 3–5 ;; \boxed{7} -> 7 ;; so \boxed{7} it -> 7 ;;
\boxed{ -> \boxed{ ;; \text{five} -> five ;; \mathrm{cm} -> cm ;; 5\textbf{ kg} -> 5 kg ;; \mbox{x} -> x ;;
\operatorname{sin} -> sin ;; \rm{x} -> x ;; \mathbf{5} -> 5 ;; \textit{red} -> red ;; $\frac12$ -> \frac12 ;;
a $\pi$ b -> a \pi b ;; \left(5\right) -> (5 ) ;; \leftarrow -> \leftarrow ;; \(5\) -> 5 ;; \[5\] -> 5 ;;
5\,000 -> 5 000 ;; 5\;6 -> 5 6 ;; 5\:6 -> 5 6 ;; 5\!6 -> 5 6 ;; 5\ 6 -> 5 6 ;; 5\quad6 -> 5 6 ;; 5\~6 -> 5\ 6 ;;
50\% -> 50% ;; \$5 -> $5 ;; **5** -> 5 ;; __5__ -> 5 ;; `5` -> 5 ;; *5 -> 5 ;; = 5 -> 5 ;; ==5 -> 5 ;; $5$ -> 5 ;;
$5 -> $5 ;; $ -> $ ;; 5$ -> 5$ ;; so the answer is 5 -> 5 ;; Thus, the final answer is: 5 -> 5 ;;
Therefore answer = 5 -> 5 ;; hence the correct option is that B -> B ;; the right choice should be B -> B ;;
the answer to the question is 5 -> 5 ;; answer to this question would be 5 -> 5 ;; The answer: 5 -> 5 ;;
The answer：5 -> 5 ;; it is 5 -> 5 ;; it's 5 -> 5 ;; that is 5 -> 5 ;; 因此答案是5 -> 5 ;; 所以，最终答案为：5 -> 5 ;;
故选项是B -> B ;; 综上，正确的答案应该是 5 -> 5 ;; 结果: 5 -> 5 ;; 标准答案：5 -> 5 ;; about 5 -> 5 ;;
approximately 5 -> 5 ;; approx. 5 -> 5 ;; approx 5 -> 5 ;; around 5 -> 5 ;; roughly 5 -> 5 ;; nearly 5 -> 5 ;;
exactly 5 -> 5 ;; precisely 5 -> 5 ;; ~5 -> 5 ;; ≈5 -> 5 ;; \approx 5 -> 5 ;; 大约5 -> 5 ;; 大概5 -> 5 ;;
差不多5 -> 5 ;; 恰好5 -> 5 ;; 正好5 -> 5 ;; 约5 -> 5 ;; the answer is ** 5 ** -> 5 ;; aboutness -> aboutness ;;
"red" -> red ;; 'red' -> red ;; “red” -> red ;; ‘red’ -> red ;; 「red」 -> red ;; 『red』 -> red ;; "red' -> "red' ;;
'' -> '' ;; "a" -> a ;; 5. -> 5 ;; 5; -> 5 ;; 5, -> 5 ;; . -> . ;; ... -> ... ;; 5.;, -> 5 ;; 1{,}000 -> 1,000 ;;
{5} -> 5 ;; {a,b} -> {a,b} ;; {a: b} -> {a: b} ;; {"a"} -> {"a"} ;; {{5}} -> {{5}} ;; {5 -> {5 ;; “ red ” -> red ;;
$ it is 5 $ -> 5 ;; 90˚C -> 90°C ;; {5:} -> {5:} ;; **=5** -> 5 ;; 50\% off -> 50% off ;; 5_. -> 5_ ;; = $5$ -> 5 ;;
↉ -> 0/3 ;; ⅐ -> 1/7 ;; ⅞ -> 7/8 ;; 5~7 -> 5~7 ;; 5 . -> 5 ;; { 5 } -> 5 ;; x ^2 -> x^2
"""
AFFIRMED = r"""
B, not A -> B ;; not 4 but 3 -> 3 ;; not A -> nothing at all ;; never A; B -> B ;; neither A nor B -> nothing at all ;;
no -> nothing at all ;; no, B -> B ;; all but A -> nothing at all ;; anything but A -> nothing at all ;;
any but A -> nothing at all ;; everything but A -> nothing at all ;; nothing but A -> nothing at all ;;
none but A -> nothing at all ;; every but A -> nothing at all ;; B rather than A -> B ;; B, instead of A -> B ;;
B as opposed to A -> B ;; B and not A -> B ;; B，而不是A -> B ;; B，而非A -> B ;; B而不是A -> B ;; except A, B -> B ;;
excluding A. B -> B ;; B without A, C -> C ;; other than A, B -> B ;; A is incorrect, B -> B ;; A is wrong. B -> B ;;
A is false! B -> B ;; A? not so? B -> A?, B ;; rule out A, B -> B ;; ruled out A, B -> B ;; eliminated A, B -> B ;;
A cannot be, B -> B ;; impossible A, B -> B ;; unlikely A, B -> B ;; exclude A, B -> B ;; excludes A, B -> B ;;
excluded A, B -> B ;; A isn't it, B -> B ;; A isn’t it, B -> B ;; 不是A，B -> B ;; 并非A，B -> B ;; 非A，B -> B ;;
没有A，B -> B ;; A错，B -> B ;; 除A，B -> B ;; 排除A，B -> B ;; not 1,000, 5 -> 5 ;; not A however B -> B ;;
not A yet B -> B ;; 不是A而是B -> B ;; 不是A,是B -> 是B ;; 不是A是B -> B ;; 不是A；B -> B ;; nothing -> nothing ;;
notable -> notable ;; knot -> knot ;; A, B -> A, B ;; B而非A -> B ;; it is anything but A -> nothing at all ;;
A; B -> A; B ;; B; not A; -> B ;; however A -> however A ;; not A. B. -> B. ;; but A -> but A
"""
WITHOUT_REASON = r"""
5 because x -> 5 ;; 5 , because x -> 5 ;; 5, since x -> 5 ;; 5; as it is -> 5 ;; 5 as the x -> 5 ;; 5 as he x -> 5 ;;
5 as she -> 5 ;; 5 as they -> 5 ;; 5 as there -> 5 ;; 5 as this -> 5 ;; 5 as that -> 5 ;; 5 due to x -> 5 ;;
5 given that x -> 5 ;; 5因为x -> 5 ;; 5，因x -> 5 ;; 5 as red -> 5 as red ;; because x -> because x ;;
5 Because x -> 5 ;; 5 because a because b -> 5 ;; 5 becauses -> 5 becauses
"""
PLAIN = r"""
The Cat -> cat ;; a an the -> a an the ;; A -> a ;; the -> the ;; the. -> the ;; It's -> its ;; it’s -> its ;;
R&B -> r and b ;; x² -> x^2 ;; x³y -> x^3y ;; x²y -> x^2y ;; U.S.A. -> usa ;; U.S.A -> usa ;; e.g. this -> eg this ;;
a.b -> ab ;; 3.5 -> 3.5 ;; 1,000 -> 1,000 ;; 2:30 -> 2:30 ;; 2 : 30 -> 2:30 ;; a:b -> b ;; a: 5 -> 5 ;; 5 :a -> 5 ;;
-5 -> -5 ;; a-b -> b ;; 5- -> 5 ;; 5 - 3 -> 5 3 ;; 3/4 -> 3/4 ;; a/b -> b ;; a/ 5 -> 5 ;; / -> / ;; x_y -> x y ;;
50% -> 50% ;; $5 -> $5 ;; €5 -> €5 ;; £5 -> £5 ;; ¥5 -> ¥5 ;; 90° -> 90° ;; a+b -> +b ;; <5 -> <5 ;; >5 -> >5 ;;
= 5 -> =5 ;; a = b -> =b ;; \frac -> \frac ;; ^2 -> ^2 ;; √2 -> √2 ;; ±5 -> ±5 ;; ×5 -> ×5 ;; 5 ÷ 2 -> 5÷2 ;;
≠5 -> ≠5 ;; ≤5 -> ≤5 ;; ≥5 -> ≥5 ;; ∞ -> ∞ ;; (red) -> red ;; "red" -> red ;; red! -> red ;; ｒｅｄ -> red ;;
ﬁ -> fi ;; one, two. -> one two ;; a . b -> b ;; .5 -> .5 ;; 5. -> 5 ;; ,5 -> 5 ;; 2:3 -> 2:3 ;;
tree-like -> tree like ;; * -> * ;; ** -> ** ;; .5 of it -> .5 of it ;; it.5 -> it 5
"""
SAID = r"""
The car is red -> The car is red / red ;; The cars are red -> The cars are red / red ;;
it was red -> it was red / red ;; they were red -> they were red / red ;;
it is that x is red -> it is that x is red / that x is red / red ;;
The car is red because it is new -> The car is red because it is new / red ;;
x is a since y is b -> x is a since y is b / a ;; x is a but y is b -> x is a but y is b / a ;; red -> red ;;
This is -> This is ;; bis red -> bis red
"""
# to a question whether there is a dog, and to no question
YES_OR_NO = r"""
yes -> yes, yes ;; Yes. -> yes, yes ;; YES -> yes, yes ;; true -> yes, yes ;; True -> yes, yes ;; 是 -> yes, yes ;;
对 -> yes, yes ;; 正确 -> yes, yes ;; 是的 -> yes, yes ;; 对的 -> yes, yes ;; 有 -> yes, yes ;; 有的 -> yes, yes ;;
存在 -> yes, yes ;; no -> no, no ;; No. -> no, no ;; false -> no, no ;; 否 -> no, no ;; 不是 -> no, no ;;
错 -> no, no ;; 错误 -> no, no ;; 不对 -> no, no ;; 不 -> no, no ;; 没有 -> no, no ;; 不存在 -> no, no ;;
没 -> no, no ;; 无 -> no, no ;; yep -> yes, yes ;; yeah -> yes, yes ;; yup -> yes, yes ;; nope -> no, no ;;
nah -> no, no ;; *yes* -> yes, yes ;; (yes) -> yes, yes ;; no, true -> None, None ;; *yes?* -> None, None ;;
"yes" -> yes, yes ;; “no” -> no, no ;; `no` -> no, no ;; $yes$ -> yes, yes ;; yes, there is a dog -> yes, yes ;;
no, there is no dog -> no, no ;; yes there is -> None, None ;; no there is -> None, None ;; yes: it is -> yes, yes ;;
no; it is -> no, no ;; yes! it -> yes, yes ;; yes - it -> yes, yes ;; yes, there is no dog -> None, yes ;;
no, there is a dog -> None, no ;; yes, no -> None, None ;; no, yes -> None, None ;; yes and no -> None, None ;;
yes or no -> None, None ;; no but yes -> None, None ;; yes, true -> yes, yes ;; yes, false -> None, None ;;
maybe -> None, None ;; likely -> None, None ;; unlikely -> None, None ;; yes, likely -> None, None ;;
perhaps -> None, None ;; possible -> None, None ;; possibly -> None, None ;; probable -> None, None ;;
yes, probably -> None, None ;; might be -> None, None ;; may be -> None, None ;; could be -> None, None ;;
not sure -> None, None ;; unsure -> None, None ;; uncertain -> None, None ;; not certain -> None, None ;;
unclear -> None, None ;; not clear -> None, None ;; whether -> None, None ;; no idea -> None, None ;;
depends -> None, None ;; depend -> None, None ;; if there is a dog -> None, None ;; not entirely -> None, None ;;
I do not know -> None, None ;; I don't know -> None, None ;; does not know -> None, None ;;
doesn’t know -> None, None ;; unable -> None, None ;; hard to say -> None, None ;; difficult to say -> None, None ;;
impossible to say -> None, None ;; unknown -> None, None ;; ambiguous -> None, None ;; cannot say -> None, None ;;
can't tell -> None, None ;; can not be determined -> None, None ;; cannot be confirmed -> None, None ;;
cannot know -> None, None ;; can't be certain -> None, None ;; cannot be sure -> None, None ;; yes? -> None, None ;;
是？ -> None, None ;; 可能有 -> None, None ;; 也许 -> None, None ;; 或许 -> None, None ;; 大概有 -> None, None ;;
不确定 -> None, None ;; 不清楚 -> None, None ;; 不知道 -> None, None ;; 无法判断 -> None, None ;;
难以判断 -> None, None ;; 不好说 -> None, None ;; 是否 -> None, None ;; 有没有 -> None, None ;; 说不准 -> None, None ;;
说不定 -> None, None ;; 恐怕有 -> None, None ;; 未必 -> None, None ;; no. 5 -> None, None ;; No. 5 -> None, None ;;
no, it is yes -> None, None ;; no.5 -> None, None ;; ... -> None, None ;; 5 -> None, None ;;
There is a dog. -> yes, None ;; There is a dog -> yes, None ;; There are no dogs. -> no, None ;;
There is not a dog -> no, None ;; There never was a dog -> no, None ;; there is a cat -> None, None ;;
I see a dog -> yes, None ;; I notice a dog -> yes, None ;; I noticed a dog -> yes, None ;;
I can see a dog -> yes, None ;; I do see a dog -> yes, None ;; I don't see a dog -> no, None ;;
I do not see a dog -> no, None ;; The image contains a dog -> yes, None ;; The picture shows a dog -> yes, None ;;
The photo has a dog -> yes, None ;; The scene includes a dog -> yes, None ;; images have a dog -> yes, None ;;
A dog is present -> yes, None ;; A dog is visible -> yes, None ;; A dog is seen -> yes, None ;;
A dog is depicted -> yes, None ;; the dog exists -> yes, None ;; a dog in it -> yes, None ;; None -> no, None ;;
nothing -> no, None ;; Not that I can see -> no, None ;; not as far as I can see -> no, None ;;
not present -> no, None ;; not visible -> no, None ;; not there -> no, None ;; not seen -> no, None ;;
not any -> no, None ;; notable dog -> yes, None ;; None of the dogs -> no, None ;; a dog is absent -> no, None ;;
it lacks a dog -> no, None ;; lacking a dog -> no, None ;; without a dog -> no, None ;; cannot see a dog -> no, None ;;
missing dog -> no, None ;; nor a dog -> no, None ;; neither dog -> no, None ;; dog isnt there -> no, None ;;
dog arent -> no, None ;; dont dog -> no, None ;; doesnt dog -> no, None ;; cant dog -> no, None ;;
the dog isn’t there -> no, None ;; There is a dog. There is no cat. -> yes, None ;;
The cat sleeps. There is no dog. -> no, None ;; 图里有狗 -> yes, None ;; 没有狗 -> no, None ;; 不是狗 -> None, None ;;
无狗 -> None, None ;; 未见狗 -> None, None ;; 非狗 -> None, None ;; class -> None, None ;; dogs -> yes, None ;;
a glass -> None, None
"""


def differing(table: str, function) -> list[tuple[str, str, str]]:
    cells = [cell.strip().split(" -> ") for cell in table.replace("\n", " ").split(" ;;")]
    return [(given, wanted, found) for given, wanted in cells if (found := str(function(given))) != wanted]


def test_an_answer_is_freed_of_what_carries_no_meaning():
    assert differing(CLEANED, clean_answer) == []
    assert clean_answer(" **$5$** ") == "5" and clean_answer("a～5｟") == "a~5｟"
    for kept in "»¿⅏⅟":
        assert clean_answer(f"a{kept}b") == f"a{kept}b"
    for odd in ("\u00a0", "\u2007", "\u2009", "\u202f", "\u3000", "  ", "\n"):
        assert clean_answer(f"a{odd}b") == "a b"
    for odd in "\u200b\u200c\u200d\u2060\ufeff":
        assert clean_answer(f"a{odd}b") == "ab"
    for odd in "\u2212\u2010\u2011\u2012\ufe63":
        assert clean_answer(f"{odd}5") == "-5"
    assert "".join(map(clean_answer, map(chr, range(0xFF10, 0xFF5B)))) == "".join(
        clean_answer(chr(0x30 + i)) for i in range(0x4B)
    )


def test_what_is_denied_is_left_out():
    assert differing(AFFIRMED, lambda text: affirmed(text) or "nothing at all") == []
    assert affirmed("not A\nB") == "B" and affirmed(" B , not A") == "B"


def test_a_reason_behind_an_answer_is_left_out():
    assert differing(WITHOUT_REASON, without_reason) == []


def test_marks_that_mean_nothing_are_left_out_and_others_stay():
    assert differing(PLAIN, plain_words) == []
    assert plain_words("a  b") == "b" and plain_words("  Red   car ") == "red car"
    assert plain_words(" ** ") == "**"


def test_what_a_sentence_says_of_its_subject():
    assert differing(SAID, lambda text: " / ".join(said_values(text))) == []


def test_yes_and_no_are_said_in_many_ways_and_left_open_in_more():
    def read(text: str) -> str:
        return f"{yes_or_no(text, 'Is there a dog in the image?')}, {yes_or_no(text)}"

    assert differing(YES_OR_NO, read) == []
    assert read("yes\nit is") == "yes, yes" and read("") == "None, None"


@pytest.mark.parametrize(
    ("text", "question", "found"),
    [
        ("有", "图里有狗吗？", "yes"),
        ("图里有一只狗", "图里有狗吗？", "yes"),
        ("图中没有狗", "图里有狗吗？", "no"),
        ("There is a dog", "图里有狗吗？", "yes"),
        ("图里有狗", "Is there a dog?", "yes"),
        ("OK 图里有狗", "Is there a dog?", "yes"),
        ("There is no dog", "What is there?", "no"),
        ("There is nothing", "What is there?", "no"),
        ("A dog", "What is it?", None),
        ("There is a dog\nThere is no cat", "Is there a dog in the image?", "yes"),
        ("There is a dog.", "Is there a dog that isn't in the picture?", "yes"),
        ("There is a dog", "Was there a dog?", "yes"),
        ("Yes, a piano. 5 keys", "", "yes"),
        ("There is 猫", "Is 狗 there?", None),
        ("Is it?", "x", None),
        ("none", "x", "no"),
        ("none", "", None),
        ("It is red.", "Is the car red?", None),
        ("The car is red.", "Is the car red?", "yes"),
        ("The car is not red.", "Is the car red?", "no"),
        ("The cars are red", "Is a car red?", "yes"),
        ("bus", "Is there a bus?", "yes"),
    ],
)
def test_a_sentence_answers_what_was_asked_and_nothing_else(text, question, found):
    assert yes_or_no(text, question) == found


@pytest.mark.parametrize(
    ("prediction", "gold", "right"),
    [
        *(("yes", "yes", True), ("no", "YES", False), ("True", "yes", True), ("x", "yes", False), ("yes", "cat", None)),
        *(("T", "true", True), ("F", "true", False), ("F", "false", True), ("T", "False", False), ("T", "yes", False)),
        *(("t", "true", False),),
    ],
)
def test_the_rule_for_yes_and_no(prediction, gold, right):
    found = decide_yes_no(prediction, gold, NOTHING_ASKED)
    assert (found and found[0]) is right
    said = {"yes": "yes", "True": "yes", "no": "no", "T": "yes", "F": "no"}
    if found and gold.lower() != "yes":
        assert found[1].startswith(f"says {said.get(prediction, 'neither yes nor no')}, expected ")


def test_a_question_for_yes_or_no_begins_with_its_verb():
    verbs = "is are was were does do did can could has have will would should"
    assert all(is_yes_no_question(f" {verb.title()} it?") for verb in verbs.split())
    assert not any(map(is_yes_no_question, ("What is it?", "islands?", "Isn't it?", "it is?")))


# ---------------------------------------------------------------------------------------------------- texts and lists


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("(1,2]", "(1,2]", True),
        ("(1,2]", "[1,2]", False),
        ("[1,2)", "(1,2)", False),
        ("x=(1,2)", "(1,2)", True),
        ("\\left(1,2\\right]", "(1,2]", True),
        ("\\{1,2\\}", "{1,2}", True),
        ("{1,2}", "(1,2)", False),
        ("1,2", "(1,2)", True),
        ("-x", "x", False),
        ("-x", "-x", True),
        ("- x", "x", False),
        ("a/b", "b/a", False),
        ("a / b", "a/b", True),
        ("a+b", "b+a", False),
        ("a*b", "A*B", True),
        ("a-b", "a-b", True),
        ("x is a/b", "x is b/a", False),
        ("x-ray", "x ray", True),
        ("\\frac{1}{2}", "\\frac{2}{1}", False),
        ("\\frac12", "\\frac 12", True),
        ("\\frac12", "1/2", True),
        ("red", "red", True),
        ("- x", "-x", True),
        ("(1,2] of it", "[1,2) of it", False),
        ("-X", "X", False),
        ("- red", "red", True),
        ("-red", "red", False),
        ("x", "- x", False),
    ],
)
def test_brackets_signs_and_the_order_of_a_quotient_count(one, other, same):
    assert same_marks(one, other) is same
    assert same_marks(other, one) is same


@pytest.mark.parametrize(
    ("prediction", "gold", "right"),
    [
        ("1, 2", "1,2", True),
        ("2, 1", "1,2", False),
        ("{2,1}", "{1,2}", True),
        ("\\{2,1\\}", "\\{1,2\\}", True),
        ("red, blue", "blue and red", True),
        ("red; blue", "red, blue", True),
        ("red & blue", "red and blue", True),
        ("red、blue", "red和blue", True),
        ("red, and blue", "red, blue", True),
        ("red", "red, blue", False),
        ("red, blue, green", "red, blue", False),
        ("red, blue", "red", False),
        ("x=1, y=2", "y=2, x=1", True),
        ("x=2, y=1", "x=1, y=2", False),
        ("(1,2]", "(1,2)", False),
        ("x∈(1,2)", "(1,2)", True),
        ("x \\in (1,2)", "(1,2)", True),
        ("red,, blue", "red, blue", True),
        ("red, red", "red, blue", False),
        ("blue, red", "red, red", False),
        ("1, red", "red, 1", False),
        ("1/2, 3", "0.5, 3", True),
        ("√4, 3", "2, 3", True),
        ("\\sqrt{2}, red", "red, \\sqrt{2}", True),
        ("1.0, 2", "1, 2", True),
        ("cat, 5 dogs", "5 dogs, cat", False),
        ("2, x = 1", "x = 1, 2", False),  # only where all are named the order is free
        ("[1, 2]", "1, 2", True),
        ("{2,1}", " {1,2}", True),
        ("1,000, 2", "1000, 2", False),
        ("1/8, 2", "0.13, 2", True),
        ("0.13, 2", "1/8, 2", False),
        ("{2, 1/8}", "{0.13, 2}", True),
        ("{2, 0.13}", "{1/8, 2}", False),
    ],
)
def test_lists_are_numbers_in_order_or_words_in_any(prediction, gold, right):
    assert decide_list(prediction, gold, NOTHING_ASKED) == ((True, "same items") if right else None)


@pytest.mark.parametrize(
    ("prediction", "gold", "right"),
    [
        ("The Cat", "cat", True),
        ("It is a cat", "cat", True),
        ("a cat is red", "red", True),
        ("-x", "x", False),
        ("", "cat", False),
        ("cat", "", False),
        ("cat", "*", False),
        ("x is (1,2]", "[1,2]", False),
        ("x is (1,2]", "(1,2]", True),
        ("!", "?", False),
        (".5 of it", "5 of it", False),
    ],
)
def test_texts_are_the_same_words(prediction, gold, right):
    assert decide_text(prediction, gold, NOTHING_ASKED) == ((True, "same words") if right else None)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("x=5", "y=5", False),
        ("x=5", "x=5", True),
        ("x=5", "5", True),
        ("5", "x=5", True),
        ("5", "5.0", True),
        ("√4", "2", True),
        ("cat", "The cat", True),
        ("cat", "dog", False),
        ("x", "x+0", True),
        ("9^{9^9}", "8^{8^8}", False),
    ],
)
def test_items_are_equal_as_numbers_formulas_or_words(one, other, same):
    assert same_item(one, other) is same
    assert same_item(other, one) is same


# ---------------------------------------------------------------------------------------------- where an answer stands


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{ 5 }", "5"),
        (r"\boxed{\frac{1}{2}} and", r"\frac{1}{2}"),
        (r"\boxed{1} \boxed{2}", "2"),
        (r"\boxed{1} \boxed{2", "1"),  # the last one that closes
        (r"\boxed{", None),
        ("boxed{1}", None),
        (r"\boxed{}", ""),
        (r"\boxed{{1}", None),
        (r"\boxed{1}" + r"\boxed{" * 19, "1"),
        (r"\boxed{1}" + r"\boxed{" * 20, None),  # a loop
        (r"\boxed{" + "x" * 298 + "}", "x" * 298),
        (r"\boxed{" + "x" * 299 + "}", None),
    ],
)
def test_the_last_box_that_closes(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        *(("a", "a"), ("<think>a</think>b", "b"), ("<think>a", None), ("<think>a</think> b <think>c", None)),
        *(
            ("<THINK>a</Thinking> b ", "b"),
            ("a</think>b", "b"),
            ("think", "think"),
            ("<think>a</think>b</think>c", "c"),
        ),
    ],
)
def test_what_follows_the_last_thought(text, rest):
    assert without_thinking(text) == rest


REASON = "x" * 20


@pytest.mark.parametrize(
    ("response", "answer_format", "answer", "reason"),
    [
        (f"<think>{REASON}</think>\\boxed{{5}}", "think", None, "no reasoning before the box"),
        (f"<think>{REASON}x</think>\\boxed{{5}}", "think", "5", "in the last box"),
        (f"<think> {REASON[1:]} </think>\\boxed{{5}}", "think", None, "the think block is empty"),
        ("\\boxed{5}", "think", None, "not exactly one think block"),
        (f"<think>{REASON}\\boxed{{5}}", "think", None, "not exactly one think block"),
        (f"<think>{REASON}x</think></think>\\boxed{{5}}", "think", None, "not exactly one think block"),
        (f"<think><think>{REASON}x</think>\\boxed{{5}}", "think", None, "not exactly one think block"),
        (f"<think>{REASON}x</think> nothing", "think", None, "no \\boxed{}"),
        (f"<think>{REASON}x</think> \\boxed{{}}", "think", None, "empty \\boxed{}"),
        ("<think>a Final answer: 5", "marker", None, "the think block never closes"),
        ("<think>a</think>Final answer: 5", "marker", "5", "after the marker"),
        ("<think>Final answer: 4</think>x Final answer: 5", "marker", "5", "after the marker"),
        ("Final answer: 5", "marker", None, "no reasoning before the final answer"),
        (" \t\n*#_Final answer: 5", "marker", None, "no reasoning before the final answer"),
        ("x Final answer: 5", "marker", "5", "after the marker"),
        ("x FINAL ANSWER is: **5**", "marker", "5", "after the marker"),
        ("x final  answer:5", "marker", "5", "after the marker"),
        ("x 答案是：5", "marker", "5", "after the marker"),
        ("x 答案为:5", "marker", "5", "after the marker"),
        ("final count; so 答案: 5", "marker", "5", "after the marker"),
        ("答案 of it; Final answer: 5", "marker", "5", "after the marker"),
        ("x 答案: 5 finally", "marker", "5 finally", "after the marker"),
        ("答案: 4 Final answer: 5", "marker", None, "no reasoning before the final answer"),
        ("Final answer: İ", "marker", None, "no reasoning before the final answer"),
        ("x final", "marker", None, "no 'Final answer:'"),
        ("x Final answer: a Final answer: b", "marker", "b", "after the marker"),
        ("x Final answer: a Final answer: b 答案: c", "marker", None, "'Final answer:' occurs 3 times"),
        ("x Final answer: **", "marker", None, "nothing follows 'Final answer:'"),
        ("x Final answer: 5\n6", "marker", None, "the final answer is not on one line"),
        (f"{REASON} \\boxed{{5}}", "boxed", "5", "in the last box"),
        ("<think>\\boxed{4}</think> \\boxed{5}", "boxed", "5", "in the last box"),
        (" " * 20 + "\\boxed{5}", "boxed", None, "no reasoning before the box"),
        ("<think>\\boxed{4}</think> five", "boxed", None, "no \\boxed{}"),
        ("<think>\\boxed{4}", "boxed", None, "the think block never closes"),
        (" 5 ", "text", "5", "whole text"),
        ("because\nAnswer: 5", "text", "5", "whole text"),
        ("because\n**The answer**: 5 \nAnswer： 6", "text", "6", "whole text"),
        ("<think>a</think>5", "text", "5", "whole text"),
        (" ", "text", None, "empty response"),
        ("5\n6", "text", None, "several lines and no answer line"),
    ],
)
def test_the_final_answer_of_a_response_and_why_there_is_none(response, answer_format, answer, reason):
    assert parse_answer(response, answer_format) == (answer, reason)


def test_an_unknown_format_is_named():
    with pytest.raises(ValueError, match="answer_format is 'x', expected one of marker, boxed, think, text"):
        parse_answer("5", "x")
