"""Every pair is looked at before training: keys, text, image headers, tokens. What was found is kept on disk.

    folder/3f0c.../part-*.parquet    one row per pair: digest of its content, size and time of change of its images, its
                                     tokens, or the reason why it is unusable
    folder/3f0c.../started           token of the run whose first rank works here, so that others know a shared folder
    folder/3f0c.../done              written when a pass is through; other ranks wait for it

3f0c... is a digest of tokenizer, template, tiling, length limit, columns and rules. A second start reads no image; a
row whose text, tiling or image file changed is looked at anew.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import platform
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet
from tqdm import tqdm

from internvl_mpo.encoding import measure_group, pair_size
from internvl_mpo.errors import BadInputError
from internvl_mpo.families.registry import family_of_processor
from internvl_mpo.files import atomic_writer, write_parquet
from internvl_mpo.locks import beating
from internvl_mpo.mmpr.pairs import PairRow
from internvl_mpo.pack_plan import PairSize
from internvl_mpo.records import RowError, content_id

VerifyImages = Literal["header", "full"]

_CHUNK = 64  # pairs handed to a worker at a time
_SHARD = 20_000  # pairs after which what was found reaches the disk
_RULES = 2  # rises when pairs are refused for other reasons than before
_PATIENCE = 120.0  # seconds until a folder without the first rank's mark is not shared; network disks show files late
_SILENCE = 600.0  # seconds without a sign of life of the first rank until the others stop waiting
_WORTH_WORKERS = 2_000  # below this many pairs, starting processes takes longer than the work


class Preflight:
    """Looks at pairs; see the top of this file."""

    def __init__(
        self,
        processor: Any,
        folder: str | Path,
        *,
        max_tiles: int,
        max_length: int,
        verify_images: VerifyImages = "header",
        num_workers: int | None = None,
    ):
        """Nothing is read or written yet.

        Args:
            processor: encodes pairs.
            folder: home of what was found by earlier passes.
            max_tiles: tiles per image where a pair has no cap of its own.
            max_length: longest prompt plus response in tokens.
            verify_images: "header" trusts a file whose header is sound, "full" decodes every image.
            num_workers: processes; 0 works in this one, None means one per core where that pays.
        """
        self.processor, self.num_workers = processor, num_workers
        self.options = {"max_tiles": max_tiles, "max_length": max_length, "decode": verify_images == "full"}
        self.folder = Path(folder) / content_id(_processor_digest(processor), self.options, PairSize._fields, _RULES)

    def run(self, rows: Sequence[PairRow]) -> list[PairSize | RowError]:
        """Return the size of each pair or why it is unusable, in the order of `rows`; known pairs cost a file stat.

        Raises:
            BadInputError: a worker process died.
        """
        known = self._read()
        digests = [_digest(row) for row in rows]
        stats = _ImageStats()
        images = [stats.of(row) for row in rows]
        # a pair that appears twice is looked at once
        new = list({d: i for i, d in enumerate(digests) if d not in known or known[d][0] != images[i]}.values())
        found: list[tuple[str, str, PairSize | str]] = []
        try:
            with (
                beating(self._show_life),
                tqdm(total=len(new), desc="checking pairs", unit="pair", disable=not new) as bar,
            ):
                for i, result in zip(new, self._measure([rows[i] for i in new]), strict=True):
                    found.append((digests[i], images[i], result))
                    known[digests[i]] = (images[i], result)
                    bar.update(1)
                    if len(found) == _SHARD:
                        self._write(found)
                        found = []
        finally:
            self._write(found)  # an interrupted pass goes on from here
        return self._results(rows, digests, known)

    def reopen(self) -> str:
        """Forget that an earlier pass was completed, and return the token of a mark that the others `wait` for."""
        (self.folder / "done").unlink(missing_ok=True)
        token = uuid.uuid4().hex
        with atomic_writer(self.folder / "started") as out:
            out.write(token)
        return token

    def finish(self) -> None:
        """Let the other ranks go on."""
        with atomic_writer(self.folder / "done") as out:
            out.write("ok\n")

    def _show_life(self, count: int) -> None:
        os.utime(self.folder / "started")

    def wait(self, rows: Sequence[PairRow], token: str) -> list[PairSize | RowError]:
        """Return what `run` on the first rank finds; a file is awaited, as collectives would time out on long passes.

        Args:
            rows: those of the first rank.
            token: what `reopen` gave the first rank.

        Raises:
            BadInputError: this process does not see the folder of the first rank, or other pairs in it.
        """
        deadline = time.monotonic() + _PATIENCE
        while not self._is_marked(token):
            if time.monotonic() > deadline:
                raise BadInputError(
                    f"{self.folder} on {platform.node()} is not the folder the first rank works in; give "
                    "--preflight_cache, --output_dir and --reference_cache folders that all nodes share"
                )
            time.sleep(0.2)
        self._await_done()
        try:
            return self._results(rows, [_digest(row) for row in rows], self._read())
        except KeyError as error:
            raise BadInputError(
                f"{self.folder} lacks pairs that the first rank has checked; give --preflight_cache a folder that all "
                "nodes share, and the same data"
            ) from error

    def _await_done(self) -> None:
        """Wait while the first rank shows signs of life, and while there is somebody to wait for.

        Raises:
            BadInputError: the launcher is gone, or the first rank is.
        """
        launcher, mark, seen = os.getppid(), None, time.monotonic()
        while not (self.folder / "done").exists():
            if os.getppid() != launcher:
                raise BadInputError("the launcher of this rank is gone; start the command again")
            now = _time_of_change(self.folder / "started")
            if now != mark:
                mark, seen = now, time.monotonic()
            elif time.monotonic() - seen > _SILENCE:
                raise BadInputError(
                    f"the first rank, which checks the pairs, has shown no sign of life in {self.folder} for "
                    f"{_SILENCE / 60:.0f} minutes; start the command again, it goes on from what was found"
                )
            time.sleep(0.2)

    def _is_marked(self, token: str) -> bool:
        try:
            return (self.folder / "started").read_text(encoding="utf-8") == token
        except OSError:
            return False

    def _measure(self, rows: Sequence[PairRow]) -> Iterator[PairSize | str]:
        """Yield a size or a reason for each row, in order, whatever the number of workers."""
        num_workers = self.num_workers
        if num_workers is None:
            num_workers = min(16, _num_cores()) if len(rows) >= _WORTH_WORKERS else 0
        chunks = [rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK)]
        if num_workers == 0:
            for chunk in chunks:
                yield from _measure_chunk(chunk, self.processor, self.options)
            return
        # fork shares the processor and starts at once, as in a DataLoader; elsewhere only spawn is safe
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        try:
            with ProcessPoolExecutor(
                min(num_workers, max(1, len(chunks))), context, _start_worker, (self.processor, self.options)
            ) as pool:
                yield from itertools.chain.from_iterable(pool.map(_measure_chunk, chunks))
        except BrokenProcessPool as error:
            raise BadInputError(
                "a process that checks pairs died, perhaps for lack of memory; what it found is kept, so give the "
                "same command again with fewer --preflight_workers"
            ) from error

    def _read(self) -> dict[str, tuple[str, PairSize | str]]:
        """(image stats, result) by pair digest; later parts win."""
        known: dict[str, tuple[str, PairSize | str]] = {}
        for path in sorted(self.folder.glob("part-*.parquet")):
            try:
                columns = pyarrow.parquet.read_table(path).to_pydict()
                sizes = zip(*(columns[name] for name in PairSize._fields), strict=True)
                for digest, images, size, reason in zip(
                    columns["digest"], columns["images"], sizes, columns["reason"], strict=True
                ):
                    known[digest] = (images, PairSize(*size) if reason is None else reason)
            except (OSError, KeyError, ValueError) as error:  # pyarrow's errors are ValueErrors
                raise BadInputError(
                    f"{path} cannot be read ({error}); delete it, its pairs are checked again"
                ) from error
        return known

    def _write(self, found: Sequence[tuple[str, str, PairSize | str]]) -> None:
        if not found:
            return
        nothing = PairSize(0, 0, 0)
        sizes = [nothing if isinstance(result, str) else result for _, _, result in found]
        table = pyarrow.table(
            {
                "digest": [digest for digest, _, _ in found],
                "images": [images for _, images, _ in found],
                **dict(zip(PairSize._fields, map(list, zip(*sizes, strict=True)), strict=True)),
                "reason": pyarrow.array(
                    [result if isinstance(result, str) else None for _, _, result in found], pyarrow.string()
                ),
            }
        )
        write_parquet(table, self.folder / f"part-{time.time_ns():020d}.parquet")

    @staticmethod
    def _results(rows: Sequence[PairRow], digests: Sequence[str], known: dict) -> list[PairSize | RowError]:
        results = []
        for row, digest in zip(rows, digests, strict=True):
            result = known[digest][1]
            results.append(RowError(result, row.where) if isinstance(result, str) else result)
        return results


_worker: tuple[Any, dict[str, Any]] | None = None  # processor and options of this worker process


def _start_worker(processor: Any, options: dict[str, Any]) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = (processor, options)


def _measure_chunk(
    rows: Sequence[PairRow], processor: Any = None, options: dict[str, Any] | None = None
) -> list[PairSize | str]:
    if processor is None:
        processor, options = _worker
    return [_measure_row(row, processor, options) for row in rows]


def _measure_row(row: PairRow, processor: Any, options: dict[str, Any]) -> PairSize | str:
    own = {**options, "max_tiles": row.max_tiles or options["max_tiles"]}
    try:
        size = measure_group(processor, [row.pair], row.image_root, **own)
    except RowError as error:
        return error.reason
    return pair_size(size)


def _digest(row: PairRow) -> str:
    """Other than `PairRow.digest` it names the place: files are looked at again where they were moved to."""
    return content_id(row.digest, str(row.image_root))


def _time_of_change(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


class _ImageStats:
    """Size and time of change of image files; each file is asked once."""

    def __init__(self) -> None:
        self.seen: dict[str, str] = {}

    def of(self, row: PairRow) -> str:
        """Return one text for all images of a pair."""
        if not isinstance(row.image_root, (str, Path)):
            return row.image_root.version
        return " ".join(self._one(os.path.join(row.image_root, name)) for name in row.pair.images)

    def _one(self, path: str) -> str:
        if path not in self.seen:
            try:
                stat = os.stat(path)
                self.seen[path] = f"{stat.st_size}:{stat.st_mtime_ns}"
            except (OSError, ValueError):
                self.seen[path] = "absent"
        return self.seen[path]


def _processor_digest(processor: Any) -> str:
    """What the number of tokens depends on besides the pair: tokenizer, template, image settings."""
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    parts = (vocabulary, processor.chat_template, *family_of_processor(processor).cost_settings(processor))
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def same_id_twice(rows: Sequence[PairRow]) -> dict[int, str]:
    """Return the rows whose id another row has with other content, as {index: reason}; reference log-probs go by id."""
    first: dict[str, tuple[str, str]] = {}
    clashes: dict[int, str] = {}
    for index, row in enumerate(rows):
        digest = _digest(row)
        seen, where = first.setdefault(row.pair.id, (digest, row.where))
        if seen != digest:
            clashes[index] = f"id '{row.pair.id}' is also that of {where}, with other content"
    return clashes
