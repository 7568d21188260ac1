"""Replies survive a killed process: every reply is appended to a file as it comes, and read back on the next run.

The journal of `responses.jsonl` is `responses.jsonl.part`. It holds one reply per line in order of arrival; the last
line may be torn. A finished program writes its output in the planned order and removes the journal, unless that holds
replies the output has no place for: nothing is asked twice, by a next run of the same command either.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from internvl_mpo.engines import Engine, Reply, Request
from internvl_mpo.errors import BadInputError
from internvl_mpo.files import atomic_writer
from internvl_mpo.records import iter_jsonl


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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "a+b")  # noqa: SIM115 - closed by `close`
        self._offsets: dict[str, int] = {}
        self._reply_of = reply_of
        self._lock()
        self._read_back()
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

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def __contains__(self, id: str) -> bool:
        return id in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def append(self, reply: Reply) -> None:
        """Keep a reply; it is on its way to disk when this returns."""
        line = json.dumps(dataclasses.asdict(reply), ensure_ascii=False).encode("utf-8", "surrogatepass")
        self._file.seek(0, os.SEEK_END)
        self._offsets[reply.id] = self._file.tell()
        self._file.write(line + b"\n")
        self._file.flush()

    def __getitem__(self, id: str) -> Reply:
        self._file.seek(self._offsets[id])
        return Reply(**json.loads(self._file.readline()))

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
        count = 0
        with atomic_writer(self.output) as out:
            for row in rows:
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        if self._reply_of is not None and count == len(self):
            self.path.unlink()  # before it is closed, which lets the next run in
        self._file.close()
        return count

    def _lock(self) -> None:
        """Keep a second run of the same command away, which would ask for everything again and mix up the journal."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however it ends
        except BlockingIOError as error:
            self._file.close()
            raise BadInputError(
                f"another run is writing {self.output}; wait for it or give another --output"
            ) from error
        except OSError:
            pass  # a file system without locks

    def _read_back(self) -> None:
        """Index whole lines and cut a torn last one."""
        self._file.seek(0)
        offset = 0
        for line in self._file:
            try:
                if not line.endswith(b"\n"):
                    break
                self._offsets[json.loads(line)["id"]] = offset
            except (ValueError, KeyError, TypeError):
                break
            offset += len(line)
        self._file.truncate(offset)


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
    with atomic_writer(path) as out:
        for id, reason in missing.items():
            out.write(json.dumps({"id": id, "reason": reason}, ensure_ascii=False) + "\n")
    first = next(iter(missing.values()))
    print(
        f"{len(missing)} replies are missing, named in {path} (first reason: {first}); the same command asks again",
        file=sys.stderr,
    )
    return 1
