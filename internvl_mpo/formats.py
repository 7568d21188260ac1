"""Rows of other projects, read as they are: recognised by their keys and turned into ours.

    MMPR, RLAIF-V            image, question, chosen, rejected
    TRL                      prompt, chosen, rejected: texts or lists of messages; images
    LLaMA-Factory ShareGPT   conversations, chosen and rejected as messages; system, images
    LLaMA-Factory Alpaca     instruction, input, chosen, rejected; system, history, images
    ms-swift                 messages that end in the chosen answer, rejected_response or rejected_messages; images
    ms-swift query           query, response, rejected_response; system, history, images

Earlier turns become `history`, a system message `system`. For sampling the same forms are read without a rejected
answer; the last answer of a conversation, `output` or `response` is the ground truth. A form is never mixed with
another, and what it cannot carry is refused by the name of the key.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from internvl_mpo.errors import RowError
from internvl_mpo.records import IMAGE_PLACEHOLDER, images_of
from internvl_mpo.row_keys import READ, holds, is_misspelt

ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
OWN_FORM = '{"image": "..", "question": "..", "chosen": "..", "rejected": ".."}'
_ANSWERS = ("chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images")


class Talk(NamedTuple):
    """A conversation: system message or None, (question, answer) turns, the open question, its answer or None."""

    system: str | None
    history: list[list[str]]
    question: str
    answer: str | None
    images: list[str]


class Form(NamedTuple):
    """A form of rows.

    Attributes:
        name: as a user knows it.
        key: the key that it is recognised by.
        needs: keys that a pair must have beside it; of a tuple one is enough.
        read: makes our keys of a row; the second argument says whether it must be a pair.
    """

    name: str
    key: str
    needs: tuple[str | tuple[str, ...], ...]
    read: Callable[[Mapping[str, Any], bool], dict[str, Any]]


def to_own_form(row: Mapping[str, Any], *, is_pair: bool = True) -> tuple[str, Mapping[str, Any]]:
    """Return the name of a row's form, and the row with our keys.

    Args:
        row: as it stands in the file.
        is_pair: whether a chosen and a rejected answer are needed; a question to be sampled needs neither.

    Raises:
        RowError: the row is in no form, in two at once, or says what its form cannot carry.
    """
    if holds(row.get("question")):
        name = "RLAIF-V" if holds(row.get("ds_name")) and holds(row.get("origin_dataset")) else "MMPR"
        return name, row
    found = [form for form in FORMS if holds(row.get(form.key)) and (form.key != "chosen" or is_pair)]
    found = [form for form in found if form.key != "chosen"] or found
    if not found or (found[0].key == "chosen" and not isinstance(row["chosen"], (list, tuple))):
        raise RowError(_nearest(row))
    if len(found) > 1:
        keys = f"keys '{found[0].key}' and '{found[1].key}'"
        raise RowError(f"{keys} are of two forms, {found[0].name} and {found[1].name}; keep one of them")
    form = found[0]
    for need in form.needs if is_pair else ():
        names = (need,) if isinstance(need, str) else need
        if not any(holds(row.get(name)) for name in names):
            raise RowError(f"key '{names[0]}' is missing for the nearest form, {form.name}; {_WRITE}")
    own = form.read(row, is_pair)
    spent = {form.key, *own.pop("spent")} | (set() if is_pair else set(_ANSWERS))
    kept = {key: value for key, value in row.items() if key not in spent and (holds(value) or key not in READ)}
    return form.name, {**kept, **own}


_WRITE = f"or write {OWN_FORM}"


def _nearest(row: Mapping[str, Any]) -> str:
    """Say which key is missing or misspelt for the form that comes nearest."""
    held = [key for key, value in row.items() if holds(value)]
    names = [("MMPR", "question"), *((form.name, form.key) for form in FORMS)]
    for key in held:
        for name, wanted in names:
            if key not in READ and is_misspelt(key.strip().lower(), wanted):
                return f"key '{key}' is not read; in the nearest form, {name}, it is '{wanted}'; {_WRITE}"
    shared = {"chosen", "rejected"}
    nearest = max(FORMS, key=lambda form: len((_keys_of(form) - shared) & set(held)))
    if (_keys_of(nearest) - shared) & set(held):
        return f"key '{nearest.key}' is missing for the nearest form, {nearest.name}; {_WRITE}"
    return f"key 'question' is missing for the nearest form, MMPR; write {OWN_FORM}"


def _keys_of(form: Form) -> set[str]:
    return {form.key} | {key for need in form.needs for key in ((need,) if isinstance(need, str) else need)}


# --- forms ------------------------------------------------------------------------------------------------------------


def _trl(row: Mapping[str, Any], is_pair: bool) -> dict[str, Any]:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        talk = Talk(None, [], prompt, None, [])
    else:
        talk = _talk(_messages(prompt, "prompt"), "prompt")
        if talk.answer is not None:
            raise RowError("key 'prompt' ends in an answer; it must end in a question")
    own = _own(row, talk)
    if is_pair:
        own |= {key: _answer_after(talk, row[key], key) for key in ("chosen", "rejected")}
    elif holds(row.get("completion")):
        own["answer"] = _answer_after(talk, row["completion"], "completion")
        own["spent"].append("completion")
    return own


def _trl_implicit(row: Mapping[str, Any], is_pair: bool) -> dict[str, Any]:
    """TRL without `prompt`: both answers are whole conversations, which part in their last message."""
    chosen, rejected = (_talk(_messages(row[key], key), key) for key in ("chosen", "rejected"))
    for key, talk in (("chosen", chosen), ("rejected", rejected)):
        if talk.answer is None:
            raise RowError(f"key '{key}' must end in an answer of the assistant")
    if chosen[:3] != rejected[:3]:
        raise RowError("the conversations of 'chosen' and 'rejected' differ before their last message")
    return _own(row, chosen) | {"chosen": chosen.answer, "rejected": rejected.answer}


def _sharegpt(row: Mapping[str, Any], is_pair: bool) -> dict[str, Any]:
    talk = _talk(_messages(row["conversations"], "conversations"), "conversations")
    own = _own(row, talk)
    if not is_pair:
        return own | _truth(row, talk.answer)
    if talk.answer is not None:
        raise RowError(
            "key 'conversations' ends in an answer; it must end in a question, before 'chosen' and 'rejected'"
        )
    return own | {key: _answer_after(talk, row[key], key) for key in ("chosen", "rejected")}


def _alpaca(row: Mapping[str, Any], is_pair: bool) -> dict[str, Any]:
    parts = [_text(row[key], key) for key in ("instruction", "input") if holds(row.get(key))]
    own = _own(row, Talk(None, [], "\n".join(parts), None, []))
    own["spent"].append("input")
    if not is_pair:
        own["spent"].append("output")
        return own | _truth(row, _text(row["output"], "output") if holds(row.get("output")) else None)
    return own | {key: _text(row[key], key) for key in ("chosen", "rejected")}


def _swift(row: Mapping[str, Any], is_pair: bool) -> dict[str, Any]:
    talk = _talk(_messages(row["messages"], "messages"), "messages")
    own = _own(row, talk)
    own["spent"] += ["rejected_response", "rejected_messages", "rejected_images"]
    if not is_pair:
        return own | _truth(row, talk.answer)
    if talk.answer is None:  # the form of OpenAI's messages in LLaMA-Factory
        if not (holds(row.get("chosen")) and holds(row.get("rejected"))):
            raise RowError("key 'messages' must end in the chosen answer of the assistant")
        return own | {key: _answer_after(talk, row[key], key) for key in ("chosen", "rejected")}
    if holds(row.get("rejected_messages")):
        other = _talk(_messages(row["rejected_messages"], "rejected_messages"), "rejected_messages")
        if other[:3] != talk[:3] or other.answer is None:
            raise RowError("'rejected_messages' must be 'messages' with another last answer")
        rejected = other.answer
    else:
        if not holds(row.get("rejected_response")):
            raise RowError(f"key 'rejected_response' is missing for the nearest form, ms-swift; {_WRITE}")
        rejected = _text(row["rejected_response"], "rejected_response")
    if holds(row.get("rejected_images")) and _pictures({"images": row["rejected_images"]}) != _pictures(row):
        raise RowError("key 'rejected_images' names other pictures than 'images'; both answers need the same prompt")
    return own | {"chosen": talk.answer, "rejected": rejected}


def _swift_query(row: Mapping[str, Any], is_pair: bool) -> dict[str, Any]:
    own = _own(row, Talk(None, [], _text(row["query"], "query"), None, []))
    own["spent"] += ["response", "rejected_response"]
    if not is_pair:
        return own | _truth(row, _text(row["response"], "response") if holds(row.get("response")) else None)
    return own | {
        "chosen": _text(row["response"], "response"),
        "rejected": _text(row["rejected_response"], "rejected_response"),
    }


FORMS = (
    Form("TRL", "prompt", ("chosen", "rejected"), _trl),
    Form("LLaMA-Factory ShareGPT", "conversations", ("chosen", "rejected"), _sharegpt),
    Form("LLaMA-Factory Alpaca", "instruction", ("chosen", "rejected"), _alpaca),
    Form("ms-swift", "messages", (("rejected_response", "rejected_messages", "rejected"),), _swift),
    Form("ms-swift query", "query", ("response", "rejected_response"), _swift_query),
    Form("TRL without prompt", "chosen", ("rejected",), _trl_implicit),
)


# --- what forms share -------------------------------------------------------------------------------------------------


def _own(row: Mapping[str, Any], talk: Talk) -> dict[str, Any]:
    """Our keys for pictures and prompt; `spent` lists the keys they came from."""
    own: dict[str, Any] = {"question": talk.question, "spent": ["image", "images", "system", "history", "question"]}
    images = _pictures(row)
    if images and talk.images and images != talk.images:
        raise RowError("the messages name other pictures than 'images'; keep one of them")
    if images or talk.images:
        own["images"] = images or talk.images
    given = row.get("system") if holds(row.get("system")) else None
    if given is not None and talk.system is not None and given != talk.system:
        raise RowError("key 'system' and the system message differ; keep one of them")
    if given is not None or talk.system is not None:
        own["system"] = talk.system if given is None else given
    if holds(row.get("history")):
        if talk.history:
            raise RowError("key 'history' stands beside a conversation with earlier turns; keep one of them")
        own["history"] = row["history"]
    elif talk.history:
        own["history"] = talk.history
    return own


def _truth(row: Mapping[str, Any], answer: str | None) -> dict[str, Any]:
    """The last answer as ground truth, where the row names no other."""
    known = holds(row.get("answer")) or holds(row.get("answer_gt"))
    return {} if known or answer is None else {"answer": answer}


def _pictures(row: Mapping[str, Any]) -> list[str]:
    """Pictures as paths; one written as `{"path": .., "bytes": null}` or `{"url": ..}` is its path."""
    plain = {}
    for key in ("image", "images"):
        value = row.get(key)
        if holds(value):
            several = value if isinstance(value, (list, tuple)) else [value]
            plain[key] = [_path(one, key) for one in several]
    return list(images_of(plain))


def _path(picture: Any, key: str) -> Any:
    if not isinstance(picture, Mapping):
        return picture
    held = {name: value for name, value in picture.items() if holds(value)}
    if len(held) != 1 or not held.keys() <= {"path", "url", "image"}:
        raise RowError(f"key '{key}' holds a picture as {', '.join(held) or 'nothing'}; give its path")
    return next(iter(held.values()))


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise RowError(f"key '{key}' must be text, found {type(value).__name__}")
    return value


def _messages(value: Any, key: str) -> list[tuple[str, str, list[str]]]:
    """Return (role, text with `<image>` in the places of pictures, pictures named in it) of every message."""
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)) or not all(isinstance(message, Mapping) for message in value):
        raise RowError(f"key '{key}' must be text, a message, or a list of messages")
    return [_message(message, f"{key}[{number}]") for number, message in enumerate(value)]


def _message(message: Mapping[str, Any], key: str) -> tuple[str, str, list[str]]:
    names = ("role", "content") if "role" in message else ("from", "value")
    for name, value in message.items():
        if name not in names and holds(value):
            raise RowError(f"key '{key}.{name}' is not read; a message has a role and a text")
    role, content = (message.get(name) for name in names)
    if role not in ROLES:
        raise RowError(f"'{key}' is of role '{role}', which is not read; expected {', '.join(ROLES)}")
    if isinstance(content, str):
        return ROLES[role], content, []
    if not isinstance(content, (list, tuple)):
        raise RowError(f"key '{key}.{names[1]}' must be text or a list of blocks, found {type(content).__name__}")
    return ROLES[role], *_joined(content, f"{key}.{names[1]}")


def _joined(blocks: Sequence[Any], key: str) -> tuple[str, list[str]]:
    """Join blocks as the chat template does: a picture gets its line, where the next text brings no line end."""
    text, images = "", []
    for number, block in enumerate(blocks):
        held = {name: value for name, value in dict(block).items() if holds(value)} if _is_block(block) else {}
        kind = held.pop("type", None)
        if kind == "text" and held.keys() <= {"text"}:
            needs_line = text.endswith(IMAGE_PLACEHOLDER) and not held.get("text", "").startswith("\n")
            text += "\n" * needs_line + held.get("text", "")
        elif kind in ("image", "image_url") and held.keys() <= {"image", "path", "url", "image_url"}:
            text += "\n" * text.endswith(IMAGE_PLACEHOLDER) + IMAGE_PLACEHOLDER
            images += [_path(value, key) for value in held.values()]
        else:
            raise RowError(f"'{key}[{number}]' is a block of type '{kind}' that is not read; expected text and image")
    return text, images


def _is_block(block: Any) -> bool:
    return isinstance(block, Mapping)


def _talk(messages: list[tuple[str, str, list[str]]], key: str) -> Talk:
    """Put messages into turns.

    Raises:
        RowError: they are not a system message or none, then questions and answers in turn.
    """
    images = [name for _, _, names in messages for name in names]
    texts = [(role, text) for role, text, _ in messages]
    system = texts.pop(0)[1] if texts and texts[0][0] == "system" else None
    roles = [role for role, _ in texts]
    if not roles or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
        found = ", ".join(role for role, _, _ in messages) or "nothing"
        raise RowError(f"key '{key}' must be user and assistant in turn, after a system message or none; found {found}")
    answer = texts.pop()[1] if roles[-1] == "assistant" else None
    history = [[texts[number][1], texts[number + 1][1]] for number in range(0, len(texts) - 1, 2)]
    return Talk(system, history, texts[-1][1], answer, images)


def _answer_after(talk: Talk, value: Any, key: str) -> str:
    """Return an answer given as text, as a message, or as the whole conversation up to it."""
    if isinstance(value, str):
        return value
    messages = _messages(value, key)
    if len(messages) == 1:
        role, text, _ = messages[0]
        if role != "assistant":
            raise RowError(f"key '{key}' must be an answer of the assistant, found one of '{role}'")
        return text
    whole = _talk(messages, key)
    if whole.answer is None or whole[1:3] != talk[1:3] or (whole.system or talk.system) != talk.system:
        raise RowError(
            f"key '{key}' holds several messages that do not begin with the prompt; give the last answer alone"
        )
    return whole.answer
