"""Replies survive a killed process: every reply is appended to a file as it comes, and read back on the next run.

The journal of `responses.jsonl` is `responses.jsonl.part`. It holds one reply per line in order of arrival; the last
line may be torn. A finished program writes its output in the planned order and removes the journal, unless that holds
replies the output has no place for: nothing is asked twice, by a next run of the same command either.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from internvl_mpo.engines import Engine, Reply, Request
from internvl_mpo.errors import BadInputError
from internvl_mpo.jsonl import AppendLog, iter_jsonl, write_jsonl


class Journal:
    """Replies by id, on disk; memory holds one number per reply.

    Args:
        output: the file that is written in the end.
        reply_of: finds the reply in a row of a finished `output`, so that a finished file can be extended; None where
            rows do not hold their replies.

    Raises:
        BadInputError: another run writes the same output, or `output` holds rows of another program.
    """

    def __init__(self, output: str | Path, reply_of: Callable[[Mapping[str, Any]], Reply] | None = None):
        self.output = Path(output)
        self.path = self.output.with_name(self.output.name + ".part")
        self._log = AppendLog(self.path, self.output)  # also keeps a second run away, which would ask for all again
        self._offsets: dict[str, int] = {row["id"]: offset for offset, row in self._log}
        self._reply_of = reply_of
        if reply_of is not None and self.output.exists():
            for where, row in iter_jsonl(self.output):
                try:
                    reply = reply_of(row)
                except (KeyError, TypeError) as error:
                    raise BadInputError(f"{where} was not written by this program; give another --output") from error
                if reply.id not in self._offsets:
                    self.append(reply)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._log.close()

    def __contains__(self, id: str) -> bool:
        return id in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def append(self, reply: Reply) -> None:
        """Keep a reply; it is on its way to disk when this returns."""
        self._offsets[reply.id] = self._log.append(dataclasses.asdict(reply))

    def __getitem__(self, id: str) -> Reply:
        return Reply(**self._log.read(self._offsets[id]))

    def check(self, planned: Iterable[str]) -> None:
        """Refuse to go on with replies of another plan, which `finish` would lose.

        Raises:
            BadInputError: a reply is kept that the ids of this run do not ask for.
        """
        strangers = len(self._offsets) - sum(1 for id in planned if id in self._offsets)
        if strangers:
            raise BadInputError(
                f"{self.output} (or its .part) holds {strangers} replies to other questions or settings; give another "
                "--output or delete it"
            )

    def finish(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Write the output in the given order and return the number of rows.

        The journal goes if the rows hold all replies.
        """
        count = write_jsonl(rows, self.output)
        if self._reply_of is not None and count == len(self):
            self.path.unlink()  # before it is closed, which lets the next run in
        self._log.close()
        return count


def collect_replies(engine: Engine, requests: Iterable[Request], total: int, journal: Journal) -> dict[str, str]:
    """Ask for every reply the journal does not hold yet, and keep it there.

    Args:
        engine: who answers.
        requests: all requests of the run, answered ones too (see `Engine.generate`).
        total: their number, for the progress bar.
        journal: where replies go.

    Returns:
        Why a reply is missing, by request id; empty when all came.
    """
    missing: dict[str, str] = {}
    with tqdm(total=total, initial=len(journal), unit="reply", desc=engine.name, smoothing=0.05) as bar:
        for reply in engine.generate(requests, done=journal):
            if reply.error is None:
                journal.append(reply)
            else:
                missing[reply.id] = reply.error
            bar.update()
    return missing


def sample_seed(seed: int, id: str, number: int) -> int:
    """Return the seed of the n-th reply to the row with this id, below 2**31 as servers want it."""
    digest = hashlib.sha256(f"{seed}/{id}/{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def report_missing(missing: dict[str, str], output: str) -> int:
    """Name the replies that did not come in `OUTPUT.missing.jsonl` and return the exit code."""
    path = Path(f"{output}.missing.jsonl")
    if not missing:
        path.unlink(missing_ok=True)
        return 0
    write_jsonl(({"id": id, "reason": reason} for id, reason in missing.items()), path)
    first = next(iter(missing.values()))
    print(
        f"{len(missing)} replies are missing, named in {path} (first reason: {first}); the same command asks again",
        file=sys.stderr,
    )
    return 1
