"""Requests that arrive one by one, answered in batches by a thread."""

import queue
import threading
from collections.abc import Iterator
from concurrent.futures import Future

from internvl_mpo.engines import Engine, Reply, Request

GATHER_SECONDS = 0.01  # a batch waits for company as long as requests follow each other this closely
MAX_WAITING = 1024  # replies; who comes then is told to come back
MAX_BATCH_PIXELS = 25_000_000  # decoded at the same time, 75 MB; a request with more is a batch by itself


class BusyError(Exception):
    """There is no place for another request now."""


class Batcher:
    """Hands requests to an engine, those that arrive together in one batch.

    Args:
        engine: who answers.
        batch_size: requests handed over together, at most.
    """

    def __init__(self, engine: Engine, batch_size: int):
        self.engine, self.batch_size = engine, batch_size
        self._waiting: queue.Queue[tuple[Request, Future[Reply]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, requests: list[Request]) -> list["Future[Reply]"]:
        """Queue requests; their replies come as futures.

        Raises:
            BusyError: too many wait already.
        """
        if self._waiting.qsize() + len(requests) > MAX_WAITING:
            raise BusyError
        futures: list[Future[Reply]] = [Future() for _ in requests]
        for item in zip(requests, futures, strict=True):
            self._waiting.put(item)
        return futures

    def close(self) -> None:
        """Answer what has been queued, then end."""
        self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        for batch in filter(None, self._batches()):
            futures = {request.id: future for request, future in batch}
            try:
                for reply in self.engine.generate([request for request, _ in batch]):
                    futures.pop(reply.id).set_result(reply)
                error: Exception = RuntimeError("the engine gave no reply")
            except Exception as raised:  # the server outlives a batch that fails; each client is told
                error = raised
            for future in futures.values():
                future.set_exception(error)

    def _batches(self) -> Iterator[list[tuple[Request, "Future[Reply]"]]]:
        """What arrives together, without what nobody waits for any more."""
        held = None
        while (first := held or self._waiting.get()) is not None:
            held, batch, pictures = None, [first], set(first[0].images)
            while len(batch) < self.batch_size:
                try:
                    item = self._waiting.get(timeout=GATHER_SECONDS)
                except queue.Empty:
                    break
                if item is None:
                    self._waiting.put(None)
                    break
                pictures |= set(item[0].images)
                if sum(width * height for width, height in (picture.size for picture in pictures)) > MAX_BATCH_PIXELS:
                    held = item
                    break
                batch.append(item)
            yield [item for item in batch if not (item[0].draft and item[0].draft.stopped.is_set())]
