"""What a check can find, and the report it adds up to."""

from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

from internvl_mpo.mmpr.contamination import BenchmarkIndex
from internvl_mpo.mmpr.differences import Differences, LikelihoodGap
from internvl_mpo.mmpr.statistics import ReleaseStatistics

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


MAX_EXAMPLES = 5  # findings of one kind that the report shows


MAX_SHOWN = 24  # pictures that it shows beside a benchmark's question


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


class CheckTask(NamedTuple):
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
        differences: between their responses.
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
    statistics: ReleaseStatistics = field(default_factory=ReleaseStatistics)
    differences: Differences = field(default_factory=Differences)
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
        differences: between their responses.
        counts: subset -> rows.
        expected: subset -> rows that meta.json promises; absent where it says nothing.
        kinds: (kind, subset) -> number of findings.
        examples: kind -> the first of them.
        index: the benchmarks, or None.
        matched: "picture", "question", "both" -> examples of the benchmarks that were found.
        shown: (example, where, picture) to be looked at.
        model: the model that was asked how likely it finds the responses; empty where none was.
        gaps: (source, rule) -> what it said.
    """

    data: str
    statistics: ReleaseStatistics = field(default_factory=ReleaseStatistics)
    differences: Differences = field(default_factory=Differences)
    counts: Counter = field(default_factory=Counter)
    expected: dict[str, int] = field(default_factory=dict)
    kinds: Counter = field(default_factory=Counter)
    examples: dict[str, list[Finding]] = field(default_factory=lambda: defaultdict(list))
    index: BenchmarkIndex | None = None
    matched: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    shown: list[tuple[int, str, bytes]] = field(default_factory=list)
    model: str = ""
    gaps: dict[tuple[str, str], LikelihoodGap] = field(default_factory=dict)

    def num(self, severity: str) -> int:
        """Return the number of findings of a severity."""
        return sum(number for (kind, _), number in self.kinds.items() if KINDS[kind][0] == severity)
