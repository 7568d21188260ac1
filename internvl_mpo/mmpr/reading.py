"""Pairs out of any source: a raw release, JSONL, Parquet, the Hub."""

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from internvl_mpo.errors import RowError
from internvl_mpo.formats import to_own_form
from internvl_mpo.mmpr.files import PictureFolder
from internvl_mpo.mmpr.lines import read_lines
from internvl_mpo.mmpr.pairs import PairRow
from internvl_mpo.mmpr.release import parse_line, read_subsets
from internvl_mpo.mmpr.sources import is_parquet, open_sources
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
    for source in open_sources(data, image_root):
        for block in source.blocks():
            for _, row in source.rows(block):
                yield row


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
            with suppress(RowError):  # a blank line, or one that the reader names
                counts[to_own_form(parse_line(line, ""), is_pair=is_pair)[0]] += 1
    return f"{data}: {', '.join(counts) or 'no form that is read'}"
