"""A conversation as messages and small pieces of HTML; everything a model or a visitor wrote is escaped here."""

import html
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from internvl_mpo.demo.conversation import (
    Answer,
    Conversation,
    Turn,
    describe_speed,
    shown_answer,
    split_answer,
)
from internvl_mpo.demo.markup import safe_markdown
from internvl_mpo.demo.pictures import Cutter, Picture, data_uri

TITLES = {"base": "Base", "mpo": "MPO"}
MARKS = {"same": "✓ same", "different": "≠ different", "unknown": ""}


def question_html(turn: Turn | None) -> str:
    """Return the question that both panes answer, with its pictures; it stands once, above both."""
    if turn is None:
        return ""
    return f"<div class='asked'>{_pictures(turn)}<p>{html.escape(turn.question)}</p></div>"


def answer_messages(turn: Turn | None, side: str) -> list[dict[str, Any]]:
    """Return the messages of one pane: thoughts, reasoning, and the final answer apart."""
    return [] if turn is None else _answered(turn, side)


def earlier_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """Return all turns but the last as one conversation: the question once, then what each side said."""
    messages: list[dict[str, Any]] = []
    for turn in conversation.turns[:-1]:
        question = safe_markdown(turn.question)
        pictures = _pictures(turn)
        messages.append({"role": "user", "content": f"{pictures}\n\n{question}" if pictures else question})
        for position, side in enumerate(conversation.order):
            name = _title(conversation, position)
            messages += [_named(message, name) for message in _answered(turn, side)]
    return messages


def _named(message: dict[str, Any], name: str) -> dict[str, Any]:
    """Put the side's name before its messages, which stand in one column here."""
    title = message["metadata"].get("title")
    return {**message, "metadata": {**message["metadata"], "title": f"{name}: {title}" if title else name}}


def _pictures(turn: Turn) -> str:
    return "".join(
        f'<img class="sent" src="{_thumbnail(picture)}" alt="Picture {number} of the question">'
        for number, picture in enumerate(turn.images, start=1)
    )


def _answered(turn: Turn, side: str) -> list[dict[str, Any]]:
    answer = turn.answers[side]
    parts = split_answer(answer.text, turn.answer_format)
    messages: list[dict[str, Any]] = []

    def say(text: str, **metadata: str) -> None:
        messages.append({"role": "assistant", "content": text, "metadata": metadata})

    if parts.thoughts:
        thinking = not (parts.body or answer.finish_reason)
        say(safe_markdown(parts.thoughts), title="Thoughts", **({"status": "pending"} if thinking else {}))
    if not answer.finish_reason:  # the final answer is lifted out when it is known to be final
        text = parts.body or ("" if parts.thoughts else answer.text)
        if text or not parts.thoughts:
            say(safe_markdown(text) or "…")
        return messages
    if parts.body:
        say(safe_markdown(parts.body))
    if parts.final is not None:
        mark = f" *{MARKS[turn.agreement.state]}*" if turn.is_finished and MARKS[turn.agreement.state] else ""
        say(f"**Final answer:** {safe_markdown(shown_answer(parts.final))}{mark}")
    if answer.error:
        say(f"⚠️ {safe_markdown(answer.error)}")
    elif not answer.text:
        say("*Stopped before the first word.*" if answer.finish_reason == "stopped" else "*An empty answer.*")
    return messages


@lru_cache(maxsize=256)
def _thumbnail(picture: Picture) -> str:
    return picture.thumbnail()


def _title(conversation: Conversation, position: int) -> str:
    """Return "A", or where names are shown "A · Base"."""
    letter = "AB"[position]
    return letter if conversation.hides_names else f"{letter} · {TITLES[conversation.order[position]]}"


def head_html(conversation: Conversation, position: int, models: dict[str, str]) -> str:
    """Return the heading of the left (0) or right (1) pane; a blinded one is only called A or B."""
    side = conversation.order[position]
    where = ("left", "right")[position]
    model = "hidden until you vote" if conversation.hides_names else models[side]
    title = _title(conversation, position)
    return f"<div class='pane-head pane-{where}'><h2>{title}</h2><span class='muted'>{html.escape(model)}</span></div>"


def speed_html(answer: Answer | None) -> str:
    """Return the line under a pane."""
    return f"<p class='speed'>{html.escape(describe_speed(answer)) if answer else ''}</p>"


def agreement_html(turn: Turn | None, running: bool) -> str:
    """Return the line between panes and votes."""
    if turn is None:
        state, text = "idle", "Whether the two final answers agree will stand here."
    elif running or not turn.is_finished:
        state, text = "running", "Both sides are writing …"
    else:
        state, text = turn.agreement
    mark = {"same": "✓", "different": "≠"}.get(state, "")
    return f"<p class='agreement {state}' role='status' aria-live='polite'><b aria-hidden='true'>{mark}</b> {text}</p>"


def status_html(text: str) -> str:
    """Return a line a screen reader announces."""
    return f"<p class='muted' role='status' aria-live='polite'>{html.escape(text)}</p>"


def shrunk(pictures: Sequence[Picture]) -> list[str]:
    """Return a sentence for every picture that was made smaller."""
    return [
        f"Picture {number} had {picture.sent[0]:,} × {picture.sent[1]:,} pixels and was made smaller "
        f"({picture.width:,} × {picture.height:,}); the models look at tiles, which need no more."
        for number, picture in enumerate(pictures, start=1)
        if picture.sent
    ]


def tiles_html(cutter: Cutter, pictures: Sequence[Picture], max_tiles: int) -> str:
    """Return a drawing of the tiles of pictures that share a limit, with their cost in tokens."""
    if not pictures:
        return "<p class='muted'>Add a picture to see the tiles the model gets, and what they cost.</p>"
    limit = cutter.share(max_tiles, len(pictures))
    figures, total = [], 0
    for number, picture in enumerate(pictures, start=1):
        num_tokens = cutter.num_tokens(picture, limit, len(pictures))
        total += num_tokens
        text = (
            f"Picture {number}: {picture.width} × {picture.height} pixels, {cutter.describe(picture, limit)}, "
            f"{num_tokens:,} tokens"
        )
        drawn = data_uri(cutter.draw(picture, limit))
        figures.append(f"<figure><img src='{drawn}' alt='{text}'><figcaption>{text}</figcaption></figure>")
    together = f"<p class='muted'>{total:,} image tokens together.</p>" if len(pictures) > 1 else ""
    return f"<div class='tiles'>{''.join(figures)}</div>{together}"
