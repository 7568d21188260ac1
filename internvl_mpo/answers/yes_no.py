"""Yes or no as answers: read once, here, for the matcher and for POPE's rule `ours`."""

import re

from internvl_mpo.answers.common import Asked, Decision

YES_NO = {
    **dict.fromkeys(("yes", "true", "是", "对", "正确", "是的", "对的", "有", "有的", "存在"), "yes"),
    **dict.fromkeys(("no", "false", "否", "不是", "错", "错误", "不对", "不", "没有", "不存在", "没", "无"), "no"),
}
_SPOKEN = {**dict.fromkeys(("yep", "yeah", "yup"), "yes"), **dict.fromkeys(("nope", "nah"), "no")}
# What leaves the answer open, whatever words stand beside it.
_OPEN = re.compile(
    r"\b(?:maybe|(?:un)?likely|perhaps|possibl[ey]|probabl[ey]|might|may|could|(?:un|not )sure|(?:un|not )certain|"
    r"unclear|not clear|uncertain|whether|no idea|depends?|if there|not entirely|"
    r"(?:do not|don['’]t|does not|doesn['’]t) know|unable|(?:hard|difficult|impossible) to|unknown|ambiguous)\b"
    r"|\bcan(?:not|['’]t| not) (?:be )?(?:certain|sure|say|tell|determined?|confirm(?:ed)?|know)\b"
    r"|\b(?:yes\W+(?:(?:and|or|but)\W+)?no|no\W+(?:(?:and|or|but)\W+)?yes)\b|[?？]\s*$"
    r"|可能|也许|或许|大概|不确定|不清楚|不知道|无法|难以|不好说|是否|有没有|说不准|说不定|恐怕|未必",
    re.IGNORECASE,
)
_NOT = re.compile(
    r"\b(?:no|not|never|none|nothing|neither|nor|without|absent|lacks?|lacking|cannot|isnt|arent|dont|doesnt|cant|"
    r"missing)\b|n['’]t\b|不|没|无|未|非",
    re.IGNORECASE,
)
_SEEN = re.compile(
    r"\bthere(?: (?:is|are|was|were)|['’]s)\b|\bi (?:can |do |don['’]t |do not )?(?:see|notice[d]?)\b"
    r"|\b(?:image|picture|photo|scene)\b.*\b(?:contains?|shows?|has|have|features?|includes?|depicts?|displays?)\b"
    r"|\b(?:present|visible|shown|seen|depicted|pictured|exists?|in the (?:image|picture|photo|scene)|in it)\b"
    r"|有|存在|看[不得]?[到见]|出现|包含|显示|可见",
    re.IGNORECASE,
)
_ABSENT = re.compile(
    r"^\W*(?:none|nothing|not (?:(?:that|as far as) i can see|present|visible|there|seen|any))\b", re.IGNORECASE
)
_ASKED = re.compile(r"^\s*(?:is|are|was|were|does|do|did|can|could|has|have|will|would|should)\b", re.IGNORECASE)
_HAN = re.compile("[\u4e00-\u9fff]")
_OPENING = re.compile(r"^\W*\w+\s*(?:[,.;:!，。；：！\n-]|$)")
_COMMON_WORDS = (
    "a an the is are was were be been do does did has have had there this that these those it its in on at of to any "
    "some and image picture photo scene visible present can could will would should you see please answer question "
    "using single word or phrase yes no"
)
_NO_CONTENT = frozenset(_COMMON_WORDS.split())


def is_yes_no_question(text: str) -> bool:
    """Return whether a question begins as one that yes or no answers."""
    return bool(_ASKED.match(text))


def yes_or_no(text: str, question: str = "") -> str | None:
    """Return "yes" or "no", or None where an answer says neither, both, or that it does not know.

    The word itself, one that opens the answer ("Yes, there is a dog."), or a plain sentence that says what was asked:
    "There is no dog in the image." is no. A sentence about something else than the question's words is no answer.

    Args:
        text: a final answer.
        question: what was asked; without it, sentences are not read.
    """
    text = text.strip().strip("*_`\"'“”$ ")
    words = re.findall(r"[a-z]+|[\u4e00-\u9fff]+", text.lower())
    if not words or _OPEN.search(text) or re.match(r"no\. ?\d", text.lower()):
        return None
    first = YES_NO.get(words[0]) or _SPOKEN.get(words[0])
    if first is not None and (len(words) == 1 or _OPENING.match(text)):
        others = {YES_NO[word] for word in words[1:] if word in ("yes", "true", "false")}
        claim = _claim(re.sub(r"^\W*\w+\W*", "", text), question)
        return first if others <= {first} and claim in (None, first) else None
    if question and _ABSENT.match(text):
        return "no"
    return _claim(text, question)


def _claim(text: str, question: str) -> str | None:
    """What the first sentence that speaks of the question's words says of them."""
    if not question:
        return None
    asked = _content(question) if is_yes_no_question(question) else set()
    if bool(_HAN.search(text)) != bool(_HAN.search(question)):
        asked = set()  # asked in one language and answered in another
    for sentence in re.split(r"(?<=[.!。！])\s*|\n", text):
        if sentence.strip() and asked <= _content(sentence) and (asked or _SEEN.search(sentence)):
            return "no" if _NOT.search(sentence) else "yes"
    return None


def _content(text: str) -> set[str]:
    """The words that carry a sentence, in the singular."""
    words = re.findall(r"[a-z0-9]+|[\u4e00-\u9fff]", text.lower().replace("n't", ""))
    singular = (
        word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in words
    )
    return set(singular) - _NO_CONTENT


def decide_yes_no(prediction: str, gold: str, asked: Asked) -> Decision:
    """The rule for ground truths that are yes, no, true or false."""
    wanted = YES_NO.get(gold.lower())
    if wanted is None:
        return None
    given = yes_or_no(prediction, asked.question)
    if gold.lower() in ("true", "false") and prediction in ("T", "F"):
        given = "yes" if prediction == "T" else "no"
    return (given == wanted, f"says {given or 'neither yes nor no'}, expected {wanted}")
