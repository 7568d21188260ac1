"""What no request may ask the server for, in front of everything else.

Gradio fetches a web address or serves it through itself wherever a file is expected: `/file=http://...`, and
`{"path": "http://..."}` in the data of a call. Here a picture is what a visitor uploads, nothing else, so such requests
are refused before they are looked at, and bodies that are too large before they are read. Gradio itself refuses paths
outside its temporary folder; they are refused here too, so that the answer does not depend on its version.
"""

import asyncio
import json
import posixpath
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from internvl_mpo.errors import BadInputError

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

# The second wall behind `markup`: whatever gets into an answer, no picture, frame or form of elsewhere is fetched.
POLICY = (
    "img-src 'self' data: blob:; media-src 'self' data: blob:; connect-src 'self'; frame-src 'none'; "
    "object-src 'none'; form-action 'self'; base-uri 'self'"
)
_ADDRESS = ("http:", "https:", "ftp:", "file:", "//", "\\\\")
MAX_DEPTH = 40
MAX_FETCHES = 8  # at the same time, of all visitors together


class Guard:
    """ASGI middleware.

    Args:
        app: what comes behind.
        uploads: the folder uploads are in; the only place a file of a request may be.
        max_body_bytes: of a call. Uploads have a limit of their own, which Gradio enforces while it reads.
        fetch: gives the data URI of a picture behind an http(s) address; None lets no address through. Pictures are
            fetched here, ahead of the queue for the models, so that nobody else waits for a slow address.
        health: answers `/health`.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        uploads: str | Path,
        max_body_bytes: int,
        fetch: Callable[[str], str] | None = None,
        health: Callable[[], dict[str, Any]] | None = None,
    ):
        self.app, self.uploads, self.max_body_bytes = app, Path(uploads).resolve(), max_body_bytes
        self.fetch, self.health = fetch, health
        self._fetching = asyncio.Semaphore(MAX_FETCHES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with a refusal."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        send = _with_policy(send)
        path = unquote(scope["path"])
        if path == "/health" and self.health is not None:
            await _answer(send, 200, self.health())
            return
        reason = self._refuse_path(path)
        if reason:
            await _answer(send, 403, {"detail": reason})
            return
        if scope["method"] == "POST" and not path.endswith("/upload"):
            body, reason = await self._read(receive)
            if reason:
                await _answer(send, 413, {"detail": reason})
                return
            reason = self._refuse_body(body)
            if reason:
                await _answer(send, 403, {"detail": reason})
                return
            if self.fetch is not None and path.rstrip("/").endswith(("/call/compare", "/queue/join", "/run/compare")):
                try:
                    body = await self._with_pictures(body)
                except BadInputError as error:
                    await _answer(send, 400, {"detail": str(error)})
                    return
                scope = _with_length(scope, len(body))
            receive = _again(body, receive)
        await self.app(scope, receive, send)

    def _refuse_path(self, path: str) -> str | None:
        for word in ("file=", "file/", "proxy="):
            _, found, wanted = path.partition(f"/{word}")
            if not found:
                continue
            wanted = unquote(unquote(wanted))
            if word == "proxy=" or wanted.lower().lstrip("/ ").startswith(_ADDRESS):
                return "addresses are not fetched"
            if ".." in posixpath.normpath(wanted).split("/") or ".." in wanted.replace("\\", "/").split("/"):
                return "paths with .. are not served"
        return None

    async def _read(self, receive: Receive) -> tuple[bytes, str | None]:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return b"", "the client has gone"
            part = message.get("body", b"")
            size += len(part)
            if size > self.max_body_bytes:
                return b"", f"a call may have {self.max_body_bytes / 2**20:.0f} MB at most"
            parts.append(part)
            if not message.get("more_body"):
                return b"".join(parts), None

    async def _with_pictures(self, body: bytes) -> bytes:
        """Put pictures in the place of their addresses in the lists of a call's data."""
        try:
            call = json.loads(body)
        except (ValueError, RecursionError):
            return body
        lists = [value for value in call.get("data") or () if isinstance(value, list)] if isinstance(call, dict) else []
        for images in lists:
            for number, image in enumerate(images):
                address = image.get("path") if isinstance(image, dict) else image
                if isinstance(address, str) and address.lower().startswith(("http://", "https://")):
                    async with self._fetching:
                        images[number] = await asyncio.to_thread(self.fetch, address)
        return json.dumps(call).encode() if lists else body

    def _refuse_body(self, body: bytes) -> str | None:
        try:
            return self._refuse(json.loads(body), 0) if body else None
        except (ValueError, RecursionError):
            return None  # no JSON: nothing that could name a file

    def _refuse(self, value: Any, depth: int) -> str | None:
        """A sentence for the first object that names a file the visitor has not uploaded."""
        if depth > MAX_DEPTH:
            return "the call is nested too deeply"
        if isinstance(value, list):
            return next((reason for item in value if (reason := self._refuse(item, depth + 1))), None)
        if not isinstance(value, dict):
            return None
        if isinstance(value.get("path"), str) and not self._may_read(value["path"]):
            return "only uploaded files are read; upload the picture first"
        return next((reason for item in value.values() if (reason := self._refuse(item, depth + 1))), None)

    def _may_read(self, path: str) -> bool:
        if path.strip().lower().startswith(_ADDRESS):
            return self.fetch is not None and path.lower().startswith(("http:", "https:"))
        try:
            return Path(path).resolve().is_relative_to(self.uploads)
        except (OSError, ValueError):
            return False


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was already read, then goes on as before."""
    given = False

    async def once() -> dict[str, Any]:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once


def _with_length(scope: Scope, length: int) -> Scope:
    others = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return {**scope, "headers": [*others, (b"content-length", str(length).encode())]}


def _with_policy(send: Send) -> Send:
    async def sending(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {
                **message,
                "headers": [*message.get("headers", ()), (b"content-security-policy", POLICY.encode())],
            }
        await send(message)

    return sending


async def _answer(send: Send, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
