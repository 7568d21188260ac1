r"""Build preference pairs from sampled responses: right over wrong answers, and right over unparsable ones.

Reads Response rows (sample_responses.py) and writes PreferencePair rows, rule "correctness" or "format", with a table
of what was found. Questions without a single right answer go to a file of their own, to be asked of a stronger model.

    python dataset_scripts/build_correctness_pairs.py --responses responses.jsonl --output pairs_correctness.jsonl \
        --pairs_per_question 4 --seed 0

The same responses and seed give the same bytes whatever the order of the rows, the memory limit or the workers.
"""

import gc
import marshal
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import BinaryIO, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without installation

from tqdm import tqdm

from internvl_mpo.answers.comparing import accepted_answers
from internvl_mpo.answers.finding import FORMATS
from internvl_mpo.errors import BadInputError, RowError, run_program
from internvl_mpo.files import atomic_writer, work_folder
from internvl_mpo.jsonl import iter_json_lines
from internvl_mpo.mmpr.release import subset_name, write_meta
from internvl_mpo.pairing import PairingStatistics, PairRules, group_key, match_responses, pair_lines
from internvl_mpo.records import Response
from internvl_mpo.row_keys import holds
from internvl_mpo.settings import parse_settings, setting, show_settings, write_settings

MEGABYTE = 1 << 20
ROWS_AT_ONCE = 32  # written to a part together
FIELDS = tuple(field.name for field in fields(Response))
_values = attrgetter(*FIELDS)


@dataclass
class Settings:
    """Settings of the program; `--help` prints them."""

    responses: list[str] = setting(help="JSONL files of Response rows, separated by commas")
    output: str = setting(help="JSONL file of PreferencePair rows to write; a folder gets MMPR's layout and meta.json")
    image_root: str = setting("", help="folder the image paths are relative to, for meta.json")
    all_wrong: str | None = setting(None, help="JSONL file of the questions without a right answer; empty is beside it")
    pairs_per_question: int = setting(15, help="most right-wrong pairs of one question")
    format_pairs_per_question: int | None = setting(None, help="most right-unparsable pairs; empty is the same number")
    seed: int = setting(0, help="of the choice among possible pairs")
    min_pass_rate: float = setting(0.0, help="leave out questions with a smaller share of right answers")
    max_pass_rate: float = setting(1.0, help="leave out questions with a larger share of right answers")
    max_length_ratio: float = setting(0.0, help="longest over shortest text of a pair, at most; 0 is off")
    max_similarity: float = setting(0.9, help="responses that share this much of their word triples count as one")
    answer_format: str = setting("", help=f"where answers stand ({', '.join(FORMATS)}); empty is by prompt style")
    keep_truncated: bool = setting(False, help="let responses cut at the token limit be chosen")
    workers: int = setting(1, help="processes")
    bucket_mb: int = setting(2, help="rows held in memory at a time per process, in MB of JSON")

    def __post_init__(self) -> None:
        if self.answer_format and self.answer_format not in FORMATS:
            raise BadInputError(f"answer_format is '{self.answer_format}'; expected one of {', '.join(FORMATS)}")
        if not 0 <= self.min_pass_rate <= self.max_pass_rate <= 1:
            raise BadInputError(
                f"pass rates {self.min_pass_rate} to {self.max_pass_rate} are no band; give 0 <= min <= max <= 1"
            )
        if self.pairs_per_question < 0 or self.workers < 1 or self.bucket_mb < 1:
            raise BadInputError("pairs_per_question must be at least 0, workers and bucket_mb at least 1")


def main(argv: list[str]) -> int:
    """Run the program; see the module's text."""
    settings = parse_settings(Settings, argv, program="dataset_scripts/build_correctness_pairs.py", about=__doc__)
    print(show_settings(settings, "Building correctness pairs"))
    rules = PairRules(
        pairs_per_question=settings.pairs_per_question,
        format_pairs_per_question=settings.pairs_per_question
        if settings.format_pairs_per_question is None
        else settings.format_pairs_per_question,
        seed=settings.seed,
        min_pass_rate=settings.min_pass_rate,
        max_pass_rate=settings.max_pass_rate,
        max_length_ratio=settings.max_length_ratio,
        max_similarity=settings.max_similarity,
        answer_format=settings.answer_format,
        keep_truncated=settings.keep_truncated,
    )
    output = Path(settings.output)
    as_folder = output.suffix != ".jsonl"
    all_wrong = Path(
        settings.all_wrong or (output / "all_wrong.jsonl" if as_folder else output.with_suffix(".all_wrong.jsonl"))
    )
    stats = PairingStatistics()
    with work_folder(output) as folder:
        buckets = partition(settings.responses, folder, settings.bucket_mb * MEGABYTE, stats)
        built = _map(partial(build_bucket, rules=rules), buckets, settings.workers)
        with ExitStack() as files:
            wrong_out = files.enter_context(atomic_writer(all_wrong))
            outputs: dict[str, TextIO] = {}
            for pairs, wrong, counted in tqdm(built, total=len(buckets), desc="pairing", unit="part"):
                for source, rule, lines in pairs:
                    name = f"annotations/{subset_name(source, rule)}.jsonl" if as_folder else ""
                    if name not in outputs:
                        outputs[name] = files.enter_context(atomic_writer(output / name))
                    outputs[name].write(lines)
                wrong_out.write(wrong)
                stats.merge(counted)
            if not as_folder and not outputs:
                files.enter_context(atomic_writer(output))
            # late, since those of a refused run would belie an older output
            write_settings(settings, f"{settings.output}.settings.yaml")
    if as_folder:
        root = settings.image_root or output
        names = {Path(name).stem: output / name for name in sorted(outputs)}
        write_meta(output / "meta.json", {name: {"root": root, "annotation": path} for name, path in names.items()})
    print(stats.table())
    print(f"pairs -> {output}\nquestions without a right answer -> {all_wrong}")
    return 0


@contextmanager
def _without_collector() -> Iterator[None]:
    """Rows hold no cycles; walking through all of them again and again costs time and frees nothing."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_without_collector()
def partition(paths: list[str], folder: Path, bucket_bytes: int, stats: PairingStatistics) -> list[Path]:
    """Spread responses over files by the hash of their question, so that each fits in memory and holds whole questions.

    Such a file holds lists of (key of the question, values of the response's fields), each after its length, in the
    interpreter's own format, which is read faster than JSON. The files live as long as the program and are its own.

    Args:
        paths: files of Response rows.
        folder: where the files go.
        bucket_bytes: of JSON in a file, about.
        stats: counts the responses left out because nothing says what is right.

    Returns:
        The files in hash order; concatenating what is built from them, each sorted, is sorted.

    Raises:
        BadInputError: a file or a row is unusable; nothing has been built yet.
    """
    size = 0
    for path in paths:
        if not Path(path).is_file():
            raise BadInputError(f"cannot read {path}: no such file")
        size += Path(path).stat().st_size
    count = max(1, min(512, -(-size // bucket_bytes)))
    buckets = [folder / f"{number:03d}" for number in range(count)]
    with ExitStack() as stack:
        files = [stack.enter_context(open(bucket, "wb")) for bucket in buckets]
        bar = stack.enter_context(tqdm(total=size, desc="sorting", unit="B", unit_scale=True))
        waiting: list[list[tuple[str, bytes]]] = [[] for _ in buckets]
        done = 0  # since the bar moved
        for path in paths:
            for where, line, row in iter_json_lines(path):
                response = Response.from_json(row, where=where)
                done += len(line)
                if done >= MEGABYTE:
                    bar.update(done)
                    done = 0
                if not holds(response.answer):
                    stats.add(response.source, "drop responses without ground truth")
                    continue
                if response.answer[0] in "[{":
                    _check_truth(response.answer, where)
                key = group_key(response)
                number = int(key[:8], 16) * count >> 32
                rows = waiting[number]
                rows.append((key, marshal.dumps(_values(response))))
                if len(rows) == ROWS_AT_ONCE:
                    _write_rows(rows, files[number])
                    rows.clear()
        bar.update(done)
        for rows, file in zip(waiting, files, strict=True):
            _write_rows(rows, file)
    return buckets


def _check_truth(truth: str, where: str) -> None:
    try:
        accepted_answers(truth)
    except BadInputError as error:
        raise RowError(str(error), where) from error


def _write_rows(rows: list[tuple[str, bytes]], file: BinaryIO) -> None:
    entry = marshal.dumps(rows)
    file.write(len(entry).to_bytes(4, "little") + entry)


def _read_rows(path: Path) -> Iterator[tuple[str, bytes]]:
    with open(path, "rb") as file:
        while size := file.read(4):
            yield from marshal.loads(file.read(int.from_bytes(size, "little")))


@_without_collector()
def build_bucket(path: Path, rules: PairRules) -> tuple[list[tuple[str, str, str]], str, PairingStatistics]:
    """Build the pairs of one file of `partition`.

    Returns:
        (source, rule, pairs as JSONL text) in order, the unanswered questions as JSONL text, and the counts.
    """
    groups: dict[str, list[bytes]] = {}
    for key, values in _read_rows(path):
        groups.setdefault(key, []).append(values)
    stats = PairingStatistics()
    pairs: list[tuple[str, str, str]] = []
    wrong: list[str] = []
    for key in sorted(groups):
        # loaded one question at a time, which a processor's cache holds while it is worked on
        loaded = map(marshal.loads, groups.pop(key))
        responses = [Response.of_fields(dict(zip(FIELDS, values, strict=True))) for values in loaded]
        matches, question = match_responses(responses, rules, stats)
        pairs += pair_lines(matches)
        if question is not None:
            wrong.append(question.to_line())
    return pairs, "".join(wrong), stats


def _map(work: partial, buckets: list[Path], workers: int) -> Iterator[tuple]:
    if workers == 1 or len(buckets) == 1:
        yield from map(work, buckets)
        return
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(work, buckets)


if __name__ == "__main__":
    sys.exit(run_program(main))
