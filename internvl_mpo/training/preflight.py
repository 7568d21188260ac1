"""Every pair is read and looked at before training, in one pass: keys, text, image headers, tokens. What was found is a
table on disk, see `pair_table`.

    folder/3f0c.../81d2.../table.json   and what else a table has
    folder/3f0c.../81d2.../started      token of the run whose first rank works here, so that others know the folder
    folder/3f0c.../81d2.../done         written when a pass is through; other ranks wait for it

3f0c... is a digest of tokenizer, template, tiling, length limit, columns and rules, 81d2... of the names of the data.
A second start reads no row: it asks the files of the data and of the pictures for their size and time of change. What
changed is read and looked at anew.
"""

import gc
import hashlib
import json
import multiprocessing
import os
import platform
import sys
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from internvl_mpo.errors import BadInputError
from internvl_mpo.families.registry import family_of_processor
from internvl_mpo.files import atomic_writer
from internvl_mpo.locks import beating
from internvl_mpo.mmpr.sources import Block, open_sources
from internvl_mpo.records import content_id
from internvl_mpo.training.pair_table import INDEX, NUMBERS, PairTable, Part, read_facts, read_index, write_index
from internvl_mpo.training.table_parts import PartWriter, pictures_changed

VerifyImages = Literal["header", "full"]

_RULES = 3  # rises when pairs are refused for other reasons than before
_PATIENCE = 120.0  # seconds until a folder without the first rank's mark is not shared; network disks show files late
_SILENCE = 600.0  # seconds without a sign of life of the first rank until the others stop waiting
_AHEAD = 2  # blocks that wait for each worker


class Preflight:
    """Looks at pairs; see the top of this file."""

    def __init__(
        self,
        processor: Any,
        folder: str | Path,
        data: Sequence[str | Path],
        *,
        image_root: str | Path | None = None,
        max_tiles: int,
        max_length: int,
        verify_images: VerifyImages = "header",
        num_workers: int | None = None,
    ):
        """Find the files of the data; no row is read and nothing written yet.

        Args:
            processor: encodes pairs.
            folder: home of what was found by earlier passes.
            data: see `iter_pairs`; one or several.
            image_root: see `iter_pairs`.
            max_tiles: tiles per image where a pair has no cap of its own.
            max_length: longest prompt plus response in tokens.
            verify_images: "header" trusts a file whose header is sound, "full" decodes every image.
            num_workers: processes; 0 works in this one, None means one per core where that pays.

        Raises:
            BadInputError: a file is missing or unreadable.
        """
        self.processor, self.num_workers = processor, num_workers
        self.options = {"max_tiles": max_tiles, "max_length": max_length, "decode": verify_images == "full"}
        self.sources = [source for path in data for source in open_sources(path, image_root)]
        looked = content_id(_processor_digest(processor), self.options, list(NUMBERS), _RULES)
        self.folder = Path(folder) / looked / content_id([str(path) for path in data], str(image_root))

    def run(self) -> PairTable:
        """Return the table of all pairs; where nothing changed since an earlier pass no row is touched.

        Raises:
            BadInputError: a source cannot be read, or a worker process died.
        """
        made_from = content_id([[source.settings(), source.facts()] for source in self.sources])
        if self._is_current(made_from):
            return PairTable(self.folder, self.sources)
        with beating(self._show_life):
            parts = list(self._parts())
            write_index(self.folder, parts, made_from, self.sources)
        self._remove_others(parts, made_from)
        return PairTable(self.folder, self.sources)

    def _is_current(self, made_from: str) -> bool:
        """Say whether an earlier pass was completed on the same sources, and no picture has changed since."""
        index = read_index(self.folder)
        if index.get("made_from") != made_from:
            return False
        facts = (read_facts(self.folder, name) for _, _, name, _ in index["parts"])
        return all(known is not None and not pictures_changed(known) for known in facts)

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

    def wait(self, token: str) -> PairTable:
        """Return what `run` on the first rank finds; a file is awaited, as collectives would time out on long passes.

        Args:
            token: what `reopen` gave the first rank.

        Raises:
            BadInputError: this process does not see the folder of the first rank.
        """
        deadline = time.monotonic() + _PATIENCE
        while not self._is_marked(token):
            if time.monotonic() > deadline:
                raise BadInputError(
                    f"{self.folder} on {platform.node()} is not the folder the first rank works in; give "
                    "--preflight_cache, --output_dir and --reference_cache folders that all nodes share, and all "
                    "ranks the same data"
                )
            time.sleep(0.2)
        self._await_done()
        return PairTable(self.folder, self.sources)

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

    def _parts(self) -> Iterator[Part]:
        """Read and look at all blocks; yield the part of each, in order, whatever the number of workers."""
        blocks = ((number, block) for number, source in enumerate(self.sources) for block in source.blocks())
        first = list(islice(blocks, 2))
        blocks = chain(first, blocks)
        workers = min(16, _num_cores()) if self.num_workers is None else self.num_workers
        if workers == 0 or (self.num_workers is None and len(first) < 2):  # starting processes takes longer than work
            made = self._make_here(blocks)
        else:
            made = self._make_in_workers(blocks, workers)
        total = sum(source.num_bytes for source in self.sources)
        with tqdm(total=total, desc="reading and checking pairs", unit="B", unit_scale=True, delay=1) as bar:
            num_pairs = 0
            for number, block, name, count in made:
                num_pairs += count
                bar.set_postfix_str(f"{num_pairs:,} pairs", refresh=False)
                bar.update(block.num_bytes)
                yield Part(number, block.first, name, count)

    def _make_here(self, blocks: Iterator[tuple[int, Block]]) -> Iterator[tuple[int, Block, str, int]]:
        writer = PartWriter(self.processor, self.folder, self.sources, **self.options)
        for number, block in blocks:
            yield number, block, *writer.write(number, block)

    def _make_in_workers(
        self, blocks: Iterator[tuple[int, Block]], workers: int
    ) -> Iterator[tuple[int, Block, str, int]]:
        # fork shares the processor and starts at once, as in a DataLoader; elsewhere only spawn is safe
        context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        options = (self.processor, self.folder, self.sources, self.options)
        waiting: deque[tuple[int, Block, Future]] = deque()
        try:
            with ProcessPoolExecutor(workers, context, _start_worker, options) as pool:
                try:
                    for number, block in blocks:
                        waiting.append((number, block._replace(lines=None), pool.submit(_make_part, number, block)))
                        if len(waiting) > _AHEAD * workers:
                            number, block, part = waiting.popleft()
                            yield number, block, *part.result()
                    for number, block, part in waiting:
                        yield number, block, *part.result()
                finally:
                    pool.shutdown(wait=False, cancel_futures=True)  # a run that stops waits for no more than it has
        except BrokenProcessPool as error:
            raise BadInputError(
                "a process that checks pairs died, perhaps for lack of memory; what it found is kept, so give the "
                "same command again with fewer --preflight_workers"
            ) from error

    def _remove_others(self, parts: Sequence[Part], made_from: str) -> None:
        """Remove parts of an earlier state of the data; whoever has them mapped keeps them."""
        kept = {f"{part.name}.{end}" for part in parts for end in ("arrow", "json")}
        kept |= {INDEX, f"columns-{made_from}.arrow"}
        for path in [*self.folder.glob("*.arrow"), *self.folder.glob("*.json")]:
            if path.name not in kept and not path.name.startswith("."):
                path.unlink(missing_ok=True)


_worker: PartWriter | None = None  # of this worker process


def _start_worker(processor: Any, folder: Path, sources: Sequence[Any], options: dict[str, Any]) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    gc.freeze()  # what was imported need not be looked through again and again
    _worker = PartWriter(processor, folder, sources, **options)


def _make_part(number: int, block: Block) -> tuple[str, int]:
    return _worker.write(number, block)


def _processor_digest(processor: Any) -> str:
    """What the number of tokens depends on besides the pair: tokenizer, template, image settings."""
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    parts = (vocabulary, processor.chat_template, *family_of_processor(processor).cost_settings(processor))
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _time_of_change(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None
