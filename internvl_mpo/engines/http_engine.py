"""The engine behind a URL: any server that speaks OpenAI's chat completions (vLLM, SGLang, LMDeploy, `engines.serve`).

One request per reply, each with its own seed, since servers disagree about `n`. Pictures travel as data URIs. A reply
is asked for again, later and later, when the server is busy, breaks, stalls or talks nonsense; after the last attempt
it comes back with the error. A request with a draft is streamed into it. Standard library only.
"""

import contextlib
import json
import random
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from PIL import Image

from internvl_mpo.engines import Reply, Request, StopSign
from internvl_mpo.engines.chat_format import STREAMED, chat_payload, read_reply, read_stream
from internvl_mpo.engines.connections import FAULTS, Answer, Pace, ServerPool, seconds_to_wait
from internvl_mpo.engines.revision import model_revision, why_other
from internvl_mpo.errors import BadInputError

RETRIED_STATUS = frozenset({408, 409, 425, 429, *range(500, 600)})  # proxies have codes of their own above 504
REFUSED_STATUS = frozenset({400, 413, 422})  # the request is at fault: the server is well, every other would refuse too
MAX_WAIT_SECONDS = 60.0


class HttpEngine:
    """Answers requests through one or several servers.

    Args:
        base_urls: one URL or several, with or without `/v1`; the least busy one gets the next request.
        model: name the servers know the model by; None asks the first server.
        served_from: folder or Hub id that every server must have loaded; None takes what they have.
        concurrency: requests in flight at the same time.
        api_key: sent as a bearer token.
        timeout: seconds one attempt may take from connecting to the last byte.
        silence: seconds a server that streams may say nothing.
        max_attempts: how often a reply is asked for.
        backoff: seconds before the second attempt; doubles each time, half of it random, up to a minute.
        requests_per_minute: most requests sent per minute; None is no limit.

    Raises:
        BadInputError: a URL is malformed, no server answers, or one has another model than `served_from`.

    Attributes:
        revision: of `served_from`.
    """

    name = "http"
    revision: str | None = None

    def __init__(
        self,
        base_urls: str | Sequence[str],
        model: str | None = None,
        *,
        served_from: str | None = None,
        concurrency: int = 64,
        api_key: str | None = None,
        timeout: float = 600.0,
        silence: float = 120.0,
        max_attempts: int = 6,
        backoff: float = 1.0,
        requests_per_minute: float | None = None,
    ):
        urls = [base_urls] if isinstance(base_urls, str) else list(base_urls)
        if not urls or concurrency < 1 or max_attempts < 1:
            raise BadInputError("the http engine needs a base_url, and concurrency and max_attempts of at least 1")
        self._servers = [ServerPool(url) for url in urls]
        self._headers = {"Content-Type": "application/json", "User-Agent": "internvl-mpo"}
        if api_key and api_key.strip():  # a line break from the file the key was read from would be shown in errors
            self._headers["Authorization"] = f"Bearer {api_key.strip()}"
        self.concurrency, self.timeout, self.silence = concurrency, timeout, silence
        self.max_attempts, self.backoff = max_attempts, backoff
        self._pace = Pace(requests_per_minute)
        self._lock = threading.Lock()
        self._failures_in_row = 0
        names = self._served_models()
        if not names and not model:
            raise BadInputError(f"{urls[0]} lists no model; give the model's name as --model")
        self.model_id = model or names[0]
        if names and model and model not in names:
            raise BadInputError(f"{urls[0]} serves {', '.join(names)}, not '{model}'; give one of these as --model")
        if served_from is not None:
            for server in self._servers:
                self._check_loaded(server, served_from)
            self.revision = model_revision(served_from)

    def generate(self, requests: Iterable[Request], done: Collection[str] = ()) -> Iterator[Reply]:
        """Yield replies as they come; see `Engine.generate`."""
        stream = (request for request in requests if request.id not in done)
        self._failures_in_row = 0
        run = StopSign()
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="http-engine")
        pending: set[Future[Reply]] = set()
        try:
            for request in stream:
                pending.add(pool.submit(self._answer, request, run))
                if len(pending) >= 2 * self.concurrency:  # the next request is ready when a thread is
                    finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in finished)
            while pending:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        finally:
            run.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            for server in self._servers:
                server.close()

    def _answer(self, request: Request, run: StopSign) -> Reply:
        try:
            payload = chat_payload(request, self.model_id)
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            return Reply(id=request.id, error=str(error))
        if request.draft is None:
            return self._ask(request, payload, run)
        with run.wakes(request.draft.stop):
            return self._ask(request, payload, request.draft)

    def _ask(self, request: Request, payload: dict[str, Any], sign: StopSign) -> Reply:
        """Ask until there is a reply, a refusal, no attempt left, or the stop sign."""
        error, status, num_asked = "", 0, 0
        jitter = random.Random(request.seed)
        for attempt in range(self.max_attempts):
            if self._failures_in_row > 2 * self.concurrency + 8:
                error = f"not asked, the last {self._failures_in_row} requests all failed {error}".rstrip()
                break
            self._pace.wait(sign.stopped)
            if sign.stopped.is_set():
                return _stopped(request)
            server = self._pick()
            num_asked += 1
            try:
                answer = self._complete(server, request, payload, sign)
                if isinstance(answer, Reply):
                    self._release(server, failed=False)
                    self._failures_in_row = 0
                    return answer
                status, retry_after = answer.status, seconds_to_wait(answer.headers.get("Retry-After", ""))
                error = f"HTTP {status}: {answer.content[:200].decode('utf-8', 'replace')}"
            except FAULTS as fault:
                if sign.stopped.is_set():
                    self._release(server, failed=False)
                    return _stopped(request)
                status, retry_after = 0, 0.0
                error = f"{type(fault).__name__}: {fault}"
            self._release(server, failed=status not in REFUSED_STATUS and status != 429)
            if status in REFUSED_STATUS:
                break
            if status and status not in RETRIED_STATUS and len(self._servers) == 1:
                break  # with several, one that has another model or key must not lose what the others can answer
            if attempt + 1 < self.max_attempts:
                sign.stopped.wait(self._pause(attempt, retry_after, jitter.random()))
        if status not in REFUSED_STATUS:
            with self._lock:
                self._failures_in_row += 1
        asked = f"{server.url}: {error}" if num_asked else error
        return Reply(id=request.id, error=f"{asked} (after {num_asked} attempts)" if num_asked != 1 else asked)

    def _complete(
        self, server: ServerPool, request: Request, payload: dict[str, Any], sign: StopSign
    ) -> "Reply | Answer":
        """Ask once: streamed where somebody reads along and the server can, whole otherwise."""
        streamed = request.draft is not None and server.streams
        with self._exchange(server, "/chat/completions", payload | (STREAMED if streamed else {}), sign) as answer:
            if answer.status == 200:
                return read_stream(request, answer.parts) if answer.is_stream else read_reply(request, answer.content)
            content = answer.content  # is read now or never
        if not (streamed and answer.status in REFUSED_STATUS and b"stream" in content):
            return answer
        server.streams = False
        return self._complete(server, request, payload, sign)

    def _pause(self, attempt: int, retry_after: float, jitter: float) -> float:
        """Return the seconds between an attempt, counted from 0, and the next; jitter is in [0, 1)."""
        backoff = min(MAX_WAIT_SECONDS, self.backoff * 2**attempt) * (0.5 + 0.5 * jitter)
        return min(MAX_WAIT_SECONDS, max(backoff, retry_after))

    def _pick(self) -> ServerPool:
        with self._lock:
            now = time.monotonic()
            server = min(self._servers, key=lambda server: (server.resting_until > now, server.in_flight))
            server.in_flight += 1
            return server

    def _release(self, server: ServerPool, failed: bool) -> None:
        with self._lock:
            server.in_flight -= 1
            server.resting_until = time.monotonic() + 5.0 if failed else 0.0

    def _exchange(
        self, server: ServerPool, path: str, payload: dict[str, Any] | None, sign: StopSign
    ) -> contextlib.AbstractContextManager[Answer]:
        body = None if payload is None else json.dumps(payload).encode()
        silence = self.silence if payload and payload.get("stream") else self.timeout
        return server.exchange(path, body, self._headers, timeout=self.timeout, silence=silence, sign=sign)

    def _served_models(self) -> list[str]:
        """Names that the first server which answers lists."""
        errors = []
        for server in self._servers:
            try:
                return list(self._list_models(server))
            except BadInputError as error:
                errors.append(str(error))
        raise BadInputError(f"{'; '.join(errors)}; start a server there or give another --base_url")

    def _list_models(self, server: ServerPool) -> dict[str, dict[str, Any]]:
        """What a server lists, by name; waits for one that is still starting only as long as a reply may take."""
        try:
            with self._exchange(server, "/models", None, StopSign()) as answer:
                content = answer.content
            if answer.status != 200:
                raise BadInputError(f"{server.url} answers {answer.status}")
            return {entry["id"]: entry for entry in json.loads(content)["data"]}
        except BadInputError:
            raise
        except (*FAULTS, TypeError) as fault:
            raise BadInputError(f"{server.url} does not answer ({fault})") from fault

    def _check_loaded(self, server: ServerPool, served_from: str) -> None:
        """Refuse a server with another model: replies of a wrong policy cannot be told from those of the right one."""
        entry = self._list_models(server).get(self.model_id)
        reason = f"no '{self.model_id}'" if entry is None else why_other(entry, served_from)
        if reason:
            raise BadInputError(f"{server.url} has loaded {reason}, and {served_from} is to answer; start it with that")


def _stopped(request: Request) -> Reply:
    """What there was when the reader of a draft went, or the whole run ended."""
    if request.draft is None:
        return Reply(id=request.id, error="the run was stopped")
    text = request.draft.all_text()
    return Reply(id=request.id, text=text, finish_reason="stopped", num_tokens=request.draft.num_pieces)
