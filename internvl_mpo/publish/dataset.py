"""`publish dataset`: Parquet files with a card, read back by a stranger before the push and from the Hub after it."""

import hashlib
import json
import posixpath
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_mpo.errors import BadInputError
from internvl_mpo.files import link, read_json, replaced_folder
from internvl_mpo.publish.hub import Pushed, files_of
from internvl_mpo.publish.hygiene import check_nothing_private
from internvl_mpo.publish.picture_names import shorten, shorten_names
from internvl_mpo.publish.proof import clean_environment, last_words
from internvl_mpo.publish.settings import Built, HubSettings
from internvl_mpo.settings import setting

MANIFEST = "manifest.json"
_READER = Path(__file__).with_name("clean_rows.py")
_KNOWN = ("README.md", MANIFEST, "LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "NOTICE", "CITATION.cff")
# Files a card shows or links to: [text](path), ![text](path), <img src="path">; addresses have a colon.
_LINKED = re.compile(r"""(?:\]\(|\b(?:src|href)=["'])\s*<?([^\s:)>"']+)""")
_PLACEHOLDER = "org/MMPR"  # what a card calls its repository until it is known


@dataclass(kw_only=True)
class DatasetSettings(HubSettings):
    """Settings of `publish dataset`."""

    source: str = setting(help="Parquet folder with a card, from convert_mmpr.py; may be given without --source")
    output: str = setting(help="folder to build; its large files are links")
    num_rows: int = setting(20, help="rows of every configuration that are read back and compared")
    check_hashes: bool = setting(True, help="compare every shard with its hash in manifest.json")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_rows < 1:
            raise BadInputError(f"num_rows is {self.num_rows}; give at least 1")


def publish_dataset(settings: DatasetSettings) -> Built:
    """Build the folder, and read it back as a stranger does.

    Raises:
        BadInputError: the source is not finished, does not load, or holds something private.
    """
    source = Path(settings.source)
    if not source.is_dir():
        raise BadInputError(f"data folder '{source}' does not exist; make it with dataset_scripts/convert_mmpr.py")
    _check_source(source, settings)
    with replaced_folder(settings.output, sources=[source]) as folder:
        for name, path in published_files(source).items():
            link(path, folder, name)
        _tidy_card(folder, settings.push)
        changed = [path for name, path in files_of(folder).items() if name.endswith(".parquet") and shorten_names(path)]
        if changed:
            print(f"{len(changed)} shards named pictures by absolute paths; the names were shortened", flush=True)
        _tidy_manifest(folder, changed)
        check_nothing_private(folder, owner=settings.owner)
        found = read_back(str(folder.resolve()), folder, settings.num_rows)
        print(_sentence("the folder", found), flush=True)
    return Built(Path(settings.output), found)


def verify_dataset(settings: DatasetSettings, built: Built, pushed: Pushed) -> None:
    """Read the data set from where it was put and compare it with the folder.

    Raises:
        BadInputError: the Hub gives other rows, or none.
    """
    found = read_back(settings.push, built.folder, settings.num_rows, revision=pushed.revision)
    if found != built.rows:
        raise BadInputError(f"{settings.push} gives other rows than {built.folder}; run the same command again")
    print(_sentence(settings.push, found), flush=True)


def read_back(source: str, folder: Path, num_rows: int, *, revision: str | None = None) -> dict[str, Any]:
    """Load a folder or a repository in a clean process with an empty cache.

    Args:
        source: folder or owner/name.
        folder: the local copy, which tells the smallest configuration.
        num_rows: rows to stream of every configuration.
        revision: branch or pull request.

    Returns:
        Digests of the rows, by configuration: see `clean_rows.py`.

    Raises:
        BadInputError: it does not load.
    """
    is_local = source == str(folder.resolve())
    with tempfile.TemporaryDirectory() as temporary:
        result = Path(temporary) / "rows.json"
        words = [source, revision or "-", str(num_rows), _smallest(folder), str(result)]
        ran = subprocess.run(
            [sys.executable, "-I", str(_READER), *words],
            cwd=temporary,
            env=clean_environment(Path(temporary), online=not is_local),
            capture_output=True,
            text=True,
        )
        if ran.returncode != 0:
            raise BadInputError(f"load_dataset does not read {source} ({last_words(ran)})")
        return json.loads(result.read_text(encoding="utf-8"))


def configurations(folder: Path) -> dict[str, list[Path]]:
    """Return the files of every configuration that the card names.

    Raises:
        BadInputError: there is no card, no configuration, or one without files.
    """
    from huggingface_hub import DatasetCard

    card = folder / "README.md"
    if not card.exists():
        raise BadInputError(f"{folder} has no README.md with `configs`; dataset_scripts/convert_mmpr.py writes one")
    found = {}
    for entry in DatasetCard.load(card).data.to_dict().get("configs") or []:
        parts = entry["data_files"]
        parts = [{"path": parts}] if isinstance(parts, str) else parts
        paths = [path for part in parts for path in ([part["path"]] if isinstance(part["path"], str) else part["path"])]
        files = sorted({file for pattern in paths for file in folder.glob(pattern)})
        if not files:
            raise BadInputError(f"{card} names a configuration '{entry['config_name']}', but {paths[0]} is not there")
        found[entry["config_name"]] = files
    if not found:
        raise BadInputError(f"the header of {card} names no `configs`; dataset_scripts/convert_mmpr.py writes them")
    return found


def published_files(source: Path) -> dict[str, Path]:
    """Return what of a data folder goes out, by its path: the card, what the card names, manifest, licence and code.

    Raises:
        BadInputError: something else lies in the folder, or a link leads out of it.
    """
    named = {path.relative_to(source).as_posix() for files in configurations(source).values() for path in files}
    text = (source / "README.md").read_text(encoding="utf-8")
    named |= {posixpath.normpath(target) for target in _LINKED.findall(text)}
    for path in sorted(source.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(source.resolve()):
            raise BadInputError(f"{path} is a link that leads out of {source}; put what it names there, or remove it")
    found, surplus = {}, []
    for name, path in files_of(source).items():
        is_hidden = any(part.startswith(".") for part in path.relative_to(source).parts)
        if not is_hidden and (name in named or name in _KNOWN or (path.suffix == ".py" and "/" in name)):
            found[name] = path
        else:
            surplus.append(name)
    if surplus:
        more = f" and {len(surplus) - 3} more" if len(surplus) > 3 else ""
        raise BadInputError(
            f"{source} holds {', '.join(surplus[:3])}{more}, which the card does not name; published are the card, the "
            "data and pictures it names, manifest.json, LICENSE and code in folders: move the rest elsewhere"
        )
    return found


def _smallest(folder: Path) -> str:
    sizes = {name: sum(path.stat().st_size for path in files) for name, files in configurations(folder).items()}
    return min(sizes, key=sizes.__getitem__)


def _check_source(source: Path, settings: DatasetSettings) -> None:
    """Refuse a folder that is not finished, or that `load_dataset` could take for a script."""
    from tqdm import tqdm

    scripts = sorted(path.name for path in source.glob("*.py"))
    if scripts:
        raise BadInputError(f"{source / scripts[0]} would stop load_dataset, which takes it for a script; remove it")
    configurations(source)
    if not (source / MANIFEST).exists():
        return
    shards = read_json(source / MANIFEST)["shards"]
    listed = {shard["path"] for shard in shards}
    surplus = [name for name in files_of(source) if name.endswith(".parquet") and name not in listed]
    if surplus:
        raise BadInputError(f"{source / surplus[0]} is not in {MANIFEST}; convert into an empty folder")
    bar = tqdm(shards, desc="checking shards", unit="shard", disable=not settings.check_hashes)
    for shard in bar:
        path = source / shard["path"]
        if not path.exists():
            raise BadInputError(
                f"{path} is in {MANIFEST} but not there; run convert_mmpr.py again, it writes only that"
            )
        is_whole = path.stat().st_size == shard["num_bytes"]
        if is_whole and settings.check_hashes:
            is_whole = _hash(path) == shard["sha256"]
        if not is_whole:
            raise BadInputError(f"{path} is not the file that {MANIFEST} describes; remove it and convert again")


def _tidy_card(folder: Path, repository: str | None) -> None:
    """Let the examples of the card name the repository; the source's card is a link and stays as it is."""
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8")
    card.unlink()
    card.write_text(text.replace(_PLACEHOLDER, repository) if repository else text, encoding="utf-8")


def _tidy_manifest(folder: Path, changed: Sequence[Path]) -> None:
    """Take the folders of the computer it was made on out of the manifest, and describe changed shards anew."""
    path = folder / MANIFEST
    if not path.exists():
        return
    manifest = read_json(path)
    for entry in manifest.get("meta", {}).values():
        for key in ("root", "annotation"):
            if isinstance(entry.get(key), str):
                entry[key] = shorten(entry[key])
    for shard in manifest["shards"]:
        if folder / shard["path"] in changed:
            shard |= {"num_bytes": (folder / shard["path"]).stat().st_size, "sha256": _hash(folder / shard["path"])}
    path.unlink()  # a link to the source's
    path.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sentence(where: str, found: dict[str, Any]) -> str:
    streamed = sum(len(config["rows"]) for config in found["streamed"].values())
    return (
        f"read back from {where}: {streamed} rows of {len(found['streamed'])} configurations streamed, "
        f"'{found['whole']['config']}' loaded whole ({len(found['whole']['rows'])} rows)"
    )
