"""MathVista testmini: 1,000 questions of visual mathematics, multiple choice or with a number for an answer.

Source: lupantech/MathVista, Hub AI4Math/MathVista (CC BY-SA 4.0), split testmini.
Example: "... By what distance d is the spring compressed ...?" -> 1.2 (float, one decimal).
Number: accuracy in per cent; a question counts under each of its skills.

Upstream is two steps: a judge reads the final answer off the reply, then rules normalise and compare it. `score` takes
either, a whole reply or an extraction. Reading replies without a judge gives lower scores than published ones.

Rules
- official (calculate_score.py): multiple choice takes the first "(x)", a letter in range, else the option with the
  smallest edit distance, whatever was said (an empty answer becomes the shortest option); a whole number is
  int(float(text)), so 3.9 is 3; a decimal number is rounded to the question's precision; "1,000", "5 cm" and "50%"
  are no numbers; lists are compared as text.
- internvl: of a chain of thought the first marked answer, then official.
- vlmevalkit (utils/mathvista.py, November 2024, no judge): the option inferred from the reply, or a reply that is a
  number; decimal numbers must be equal exactly; lists and the answer 0 are never right.
- ours: the last marked or boxed answer, else the last line; options and numbers as `internvl_mpo.answers` reads them,
  numbers equal after rounding to the question's precision; lists element by element. 3.9 is not 3, nor is "at least 3".
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from internvl_mpo.answers.numbers import value_of
from internvl_mpo.benchmarks.common import (
    LETTERS,
    MAX_REPLY,
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
from internvl_mpo.benchmarks.judging import fill
from internvl_mpo.benchmarks.sources import image_source, parse_list, read_rows, shared_picture
from internvl_mpo.prompts import ask

NAME = "mathvista"
TITLE = "MathVista"
HUB_ID = "AI4Math/MathVista:testmini"
RULES: tuple[Rule, ...] = ("ours", "official", "internvl", "vlmevalkit")
MAX_NEW_TOKENS: Mapping[Mode, int] = {"direct": 4096, "cot": 4096}
CLUSTER = "pictures"
JUDGE_MAX_NEW_TOKENS = 64
JUDGE_PROMPT = """Read the final answer off a reply to a question. Write the answer alone: the option letter, the \
number without its unit, or the list in brackets. Write nothing if the reply settles on no answer.

{query}

Reply: {answer}

Final answer: """
GROUPS = ("question_type", "answer_type")
METADATA_GROUPS = ("language", "source", "category", "task", "context", "grade", "skills")

MAX_EXTRACTION = 4_000  # a longer text never was an extraction; see `_distance`

_HINTS = {
    "text": "Please answer the question and provide the correct option letter, e.g., A, B, C, D, at the end.",
    "integer": "Please answer the question requiring an integer answer and provide the final value, "
    "e.g., 1, 2, 3, at the end.",
    "float1": "Please answer the question requiring a floating-point number with one decimal place and provide the "
    "final value, e.g., 1.2, 1.3, 1.4, at the end.",
    "float2": "Please answer the question requiring a floating-point number with two decimal places and provide the "
    "final value, e.g., 1.23, 1.34, 1.45, at the end.",
    "list": "Please answer the question requiring a Python list as an answer and provide the final list, "
    "e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the end.",
}


def examples(source: Source, image_root: str | Path | None = None) -> list[Example]:
    """Return the questions of the official JSON, a VLMEvalKit table, or Hub rows."""
    rows, root = read_rows(source, "testmini.json", "*testmini*.json*", "*.tsv")
    root = Path(image_root) if image_root else root
    found = []
    for row in rows:
        metadata = row.get("metadata") or row
        groups = {key: (str(row[key]),) for key in GROUPS}
        for key in METADATA_GROUPS:
            value = metadata.get(key)
            if key == "skills" and isinstance(value, str) and value.startswith("["):
                value = parse_list(value)
            if value:
                groups[key] = tuple(map(str, value)) if isinstance(value, list) else (str(value),)
        picture = row.get("decoded_image") or row.get("image")
        precision = row.get("precision")
        choices = tuple(parse_list(row.get("choices")))
        answer = str(row["answer"])
        if choices and answer not in choices and answer in LETTERS:  # VLMEvalKit tables hold the letter
            answer = choices[LETTERS.index(answer)]
        found.append(
            Example(
                id=str(row.get("pid", row.get("id", row.get("index")))),
                question=row["question"],
                answer=answer,
                images=(image_source(picture, root),) if picture else (),
                cluster=shared_picture(row, row["image"] if isinstance(row.get("image"), str) else picture),
                choices=choices,
                groups=groups,
                details={
                    "precision": int(float(precision)) if precision not in (None, "") else None,
                    "unit": row.get("unit") or "",
                    "query": row.get("query"),
                },
            )
        )
    return found


def prompt(example: Example, mode: Mode) -> str:
    """Return the official query (hint, question, unit, choices), as it is or inside the chain-of-thought prompt."""
    query = example.details.get("query") or _query(example)
    return query if mode == "direct" else ask(query, mode, "en")


def score(
    example: Example, answer: str | None, rule: Rule = "ours", mode: Mode = "cot", replies: Sequence[str] = ()
) -> Score:
    """Return whether the answer, or a judge's extraction of it, is the gold answer; see the rules above."""
    text = replies[0].strip() if replies else reply_text(answer, SLOW_REPLY if rule == "vlmevalkit" else MAX_REPLY)
    if rule == "ours":
        right, extracted, reason = _ours(example, text)
    elif rule == "vlmevalkit":
        right, extracted, reason = _vlmevalkit(example, text)
    else:
        if rule == "internvl" and mode == "cot":
            text = first_marked_answer(text)
        if answer is None and rule == "official" and example.choices and not replies:
            text = "None"  # upstream makes a text of it and takes the option closest to that
        extracted, reason = _official(example, text)
        right = extracted == example.answer
    return Score(
        id=example.id,
        value=float(right),
        extracted=extracted,
        reason=reason,
        groups=example.groups,
        cluster=example.cluster,
    )


def summarise(scores: Sequence[Score], rule: Rule = "ours") -> dict[str, Any]:
    """Return accuracy, with breakdowns by type, language, source, category, task, context, grade and skill."""
    return summarise_accuracy(scores, CLUSTER)


def judge_request(example: Example, answer: str, template: str = JUDGE_PROMPT) -> str | None:
    """Return what asks a judge to read the final answer off a reply; None where the reply is nothing but the answer."""
    kind = example.groups["answer_type"][0]
    parse = {"integer": int, "float": float}.get(kind)
    try:
        bare = not answer or answer in example.choices or (parse is not None and parse(answer) is not None)
    except (ValueError, OverflowError):
        bare = False
    return None if bare else fill(template, {"query": prompt(example, "direct"), "answer": answer})


def _query(example: Example) -> str:
    kind = example.groups["answer_type"][0]
    hint = _HINTS["text" if example.choices else f"{kind}{example.details['precision']}" if kind == "float" else kind]
    lines = [f"Hint: {hint}", f"Question: {example.question}"]
    if example.details["unit"]:
        lines[-1] += f" (Unit: {example.details['unit']})"
    if example.choices:
        lines.append("Choices:")
        lines += [f"({letter}) {choice}" for letter, choice in zip(LETTERS, example.choices, strict=False)]
    return "\n".join(lines).strip()


# ------------------------------------------------------------------------------------------------------- official


def _official(example: Example, text: str) -> tuple[str | None, str]:
    if example.choices:
        stripped = text.strip()
        letters = re.findall(r"\(([a-zA-Z])\)", stripped)
        if letters:
            stripped = letters[0].upper()
        valid = LETTERS[: len(example.choices)]
        if len(stripped) == 1 and stripped in valid:
            return example.choices[valid.index(stripped)], "letter"
        return _most_similar(stripped, example.choices), "smallest edit distance"
    kind = example.groups["answer_type"][0]
    if kind == "list":
        return text, "text as it is"
    try:
        number = float(text)
        if kind == "integer":
            return str(int(number)), "whole part"
        return str(round(number, int(example.details["precision"]))), "rounded to the precision"
    except (ValueError, OverflowError, TypeError):
        return None, "not a number"


def _most_similar(text: str, choices: Sequence[str]) -> str:
    return min(choices, key=lambda choice: _distance(text, choice))


def _distance(text: str, choice: str) -> int:
    """Levenshtein distance, a column of the table per character as bits of two integers (Myers 1999)."""
    if not choice:
        return len(text)
    if len(text) > MAX_EXTRACTION:
        return _distance_of_long(text, choice)
    matches: dict[str, int] = {}
    for i, character in enumerate(choice):
        matches[character] = matches.get(character, 0) | 1 << i
    mask, last = (1 << len(choice)) - 1, 1 << (len(choice) - 1)
    up, down, distance = mask, 0, len(choice)
    for character in text:
        match = matches.get(character, 0)
        vertical = match | down
        horizontal = (((match & up) + up) ^ up) | match
        plus, minus = down | ~(horizontal | up), up & horizontal
        distance += bool(plus & last) - bool(minus & last)
        plus = plus << 1 | 1
        up, down = (minus << 1 | ~(vertical | plus)) & mask, plus & vertical & mask
    return distance


def _distance_of_long(text: str, choice: str) -> int:
    """Levenshtein distance of a text far longer than the choice: its length less the characters they share in order.

    A character of the choice that the text does not hold at all takes the place of any other. Where those it does hold
    come in another order, only the beginning of the text is compared.
    """
    position = shared = 0
    for character in choice:
        found = text.find(character, position)
        if found >= 0:
            shared += 1
            position = found + 1
        elif character not in text:
            position += 1
        else:
            beginning = text[:MAX_EXTRACTION]
            return len(text) - max(shared, MAX_EXTRACTION - _distance(beginning, choice))
    return len(text) - shared


# ----------------------------------------------------------------------------------------------------- vlmevalkit


def _vlmevalkit(example: Example, text: str) -> tuple[bool, str | None, str]:
    if example.choices:
        choices = dict(zip(LETTERS, example.choices, strict=False))
        letter = vlmevalkit_option(text, choices)
        gold = next((key for key, choice in choices.items() if choice == example.answer), None)
        return letter is not None and letter == gold, letter, "option inferred" if letter else "left to a judge"
    parse = {"integer": int, "float": float}.get(example.groups["answer_type"][0])
    try:
        right = parse is not None and parse(text) == parse(example.answer or "") and parse(text) != 0
    except (ValueError, OverflowError):
        right = False
    return right, text if right else None, "the reply is the number" if right else "left to a judge"


# ----------------------------------------------------------------------------------------------------------- ours


def _ours(example: Example, text: str) -> tuple[bool, str | None, str]:
    if example.choices:
        letter, reason = choose_option(text, example.choices, example.question)
        choice = example.choices[LETTERS.index(letter)] if letter else None
        return choice == example.answer, choice, reason
    said = short_answer(text)
    if not said:
        return False, None, "empty"
    if example.groups["answer_type"][0] == "list":
        numbers, gold = _numbers(said), _numbers(example.answer or "")
        return numbers == gold and bool(gold), said if numbers else None, "element by element"
    number, gold_number = value_of(said), value_of(example.answer or "")
    if number is None or gold_number is None:
        return False, None, "no number, or several"
    precision = example.details["precision"] or 0
    right = abs(number - gold_number) <= (0.5 * 10**-precision + 1e-9 if precision else 1e-9)
    return right, said, "equal" if right else f"{said[:40]}, expected {example.answer}"


def _numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d{1,300}(?:\.\d{1,300})?", text)][:50]
