r"""MathVision MINI: 304 competition problems with pictures, 16 subjects, 5 levels.

Source: mathllm/MATH-V (MIT), Hub MathLLMs/MathVision, split testmini.
Example: "How many different digits can you find in this picture?" -> 6.
Number: accuracy in per cent. Multiple choice is right as the letter or as the text of the option.

Rules
- official (evaluation/evaluate.py and utils.py): a reply that opens or closes with a letter is that letter; the last
  `\boxed`, else what follows "the answer is" and its kin; then LaTeX dressing is taken off and both sides are compared
  as text, element by element for tuples, and as numbers rounded to two decimals: 6.004 is 6, 0.33 is 1/3. Without a
  box or phrase the whole reply is the answer, so "Final answer: 6" is wrong. The original hands replies to `eval`;
  `latex_value` gives the same verdicts without.
- vlmevalkit (November 2024, no judge): the option inferred from the whole reply; free answers only if the whole reply
  equals the gold answer as text or as a number within 1e-6. Upstream evaluates both as Python first, so "5 or 6" is 5,
  5^2 is 7 too, and "A" is any number: its variable a holds the gold value at that moment. `python_value` does the
  arithmetic of that without running anything.
- ours: the last marked or boxed answer, else the last line; options as `internvl_mpo.answers` reads them, or the same
  text, number (within 1e-6, units and degrees ignored), items in the same brackets, or formula. A two-decimal rounding
  of an irrational gold answer is not the answer.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_mpo.answers.common import NOTHING_ASKED, clean_answer
from internvl_mpo.answers.formulas import decide_math
from internvl_mpo.answers.numbers import is_close, value_of
from internvl_mpo.answers.texts import decide_list
from internvl_mpo.benchmarks.common import (
    LETTERS,
    SLOW_REPLY,
    Example,
    Mode,
    Rule,
    Score,
    Source,
    first_marked_answer,
    reply_text,
    summarise_accuracy,
)
from internvl_mpo.benchmarks.extraction import choose_option, short_answer, vlmevalkit_option
from internvl_mpo.benchmarks.latex_value import latex_value
from internvl_mpo.benchmarks.python_value import python_value
from internvl_mpo.benchmarks.sources import image_source, parse_list, read_rows, shared_picture
from internvl_mpo.prompts import ask

NAME = "mathvision"
TITLE = "MathVision MINI"
HUB_ID = "MathLLMs/MathVision:testmini"
RULES: tuple[Rule, ...] = ("ours", "official", "internvl", "vlmevalkit")
MAX_NEW_TOKENS: Mapping[Mode, int] = {"direct": 4096, "cot": 4096}
CLUSTER = "pictures"
MAX_ELEMENTS = 64  # of a tuple; no gold answer has more than a few


def examples(source: Source, image_root: str | Path | None = None) -> list[Example]:
    """Return the questions of `testmini.jsonl`, a VLMEvalKit table, or Hub rows."""
    rows, root = read_rows(source, "testmini.jsonl", "*.jsonl", "*.tsv")
    root = Path(image_root) if image_root else root
    found = []
    for row in rows:
        picture = row.get("decoded_image") or row.get("image")
        subject = row.get("subject") or row.get("category") or ""
        found.append(
            Example(
                id=str(row.get("id", row.get("index"))),
                question=row["question"],
                answer=str(row["answer"]),
                images=(image_source(picture, root),) if picture else (),
                cluster=shared_picture(row, row["image"] if isinstance(row.get("image"), str) else picture),
                choices=tuple(parse_list(row.get("options") or row.get("choices"))),
                groups={"subject": (str(subject),), "level": (str(row.get("level", "")),)},
            )
        )
    return found


def prompt(example: Example, mode: Mode) -> str:
    """Return question and options, with the instruction to answer directly or in the chain-of-thought prompt."""
    question = re.sub(r"<image\d+>", "", example.question.split("Question:", 1)[-1]).replace("Choices:\n", "").strip()
    options = "".join(f"\n{letter}. {choice}" for letter, choice in zip(LETTERS, example.choices, strict=False))
    return ask(question + options, mode, "en")


def score(example: Example, answer: str | None, rule: Rule = "ours", mode: Mode = "cot") -> Score:
    """Return whether the answer is the gold answer; see the rules above."""
    text = reply_text(answer, SLOW_REPLY)
    if rule == "ours":
        right, extracted, reason = _ours(example, text)
    elif rule == "vlmevalkit":
        right, extracted, reason = _vlmevalkit(example, text)
    else:
        if rule == "internvl" and mode == "cot":
            text = first_marked_answer(text)
        extracted = _official_answer(text)
        right = any(_official_equal(gold, extracted) for gold in _golds(example))
        reason = "equal as text or to two decimals" if right else "differs"
        extracted = extracted or None
    return Score(
        id=example.id,
        value=float(right),
        extracted=extracted,
        reason=reason,
        groups=example.groups,
        cluster=example.cluster,
    )


def summarise(scores: Sequence[Score], rule: Rule = "ours") -> dict[str, Any]:
    """Return accuracy, with breakdowns by subject and level."""
    return summarise_accuracy(scores, CLUSTER)


def _golds(example: Example) -> tuple[str, ...]:
    """The gold answer, and for multiple choice the text of its option."""
    gold = example.answer or ""
    if not example.choices:
        return (gold,)
    return gold, example.choices[LETTERS.index(gold)]


# ------------------------------------------------------------------------------------------------------- official

_PHRASES = tuple(
    article + phrase
    for phrase in ("e final answer is", "e answer is", "e correct answer is", "e answer should be")
    for article in ("th", "Th")
)
_DROPPED_FIRST = (
    *("\\text", "\\mbox"),
    *("\\left", "\\right", "^{\\circ}", "^\\circ", "{m}^3", "m^3", "{units}", "units", "{km}", "km"),
)
_DROPPED_LAST = ("\\left", "\\right", "^{\\circ}", "^\\circ", "\\$", "$")


def _official_answer(reply: str) -> str:
    text = reply.strip()
    for letter in "ABCDE":
        if text.endswith((f" {letter}.", f" ({letter}).")) or text.startswith(
            (f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n")
        ):
            text = letter
    ending = text.split("is ")[-1].rstrip(".")
    if _is_float(ending):
        text = ending
    if "oxed{" not in text:
        for phrase in _PHRASES:
            found = phrase in text
            text = text.split(phrase)[-1].strip()
            if found:
                text = text.split("\n")[0].split(". ")[0]
    elif text.count("oxed{") > 1:
        text = "\\boxed{" + text.split("oxed{")[-1]
    text = _undress(text)
    for opening, closing in ("()", "{}"):
        for letter in "abcde":
            text = text.replace(opening + letter + closing, letter)
    return text.rstrip(".").lstrip(":").strip()


def _is_float(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _undress(text: str) -> str:
    """Take the boxed content and its LaTeX dressing off, in the original's order, on which the outcome depends."""
    text = text.lower().replace("{}", "")
    start, end = text.find("oxed{"), text.rfind("}")
    if start >= 0 and end >= start + len("oxed{"):
        text = text[start + len("oxed{") : end]
    if "}" in text and ("{" not in text or text.find("}") < text.find("{")):
        text = text.split("}")[0]
    text = text.split("=")[-1].split("\\approx")[-1]
    text = text.replace(" ", "").replace("\\,", "").replace("∞", "\\infty").replace("+\\infty", "\\infty")
    text = text.replace("\\\\", "\\").replace("\n", "").replace("bmatrix", "pmatrix")
    for dropped in _DROPPED_FIRST:
        text = text.replace(dropped, "")
    text = text.replace("\\!", "").replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    for dropped in _DROPPED_LAST:
        text = text.replace(dropped, "")
    text = text.split("\\text{ ")[0].replace("\\%", "").replace("{.", "{0.")
    if text.startswith("."):
        text = "0" + text
    for sign in ("=", "\\approx"):
        if text.count(sign) == 1:
            text = text.split(sign)[-1]
    if "sqrt" in text:
        text = re.sub(r"\\sqrt(?!\\sqrt)([^{])", r"\\sqrt{\1}", text, flags=re.DOTALL)
        text = _brace_fractions(text.replace(" ", ""))
    if text == "0.5":
        return "\\frac{1}{2}"
    simple = re.fullmatch(r"(0|-?[1-9]\d*)/(0|-?[1-9]\d*)", text, re.ASCII)
    return f"\\frac{{{simple.group(1)}}}{{{simple.group(2)}}}" if simple else text


def _brace_fractions(text: str) -> str:
    r"""`\frac12` to `\frac{1}{2}`; the whole text stays as it is when one fraction is cut off."""
    first, *rest = text.split("\\frac")
    if any(len(part) < 2 and not part.startswith("{") for part in rest):
        return text
    for part in rest:
        if part.startswith("{"):
            first += "\\frac" + part
        elif part[1] == "{":
            first += f"\\frac{{{part[0]}}}{part[1:]}"
        else:
            first += f"\\frac{{{part[0]}}}{{{part[1]}}}{part[2:]}"
    return first


def _official_equal(gold: str, given: str) -> bool:
    gold, given = gold.lower(), given.lower()
    if not gold.replace(" ", "") or not given.replace(" ", ""):
        return False
    if gold.strip() == given.strip():
        return True
    gold, given = _rounded_tuple(gold), _rounded_tuple(given)
    if gold == given:
        return True
    values = latex_value(gold), latex_value(given)
    return None not in values and round(values[0], 2) == round(values[1], 2)


def _rounded_tuple(text: str) -> str:
    parts = text[1:-1].split(",")
    if not 2 <= len(parts) <= MAX_ELEMENTS or text[0] + text[-1] not in ("()", "[]"):
        return text
    rounded = []
    for part in parts:
        if "infty" in part or part in ("a", "-a"):
            rounded.append(part)
            continue
        value = latex_value(part)
        if value is None:
            return text
        rounded.append(str(round(value, 2)))
    return f"{text[0]}{','.join(rounded)}{text[-1]}"


# ----------------------------------------------------------------------------------------------------- vlmevalkit


def _vlmevalkit(example: Example, text: str) -> tuple[bool, str | None, str]:
    if example.choices:
        letter = vlmevalkit_option(text, dict(zip(LETTERS, example.choices, strict=False)))
        return letter == example.answer, letter, "option inferred" if letter else "left to a judge"
    if _same_number(text.lower().strip(), (example.answer or "").lower().strip()):
        return True, text, "whole reply equals the gold answer"
    return False, None, "left to a judge"


def _same_number(given: str, gold: str) -> bool:
    """Equal as text, as Python's `eval` reads both, or as LaTeX; its variable `a` holds the gold value meanwhile."""
    if given == gold:
        return True
    wanted = python_value(gold)
    if wanted is not None and _close(python_value(given, {"a": wanted}), wanted):
        return True
    wanted = latex_value(gold, rational=True)
    return wanted is not None and _close(latex_value(given, rational=True, a=wanted), wanted)


def _close(given: complex | None, wanted: complex) -> bool:
    try:
        return given is not None and abs(given - wanted) < 1e-6
    except OverflowError:
        return False


# ----------------------------------------------------------------------------------------------------------- ours


def _ours(example: Example, text: str) -> tuple[bool, str | None, str]:
    if example.choices:
        letter, reason = choose_option(text, example.choices, example.question)
        return letter == example.answer, letter, reason
    said, gold = short_answer(text), clean_answer(example.answer or "")
    if not said:
        return False, None, "empty"
    if said.lower() == gold.lower():
        return True, said, "same text"
    given, wanted = value_of(said), value_of(gold)
    if given is not None and wanted is not None:
        same = is_close(given, wanted, 1e-6)
        return same, said, "same number" if same else f"{said[:40]}, expected {gold}"
    same = any((rule(said, gold, NOTHING_ASKED) or (False,))[0] for rule in (decide_list, decide_math))
    return bool(same), said, "same items or formula" if same else "differs"
