"""A `datasets` builder over MMPR as it was published: no conversion, no unpacking, no copy of the images.

    from dataset_scripts.mmpr import MMPR

    builder = MMPR(raw="MMPR-v1.2")  # meta.json, annotations.zip, images.zip_aa .. images.zip_ac
    for row in builder.as_streaming_dataset(split="train"):
        print(row["question"], row["images"][0].size)

    builder.download_and_prepare()  # the same rows as a memory-mapped data set
    pairs = builder.as_dataset(split="train")

Columns are those of the Parquet form (`internvl_mpo/mmpr/parquet.py`). Every subset of meta.json is a shard, so that a
stream can be shuffled, split over workers and resumed. To publish, use convert_mmpr.py: `datasets` runs no code from
the Hub any more, a data set there is Parquet.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without installation

from internvl_mpo.errors import BadInputError, RowError
from internvl_mpo.mmpr.files import check_picture
from internvl_mpo.mmpr.lines import Member, read_lines
from internvl_mpo.mmpr.parquet import FEATURES, to_columns
from internvl_mpo.mmpr.release import Subset, parse_line, read_subsets
from internvl_mpo.mmpr.tables import TableRows

log = logging.getLogger(__name__)


@dataclass
class MMPRConfig(datasets.BuilderConfig):
    """What to read.

    Attributes:
        raw: folder of the release, its meta.json, or a JSONL file.
        image_root: another folder to look for images and archives in.
        subsets: names in meta.json; None takes all.
        on_bad_row: "stop" raises the first one's error with file and line, "skip" logs it and goes on.
        stamp: set by the builder, so that a changed release is not answered from the cache.
    """

    raw: str = ""
    image_root: str | None = None
    subsets: Sequence[str] | None = None
    on_bad_row: Literal["stop", "skip"] = "stop"
    stamp: str = ""


class MMPR(datasets.GeneratorBasedBuilder):
    """Preference pairs of one MMPR release, in the order of its meta.json."""

    BUILDER_CONFIG_CLASS = MMPRConfig

    def __init__(self, *args: Any, raw: str | Path, **kwargs: Any):
        """Read meta.json.

        Args:
            *args: see `datasets.DatasetBuilder`.
            raw: folder of the release, its meta.json, or a JSONL file.
            **kwargs: fields of `MMPRConfig`, and those of `datasets.DatasetBuilder`.

        Raises:
            BadInputError: no release there, or no subset of a given name.
        """
        subsets = read_subsets(raw, kwargs.get("image_root"))
        facts = [[subset.name, dict(subset.entry), _facts(subset)] for subset in subsets]
        stamp = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        unknown = set(kwargs.get("subsets") or ()) - {subset.name for subset in subsets}
        if unknown:
            raise BadInputError(f"{raw} has no subset '{min(unknown)}'; there are {', '.join(s.name for s in subsets)}")
        super().__init__(*args, raw=str(Path(raw).resolve()), stamp=stamp, **kwargs)

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(
            description="Preference pairs for vision-language models (arXiv 2411.10442), as OpenGVLab published them.",
            features=datasets.Features.from_dict(FEATURES),
            license="mit",
        )

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        names = [subset.name for subset in read_subsets(self.config.raw, self.config.image_root)]
        wanted = [name for name in names if self.config.subsets is None or name in self.config.subsets]
        return [datasets.SplitGenerator(name=datasets.Split.TRAIN, gen_kwargs={"subsets": wanted})]

    def _generate_examples(self, subsets: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        for subset in read_subsets(self.config.raw, self.config.image_root):
            if subset.name in subsets:
                yield from self._rows(subset)

    def _rows(self, subset: Subset) -> Iterator[tuple[str, dict[str, Any]]]:
        for number, (_, _, line) in enumerate(read_lines(subset.annotation), start=1):
            if line.isspace():
                continue
            where = f"{subset.annotation}:{number}"
            try:
                row = parse_line(line, where)
                pair = subset.pair(row, where)
                files = [subset.pictures.read(name) for name in pair.images]
                for name, content in zip(pair.images, files, strict=True):
                    check_picture(content, name, decode=False)
                yield f"{subset.name}:{number}", to_columns(row, pair, subset, files)
            except RowError as error:
                if self.config.on_bad_row == "stop":
                    raise RowError(
                        f"{error.reason}; give on_bad_row='skip' to go on without such rows", where
                    ) from error
                log.warning("left out %s: %s", where, error.reason)


def _facts(subset: Subset) -> list[Any]:
    """Size and time of the annotations, or what tells a table from others."""
    if isinstance(subset.annotation, TableRows):
        return [subset.annotation.version]
    files = subset.annotation.archive.parts if isinstance(subset.annotation, Member) else [subset.annotation]
    return [number for path in files for number in (path.stat().st_size, path.stat().st_mtime_ns)]
