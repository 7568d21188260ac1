"""Formulas, compared by math-verify in a child process with a time limit."""

import re
from fractions import Fraction

from internvl_mpo.answers.common import HEDGED, Decision, Options
from internvl_mpo.answers.math_process import compare_formulas
from internvl_mpo.answers.numbers import NO_NUMBER, parse_number, rounds_to

# -- formulas

FORMULA = re.compile(r"[\\^√π=*+/]|\d\s*[a-z]\b|\bpi\b|sqrt|\d!")


_FORMULA_WORDS = (
    "frac dfrac tfrac sqrt cdot times div left right infty theta alpha beta gamma lambda circ degree sin cos tan cot "
    "sec csc log exp cup cap mathrm mathbb angle overline leq geq neq"
)


FORMULA_NAMES = frozenset(_FORMULA_WORDS.split())


def decide_math(prediction: str, gold: str, options: Options) -> Decision:
    """Formulas, by algebra in a child process; a formula also equals its decimal value given to two places or more."""
    if not (FORMULA.search(prediction) or FORMULA.search(gold)) or HEDGED.search(prediction):
        return None
    if NO_NUMBER.search(prediction) or NO_NUMBER.search(gold):
        return None
    for text in (prediction, gold):
        words = re.findall(r"[A-Za-z]{3,}", text)
        if len(text) > 200 or any(word.lower() not in FORMULA_NAMES for word in words):
            return None  # algebra would read "red" as r*e*d
    compared = compare_formulas(to_latex(prediction), to_latex(gold))
    if compared is None:
        return (None, "algebra ran out of time or memory")
    if compared.equal:
        return (True, "equal formulas")
    for text, formula_value in ((prediction, compared.gold_value), (gold, compared.prediction_value)):
        number = parse_number(text)
        if number is None or formula_value is None or (number.decimals or 0) < 2:
            continue
        if rounds_to(Fraction(formula_value), number):
            return (True, "decimal value of the formula")
    return (False, "unequal formulas")


def to_latex(text: str) -> str:
    text = re.sub(r"√\s*(?=\{)", r"\\sqrt", text)
    text = re.sub(r"√\s*(\d+|\([^()]*\))", r"\\sqrt{\1}", text).replace("π", r"\pi ")
    text = re.sub(r"(?<!\\)\bsqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    return re.sub(r"(?<![\\A-Za-z])pi\b", r"\\pi ", text)
