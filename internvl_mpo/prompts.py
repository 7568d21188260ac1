"""How a question is asked: prompt styles, and the removal of short-answer instructions that contradict them.

A style turns a question of a data set into the text the model reads. The `cot` style is, byte for byte, the prompt the
released InternVL2-8B-MPO was trained and evaluated with; the wording of the other styles is ours, since theirs was
never published.
"""

import hashlib
import re
from dataclasses import dataclass

from internvl_mpo.errors import BadInputError
from internvl_mpo.records import IMAGE_PLACEHOLDER


@dataclass(frozen=True)
class Style:
    """A way of asking.

    Attributes:
        templates: language ("en", "zh") -> text with `{question}`.
        answer_format: where the final answer stands, one of `answers.FORMATS`.
        strip: whether short-answer instructions are taken off the question first.
    """

    templates: dict[str, str]
    answer_format: str
    strip: bool = True


_FINAL_EN = 'when you\'re ready to answer, please use the format "Final answer: .."\n\nQuestion:\n\n{question}'
_FINAL_ZH = "准备好作答时，请在最后一行使用“答案: ..”的格式。\n\n问题:\n\n{question}"
_BOXED_EN = "{question}\n\nReason step by step. End with one line of the form: Answer: \\boxed{{..}}"
_BOXED_ZH = "{question}\n\n请逐步推理，并在最后一行按“答案: \\boxed{{..}}”的格式给出结果。"

STYLES: dict[str, Style] = {
    "plain": Style({"en": "{question}", "zh": "{question}"}, "text", strip=False),
    "direct": Style({"en": "{question}\n{instruction}", "zh": "{question}\n{instruction}"}, "text"),
    "cot": Style(
        {
            "en": "Your task is to answer the question below. Give step by step reasoning before you answer, and "
            + _FINAL_EN,
            "zh": "你的任务是回答下面的问题。回答之前请逐步推理，" + _FINAL_ZH,
        },
        "marker",
    ),
    "background": Style(
        {
            "en": "Your task is to answer the question below. First recall the background knowledge it calls for: "
            "the relevant concepts, laws or facts. Then apply that knowledge to the image step by step, and "
            + _FINAL_EN,
            "zh": "你的任务是回答下面的问题。请先说明所需的背景知识，例如相关的概念、定律或事实，"
            "再结合图片逐步推理，" + _FINAL_ZH,
        },
        "marker",
    ),
    "visual": Style(
        {
            "en": "Your task is to answer the question below. First describe what the image shows as far as the "
            "question needs it: text, numbers, axes, labels and layout. Then reason step by step from that "
            "description, and " + _FINAL_EN,
            "zh": "你的任务是回答下面的问题。请先描述图片中与问题有关的内容，例如文字、数字、坐标轴、标签和布局，"
            "再根据描述逐步推理，" + _FINAL_ZH,
        },
        "marker",
    ),
    "grounded": Style(
        {
            "en": "Your task is to answer the question below. Give step by step reasoning before you answer. Whenever "
            "you rely on an object, name it and say where it is, as in <ref>object</ref><box>[[x1, y1, x2, y2]]</box> "
            "with coordinates from 0 to 1000, and " + _FINAL_EN,
            "zh": "你的任务是回答下面的问题。回答之前请逐步推理。每当用到一个物体，请写出它的名称和位置，例如"
            "<ref>物体</ref><box>[[x1, y1, x2, y2]]</box>，坐标范围为0到1000。" + _FINAL_ZH,
        },
        "marker",
    ),
    "boxed": Style({"en": _BOXED_EN, "zh": _BOXED_ZH}, "boxed"),
    "r1": Style(
        {
            "en": "{question}\n\nThink it through first and write your thoughts between <think> and </think>. "
            "After </think> give a short solution and end with \\boxed{{..}}.",
            "zh": "{question}\n\n请先思考，把思考过程写在<think>和</think>之间；"
            "在</think>之后给出简短的解答，并以\\boxed{{..}}结尾。",
        },
        "think",
    ),
}

_DIRECT = {
    ("en", False): "Answer the question using a single word or phrase.",
    ("en", True): "Answer with the option's letter from the given choices directly.",
    ("zh", False): "请用一个词或短语回答问题。",
    ("zh", True): "请直接回答选项字母。",
}

# Which chain of thought suits which source, after the paper's section 4.2; half of each source keeps plain `cot`.
STYLE_OF_SOURCE: tuple[tuple[str, str], ...] = (
    (r"scienceqa|ai2d|m3cot|tqa", "background"),
    (r"chart|dvqa|figureqa|mapqa|plotqa|ocr|textvqa|stvqa|infovqa|infographic|docvqa|sroie", "visual"),
    (r"vqav2|gqa|okvqa|vsr|tallyqa|coco", "grounded"),
)

# A data set's own last line that asks for a short answer; it would forbid the reasoning we ask for.
_SHORT_ANSWER = re.compile(
    r"""(?:\n|(?<=[.?!:。？！])|^)[ \t]*(?:
        (?:please\s+)?(?:answer|respond\s+to)\s+(?:the\s+)?question\s+(?:using|with|in)\s+a\s+(?:single|short)\s+word\s+or
            \s+(?:short\s+)?phrase
      | (?:please\s+)?(?:answer|respond)\s+(?:the\s+question\s+)?with\s+(?:the|an?)\s+(?:option(?:'s)?|choice(?:'s)?)\s*
            letter(?:\s+from\s+the\s+given\s+choices)?(?:\s+directly)?
      | (?:please\s+)?select\s+the\s+(?:correct|best)\s+(?:answer|option)\s+from\s+the\s+(?:options|choices)
            (?:\s+above)?
      | (?:please\s+)?answer\s+(?:the\s+question\s+)?(?:with\s+)?(?:only\s+)?['"]?yes['"]?\s+or\s+['"]?no['"]?
      | (?:please\s+)?(?:put|place|write|give|provide)\s+(?:your|the)\s+(?:final\s+)?answer\s+(?:in|inside|within)\s+
            (?:one\s+)?["'$]*\\boxed\{\s*\}["'$]*
      | (?:please\s+)?(?:provide|give)\s+(?:a|the|your)\s+short\s+answer(?:\s+directly)?
      | 请(?:用|使用)一个(?:单词|词|字)或(?:短语|词组|词语)(?:来)?回答(?:这个)?(?:问题)?
      | 请直接(?:回答|给出)(?:正确)?(?:的)?选项(?:的)?字母
      | 请(?:用|回答)[“"'‘]?(?:是|对)[”"'’]?(?:或|或者)[“"'‘]?(?:否|不是|错)[”"'’]?(?:回答)?(?:问题)?
    )\s*[.。!！]?\s*$""",
    re.IGNORECASE | re.VERBOSE,
)
_OPTION_LINE = re.compile(r"(?m)^\s*\(?([A-H])[.):：]\s*\S")
_CJK = re.compile(r"[\u4e00-\u9fff]")
_WORD = re.compile(r"[A-Za-z]+")


def strip_answer_instruction(question: str) -> str:
    """Return the question without a trailing instruction to answer with a word, a letter, yes or no, or a box."""
    before = None
    question = question.rstrip()
    while before != question:
        before = question
        question = _SHORT_ANSWER.sub("", question).rstrip()
    return question or before


def language_of(text: str) -> str:
    """Return "zh" when the text holds more Chinese characters than Latin words, else "en"."""
    if text.isascii():
        return "en"
    return "zh" if len(_CJK.findall(text)) > len(_WORD.findall(text)) else "en"


def has_options(question: str) -> bool:
    """Return whether the question lists options A, B, ... on lines of their own."""
    letters = _OPTION_LINE.findall(question)
    return letters[:2] == ["A", "B"]


def ask(question: str, style: str, language: str = "auto") -> str:
    """Return the text to send for `question` in a style.

    A lone `<image>` goes to the front, where the chat template of InternVL puts it; several keep their places.

    Args:
        question: as the data set has it.
        style: a key of `STYLES`.
        language: "en", "zh" or "auto" (that of the question).

    Raises:
        BadInputError: unknown style or language.
    """
    if style not in STYLES:
        raise BadInputError(f"unknown style '{style}'; expected one of {', '.join(STYLES)}")
    chosen = STYLES[style]
    language = language_of(question) if language == "auto" else language
    if language not in chosen.templates:
        raise BadInputError(f"unknown language '{language}'; expected auto, {', '.join(chosen.templates)}")
    if not chosen.strip:
        return question
    lone_image = question.count(IMAGE_PLACEHOLDER) == 1
    body = question.replace(IMAGE_PLACEHOLDER, "").strip() if lone_image else question.strip()
    body = strip_answer_instruction(body)
    instruction = _DIRECT[language, has_options(body)]
    asked = chosen.templates[language].format(question=body, instruction=instruction)
    return f"{IMAGE_PLACEHOLDER}\n{asked}" if lone_image else asked


def style_for(question_id: str, source: str, styles: list[str], seed: int) -> str:
    """Return the style a question is asked in: one of `styles`, drawn by its id and the seed.

    "by_source" in the list stands for `cot` and the style `STYLE_OF_SOURCE` names for the source, half and half.
    """
    options: list[str] = []
    for style in styles:
        if style == "by_source":
            fitting = next((name for pattern, name in STYLE_OF_SOURCE if re.search(pattern, source.lower())), "cot")
            options += ["cot", fitting]
        else:
            options.append(style)
    draw = hashlib.sha256(f"{seed}/{question_id}".encode()).digest()
    return options[int.from_bytes(draw[:8], "big") % len(options)]


def judge_prompt(question: str, answer: str, response: str) -> str:
    """Return what a judge is asked about one response."""
    return (
        "Decide whether the final answer of a response is right. Compare it with the reference answer only; the "
        "reasoning does not count. A response without a clear final answer is not right.\n\n"
        f"Question:\n{question}\n\nReference answer:\n{answer}\n\nResponse:\n{response}\n\n"
        "Is the final answer of the response right? Reply with one word, yes or no."
    )
