"""The two models of the demo behind OpenAI-compatible servers."""

import contextlib
import http.client
import json
import ssl
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from internvl_mpo.demo.conversation import SIDES, Answer, Message
from internvl_mpo.demo.pictures import Cutter
from internvl_mpo.demo.streaming import Activity, Names, Pane, VisitorQuestion, follow
from internvl_mpo.engines.chat_format import data_uri
from internvl_mpo.errors import BadInputError

SILENCE_SECONDS = 120.0  # a server that says nothing for so long has hung up


class Servers:
    """Two OpenAI-compatible servers (vLLM, SGLang, LMDeploy, `internvl_mpo.engines.serve`).

    Args:
        urls: base URL by side.
        models: served names by side; None asks the server.
        api_key: sent as a bearer token.

    Raises:
        BadInputError: a URL is malformed.
    """

    concurrency = 16

    def __init__(self, urls: dict[str, str], models: dict[str, str | None], api_key: str | None = None):
        self.activity = Activity()
        self._servers = {side: _Server(urls[side], models[side], api_key) for side in SIDES}

    def stream(self, question: VisitorQuestion) -> Iterator[tuple[Answer, Answer]]:
        """See `Backend.stream`."""
        stop, changed = threading.Event(), threading.Event()
        panes = [Pane("".join, changed, self.activity) for _ in SIDES]
        work = [
            lambda side=side, pane=pane: self._servers[side].answer(question.chats[side], question, pane, stop)
            for side, pane in zip(SIDES, panes, strict=True)
        ]
        yield from follow(panes, work, stop, changed, self.activity)

    def names(self) -> dict[str, Names]:
        """See `Backend.names`."""
        return {side: Names(server.model or server.url, None) for side, server in self._servers.items()}

    def cutter(self) -> Cutter:
        """InternVL2's way; what the server does cannot be asked."""
        return Cutter()

    def load(self) -> None:
        """Ask both servers for their model's name.

        Raises:
            BadInputError: one of them does not answer.
        """
        for server in self._servers.values():
            server.find_model()


class _Server:
    """One base URL."""

    def __init__(self, url: str, model: str | None, api_key: str | None):
        parts = urlsplit(url if "//" in url else f"http://{url}")
        try:
            self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        except ValueError as error:
            raise BadInputError(f"'{url}' is no base URL ({error}); give one like http://localhost:8000/v1") from error
        if parts.scheme not in ("http", "https") or not self._host:
            raise BadInputError(f"'{url}' is no base URL; give one like http://localhost:8000/v1")
        path = parts.path.rstrip("/")
        self._path = path if path.endswith("/v1") else f"{path}/v1"
        self.url, self.model = url, model
        self._headers = {"Content-Type": "application/json", "User-Agent": "internvl-mpo"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def find_model(self) -> str:
        """Return the name of the model, the first the server lists unless one was given."""
        if self.model is None:
            try:
                with contextlib.closing(self._connect()) as connection:
                    connection.request("GET", f"{self._path}/models", headers=self._headers)
                    self.model = json.loads(connection.getresponse().read())["data"][0]["id"]
            except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
                raise BadInputError(f"{self.url} does not answer as a server should ({error})") from error
        return self.model

    def answer(self, chat: list[Message], question: VisitorQuestion, pane: Pane, stop: threading.Event) -> None:
        """Fill a pane from a stream of server-sent events; a server that cannot stream is asked for all at once."""
        try:
            payload = {
                "model": self.find_model(),
                "messages": [_as_json(message) for message in chat],
                "temperature": question.sampling.temperature,
                "max_tokens": question.sampling.max_new_tokens,
                "seed": question.seed,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            with contextlib.closing(self._connect()) as connection:
                response = self._post(connection, payload)
                if response.status == 400 and b"stream" in (body := response.read()):
                    plain = {key: value for key, value in payload.items() if not key.startswith("stream")}
                    response = self._post(connection, plain)
                elif response.status == 400:
                    raise BadInputError(f"{self.url} answers 400: {body[:200].decode('utf-8', 'replace')}")
                if response.status != 200:
                    text = response.read(200).decode("utf-8", "replace")
                    raise BadInputError(f"{self.url} answers {response.status}: {text}")
                if "event-stream" in response.headers.get("Content-Type", ""):
                    self._read_stream(response, pane, stop)
                else:
                    whole = json.loads(response.read())
                    choice = whole["choices"][0]
                    pane.add(choice["message"]["content"])
                    count = (whole.get("usage") or {}).get("completion_tokens")
                    pane.finish(choice.get("finish_reason") or "stop", num_tokens=count)
        except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
            pane.finish("error", str(error) if isinstance(error, BadInputError) else f"{self.url}: {error}")

    def _post(self, connection: http.client.HTTPConnection, payload: dict[str, Any]) -> http.client.HTTPResponse:
        connection.request("POST", f"{self._path}/chat/completions", json.dumps(payload).encode(), self._headers)
        return connection.getresponse()

    def _read_stream(self, response: http.client.HTTPResponse, pane: Pane, stop: threading.Event) -> None:
        """Take the pieces as they come. Leaving closes the connection, upon which a server stops generating."""
        reason, count = "", None
        for line in response:
            if stop.is_set():
                pane.finish("stopped")
                return
            name, _, data = line.decode("utf-8", "replace").strip().partition(":")
            if name != "data":
                continue
            if data.strip() == "[DONE]":
                break
            event = json.loads(data)
            if "error" in event:
                raise BadInputError(f"{self.url}: {event['error']}")
            count = (event.get("usage") or {}).get("completion_tokens", count)
            for choice in event.get("choices", [])[:1]:
                if piece := (choice.get("delta") or {}).get("content"):
                    pane.add(piece)
                reason = choice.get("finish_reason") or reason
        if not reason:
            raise BadInputError(f"{self.url} broke off in the middle of its answer")
        pane.finish(reason, num_tokens=count)

    def _connect(self) -> http.client.HTTPConnection:
        if self._secure:
            context = ssl.create_default_context()
            return http.client.HTTPSConnection(self._host, self._port, timeout=SILENCE_SECONDS, context=context)
        return http.client.HTTPConnection(self._host, self._port, timeout=SILENCE_SECONDS)


def _as_json(message: Message) -> dict[str, Any]:
    """One message in OpenAI's form, pictures as data URIs before the text."""
    if not message.images:
        return {"role": message.role, "content": message.text}
    pictures = [{"type": "image_url", "image_url": {"url": data_uri(picture.open())}} for picture in message.images]
    text = message.text.replace("<image>\n", "").replace("<image>", "")
    return {"role": message.role, "content": [*pictures, {"type": "text", "text": text}]}
