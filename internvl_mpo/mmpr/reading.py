"""Pairs out of any source: a raw release, JSONL, Parquet, the Hub."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from internvl_mpo.errors import RowError
from internvl_mpo.mmpr.files import read_lines
from internvl_mpo.mmpr.pairs import PairRow
from internvl_mpo.mmpr.parquet import HUB_PREFIX
from internvl_mpo.mmpr.release import parse_line, read_subsets


def iter_pairs(data: str | Path, image_root: str | Path | None = None) -> Iterator[PairRow | RowError]:
    """Yield the rows of training data; an unusable row is yielded as its error.

    Args:
        data: a release (its meta.json or folder), one JSONL file, or MMPR as Parquet (a folder, a file, or a data set
            on the Hub as `hub:OWNER/NAME[@REVISION][:CONFIG]`, see `parquet`).
        image_root: folder of the images of a JSONL file; None means the folder the file is in.

    Raises:
        BadInputError: a file is missing or unreadable.
    """
    from internvl_mpo.mmpr.parquet import iter_rows

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


# --- data sets --------------------------------------------------------------------------------------------------------


def is_parquet(data: str | Path) -> bool:
    """Return whether `data` names MMPR as Parquet: a folder or file of it, or `hub:..`."""
    if str(data).startswith(HUB_PREFIX):
        return True
    path = Path(data)
    if path.suffix == ".parquet":
        return True
    return path.is_dir() and not (path / "meta.json").is_file() and next(path.rglob("*.parquet"), None) is not None
