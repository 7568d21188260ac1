"""Short texts and lists of them; ANLS."""

import re

from internvl_mpo.answers.common import NOTHING_ASKED, Asked, Decision, plain_words, said_values
from internvl_mpo.answers.formulas import decide_math
from internvl_mpo.answers.numbers import assigned_name, equal_numbers, parse_number

MAX_ANLS_CHARS = 500  # the similarity costs the product of both lengths


def decide_text(prediction: str, gold: str, asked: Asked) -> Decision:
    wanted = plain_words(gold)
    said = [text for text in said_values(prediction) if plain_words(text) == wanted]
    if not said or not any(same_marks(text, gold) for text in said):
        return None
    return (True, "same words")


_BRACKETED = re.compile(r"(?:.*=\s*)?(?:\\left)?(\\?[\[({]).*,.*?(?:\\right)?(\\?[\])}])")

_NEGATIVE = re.compile(r"-(?:[A-Za-z]|\s+[A-Za-z]\b)")  # "- red" is an item of a list


def same_marks(given: str, gold: str) -> bool:
    """Whether marks that `plain_words` drops agree: the same brackets around (1, 2], -x is not x, a/b is not b/a."""
    if "\\frac" in given and "\\frac" in gold:
        return "".join(given.split()) == "".join(gold.split())
    if bool(_NEGATIVE.match(given)) != bool(_NEGATIVE.match(gold)):
        return False
    if any(re.search(r"\b[A-Za-z]\s*[-+*/]\s*[A-Za-z]\b", text) for text in (given, gold)):
        return "".join(given.lower().split()) == "".join(gold.lower().split())
    pairs = [_BRACKETED.match(text) for text in (given, gold)]
    return not all(pairs) or [group.strip("\\") for group in pairs[0].groups()] == [
        group.strip("\\") for group in pairs[1].groups()
    ]


# -- lists

_ELEMENT = re.compile(r"^[A-Za-z]\s*(?:∈|\\?in\b)\s*")
_SEPARATOR = re.compile(r"\s*(?:,\s*and\b|;|,|、|\band\b|&|和)\s*")


def decide_list(prediction: str, gold: str, asked: Asked) -> Decision:
    """Several items: numbers in order (in any order inside braces), words in any order."""
    prediction, gold = (_ELEMENT.sub("", text) for text in (prediction, gold))
    wanted, given = list_items(gold), list_items(prediction)
    if len(wanted) < 2:
        return None
    if len(wanted) != len(given):
        return None
    is_named = all(assigned_name(item) for item in wanted)
    in_order = not gold.strip().startswith(("{", "\\{")) and any(parse_number(item) for item in wanted)
    any_order = is_named or not in_order
    in_pairs = map(same_item, given, wanted)
    right = same_marks(prediction, gold) and (same_in_any_order(given, wanted) if any_order else all(in_pairs))
    return (True, "same items") if right else None


def list_items(text: str) -> list[str]:
    text = text.strip().removeprefix("\\{").removesuffix("\\}").strip("{}()[] ")
    return [item for item in _SEPARATOR.split(text) if item]


def same_item(given: str, wanted: str) -> bool:
    """Equal as numbers, formulas or words; "x = 3" is no value of y."""
    names = assigned_name(given), assigned_name(wanted)
    if all(names) and names[0] != names[1]:
        return False
    number, other = parse_number(wanted), parse_number(given)
    if number and other:
        return equal_numbers(other, number)
    compared = decide_math(given, wanted, NOTHING_ASKED)
    return bool(compared and compared[0]) or plain_words(given) == plain_words(wanted)


def same_in_any_order(given: list[str], wanted: list[str]) -> bool:
    """Whether each wanted item is one of those given, none of them twice."""
    left = list(given)
    for item in wanted:
        found = next((other for other in left if same_item(other, item)), None)
        if found is None:
            return False
        left.remove(found)
    return True


# -- transcribed text


def anls(prediction: str, gold: str) -> float:
    """Return the normalised Levenshtein similarity, 1 - distance / longer length: 1 is equal, 0 has nothing in common.

    This is the similarity of DocVQA's ANLS before its 0.5 threshold.
    """
    a, b = " ".join(prediction.lower().split()), " ".join(gold.lower().split())
    if a == b:
        return 1.0
    previous = list(range(len(b) + 1))
    for i, char in enumerate(a, start=1):
        current = [i]
        for j, other in enumerate(b, start=1):
            current.append(min(previous[j] + 1, current[-1] + 1, previous[j - 1] + (char != other)))
        previous = current
    return 1 - previous[-1] / max(len(a), len(b))


def decide_anls(prediction: str, gold: str, asked: Asked) -> Decision:
    """Text read off a page: a slip of a letter in ten is forgiven, a digit never."""
    if (
        len(gold) > MAX_ANLS_CHARS
        or len(prediction) > 2 * len(gold)
        or re.findall(r"\d", prediction) != re.findall(r"\d", gold)
    ):
        return None
    similarity = anls(prediction, gold)
    return (True, f"ANLS {similarity:.2f}") if similarity > 0.9 else None
