"""Looks for what is wrong with MMPR, raw or as Parquet: see `KINDS` for the list.

Annotations are cut into parts that are looked at in parallel; of a row only a few hashes come back, by which copies are
found over the whole release. Memory does not grow with texts or pictures.
"""

import io
import json
import multiprocessing
import re
import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

import numpy as np

from internvl_mpo.contamination import BenchmarkIndex
from internvl_mpo.errors import BadInputError
from internvl_mpo.mmpr import Subset, parse_line, read_subsets
from internvl_mpo.mmpr_convert import INDEX_BYTES, MANIFEST, file_facts, line_start, read_manifest
from internvl_mpo.mmpr_files import Member, check_picture, read_lines
from internvl_mpo.mmpr_parquet import FEATURES, is_parquet, to_pair
from internvl_mpo.mmpr_statistics import Statistics
from internvl_mpo.pairing import is_repetitive, without_images
from internvl_mpo.prompts import language_of
from internvl_mpo.records import PreferencePair, RowError

KINDS = {
    # name: (severity, what it means)
    "unusable row": ("error", "no JSON, a key is missing, chosen equals rejected, ..."),
    "picture": ("error", "missing, unreadable, cut off, or far too large"),
    "count": ("error", "another number of rows than meta.json or the manifest says"),
    "file": ("error", "a Parquet file is not what the manifest says, or a part of an archive is missing"),
    "same row": ("error", "pictures, question and both responses equal those of an earlier row"),
    "same id": ("error", "an earlier row with other content has the id"),
    "in a benchmark": ("error", "picture and question of one benchmark item"),
    "near copy": ("warning", "same prompt, both responses nearly those of an earlier row"),
    "near equal": ("warning", "chosen and rejected differ in case, spaces and punctuation only"),
    "repeats itself": ("warning", "the chosen response loops"),
    "language": ("warning", "the chosen response is in another language than the question"),
    "benchmark picture": ("warning", "a picture that looks like a benchmark's"),
    "benchmark question": ("warning", "words of a benchmark's question"),
}
NEAR_BITS = 8  # of 64, between the hashes of two rows: about one changed word in twenty
MIN_NEAR_WORDS = 40  # of both responses; in shorter ones a changed word changes the answer
MAX_EXAMPLES = 5  # findings of one kind that the report shows
MAX_SHOWN = 24  # pictures that it shows beside a benchmark's question
_NOT_WORD = re.compile(r"[\W_]+")


class Finding(NamedTuple):
    """Something wrong: `kind` is one of `KINDS`, `where` is file and line (or row)."""

    kind: str
    where: str
    subset: str
    detail: str

    @property
    def severity(self) -> str:
        """Either "error" or "warning"."""
        return KINDS[self.kind][0]


class Task(NamedTuple):
    """A part of the data: bytes of a subset's annotations, or a row group of a Parquet file."""

    subset: int
    start: int
    stop: int | None
    path: str = ""


@dataclass
class Part:
    """What was seen in one task.

    Attributes:
        findings: in order.
        statistics: of the usable pairs.
        counts: subset -> lines that are not blank.
        name: of the file; `numbers` are its lines or rows.
        rows: hashes per usable pair: of its content, its id, its prompt, and a similarity hash of its responses.
        numbers: line or row of each.
        subsets: names; `members` says which of them each pair belongs to.
        num_lines: lines of this part, added to the numbers of later parts of the file.
        matched: as in `Report`.
        shown: as in `Report`.
    """

    name: str
    findings: list[Finding] = field(default_factory=list)
    statistics: Statistics = field(default_factory=Statistics)
    counts: Counter = field(default_factory=Counter)
    rows: dict[str, array] = field(
        default_factory=lambda: {key: array("Q") for key in ("content", "id", "prompt", "near")}
    )
    numbers: array = field(default_factory=lambda: array("L"))
    subsets: list[str] = field(default_factory=list)
    members: array = field(default_factory=lambda: array("H"))
    num_lines: int = 0
    matched: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    shown: list[tuple[int, str, bytes]] = field(default_factory=list)


@dataclass
class Report:
    """The whole.

    Attributes:
        data: what was looked at.
        statistics: of the usable pairs.
        counts: subset -> rows.
        expected: subset -> rows that meta.json promises; absent where it says nothing.
        kinds: (kind, subset) -> number of findings.
        examples: kind -> the first of them.
        index: the benchmarks, or None.
        matched: "picture", "question", "both" -> examples of the benchmarks that were found.
        shown: (example, where, picture) to be looked at.
    """

    data: str
    statistics: Statistics = field(default_factory=Statistics)
    counts: Counter = field(default_factory=Counter)
    expected: dict[str, int] = field(default_factory=dict)
    kinds: Counter = field(default_factory=Counter)
    examples: dict[str, list[Finding]] = field(default_factory=lambda: defaultdict(list))
    index: BenchmarkIndex | None = None
    matched: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    shown: list[tuple[int, str, bytes]] = field(default_factory=list)

    def num(self, severity: str) -> int:
        """Return the number of findings of a severity."""
        return sum(number for (kind, _), number in self.kinds.items() if KINDS[kind][0] == severity)


def check(
    data: str,
    *,
    image_root: str | None = None,
    index: BenchmarkIndex | None = None,
    decode: bool = True,
    workers: int = 1,
    rejects: IO[str] | None = None,
) -> Report:
    """Look at every row and picture.

    Args:
        data: a release (folder, meta.json or JSONL), or a converted folder or Parquet file.
        image_root: another folder to look for images and archives in.
        index: benchmarks to look for.
        decode: decode every picture; without, only headers are read (and no picture is compared with a benchmark's).
        workers: processes.
        rejects: file for all findings, as JSONL.

    Raises:
        BadInputError: nothing there that can be read.
    """
    report = Report(data, index=index)

    def note(finding: Finding) -> None:
        report.kinds[finding.kind, finding.subset] += 1
        if len(report.examples[finding.kind]) < MAX_EXAMPLES:
            report.examples[finding.kind].append(finding)
        if rejects is not None:
            row = {"row": finding.where, "severity": finding.severity, "kind": finding.kind, "reason": finding.detail}
            rejects.write(json.dumps(row, ensure_ascii=False) + "\n")

    subsets: list[Subset] = []
    if is_parquet(data):
        tasks = list(_parquet_tasks(data, report, note))
    else:
        subsets = read_subsets(data, image_root)
        tasks = list(_raw_tasks(subsets))
        for subset in subsets:
            if isinstance(subset.entry.get("length"), int):
                report.expected[subset.name] = subset.entry["length"]
    parts = []
    before: Counter = Counter()
    for part in _run(tasks, (data, image_root, index, decode), workers):
        first = before[part.name]
        before[part.name] += part.num_lines
        part.numbers = array("L", (number + first for number in part.numbers))
        for finding in part.findings:
            note(finding._replace(where=_shift(finding.where, first)))
        report.statistics.merge(part.statistics)
        report.counts.update(part.counts)
        for kind, examples in part.matched.items():
            report.matched[kind] |= examples
        report.shown += [(one, _shift(where, first), picture) for one, where, picture in part.shown]
        del report.shown[MAX_SHOWN:]
        parts.append(part)
    if subsets:
        for name, expected in report.expected.items():
            if report.counts[name] != expected:
                where = next(str(subset.annotation) for subset in subsets if subset.name == name)
                note(Finding("count", where, name, f"{report.counts[name]:,} rows, meta.json says {expected:,}"))
        problems = {problem for subset in subsets for problem in subset.pictures.files.problems}
        for problem in sorted(problems):
            note(Finding("file", data, "", problem))
    for finding in _copies(parts):
        note(finding)
    return report


# --- parts ------------------------------------------------------------------------------------------------------------


def _raw_tasks(subsets: Sequence[Subset]) -> Iterator[Task]:
    for number, subset in enumerate(subsets):
        if isinstance(subset.annotation, Member):
            yield Task(number, 0, None)
            continue
        size = subset.annotation.stat().st_size
        for cut in range(0, max(1, size), INDEX_BYTES):
            yield Task(number, cut, min(cut + INDEX_BYTES, size))


def _parquet_tasks(data: str, report: Report, note: Any) -> Iterator[Task]:
    import pyarrow.parquet as pq

    folder = Path(data)
    if not folder.exists():
        raise BadInputError(
            f"{data} is not on this machine; download it first (hf download OWNER/NAME --repo-type dataset)"
        )
    paths = (
        [folder] if folder.is_file() else sorted(folder.glob("data/*/*.parquet")) or sorted(folder.rglob("*.parquet"))
    )
    if (folder / MANIFEST).is_file():
        for shard in read_manifest(folder)["shards"]:
            path = folder / shard["path"]
            if not path.is_file():
                note(Finding("file", str(path), "", "is missing, the manifest lists it"))
            elif file_facts(path)["sha256"] != shard["sha256"]:
                note(Finding("file", str(path), "", "has another hash than the manifest says"))
    for path in paths:
        try:
            file = pq.ParquetFile(path)
        except (OSError, ValueError) as error:
            note(Finding("file", str(path), "", f"cannot be read ({error})"))
            continue
        missing = [name for name in FEATURES if name not in file.schema_arrow.names]
        if missing:
            raise BadInputError(f"{path} has no column '{missing[0]}', so it was not made by convert_mmpr.py")
        for group in range(file.num_row_groups):
            yield Task(0, group, None, str(path))


def _run(tasks: Sequence[Task], options: tuple, workers: int) -> Iterator[Part]:
    from tqdm import tqdm

    if workers <= 1 or len(tasks) <= 1:
        _start(*options)
        parts: Iterable[Part] = map(look, tasks)
        yield from tqdm(parts, total=len(tasks), desc="checking", unit="part")
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=_start, initargs=options) as pool:
        yield from tqdm(pool.map(look, tasks), total=len(tasks), desc="checking", unit="part")


_state: dict[str, Any] = {}


def _start(data: str, image_root: str | None, index: BenchmarkIndex | None, decode: bool) -> None:
    subsets = [] if is_parquet(data) else read_subsets(data, image_root)
    _state.update(subsets=subsets, index=index, decode=decode)


def look(task: Task) -> Part:
    """Look at one part."""
    looker = _Looker(_state["index"], _state["decode"])
    return looker.parquet(task) if task.path else looker.raw(_state["subsets"][task.subset], task)


class _Looker:
    """Collects what is found in one part."""

    def __init__(self, index: BenchmarkIndex | None, decode: bool):
        self.index, self.decode = index, decode
        self.pictures: dict[Any, str | set[int]] = {}  # what is known of a picture: its fault, or look-alikes

    def raw(self, subset: Subset, task: Task) -> Part:
        part = self.part = Part(str(subset.annotation))
        start = line_start(subset.annotation, task.start)
        for number, (_, _, line) in enumerate(read_lines(subset.annotation, start, task.stop), start=1):
            part.num_lines = number
            if line.isspace():
                continue
            where = f"{subset.annotation}:{number}"
            part.counts[subset.name] += 1
            try:
                pair = subset.pair(parse_line(line, where), where)
            except RowError as error:
                part.findings.append(Finding("unusable row", where, subset.name, error.reason))
                continue
            files = [(name, subset.pictures.read) for name in pair.images]
            self._pair(pair, subset.name, str(subset.entry.get("root", "")), where, number, files)
        return part

    def parquet(self, task: Task) -> Part:
        import pyarrow.parquet as pq

        part = self.part = Part(task.path)
        file = pq.ParquetFile(task.path)
        part.name = f"{task.path}#{task.start}"  # rows are numbered over the file already
        number = sum(file.metadata.row_group(group).num_rows for group in range(task.start))
        try:
            for batch in file.iter_batches(batch_size=64, row_groups=[task.start]):
                for columns in batch.to_pylist():
                    where = f"{task.path}:row {number}"
                    part.counts[columns["subset"]] += 1
                    try:
                        pair = to_pair(columns)
                    except (RowError, ValueError, LookupError, TypeError) as error:
                        reason = getattr(error, "reason", f"not a pair ({error})")
                        part.findings.append(Finding("unusable row", where, columns["subset"], reason))
                    else:
                        files = [
                            (picture["path"], lambda _, picture=picture: picture["bytes"])
                            for picture in columns["images"]
                        ]
                        if [name for name, _ in files] != list(pair.images):
                            part.findings.append(
                                Finding("picture", where, columns["subset"], "images and image_paths differ")
                            )
                        self._pair(pair, columns["subset"], columns["image_root"], where, number, files)
                    number += 1
        except (OSError, ValueError) as error:
            part.findings.append(Finding("file", task.path, "", f"row group {task.start} cannot be read ({error})"))
        return part

    def _pair(self, pair: PreferencePair, subset: str, root: str, where: str, number: int, files: list) -> None:
        part = self.part
        part.statistics.add(pair, subset)
        if subset not in part.subsets:
            part.subsets.append(subset)
        part.members.append(part.subsets.index(subset))
        part.numbers.append(number)
        prompt = (PurePosixPath(root).name if pair.images else "", *pair.images, pair.question)
        part.rows["content"].append(_hash(*prompt, pair.chosen, pair.rejected))
        part.rows["id"].append(_hash(pair.id))
        part.rows["prompt"].append(_hash(*prompt))
        part.rows["near"].append(similarity_hash(pair.chosen, pair.rejected))

        def note(kind: str, detail: str) -> None:
            part.findings.append(Finding(kind, where, subset, detail))

        if _NOT_WORD.sub("", pair.chosen.lower()) == _NOT_WORD.sub("", pair.rejected.lower()):
            note("near equal", f"both say {pair.chosen[:60]!r}")
        if is_repetitive(pair.chosen):
            note("repeats itself", f"chosen ends in {pair.chosen[-60:]!r}")
        if language_of(pair.chosen) != language_of(pair.question):
            note("language", f"chosen begins with {pair.chosen[:40]!r}")
        lookalikes: set[int] = set()
        for name, read in files:
            found = self._picture(name, read, where)
            if isinstance(found, str):
                note("picture", found)
            else:
                lookalikes |= found
        if self.index is not None:
            self._contamination(pair, subset, where, lookalikes, note)

    def _picture(self, name: str, read: Any, where: str) -> str | set[int]:
        """Return what is wrong with a picture, or the benchmark examples it looks like."""
        try:
            content = read(name)
            if not content:
                return f"image '{name}' is empty"
            key = blake2b(content, digest_size=16).digest()
            if key not in self.pictures:
                self.pictures[key] = set()
                width, height, kind = check_picture(content, name, decode=self.decode)
                self.part.statistics.add_image(width, height, kind, len(content))
                if self.index is not None and self.decode:
                    self.pictures[key] = self._lookalikes(content, where)
        except RowError as error:
            if "key" in locals():
                self.pictures[key] = error.reason
            return error.reason
        return self.pictures[key]

    def _lookalikes(self, content: bytes, where: str) -> set[int]:
        from PIL import Image

        with Image.open(io.BytesIO(content)) as image:
            found = self.index.of_picture(image)
            if found and len(self.part.shown) < MAX_SHOWN:
                small = image.convert("RGB")
                small.thumbnail((240, 240))
                out = io.BytesIO()
                small.save(out, "JPEG", quality=80)
                self.part.shown.append((min(found), where, out.getvalue()))
        return found

    def _contamination(self, pair: PreferencePair, subset: str, where: str, pictures: set[int], note: Any) -> None:
        questions = self.index.of_text(without_images(pair.question))
        both = pictures & questions
        for kind, examples in (("both", both), ("picture", pictures), ("question", questions)):
            self.part.matched[kind] |= examples
        if both:
            name, example = self.index.examples[min(both)]
            note("in a benchmark", f"{name} {example}: picture and question")
        elif pictures:
            name, example = self.index.examples[min(pictures)]
            note("benchmark picture", f"looks like that of {name} {example}")
        elif questions:
            name, example = self.index.examples[min(questions)]
            note("benchmark question", f"{name} {example}: {self.index.questions[min(questions)][:80]!r}")


# --- copies -----------------------------------------------------------------------------------------------------------


def similarity_hash(chosen: str, rejected: str) -> int:
    """Return 64 bits of which few change when few words of the two responses change; 0 for short ones.

    The sign of the sum, over all runs of three words, of the bits of their hashes (Charikar 2002).
    """
    words = [*chosen.lower().split(), "|", *rejected.lower().split()]
    if len(words) < MIN_NEAR_WORDS:
        return 0
    codes = np.array([zlib.crc32(word.encode("utf-8", "replace")) for word in words], dtype=np.uint64)
    runs = codes[:-2] * np.uint64(0x9E3779B97F4A7C15) ^ codes[1:-1] * np.uint64(0xC2B2AE3D27D4EB4F) ^ codes[2:]
    runs = (runs ^ runs >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    runs = (runs ^ runs >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    bits = np.unpackbits((runs ^ runs >> np.uint64(31)).view(np.uint8).reshape(-1, 8), axis=1)
    return int(np.packbits(2 * bits.sum(axis=0, dtype=np.int64) > len(bits)).view(np.uint64)[0])


def _copies(parts: Sequence[Part]) -> Iterator[Finding]:
    """Yield rows that say what an earlier one said, over all parts."""
    columns = {
        key: np.concatenate([np.frombuffer(part.rows[key], np.uint64) for part in parts] or [np.zeros(0, np.uint64)])
        for key in ("content", "id", "prompt", "near")
    }
    starts = np.cumsum([0, *(len(part.numbers) for part in parts)])

    def place(row: int) -> tuple[str, str]:
        part = parts[int(np.searchsorted(starts, row, side="right")) - 1]
        inner = row - int(starts[int(np.searchsorted(starts, row, side="right")) - 1])
        name, _, group = part.name.partition("#")
        number = part.numbers[inner]
        return (f"{name}:row {number}" if group else f"{name}:{number}"), part.subsets[part.members[inner]]

    copies = set()
    for first, row in _repeats(columns["content"]):
        copies.add(row)
        where, subset = place(row)
        yield Finding("same row", where, subset, f"equals {place(first)[0]}")
    for first, row in _repeats(columns["id"]):
        if columns["content"][first] != columns["content"][row]:
            where, subset = place(row)
            yield Finding("same id", where, subset, f"its id is also that of {place(first)[0]}")
    for group in _groups(columns["prompt"]):
        members = [row for row in group.tolist() if row not in copies and columns["near"][row]]
        hashes = columns["near"][members]
        for position in range(1, len(members)):
            near = np.flatnonzero(np.bitwise_count(hashes[:position] ^ hashes[position]) <= NEAR_BITS)
            if len(near):
                where, subset = place(members[position])
                yield Finding("near copy", where, subset, f"nearly {place(members[int(near[0])])[0]}")


def _groups(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the positions of every value that occurs more than once, in order."""
    order = np.argsort(values, kind="stable")
    edges = np.flatnonzero(np.diff(values[order], prepend=values[order][:1] + np.uint64(1))) if len(values) else []
    for start, stop in zip(edges, [*edges[1:], len(values)], strict=True):
        if stop - start > 1:
            yield order[start:stop]


def _repeats(values: np.ndarray) -> Iterator[tuple[int, int]]:
    for group in _groups(values):
        for row in group[1:].tolist():
            yield int(group[0]), row


def _hash(*parts: str) -> int:
    return int.from_bytes(blake2b("\x1f".join(parts).encode("utf-8", "replace"), digest_size=8).digest(), "little")


def _shift(where: str, lines: int) -> str:
    """Add the lines of earlier parts of a file to `file:line`."""
    if not lines:
        return where
    name, _, number = where.rpartition(":")
    return f"{name}:{int(number) + lines}"
