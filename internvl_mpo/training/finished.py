"""The results of a run: where they go, and what a run that is over left, so that started again it touches nothing.

OUTPUT/finished.json   steps, fingerprint of the run, files of its result folders; written last
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl_mpo.errors import BadInputError
from internvl_mpo.files import atomic_writer, check_replaceable, read_json
from internvl_mpo.settings import plain

if TYPE_CHECKING:
    from internvl_mpo.training.settings import TrainSettings

FINISHED_FILE = "finished.json"
RESULT_SETTINGS = "training_settings.yaml"  # in each result folder, written last
# What a result folder of version 0.2 holds, which did not mark it otherwise; its settings were written last.
RESULT_FILES = (RESULT_SETTINGS, "*.safetensors", "*.json", "*.py", "*.jinja", "*.model", "merges.txt", "README.md")


def result_folders(settings: "TrainSettings") -> dict[str, Path]:
    """Return where the adapter and the model of a run are written, as far as they are asked for."""
    folders = {}
    if settings.save_adapter:
        folders["adapter"] = Path(settings.output_dir) / "adapter"
    if settings.save_merged:
        folders["model"] = Path(settings.model_dir or Path(settings.output_dir) / "model")
    return folders


def check_result_folders(settings: "TrainSettings") -> None:
    """Refuse result folders that hold something else, or that would replace what the run needs.

    Raises:
        BadInputError: naming the folder.
    """
    folders = result_folders(settings)
    beside = settings.output_dir.rstrip("/")
    used = [settings.output_dir, settings.model, *settings.data, settings.image_root, settings.reference_cache]
    used += [settings.preflight_cache or f"{beside}.preflight", Path(settings.output_dir) / "reference"]
    used += [settings.reference_model]
    for kind, folder in folders.items():
        others = [other for other in folders.values() if other is not folder]
        name = "model_dir" if kind == "model" and settings.model_dir else f"the {kind} folder"
        check_replaceable(folder, sources=[*filter(None, used), *others], name=name, unmarked=RESULT_FILES)


def write_finished(
    output_dir: str | Path, *, step: int, fingerprint: Mapping[str, Any], folders: Mapping[str, Path]
) -> None:
    """Note that a run is over.

    Args:
        output_dir: folder of the run.
        step: steps that were done.
        fingerprint: what the run depends on.
        folders: where its results are, by kind.
    """
    results = {kind: _result(folder) for kind, folder in folders.items()}
    with atomic_writer(Path(output_dir) / FINISHED_FILE) as out:
        json.dump({"step": step, "fingerprint": plain(fingerprint), "results": results}, out, indent=1)


def finished_step(output_dir: str | Path, folders: Mapping[str, Path]) -> int:
    """Return how many steps a run has done whose results are still where it put them; 0 if it is not over.

    Args:
        output_dir: folder of the run.
        folders: where its results should be, by kind.
    """
    note = _read(output_dir)
    for kind, folder in folders.items():
        saved, now = note.get("results", {}).get(kind, {}), _result(folder)
        if not saved or any(saved[name] != now[name] for name in ("folder", "written")):
            return 0
        if not set(saved["files"]) <= set(now["files"]):
            return 0
    return note.get("step", 0)


def is_same_run(output_dir: str | Path, fingerprint: Mapping[str, Any]) -> bool:
    """Say whether the run that is over depended on the same things."""
    return _read(output_dir).get("fingerprint") == json.loads(json.dumps(plain(fingerprint)))


def _result(folder: Path) -> dict[str, Any]:
    """Where a result folder is, when its last file was written (None if there is none), and its files."""
    last = folder / RESULT_SETTINGS
    return {
        "folder": str(folder.resolve()),
        "written": last.stat().st_mtime_ns if last.is_file() else None,
        "files": sorted(path.name for path in folder.iterdir()) if folder.is_dir() else [],
    }


def _read(output_dir: str | Path) -> dict[str, Any]:
    path = Path(output_dir) / FINISHED_FILE
    try:
        return read_json(path) if path.is_file() else {}
    except BadInputError:  # damaged: the run is finished once more
        return {}
