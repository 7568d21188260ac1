"""The wire format of chat requests: written by the client, read by the server."""

import base64
import json
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from internvl_mpo.engines import Reply, Request, Sampling, chat_messages
from internvl_mpo.engines.pictures import MAX_PIXELS, EncodedPicture, data_uri, read_picture
from internvl_mpo.errors import BadInputError
from internvl_mpo.records import IMAGE_PLACEHOLDER

CLOSING = ".,;:!?)]。，、；：！？）】"  # what a line may go on with directly behind a picture; the chat template's
STREAMED = {"stream": True, "stream_options": {"include_usage": True}}  # joins a payload that is to be streamed
MAX_EVENT_BYTES = 4 << 20


def chat_payload(request: Request, model: str) -> dict[str, Any]:
    """Return the body of a chat completion; pictures stand where the question has `<image>`, or before it.

    Raises:
        OSError, ValueError: a picture cannot be read, or placeholders and pictures differ in number.
    """
    messages: list[dict[str, Any]] = chat_messages(
        request.question, len(request.images), request.history, request.system
    )
    marks = sum(message["content"].count(IMAGE_PLACEHOLDER) for message in messages)
    if marks != len(request.images):
        raise ValueError(f"{marks} <image> placeholders for {len(request.images)} pictures")
    images = iter(request.images)
    for message in messages:
        message["content"] = _content(message["content"], images)
    sampling = request.sampling
    payload = {
        "model": model,
        "messages": messages,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_new_tokens,
        "seed": request.seed,
    }
    if sampling.top_k:
        payload["top_k"] = sampling.top_k
    if request.prefix:
        payload["messages"].append({"role": "assistant", "content": request.prefix})
        payload |= {"continue_final_message": True, "add_generation_prompt": False}
    return payload


def _content(text: str, images: Iterator[Any]) -> str | list[dict[str, Any]]:
    """Text as it is, or as parts where `<image>` marks take the next pictures.

    A line break behind a picture is left to the server's chat template wherever that writes one by itself.
    """
    if IMAGE_PLACEHOLDER not in text:
        return text
    pieces = _pieces(text, spare_breaks=True)
    if join_pieces(pieces) != text:
        pieces = _pieces(text, spare_breaks=False)
    return [
        {"type": "image_url", "image_url": {"url": data_uri(next(images))}}
        if piece is None
        else {"type": "text", "text": piece}
        for piece in pieces
    ]


def _pieces(text: str, spare_breaks: bool) -> list[str | None]:
    first, *others = text.split(IMAGE_PLACEHOLDER)
    pieces: list[str | None] = [first]
    for piece in others:
        pieces += [None, piece.removeprefix("\n") if spare_breaks else piece]
    return [piece for piece in pieces if piece != ""]


def join_pieces(pieces: Sequence[str | None]) -> str:
    """Return the text of a message, with `<image>` for each picture, as InternVL's chat template writes it.

    Args:
        pieces: texts, None for a picture.
    """
    text = ""
    for number, piece in enumerate(pieces):
        text += IMAGE_PLACEHOLDER if piece is None else piece
        if piece is None and number + 1 < len(pieces):
            before = (pieces[number - 1] if number else None) or "\n"
            after = pieces[number + 1] or "x"  # another picture, or nothing, begins a line as a word does
            closes = not before.endswith("\n") and after[0] in CLOSING
            text += "" if after[0].isspace() or closes else "\n"
    return text


def read_stream(request: Request, parts: Iterable[bytes]) -> Reply:
    """Fill a request's draft from a stream of server-sent events; return the reply when the stream says it is over.

    Args:
        request: one with a draft.
        parts: the body as it comes.

    Raises:
        ValueError: it is no such stream, reports an error, or breaks off.
    """
    request.draft.begin("".join)
    reason, tokens, model = None, 0, ""
    for event in _events(parts):
        try:
            if "error" in event:
                raise ValueError(f"the server broke off: {event['error']}")
            tokens = int((event.get("usage") or {}).get("completion_tokens") or tokens)
            model = str(event.get("model") or model)
            for choice in event.get("choices", [])[:1]:
                if piece := (choice.get("delta") or {}).get("content"):
                    request.draft.add(str(piece))
                reason = choice.get("finish_reason") or reason
        except (AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"an event is no piece of a chat completion ({type(error).__name__}: {error})") from error
    return _reply(request, request.draft.all_text(), reason, tokens or request.draft.num_pieces, model)


def _events(parts: Iterable[bytes]) -> Iterator[Any]:
    """JSON of each event, up to the one that ends the stream."""
    rest = b""
    for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        if len(rest) > MAX_EVENT_BYTES:
            raise ValueError(f"an event has more than {MAX_EVENT_BYTES >> 20} MB")
        for line in lines:
            name, _, data = line.strip().partition(b":")
            if name != b"data":
                continue
            if data.strip() == b"[DONE]":
                return
            try:
                yield json.loads(data)
            except RecursionError as error:
                raise ValueError("an event is nested too deeply") from error


def read_reply(request: Request, answer: bytes) -> Reply:
    """Turn a chat completion into a reply.

    Raises:
        ValueError: it is not one.
    """
    try:
        completion = json.loads(answer)
        choice = completion["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
        tokens = int((completion.get("usage") or {}).get("completion_tokens") or 0)
        model = str(completion.get("model") or "")
    except (AttributeError, LookupError, TypeError, RecursionError) as error:  # JSON, but of another shape
        raise ValueError(f"the answer is no chat completion ({type(error).__name__}: {error})") from error
    return _reply(request, text, reason, tokens, model)


def _reply(request: Request, text: Any, reason: Any, num_tokens: int, model: str) -> Reply:
    if not isinstance(text, str):
        raise ValueError("the answer holds no text")
    if reason not in ("stop", "length"):
        raise ValueError("the answer broke off" if reason is None else f"finish_reason is {reason!r}")
    # JSON can hold half of a character outside the basic plane, which no UTF-8 file can
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return Reply(
        id=request.id,
        text=text if request.prefix else text.strip(),
        finish_reason=reason,
        num_tokens=num_tokens,
        served_model=model,
    )


# --- the server's side ------------------------------------------------------------------------------------------------

MAX_VALUES = 100_000  # of one body's lists and objects: a few bytes of JSON can become a hundred of memory
MAX_REQUEST_PIXELS = 2 * MAX_PIXELS
DEFAULT_MAX_TOKENS = 1024
_SERVED = {
    *("messages", "model", "n", "stream", "stream_options", "seed", "temperature", "top_k", "top_p"),
    *("max_tokens", "max_completion_tokens", "continue_final_message", "add_generation_prompt"),
}
_LABELS = {"user", "safety_identifier", "prompt_cache_key"}  # ask for nothing about the reply
# what a client may say about the rest of OpenAI's fields: that it wants what it gets anyway
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "stop": ([],),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
}


def parse_body(body: bytes) -> dict[str, Any]:
    """Return the JSON object in a body, without the fields that are null.

    Raises:
        BadInputError: it is no JSON object, holds NaN, a key twice or too many values, or is nested too deeply.
    """
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise BadInputError(f"the body holds more than {MAX_VALUES:,} values")
    try:
        payload = json.loads(
            body.decode(), parse_constant=_no_constant, parse_int=_short_integer, object_pairs_hook=_no_key_twice
        )
    except RecursionError as error:
        raise BadInputError("the body is nested too deeply") from error
    except UnicodeDecodeError as error:
        raise BadInputError(f"the body is not UTF-8 (byte {error.start})") from error
    except BadInputError:
        raise
    except ValueError as error:
        raise BadInputError(f"the body is no JSON: {error}") from error
    if not isinstance(payload, dict):
        raise BadInputError("the body is not a JSON object")
    return {key: value for key, value in payload.items() if value is not None}


def _no_constant(name: str) -> None:
    raise BadInputError(f"the body holds {name}, which is no JSON")


def _short_integer(digits: str) -> int:
    if len(digits) > 30:
        raise BadInputError(f"the body holds an integer of {len(digits)} digits")
    return int(digits)


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise BadInputError(f"the body holds {shown(key)} twice")
    return found


def check_fields(payload: dict[str, Any]) -> None:
    """Refuse by name every field that would be ignored.

    Raises:
        BadInputError: a field is not served, or has a value that is not.
    """
    for name, value in payload.items():
        if name in _LABELS:
            if not isinstance(value, str):
                raise BadInputError(f"'{name}' is {shown(value)}; give a text")
        elif name in _NEUTRAL:
            served = _NEUTRAL[name]
            if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in served):
                choices = " or ".join(json.dumps(one) for one in served)
                raise BadInputError(f"'{name}' is {shown(value)}; this server serves only {choices}")
        elif name not in _SERVED:
            raise BadInputError(f"{shown(name)} is no field that this server knows")


def read_streaming(payload: dict[str, Any]) -> tuple[bool, bool]:
    """Return whether the reply is to be streamed, and whether its usage comes as the last event.

    Raises:
        BadInputError: one of the two fields is malformed.
    """
    stream, options = _flag(payload, "stream"), payload.get("stream_options", {})
    if not isinstance(options, dict):
        raise BadInputError(f"'stream_options' is {shown(options)}; give an object")
    if options and not stream:
        raise BadInputError("'stream_options' needs 'stream': true")
    unknown = [name for name in options if name != "include_usage"]
    if unknown:
        raise BadInputError(f"{shown(unknown[0])} of 'stream_options' is not served; 'include_usage' is")
    return stream, _flag(options, "include_usage")


def read_requests(payload: dict[str, Any]) -> list[Request]:
    """Turn the body of a chat completion into requests, one per choice asked for.

    Raises:
        BadInputError: it asks for something this server does not do, or is malformed.
    """
    check_fields(payload)
    prefix, messages = _split_prefix(payload)
    system = _read_text(messages.pop(0)) if messages and messages[0].get("role") == "system" else None
    roles = [message.get("role") for message in messages]
    if len(roles) % 2 == 0 or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
        found = ", ".join(map(shown, roles[:9]))
        raise BadInputError(f"expected user and assistant in turn, a user last, after a system or none; found {found}")
    asked = [_read_content(message) for message in messages[::2]]
    answers = [_read_text(message) for message in messages[1::2]]
    images = tuple(image for _, images in asked for image in images)
    if sum(width * height for width, height in (image.size for image in images)) > MAX_REQUEST_PIXELS:
        raise BadInputError(f"the pictures have more than {MAX_REQUEST_PIXELS / 1e6:g} megapixels together")
    sampling = Sampling(
        temperature=_number(payload, "temperature", 1.0),
        top_k=max(0, _integer(payload, "top_k", 0, -1, 2**31)),
        top_p=_number(payload, "top_p", 1.0),
        max_new_tokens=asked_max_tokens(payload) or DEFAULT_MAX_TOKENS,
    )
    number = _integer(payload, "n", 1, 1, 64)
    seed = _integer(payload, "seed", uuid.uuid4().int % 2**31, -(2**63), 2**63 - 65)
    return [
        Request(
            id=uuid.uuid4().hex,
            question=asked[-1][0],
            images=images,
            history=tuple(zip((text for text, _ in asked), answers, strict=False)),
            system=system,
            prefix=prefix,
            seed=seed + index,
            sampling=sampling,
        )
        for index in range(number)
    ]


def asked_max_tokens(payload: dict[str, Any]) -> int | None:
    """Return the longest reply a client asks for; None where it leaves that to the server.

    Raises:
        BadInputError: it is no positive integer, or the two fields for it differ.
    """
    names = [name for name in ("max_tokens", "max_completion_tokens") if name in payload]
    values = {_integer(payload, name, 0, 1, 2**63) for name in names}
    if len(values) > 1:
        raise BadInputError("'max_tokens' and 'max_completion_tokens' differ; give one of them")
    return next(iter(values), None)


def _split_prefix(payload: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    """The beginning of a reply that is to be continued, and the messages before it."""
    messages = payload.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadInputError("'messages' must be a list of objects")
    messages = list(messages)
    continued = _flag(payload, "continue_final_message")
    if _flag(payload, "add_generation_prompt", not continued) == continued:
        raise BadInputError("'continue_final_message' and 'add_generation_prompt' must be one true, one false")
    if not continued:
        return "", messages
    if not messages or messages[-1].get("role") != "assistant":
        raise BadInputError("'continue_final_message' needs a last message of role 'assistant'")
    return _read_text(messages.pop()), messages


def _read_content(message: dict[str, Any]) -> tuple[str, list[EncodedPicture]]:
    """Text with `<image>` where a picture was, and the pictures."""
    for name, value in message.items():
        if name not in ("role", "content") and value is not None and value != []:
            raise BadInputError(f"{shown(name)} of a message is not served")
    content = message.get("content")
    if isinstance(content, str):
        return _text(content), []
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise BadInputError("'content' must be text or a list of parts")
    pieces: list[str | None] = []
    images = []
    for part in content:
        kind = part.get("type")
        if kind not in ("text", "image_url"):
            raise BadInputError(f"content of type {shown(kind)} is not served")
        if unknown := [name for name in part if name not in ("type", kind)]:
            raise BadInputError(f"{shown(unknown[0])} of a {kind} part is not served")
        if kind == "text":
            pieces.append(_text(part.get("text")))
        else:
            images.append(_read_image(part.get("image_url")))
            pieces.append(None)
    return join_pieces(pieces), images


def _read_text(message: dict[str, Any]) -> str:
    """Text of a message that may hold no pictures."""
    text, images = _read_content(message)
    if images:
        raise BadInputError(f"a message of role {shown(message.get('role'))} holds a picture; only user messages may")
    return text


def _read_image(reference: Any) -> EncodedPicture:
    given = reference if isinstance(reference, dict) else {"url": reference}
    if unknown := [name for name in given if name not in ("url", "detail")]:
        raise BadInputError(f"{shown(unknown[0])} of an image_url is not served")
    if given.get("detail") not in (None, "auto"):
        raise BadInputError(f"'detail' of an image_url is {shown(given['detail'])}; this server serves only \"auto\"")
    url = given.get("url")
    if not isinstance(url, str) or not url.startswith("data:image/") or ";base64," not in url:
        raise BadInputError("pictures must be data URIs (data:image/...;base64,...)")
    try:
        content = base64.b64decode(url.partition(";base64,")[2], validate=True)
    except ValueError as error:
        raise BadInputError(f"a picture is not base64: {error}") from error
    return read_picture(content, "a picture")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise BadInputError(f"a text is {shown(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise BadInputError(f"a text holds half a character, {shown(value[error.start])}") from error
    return value


def _flag(payload: dict[str, Any], name: str, default: bool = False) -> bool:
    value = payload.get(name, default)
    if value is not None and not isinstance(value, bool):
        raise BadInputError(f"'{name}' is {shown(value)}; give true or false")
    return bool(value)


def _integer(payload: dict[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = payload.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise BadInputError(f"{name} is {shown(value)}; give an integer from {least} to {most}")
    return value


def _number(payload: dict[str, Any], name: str, default: float) -> float:
    value = payload.get(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        raise BadInputError(f"{name} is {shown(value)}; give a number")
    return float(value)


def shown(value: Any) -> str:
    """Return what a client sent for a message: in ASCII, and short however long or deep it is."""
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    return ascii(value[:60]) + ("..." if len(value) > 60 else "") if isinstance(value, str) else ascii(value)


def error_body(status: int, message: str) -> bytes:
    """Return an error in OpenAI's form: one sentence, in characters that every client can read."""
    sentence = " ".join(message.encode("ascii", "backslashreplace").decode().split())
    return json.dumps({"error": {"message": sentence[:500], "code": status}}).encode()
