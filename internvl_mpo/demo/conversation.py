"""Turns of both sides: what each model is sent, what is shown, and whether the final answers agree."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from internvl_mpo.answers.common import clean_answer
from internvl_mpo.answers.comparing import Outcome, compare_answers
from internvl_mpo.answers.finding import ParsedAnswer, parse_answer
from internvl_mpo.demo.pictures import Picture
from internvl_mpo.engines import Sampling
from internvl_mpo.errors import BadInputError
from internvl_mpo.prompts import STYLES, ask
from internvl_mpo.records import IMAGE_PLACEHOLDER

SIDES = ("base", "mpo")
Side = Literal["base", "mpo"]
STYLE_NAMES = {"cot": "Chain of thought", "direct": "Direct", "r1": "R1 (think)", "plain": "As typed"}
MAX_QUESTION_CHARS = 8000
# Text a tokenizer would read as the frame of the conversation, not as words of the visitor.
_CONTROL = re.compile(r"<image>|</?img>|<IMG_CONTEXT>|<\|[a-z_]{1,20}\|>", re.IGNORECASE)


@dataclass(frozen=True)
class Controls:
    """How a question is asked; the same for both sides."""

    style: str = "cot"
    temperature: float = 0.0
    max_new_tokens: int = 1024
    max_tiles: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.style not in STYLE_NAMES:
            raise BadInputError(f"style is '{self.style[:40]}'; expected one of {', '.join(STYLE_NAMES)}")
        if not 0 <= self.temperature <= 2:
            raise BadInputError(f"temperature is {self.temperature}; give 0 (greedy) to 2")
        if not 0 <= self.seed < 2**31:
            raise BadInputError(f"seed is {self.seed}; give 0 to {2**31 - 1}")
        if self.max_tiles is not None and not 1 <= self.max_tiles <= 40:
            raise BadInputError(f"max_tiles is {self.max_tiles}; give 1 to 40")

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(temperature=self.temperature, max_new_tokens=self.max_new_tokens)


@dataclass(frozen=True)
class Answer:
    """What one side has said so far.

    Attributes:
        text: the answer as the model wrote it.
        num_tokens: tokens generated.
        first_token_s: seconds from the request to the first token; None before it.
        elapsed_s: seconds from the request to now or to the end.
        finish_reason: "" while it runs, then "stop", "length", "stopped" (by the visitor) or "error".
        error: what went wrong, in a sentence.
    """

    text: str = ""
    num_tokens: int = 0
    first_token_s: float | None = None
    elapsed_s: float = 0.0
    finish_reason: str = ""
    error: str = ""

    @property
    def tokens_per_s(self) -> float | None:
        """Speed after the first token; None for fewer than two tokens."""
        if self.first_token_s is None or self.num_tokens < 2 or self.elapsed_s <= self.first_token_s:
            return None
        return (self.num_tokens - 1) / (self.elapsed_s - self.first_token_s)


class Message(NamedTuple):
    """One message as a model gets it; `text` has one `<image>` per picture."""

    role: Literal["user", "assistant"]
    text: str
    images: tuple[Picture, ...] = ()


@dataclass
class Turn:
    """One question and the answers of both sides.

    Attributes:
        question: as the visitor typed it.
        controls: how it was asked.
        images: pictures that came with it.
        answers: by side.
        vote: the row that a vote about it was stored as; None before the vote.
    """

    question: str
    controls: Controls
    images: tuple[Picture, ...] = ()
    answers: dict[str, Answer] = field(default_factory=lambda: dict.fromkeys(SIDES, Answer()))
    vote: dict[str, Any] | None = None

    @property
    def asked(self) -> str:
        """The user's text as the model reads it, placeholders in front."""
        return f"{IMAGE_PLACEHOLDER}\n" * len(self.images) + ask(self.question, self.controls.style)

    @property
    def answer_format(self) -> str:
        """Where the final answer stands, one of `answers.FORMATS`."""
        return STYLES[self.controls.style].answer_format

    @property
    def is_finished(self) -> bool:
        """Whether both sides have come to an end."""
        return all(answer.finish_reason for answer in self.answers.values())

    @cached_property
    def agreement(self) -> "Agreement":
        """Whether the final answers are the same; to be asked once the turn is finished."""
        return compare_turn(self)


@dataclass
class Conversation:
    """What a visitor and the two models have said; lives in the visitor's session only.

    Attributes:
        order: sides from left to right.
        blind: whether names are hidden until a vote.
        revealed: whether a vote has shown the names.
    """

    turns: list[Turn] = field(default_factory=list)
    order: tuple[str, str] = SIDES
    blind: bool = False
    revealed: bool = False

    @property
    def hides_names(self) -> bool:
        """Whether the page must not tell which side is which."""
        return self.blind and not self.revealed

    @property
    def num_images(self) -> int:
        """Pictures of all turns."""
        return sum(len(turn.images) for turn in self.turns)

    def restart(self, blind: bool) -> None:
        """Forget everything; a blinded conversation gets a new order."""
        self.turns.clear()
        self.blind, self.revealed = blind, False
        self.order = tuple(random.sample(SIDES, 2)) if blind else SIDES

    def messages(self, side: str) -> list[Message]:
        """Return what one side is sent for the last turn: its own history and the new question.

        Turns that this side did not answer (an error, or stopped before the first word) are left out.
        """
        history: list[Message] = []
        for turn in self.turns[:-1]:
            if turn.answers[side].text:
                history.append(Message("user", turn.asked, turn.images))
                history.append(Message("assistant", turn.answers[side].text))
        last = self.turns[-1]
        return [*history, Message("user", last.asked, last.images)]


def check_question(question: str | None, num_images: int, max_images: int) -> str:
    """Return a visitor's question, stripped.

    Raises:
        BadInputError: it is empty or too long, spells a control token, or comes with too many pictures.
    """
    question = (question or "").strip()
    if not question:
        raise BadInputError("Please type a question; pictures alone are not asked about.")
    if len(question) > MAX_QUESTION_CHARS:
        raise BadInputError(f"The question has {len(question):,} characters; at most {MAX_QUESTION_CHARS:,} please.")
    control = _CONTROL.search(question)
    if control:
        raise BadInputError(f"{control[0]} is a control word of the model; please write it another way.")
    if num_images > max_images:
        raise BadInputError(f"This conversation would have {num_images} pictures; at most {max_images} please.")
    return question


class Parts(NamedTuple):
    """An answer taken apart.

    Attributes:
        thoughts: text of a think block, "" without one.
        body: reasoning or plain text.
        final: the final answer, or None.
        reason: where it was found, or why there is none.
    """

    thoughts: str
    body: str
    final: str | None
    reason: str


MAX_LONE_ANSWER_WORDS = 2  # a number with its unit; more words are a sentence
_SOME_REASONING = "What was thought is not looked at."
_FINAL_LINE = re.compile(r"(?is)(?:\*\*|__)?(?:final\s+answer|答案)\s*(?:is\s*)?[*_]*\s*[:：].*$")


def split_answer(text: str, answer_format: str) -> Parts:
    """Lift the final answer out of an answer; works on unfinished text too."""
    thoughts, body = "", text
    if text.lstrip().startswith("<think>"):
        thoughts, _, body = text.lstrip()[len("<think>") :].partition("</think>")
    parsed = read_off(text, answer_format)
    if parsed.reason == "after the marker":
        body = _FINAL_LINE.sub("", body)
    elif parsed.reason == "whole text":
        body = ""
    return Parts(thoughts.strip(), body.strip(), parsed.answer, parsed.reason)


def read_off(text: str, answer_format: str) -> ParsedAnswer:
    """Return the final answer as a reader sees it.

    Training pairs need reasoning before the answer, and the answer where the prompt asked for it; a reader reads
    "Final answer: 16" wherever it stands, and a line that is nothing but an answer.
    """
    parsed = strict = parse_answer(text, answer_format)
    for other in (answer_format, "marker", "boxed"):
        if parsed.answer is None and other not in ("text", "think"):
            parsed = parse_answer(f"{_SOME_REASONING}\n{text}", other)
    if parsed.answer is None and len(text.split()) <= MAX_LONE_ANSWER_WORDS and "<think>" not in text:
        parsed = parse_answer(text, "text")
    return parsed if parsed.answer is not None else strict


class Agreement(NamedTuple):
    """Whether the two final answers are the same: "same", "different" or "unknown", and a sentence about it."""

    state: Literal["same", "different", "unknown"]
    text: str


def compare_turn(turn: Turn) -> Agreement:
    """Compare the final answers of a finished turn by the rules that training pairs are built with."""
    finals = {side: split_answer(turn.answers[side].text, turn.answer_format).final for side in SIDES}
    silent = [side for side in SIDES if finals[side] is None]
    if len(silent) == 2:
        return Agreement("unknown", "Neither side gave a final answer that can be read off.")
    if silent:
        return Agreement("unknown", "Only one side gave a final answer that can be read off.")
    first, second = finals.values()
    outcomes = {
        compare_answers(one, other, question=turn.question).outcome for one, other in ((first, second), (second, first))
    }
    if Outcome.RIGHT in outcomes:
        return Agreement("same", "Both sides give the same final answer.")
    if Outcome.WRONG in outcomes:
        return Agreement("different", "The final answers differ.")
    return Agreement("unknown", "Whether the final answers are equal could not be decided.")


def shown_answer(final: str) -> str:
    """Return a final answer for display: formulas keep their delimiters, everything else is cleaned."""
    if re.search(r"\\[A-Za-z]+|[\^_]\{", final) and not re.search(r"\$|\\\(|\\\[", final):
        return f"${final.strip().rstrip('.')}$"
    return final if re.search(r"\$|\\\(|\\\[", final) else clean_answer(final)


def describe_speed(answer: Answer) -> str:
    """Return the line under a pane: length, speed, time to the first token, how it ended."""
    if answer.first_token_s is None:
        return answer.error
    parts = [f"{answer.num_tokens:,} token{'' if answer.num_tokens == 1 else 's'}"]
    if answer.tokens_per_s is not None:
        parts.append(f"{answer.tokens_per_s:,.1f} tokens/s")
    parts.append(f"first after {answer.first_token_s:.2f} s")
    ended = {"length": "cut at the token limit", "stopped": "stopped", "error": answer.error}
    parts += [ended[answer.finish_reason]] if answer.finish_reason in ended else []
    return " · ".join(parts)


def transcript(turns: Sequence[Turn], side: str) -> list[dict[str, str]]:
    """Return the conversation of one side as plain role and content objects."""
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in (("user", turn.asked), ("assistant", turn.answers[side].text))
    ]
