r"""A share of pairs that were there before: MMPR against forgetting, votes of the demo.

    python -m internvl_mpo.rounds mix --pairs pairs_correctness.jsonl,pairs_dropout_ntp.jsonl \
        --fixed MMPR-v1.2,votes.jsonl --share 0.2 --output fixed

Writes a folder in MMPR's layout with copies of its pictures, which `train_mpo.py` reads beside the others.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from internvl_mpo.errors import BadInputError, RowError
from internvl_mpo.files import replaced_folder
from internvl_mpo.jsonl import iter_jsonl
from internvl_mpo.mmpr.pairs import PairRow
from internvl_mpo.mmpr.reading import iter_pairs
from internvl_mpo.mmpr.release import write_meta
from internvl_mpo.records import write_rows
from internvl_mpo.settings import setting

PICTURES = "pictures_of_fixed_pairs"  # a name that no image root has: roots are looked for there first


@dataclass(kw_only=True)
class MixSettings:
    """Settings of `python -m internvl_mpo.rounds mix`."""

    pairs: list[str] = setting(help="JSONL files with the pairs of the round")
    fixed: list[str] = setting(help="pairs to draw from: MMPR releases, JSONL, Parquet, hub:..; see train_mpo.py")
    image_root: str = setting("", help="folder of pictures that do not lie beside their JSONL file")
    share: float = setting(0.2, help="share of drawn pairs among all")
    output: str = setting(help="folder to write")
    drawn: list[str] = setting([], help="folders of earlier rounds; their pairs are drawn again when no other is left")
    seed: int = setting(0, help="of the draw")


def mix(settings: MixSettings) -> None:
    """Draw pairs and write them with their pictures.

    Raises:
        BadInputError: there is no pair to draw from, or a drawn one cannot be read.
    """
    num_own = sum(1 for path in settings.pairs for _ in iter_jsonl(path))
    wanted = max(1, round(settings.share / (1 - settings.share) * num_own))
    rows: dict[str, PairRow] = {}
    for path in settings.fixed:
        for row in iter_pairs(path):
            if isinstance(row, RowError):
                raise row
            rows.setdefault(row.pair.id, row)
    if not rows:
        raise BadInputError(f"{', '.join(settings.fixed)} holds no preference pair to draw from")
    files = [path for folder in settings.drawn for path in Path(folder).glob("*.jsonl")]
    chosen = draw(list(rows), {row["id"] for path in files for _, row in iter_jsonl(path)}, wanted, settings.seed)
    with replaced_folder(settings.output) as folder:
        _write([rows[id] for id in chosen], folder, Path(settings.image_root))
    print(f"{len(chosen)} of {len(rows)} fixed pairs beside {num_own} of the round -> {settings.output}")


def draw(ids: Sequence[str], drawn: set[str], count: int, seed: int) -> list[str]:
    """Return up to `count` ids in an order drawn from the seed; those drawn before come last."""
    order = sorted(ids, key=lambda id: (id in drawn, hashlib.sha256(f"{seed}/{id}".encode()).digest()))
    return order[:count]


def _write(rows: Iterable[PairRow], folder: Path, other_root: Path) -> None:
    """Write a subset for each cap on the tiles."""
    subsets: dict[str, list[PairRow]] = {}
    for row in rows:
        subsets.setdefault(f"fixed_{row.max_tiles}_tiles" if row.max_tiles else "fixed", []).append(row)
    pictures = folder / PICTURES
    pictures.mkdir()
    meta = {}
    for name, members in subsets.items():
        pairs = (replace(row.pair, images=tuple(_copy(row, image, pictures, other_root) for image in row.pair.images))
                 for row in members)  # fmt: skip
        write_rows(pairs, folder / f"{name}.jsonl")
        caps = {"max_dynamic_patch": members[0].max_tiles} if members[0].max_tiles else {}
        meta[name] = {"root": pictures, "annotation": folder / f"{name}.jsonl", **caps}
    write_meta(folder / "meta.json", meta)


def _copy(row: PairRow, image: str, folder: Path, other_root: Path) -> str:
    """Copy a picture, on disk or in an archive, under a name made of its content; return the name."""
    try:
        if isinstance(row.image_root, (str, Path)):
            own, other = Path(row.image_root, image), other_root / image
            content = (other if other.is_file() and not own.is_file() else own).read_bytes()
        else:
            content = row.image_root.read(image)
    except OSError as error:
        raise BadInputError(f"{row.where}: cannot read image '{image}': {error.strerror}") from error
    name = hashlib.sha256(content).hexdigest()[:20] + PurePosixPath(image).suffix
    if not (folder / name).exists():
        (folder / name).write_bytes(content)
    return name
