"""The wire format of chat requests: written by the client, read by the server."""

import base64
import binascii
import io
import json
import uuid
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from internvl_mpo.engines import Reply, Request, Sampling, chat_messages
from internvl_mpo.errors import BadInputError

_MIME = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp", ".gif": "image/gif"}
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
    marks = sum(message["content"].count("<image>") for message in messages)
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
    """Text as it is, or as parts where `<image>` marks take the next pictures."""
    first, *others = text.split("<image>")
    if not others:
        return text
    content: list[dict[str, Any]] = [{"type": "text", "text": first.strip("\n")}] if first.strip() else []
    for piece in others:
        content.append({"type": "image_url", "image_url": {"url": data_uri(next(images))}})
        if piece.strip():
            content.append({"type": "text", "text": piece.strip("\n")})
    return content


def data_uri(image: Any) -> str:
    """Return a picture as a data URI; files of a common type keep their bytes."""
    if isinstance(image, Image.Image):
        return _encode(image)
    return _file_data_uri(str(image))


@lru_cache(maxsize=128)  # the samples of one question follow each other
def _file_data_uri(path: str) -> str:
    mime = _MIME.get(Path(path).suffix.lower())
    with Image.open(path) as opened:  # also finds files that are no pictures before they travel
        if mime is None or Image.MIME.get(opened.format) != mime:
            return _encode(opened)
    return f"data:{mime};base64,{base64.b64encode(Path(path).read_bytes()).decode()}"


def _encode(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


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


def read_requests(payload: dict[str, Any]) -> list[Request]:
    """Turn the body of a chat completion into requests, one per choice asked for.

    Raises:
        ValueError: it asks for something this server does not do, or is malformed.
    """
    messages = payload.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise BadInputError("'messages' must be a list of objects")
    messages = list(messages)
    prefix = ""
    if messages and messages[-1].get("role") == "assistant" and payload.get("continue_final_message"):
        prefix = _read_text(messages.pop())
    system = _read_text(messages.pop(0)) if messages and messages[0].get("role") == "system" else None
    roles = [message.get("role") for message in messages]
    if len(roles) % 2 == 0 or roles != (["user", "assistant"] * len(roles))[: len(roles)]:
        raise BadInputError(f"expected user and assistant in turn, a user last, after a system or none; found {roles}")
    asked = [_read_content(message.get("content")) for message in messages[::2]]
    answers = [_read_text(message) for message in messages[1::2]]
    question = asked[-1][0]
    history = tuple(zip((text for text, _ in asked), answers, strict=False))
    number = int(payload.get("n") or 1)
    if not 1 <= number <= 64:
        raise BadInputError(f"n is {number}; give 1 to 64")
    temperature = payload.get("temperature")
    sampling = Sampling(
        temperature=1.0 if temperature is None else float(temperature),
        top_k=max(0, int(payload.get("top_k") or 0)),
        top_p=float(payload.get("top_p") or 1.0),
        max_new_tokens=int(payload.get("max_tokens") or payload.get("max_completion_tokens") or 1024),
    )
    seed = payload.get("seed")
    seed = uuid.uuid4().int % 2**31 if seed is None else int(seed)
    return [
        Request(
            id=uuid.uuid4().hex,
            question=question,
            images=tuple(image for _, images in asked for image in images),
            history=history,
            system=system,
            prefix=prefix,
            seed=seed + index,
            sampling=sampling,
        )
        for index in range(number)
    ]


def _read_content(content: Any) -> tuple[str, list[Image.Image]]:
    """Text with `<image>` where a picture was, and the pictures."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise BadInputError("'content' must be text or a list of parts")
    texts, images = [], []
    for part in content:
        if part.get("type") == "text":
            texts.append(str(part.get("text", "")))
        elif part.get("type") == "image_url":
            images.append(_read_image(part.get("image_url")))
            texts.append("<image>")
        else:
            raise BadInputError(f"content of type '{part.get('type')}' is not served")
    return "\n".join(texts), images


def _read_text(message: dict[str, Any]) -> str:
    """Text of a message that may hold no pictures."""
    text, images = _read_content(message.get("content"))
    if images:
        raise BadInputError(f"a message of role '{message.get('role')}' holds a picture; only user messages may")
    return text


def _read_image(reference: Any) -> Image.Image:
    url = reference.get("url") if isinstance(reference, dict) else reference
    if not isinstance(url, str) or not url.startswith("data:image/") or ";base64," not in url:
        raise BadInputError("pictures must be data URIs (data:image/...;base64,...)")
    return _decode_image(url)


@lru_cache(maxsize=64)  # equal pictures become one object, which the engine encodes once
def _decode_image(url: str) -> Image.Image:
    try:
        content = base64.b64decode(url.partition(";base64,")[2], validate=True)
    except binascii.Error as error:
        raise BadInputError(f"a picture is not base64: {error}") from error
    image = Image.open(io.BytesIO(content))
    image.load()
    return image
