"""Looks for what is wrong with MMPR, raw or as Parquet: see `KINDS` for the list.

Annotations are cut into parts that are looked at in parallel; of a row only a few hashes come back, by which copies are
found over the whole release. Memory does not grow with texts or pictures.
"""

import io
import multiprocessing
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from hashlib import blake2b
from pathlib import Path, PurePosixPath
from typing import IO, Any

from internvl_mpo.errors import BadInputError, RowError
from internvl_mpo.jsonl import json_line
from internvl_mpo.mmpr.contamination import BenchmarkIndex
from internvl_mpo.mmpr.copies import find_copies, similarity_hash
from internvl_mpo.mmpr.differences import compare
from internvl_mpo.mmpr.files import check_picture
from internvl_mpo.mmpr.findings import MAX_EXAMPLES, MAX_SHOWN, CheckTask, Finding, Part, Report
from internvl_mpo.mmpr.lines import cuts, read_lines
from internvl_mpo.mmpr.manifest import MANIFEST, file_facts, read_manifest
from internvl_mpo.mmpr.parquet import REQUIRED, to_pair
from internvl_mpo.mmpr.release import Subset, parse_line, read_subsets
from internvl_mpo.mmpr.shard_plan import INDEX_BYTES, line_start
from internvl_mpo.mmpr.sources import is_parquet
from internvl_mpo.prompts import language_of
from internvl_mpo.records import PreferencePair
from internvl_mpo.text_checks import is_repetitive, without_images

_NOT_WORD = re.compile(r"[\W_]+")


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
            rejects.write(json_line(row))

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
        report.differences.merge(part.differences)
        report.counts.update(part.counts)
        for kind, examples in part.matched.items():
            report.matched[kind] |= examples
        report.shown += [(one, _shift(where, first), picture) for one, where, picture in part.shown]
        del report.shown[MAX_SHOWN:]
        parts.append(part)
    for name, expected in report.expected.items():
        if report.counts[name] != expected:
            where = next(str(subset.annotation) for subset in subsets if subset.name == name)
            note(Finding("count", where, name, f"{report.counts[name]:,} rows, meta.json says {expected:,}"))
    problems = {problem for subset in subsets for problem in subset.pictures.files.problems}
    for problem in sorted(problems):
        note(Finding("file", data, "", problem))
    for finding in find_copies(parts):
        note(finding)
    return report


# --- parts ------------------------------------------------------------------------------------------------------------


def _raw_tasks(subsets: Sequence[Subset]) -> Iterator[CheckTask]:
    for number, subset in enumerate(subsets):
        for start, stop in cuts(subset.annotation, INDEX_BYTES):
            yield CheckTask(number, start, stop)


def _parquet_tasks(data: str, report: Report, note: Any) -> Iterator[CheckTask]:
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
        missing = [name for name in REQUIRED if name not in file.schema_arrow.names]
        if missing:
            raise BadInputError(f"{path} has no column '{missing[0]}', so it was not made by convert_mmpr.py")
        for group in range(file.num_row_groups):
            yield CheckTask(0, group, None, str(path))


def _run(tasks: Sequence[CheckTask], options: tuple, workers: int) -> Iterator[Part]:
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


def look(task: CheckTask) -> Part:
    """Look at one part."""
    looker = _Looker(_state["index"], _state["decode"])
    return looker.parquet(task) if task.path else looker.raw(_state["subsets"][task.subset], task)


class _Looker:
    """Collects what is found in one part."""

    def __init__(self, index: BenchmarkIndex | None, decode: bool):
        self.index, self.decode = index, decode
        self.pictures: dict[Any, str | set[int]] = {}  # what is known of a picture: its fault, or look-alikes

    def raw(self, subset: Subset, task: CheckTask) -> Part:
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

    def parquet(self, task: CheckTask) -> Part:
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
        part.differences.add((pair.source, pair.rule), compare(pair.chosen, pair.rejected))
        if subset not in part.subsets:
            part.subsets.append(subset)
        part.members.append(part.subsets.index(subset))
        part.numbers.append(number)
        shown = (PurePosixPath(root).name if pair.images else "", *pair.images)
        prompt = (*shown, pair.question, *map(str, pair.context))
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


def _hash(*parts: str) -> int:
    return int.from_bytes(blake2b("\x1f".join(parts).encode("utf-8", "replace"), digest_size=8).digest(), "little")


def _shift(where: str, lines: int) -> str:
    """Add the lines of earlier parts of a file to `file:line`."""
    if not lines:
        return where
    name, _, number = where.rpartition(":")
    return f"{name}:{int(number) + lines}"
