"""What is refused or named before transformers is imported, which takes seconds: keys, paths, the first bad row."""

import ast
import importlib.util
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from internvl_mpo.errors import BadInputError, RowError
from internvl_mpo.mmpr.reading import iter_pairs
from internvl_mpo.mmpr.tables import is_table
from internvl_mpo.programs import run_file
from internvl_mpo.settings import check_keys, coerce, given_values
from internvl_mpo.training.pairs import stop_on_rejects

SECONDS = 2.0  # for the first rows; the whole data is looked at later


def look_at_arguments(argv: Sequence[str]) -> None:
    """Refuse keys and files that are not there, and rows that cannot be read; print the first row without its picture.

    All is checked again, and all rows are, by what follows; this is for whoever waits at the terminal. Of data that
    takes longer to read the first unusable row is printed.

    Args:
        argv: command-line arguments, of which transformers' own may be some.

    Raises:
        BadInputError: naming the key, the file or the row.
    """
    values, where = given_values(argv)
    values = {name: value for name, value in values.items() if name != "local_rank"}  # of the `deepspeed` launcher
    keys = setting_keys()
    if keys:
        check_keys(values, keys, where)
    deepspeed = str(values.get("deepspeed") or "none")
    is_file_name = deepspeed.lower() not in ("none", "null") and not deepspeed.lstrip().startswith("{")
    if is_file_name and not isinstance(values["deepspeed"], dict) and not run_file(deepspeed).is_file():
        raise BadInputError(
            f"DeepSpeed file '{deepspeed}' does not exist; configs/deepspeed/ holds zero1, zero2, zero3 and offload"
        )
    if "data" in values and os.environ.get("RANK", "0") == "0" and values.get("on_bad_row") != "skip":
        image_root = coerce(values.get("image_root"), str | None, "image_root", where)
        look = look_at_rows(coerce(values["data"], list[str], "data", where), image_root)
        if look.is_whole and not look.missing and "output_dir" in values:  # the same reader will find the same rows
            settings = SimpleNamespace(output_dir=str(values["output_dir"]), on_bad_row="stop", process_index=0)
            stop_on_rejects(settings, look.unreadable, look.num_readable)
        bad = next(iter(look.unreadable), look.missing)
        if bad is not None:
            print(f"unusable: {bad} - all rows are looked at next, then the run stops", flush=True)


def setting_keys() -> dict[str, bool]:
    """Return the names of all settings of a training run and whether they must be given, without importing any.

    They are read from the source of the three classes; empty where transformers keeps its class in another way.
    """
    transformers = importlib.util.find_spec("transformers")
    if transformers is None or transformers.origin is None:
        return {}
    sources = {
        Path(transformers.origin).with_name("training_args.py"): "TrainingArguments",
        Path(__file__).with_name("arguments.py"): "MPOArguments",
        Path(__file__).with_name("settings.py"): "TrainSettings",
    }
    try:
        return {name: required for path, cls in sources.items() for name, required in _fields(path, cls)}
    except (OSError, StopIteration):
        return {}


def _fields(path: Path, name: str) -> Iterator[tuple[str, bool]]:
    """(name, whether it has no default) of the fields of a dataclass in a file; StopIteration if it is not there."""
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    cls = next(node for node in nodes if isinstance(node, ast.ClassDef) and node.name == name)
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            call = node.value
            options = {} if not isinstance(call, ast.Call) else {word.arg: word.value for word in call.keywords}
            if not (isinstance(options.get("init"), ast.Constant) and options["init"].value is False):
                is_setting = (
                    isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "setting"
                )
                yield node.target.id, is_setting and not call.args


@dataclass
class Look:
    """What a look at the first rows found.

    Attributes:
        unreadable: rows that no pair can be made of.
        num_readable: the others.
        missing: the first row whose picture is not there.
        is_whole: whether all rows were looked at.
    """

    unreadable: list[RowError] = field(default_factory=list)
    num_readable: int = 0
    missing: RowError | None = None
    is_whole: bool = True


def look_at_rows(data: Sequence[str], image_root: str | Path | None = None, seconds: float = SECONDS) -> Look:
    """Return what a look of `seconds` finds, one row at least; Parquet is passed over, it takes longer to open.

    Raises:
        BadInputError: a file of the data is missing.
    """
    until, look = time.monotonic() + seconds, Look()
    for path in data:
        if is_table(path):
            look.is_whole = False
            continue
        for row in iter_pairs(path, image_root):
            if isinstance(row, RowError):
                look.unreadable.append(row)
            else:
                look.num_readable += 1
                look.missing = look.missing or _missing_picture(row.image_root, row.pair.images, row.where)
            if time.monotonic() > until:
                look.is_whole = False
                return look
    return look


def _missing_picture(root: Any, names: Sequence[str], where: str) -> RowError | None:
    if not isinstance(root, (str, Path)):  # an archive
        return None
    missing = next((name for name in names if not Path(root, name).exists()), None)
    return None if missing is None else RowError(f"image '{Path(root, missing)}' does not exist", where)
