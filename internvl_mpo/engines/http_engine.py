"""The engine behind a URL: any server that speaks OpenAI's chat completions (vLLM, SGLang, LMDeploy, `engines.serve`).

One request per reply, each with its own seed, since servers disagree about `n`. Pictures travel as data URIs. A reply
is asked for again, later and later, when the server is busy, breaks, stalls or talks nonsense; after the last attempt
it comes back with the error. Standard library only.
"""

import contextlib
import http.client
import json
import random
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from PIL import Image

from internvl_mpo.engines import Reply, Request
from internvl_mpo.engines.chat_format import chat_payload, read_reply
from internvl_mpo.engines.connections import FAULTS, Pace, RequestRun, ServerPool, seconds_to_wait
from internvl_mpo.errors import BadInputError

RETRIED_STATUS = frozenset({408, 409, 425, 429, *range(500, 600)})  # proxies have codes of their own above 504
REFUSED_STATUS = frozenset({400, 413, 422})  # the request is at fault: the server is well, every other would refuse too
MAX_WAIT_SECONDS = 60.0


class HttpEngine:
    """Answers requests through one or several servers.

    Args:
        base_urls: one URL or several, with or without `/v1`; the least busy one gets the next request.
        model: name the servers know the model by; None asks the first server.
        concurrency: requests in flight at the same time.
        api_key: sent as a bearer token.
        timeout: seconds one attempt may take from connecting to the last byte.
        max_attempts: how often a reply is asked for.
        backoff: seconds before the second attempt; doubles each time, half of it random, up to a minute.
        requests_per_minute: most requests sent per minute; None is no limit.

    Raises:
        BadInputError: a URL is malformed, or no server answers.
    """

    name = "http"
    revision = None

    def __init__(
        self,
        base_urls: str | Sequence[str],
        model: str | None = None,
        *,
        concurrency: int = 64,
        api_key: str | None = None,
        timeout: float = 600.0,
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
        self.concurrency, self.timeout = concurrency, timeout
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

    def generate(self, requests: Iterable[Request], done: Collection[str] = ()) -> Iterator[Reply]:
        """Yield replies as they come; see `Engine.generate`."""
        stream = (request for request in requests if request.id not in done)
        self._failures_in_row = 0
        run = RequestRun()
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

    def _answer(self, request: Request, run: "RequestRun") -> Reply:
        try:
            body = json.dumps(chat_payload(request, self.model_id)).encode()
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            return Reply(id=request.id, error=str(error))
        error, status, num_asked = "", 0, 0
        jitter = random.Random(request.seed)
        for attempt in range(self.max_attempts):
            if self._failures_in_row > 2 * self.concurrency + 8:
                error = f"not asked, the last {self._failures_in_row} requests all failed {error}".rstrip()
                break
            self._pace.wait(run.stopped)
            if run.stopped.is_set():
                error = "the run was stopped"
                break
            server = self._pick()
            num_asked += 1
            try:
                status, answer, retry_after = self._post(server, "/chat/completions", body, run)
                if status == 200:
                    reply = read_reply(request, answer)
                    self._release(server, failed=False)
                    self._failures_in_row = 0
                    return reply
                error = f"HTTP {status}: {answer[:200].decode('utf-8', 'replace')}"
            except FAULTS as fault:
                status, retry_after = 0, 0.0
                error = f"{type(fault).__name__}: {fault}"
            self._release(server, failed=status not in REFUSED_STATUS and status != 429)
            if status in REFUSED_STATUS:
                break
            if status and status not in RETRIED_STATUS and len(self._servers) == 1:
                break  # with several, one that has another model or key must not lose what the others can answer
            if attempt + 1 < self.max_attempts:
                run.stopped.wait(self._pause(attempt, retry_after, jitter.random()))
        if status not in REFUSED_STATUS:
            with self._lock:
                self._failures_in_row += 1
        return Reply(id=request.id, error=f"{error} (after {num_asked} attempts)")

    def _pause(self, attempt: int, retry_after: float, jitter: float) -> float:
        """Return the seconds between an attempt, counted from 0, and the next; jitter is in [0, 1)."""
        backoff = min(MAX_WAIT_SECONDS, self.backoff * 2**attempt) * (0.5 + 0.5 * jitter)
        return min(MAX_WAIT_SECONDS, max(backoff, retry_after))

    def _pick(self) -> "ServerPool":
        with self._lock:
            now = time.monotonic()
            server = min(self._servers, key=lambda server: (server.resting_until > now, server.in_flight))
            server.in_flight += 1
            return server

    def _release(self, server: "ServerPool", failed: bool) -> None:
        with self._lock:
            server.in_flight -= 1
            server.resting_until = time.monotonic() + 5.0 if failed else 0.0

    def _post(
        self, server: "ServerPool", path: str, body: bytes | None, run: "RequestRun | None" = None
    ) -> tuple[int, bytes, float]:
        """Send one request and return status, body and Retry-After in seconds; a run that is stopped ends it."""
        deadline = time.monotonic() + self.timeout
        connection = server.take(self.timeout)
        sock = connection.sock
        with run.watch(sock) if run else contextlib.nullcontext():
            try:
                sock.settimeout(self._left(deadline))
                connection.request("GET" if body is None else "POST", server.path + path, body, self._headers)
                sock.settimeout(self._left(deadline))
                response = connection.getresponse()
                parts = []
                while response.length != 0 and not response.isclosed():
                    sock.settimeout(self._left(deadline))  # a server that drips bytes must not hold the thread for ever
                    parts.append(response.read1(1 << 16))
                response.close()  # read to the end or not, the connection is free for the next request only then
                if response.length:
                    raise http.client.IncompleteRead(b"".join(parts), response.length)
            except TimeoutError as error:
                connection.close()
                raise TimeoutError(f"no complete answer in {self.timeout:g} s") from error
            except BaseException:
                connection.close()
                raise
        if not response.will_close:
            server.give_back(connection)
        return response.status, b"".join(parts), seconds_to_wait(response.headers.get("Retry-After", ""))

    def _left(self, deadline: float) -> float:
        """Return the seconds an attempt has left.

        Raises:
            TimeoutError: none.
        """
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _served_models(self) -> list[str]:
        """Names the servers list; waits for a server that is still starting only as long as a reply may take."""
        errors = []
        for server in self._servers:
            try:
                status, answer, _ = self._post(server, "/models", None)
                if status == 200:
                    return [entry["id"] for entry in json.loads(answer)["data"]]
                errors.append(f"{server.url} answers {status}")
            except (*FAULTS, TypeError) as fault:
                errors.append(f"{server.url} does not answer ({fault})")
        raise BadInputError(f"{'; '.join(errors)}; start a server there or give another --base_url")
