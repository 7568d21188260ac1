"""Any engine on many processes or machines, through Ray Data (`pip install "ray[data]"`).

Each actor of a pool builds the engine once and answers chunks of requests; replies stream back to the program, which
keeps them in its journal, so a resumed run asks only for what is missing. Pictures are read where the actor runs: every
machine must see them under the same path.
"""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import pyarrow as pa
import ray

from internvl_mpo.engines import Engine, Reply, Request, Sampling
from internvl_mpo.engines.settings import EngineSettings

# Requests of one Ray dataset: large enough to keep every actor busy, small enough for the driver's memory.
PART = 65536


class RayEngine:
    """Spreads requests over a pool of engines.

    Args:
        settings: the engine, `num_actors` and `gpus_per_actor`. Connects to the cluster `RAY_ADDRESS` names, or starts
            Ray on this machine.
        build: builds one engine from the settings, in the process of an actor.
    """

    def __init__(self, settings: EngineSettings, build: Callable[[EngineSettings], Engine]):
        self.settings = settings
        self.build = build
        self.name = settings.engine
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="warning")
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        ray.data.DataContext.get_current().enable_progress_bars = False
        self.model_id, self.revision = ray.get(ray.remote(_identity).remote(settings, build))

    def generate(self, requests: Iterable[Request], done: Collection[str] = ()) -> Iterator[Reply]:
        """Yield replies as chunks come back; see `Engine.generate`. A broken actor's chunk is given to another."""
        stream = (request for request in requests if request.id not in done)
        while part := list(itertools.islice(stream, PART)):
            size = min(-(-len(part) // (4 * self.settings.num_actors)), 16 * self.settings.batch_size)
            chunks = [_table(part[start : start + size]) for start in range(0, len(part), size)]
            replies = ray.data.from_arrow(chunks).map_batches(
                _Actor,
                fn_constructor_args=(self.settings, self.build),
                batch_size=None,  # one chunk at a time
                batch_format="pyarrow",
                compute=ray.data.ActorPoolStrategy(size=self.settings.num_actors),
                num_gpus=self.settings.gpus_per_actor,
            )
            for row in replies.iter_rows():
                yield Reply(**row)


class _Actor:
    """One engine in a process of its own."""

    def __init__(self, settings: EngineSettings, build: Callable[[EngineSettings], Engine]):
        self.engine = build(settings)

    def __call__(self, table: pa.Table) -> pa.Table:
        requests = [_request(row) for row in table.to_pylist()]
        replies = [dataclasses.asdict(reply) for reply in self.engine.generate(requests)]
        return pa.Table.from_pylist(replies, schema=_REPLY_SCHEMA)


_REPLY_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("num_tokens", pa.int64()),
        ("error", pa.string()),
        ("served_model", pa.string()),
    ]
)


def _table(requests: list[Request]) -> pa.Table:
    rows = [dataclasses.asdict(request) for request in requests]
    for row in rows:
        row.pop("draft")  # nobody looks into another process
    return pa.Table.from_pylist([{**row, "images": list(row["images"])} for row in rows])


def _request(row: dict[str, Any]) -> Request:
    """Undo `_table`: Arrow gives lists back for tuples."""
    history = tuple((question, answer) for question, answer in row["history"])
    sampling = Sampling(**row["sampling"])
    return Request(**{**row, "images": tuple(row["images"]), "history": history, "sampling": sampling})


def _identity(settings: EngineSettings, build: Callable[[EngineSettings], Engine]) -> tuple[str, str | None]:
    """What the rows will name as model and revision, found out on the cluster without loading weights."""
    if settings.engine == "http":
        engine = build(settings)
        return engine.model_id, engine.revision
    from internvl_mpo.engines.revision import model_revision

    return str(settings.model), model_revision(str(settings.model))
