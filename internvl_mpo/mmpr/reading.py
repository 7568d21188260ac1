"""Pairs out of any source: a raw release, JSONL, Parquet, the Hub."""

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from internvl_mpo.errors import RowError
from internvl_mpo.formats import to_own_form
from internvl_mpo.mmpr.files import PictureFolder
from internvl_mpo.mmpr.lines import read_lines
from internvl_mpo.mmpr.manifest import MANIFEST
from internvl_mpo.mmpr.pairs import PairRow
from internvl_mpo.mmpr.parquet import REQUIRED, iter_rows
from internvl_mpo.mmpr.release import parse_line, read_subsets
from internvl_mpo.mmpr.tables import columns_of, is_table
from internvl_mpo.records import Question

FIRST_ROWS = 100  # of each file, looked at for its form


def iter_pairs(data: str | Path, image_root: str | Path | None = None) -> Iterator[PairRow | RowError]:
    """Yield the rows of training data; an unusable row is yielded as its error.

    Args:
        data: a release (its meta.json or folder), one JSONL file, or MMPR as Parquet (a folder, a file, or a data set
            on the Hub as `hub:OWNER/NAME[@REVISION][:CONFIG]`, see `parquet`). Rows may be in any form of `formats`, a
            file of them may be a JSON array or a table of another project.
        image_root: folder of the images of a JSONL file; None means the folder the file is in.

    Raises:
        BadInputError: a file is missing or unreadable.
    """
    if is_parquet(data):
        yield from iter_rows(data)
        return
    for subset in read_subsets(data, image_root):
        for number, (_, _, line) in enumerate(read_lines(subset.annotation), start=1):
            if line.isspace():
                continue
            where = f"{subset.annotation}:{number}"
            try:
                pair = subset.pair(parse_line(line, where), where)
            except RowError as error:
                yield error
                continue
            images = tuple(map(subset.pictures.below, pair.images))
            if images != pair.images:
                pair = replace(pair, images=images)
            yield PairRow(pair, subset.root, subset.max_tiles, where, subset.name, subset.repeat_time)


def iter_questions(data: str | Path, image_root: str | Path | None = None) -> Iterator[tuple[Question, PictureFolder]]:
    """Yield the questions of some data, and where their pictures lie.

    Args:
        data: JSONL, a JSON array or a table, its rows in any form of `formats`; a row without a source gets its name.
        image_root: as in `iter_pairs`.

    Raises:
        BadInputError: a file is missing or unreadable.
        RowError: a row holds no question, or what cannot be read.
    """
    for subset in read_subsets(data, image_root):
        for number, (_, _, line) in enumerate(read_lines(subset.annotation), start=1):
            if line.isspace():
                continue
            where = f"{subset.annotation}:{number}"
            try:
                row = to_own_form(parse_line(line, where), is_pair=False)[1]
            except RowError as error:
                raise RowError(error.reason, where) from error
            yield Question.from_json(row, source=subset.name, where=where), subset.pictures


# --- data sets --------------------------------------------------------------------------------------------------------


def is_parquet(data: str | Path) -> bool:
    """Return whether `data` names MMPR as Parquet, as convert_mmpr.py makes it: a folder or file of it, or `hub:..`."""
    if not is_table(data):
        return False
    columns = columns_of(data)
    return columns is None or set(REQUIRED) <= set(columns) or (Path(data) / MANIFEST).is_file()


def forms_found(data: str | Path, image_root: str | Path | None = None, *, is_pair: bool = True) -> str:
    """Return a line that says in which forms the first rows of some data are written.

    Args:
        data: as in `iter_pairs`.
        image_root: as in `iter_pairs`.
        is_pair: whether rows hold pairs, or questions.

    Raises:
        BadInputError: see `iter_pairs`.
    """
    if is_parquet(data):
        return f"{data}: MMPR as Parquet"
    counts: Counter[str] = Counter()
    for subset in read_subsets(data, image_root):
        for _, _, line in itertools.islice(read_lines(subset.annotation), FIRST_ROWS):
            with suppress(RowError):  # the reader names it
                if not line.isspace():
                    counts[to_own_form(parse_line(line, ""), is_pair=is_pair)[0]] += 1
    return f"{data}: {', '.join(counts) or 'no form that is read'}"
