"""Checkpoints that are whole or passed over, and that say what they belong to.

    OUTPUT/checkpoint-200/   what transformers and DeepSpeed write
        mpo_state.json       reward shift, number of ranks, engine, fingerprint of the run; written last

A checkpoint without `mpo_state.json` was cut off by a kill. The fingerprint names everything the losses depend on.
"""

import contextlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from internvl_mpo.errors import BadInputError
from internvl_mpo.files import atomic_writer, remove_leftovers
from internvl_mpo.locks import held

STATE_FILE = "mpo_state.json"
SETTINGS_FILE = "settings.yaml"


def write_state(checkpoint: str | Path, state: Mapping[str, Any]) -> None:
    """Mark a checkpoint as whole; call it after everything else is on the disk."""
    with atomic_writer(Path(checkpoint) / STATE_FILE) as out:
        json.dump(state, out, indent=2)


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    """Return what `write_state` wrote.

    Raises:
        BadInputError: the folder is not a whole checkpoint.
    """
    path = Path(checkpoint) / STATE_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInputError(f"{checkpoint} is not a whole checkpoint: {path.name} is missing or damaged") from error


def is_whole(checkpoint: str | Path) -> bool:
    """Say whether a folder is a checkpoint with its last file."""
    return (Path(checkpoint) / STATE_FILE).is_file()


def whole_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the whole checkpoints of a run, oldest first."""
    return [folder for folder in _folders(output_dir) if is_whole(folder)]


def check_run_folder(output_dir: str | Path) -> None:
    """Refuse a folder with logs or checkpoints of another program, which would be taken for ours and deleted.

    A run of ours writes `SETTINGS_FILE` before anything else.

    Raises:
        BadInputError: naming what is there.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise BadInputError(f"output_dir {folder} is a file; give a folder")
    if (folder / SETTINGS_FILE).is_file():
        return
    names = [name for name in ("log.jsonl", "samples.jsonl") if (folder / name).exists()]
    names += [path.name for path in _folders(folder) if not is_whole(path)]
    if names:
        raise BadInputError(
            f"output_dir {folder} holds {names[0]}, but no {SETTINGS_FILE} of a run of this program; give another "
            "folder, or move that away"
        )


def remove_half_written(output_dir: str | Path) -> list[str]:
    """Delete checkpoints that a killed run left unfinished and return their names."""
    halves = [folder for folder in _folders(output_dir) if not is_whole(folder)]
    for folder in halves:
        shutil.rmtree(folder)
    return [folder.name for folder in halves]


@contextlib.contextmanager
def run_folder(output_dir: str | Path, results: Iterable[Path] = ()) -> Iterator[None]:
    """Hold a run's folder; what a killed run left half-written goes first, since it may be what fills the disk.

    Args:
        output_dir: folder of the run; it need not exist, and is not made.
        results: folders that are written at its end.

    Raises:
        BadInputError: another training is writing there.
    """
    folder = Path(output_dir)
    with held(folder.with_name(f".{folder.name}.lock"), f"another training is writing {folder}"):
        for name in remove_half_written(folder):
            print(f"{name} is half-written and was removed", flush=True)
        remove_leftovers(folder)
        for result in results:
            shutil.rmtree(result.with_name(f".{result.name}.part"), ignore_errors=True)
        yield


def make_way(checkpoint: str | Path) -> None:
    """Delete a checkpoint that is about to be written again, its mark first: a kill in between leaves a half one."""
    (Path(checkpoint) / STATE_FILE).unlink(missing_ok=True)
    shutil.rmtree(checkpoint, ignore_errors=True)


def rotate(output_dir: str | Path, limit: int | None, best: str | Path | None = None) -> None:
    """Delete all but `limit` checkpoints: the last, the best, and those written last; None keeps all.

    Args:
        output_dir: folder of the run.
        limit: checkpoints to keep; the last and the best are kept even if that is one more.
        best: the checkpoint to load at the end, if one is the best so far.
    """
    written = sorted(whole_checkpoints(output_dir), key=lambda folder: (folder / STATE_FILE).stat().st_mtime_ns)
    needed = {folder.name for folder in (*written[-1:], *([Path(best)] if best else []))}
    others = [folder for folder in written if folder.name not in needed]
    num_kept = len(others) if not limit else max(0, limit - (len(written) - len(others)))
    for folder in others[: max(0, len(others) - num_kept)]:
        make_way(folder)


def find_checkpoint(resume: str, output_dir: str | Path) -> Path | None:
    """Return the checkpoint to go on from, or None to start anew.

    Args:
        resume: "auto" takes the newest whole one of the run; "never" none; anything else is a checkpoint folder.
        output_dir: folder of the run.

    Raises:
        BadInputError: the folder is no whole checkpoint, or "never" would mix two runs in one folder.
    """
    whole = whole_checkpoints(output_dir)
    if resume == "auto":
        return whole[-1] if whole else None
    if resume == "never":
        if whole:
            raise BadInputError(
                f"resume is 'never', but {output_dir} holds {whole[-1].name} of an earlier run; "
                "delete its checkpoints, or give another output_dir"
            )
        return None
    if not Path(resume).is_dir():
        raise BadInputError(f"checkpoint '{resume}' does not exist; resume takes auto, never or a checkpoint folder")
    read_state(resume)
    return Path(resume)


def check_fingerprint(
    checkpoint: str | Path, fingerprint: Mapping[str, Any], assumed: Mapping[str, Any] | None = None
) -> list[str]:
    """Refuse a checkpoint that was made with other settings, data or weights.

    Args:
        checkpoint: a whole checkpoint.
        fingerprint: what this run depends on, or a part of it.
        assumed: what a checkpoint has where it does not say so.

    Returns:
        The names that the checkpoint does not hold, since an earlier version of the program wrote it.

    Raises:
        BadInputError: naming the first difference.
    """
    saved = {**(assumed or {}), **read_state(checkpoint)["fingerprint"]}
    for name, value in fingerprint.items():
        if name in saved and saved[name] != value:
            raise BadInputError(
                f"{checkpoint} was made with another {name} ({saved[name]}, now {value}); "
                "restore it, or start anew with another output_dir"
            )
    return [name for name in fingerprint if name not in saved]


def check_resumable(checkpoint: str | Path, state: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that a run cannot go on from exactly.

    Args:
        checkpoint: a whole checkpoint.
        state: what this run would write into one of its own.

    Raises:
        BadInputError: naming what differs.
    """
    check_fingerprint(checkpoint, state["fingerprint"])
    saved = read_state(checkpoint)
    way_out = f"go on as before, or start a new run from its weights with --model {checkpoint} and another output_dir"
    if (Path(checkpoint) / "adapter_config.json").is_file():
        way_out = (
            "go on as before (a new run cannot start from adapters alone; the merged model folder that this run "
            "writes at its end can be the --model of one)"
        )
    if saved["engine"] != state["engine"]:
        raise BadInputError(
            f"{checkpoint} was made with {saved['engine']}, now it is {state['engine']}, which cannot read its "
            f"optimizer; {way_out}"
        )
    if saved["steps_per_epoch"] != state["steps_per_epoch"]:
        raise BadInputError(
            f"{checkpoint} counts {saved['steps_per_epoch']} steps an epoch, {state['num_ranks']} ranks would make it "
            f"{state['steps_per_epoch']} (the last step has too few pairs for all packs); {way_out}"
        )


def _folders(output_dir: str | Path) -> list[Path]:
    folders = [folder for folder in Path(output_dir).glob("checkpoint-*") if folder.name[11:].isdigit()]
    return sorted(folders, key=lambda folder: int(folder.name[11:]))
