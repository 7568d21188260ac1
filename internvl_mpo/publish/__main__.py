"""Builds the exact folder that goes to the Hub, checks it as a stranger would, and pushes it as the last step.

    python -m internvl_mpo.publish model outputs/mini/model --output outputs/hub/model --run outputs/mini/train/mpo
        puts code, a fast tokenizer, a processor, a card with curves and scores beside the weights, loads the result in
        a clean process and compares its logits with the source's; also for official folders and LoRA adapters

    python -m internvl_mpo.publish dataset outputs/MMPR --output outputs/hub/MMPR --push me/MMPR
        checks the Parquet folder of convert_mmpr.py, reads it back with load_dataset, plain and streaming, before the
        push and from the Hub after it

    python -m internvl_mpo.publish space --output outputs/hub/space --base me/base --mpo me/mpo --push me/demo
        puts the demo together with pinned requirements and starts it in a clean virtual environment

Each takes `--push OWNER/NAME` with `--private`, `--create_pr`, `--revision`, `--overwrite`; `--dry_run` shows what
would change. The token comes from `hf auth login` or HF_TOKEN. A push is one commit: whoever looks sees all of it or
nothing, and the same command goes on where a broken one stopped.
"""

import sys
from pathlib import Path
from typing import Any

from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.programs import spelled
from internvl_mpo.publish.dataset import DatasetSettings, publish_dataset, verify_dataset
from internvl_mpo.publish.faults import DISK_FULL, is_disk_full
from internvl_mpo.publish.hub import check_access, files_of, format_size, preview, push_folder
from internvl_mpo.publish.model import ModelSettings, publish_model
from internvl_mpo.publish.space import SpaceSettings, publish_space
from internvl_mpo.settings import parse_settings, show_settings

# kind -> its settings, what builds and checks the folder
KINDS = {
    "model": (ModelSettings, publish_model),
    "dataset": (DatasetSettings, publish_dataset),
    "space": (SpaceSettings, publish_space),
}


def main(argv: list[str]) -> int:
    """Build a folder, and push it if asked to."""
    kind = argv[0] if argv else None
    if kind in (None, "-h", "--help"):
        kinds = ",".join(KINDS)
        usage = f"usage: python -m internvl_mpo.publish {{{kinds}}} SOURCE --output DIR [--push OWNER/NAME]"
        print(spelled(f"{__doc__}\n{usage}"))
        return 0 if kind else 2
    if kind not in KINDS:
        raise BadInputError(f"'{kind}' cannot be published; expected one of {', '.join(KINDS)}")
    settings_class, build = KINDS[kind]
    rest = argv[1:]
    if rest and not rest[0].startswith("-"):
        rest = ["--source", *rest]
    settings = parse_settings(settings_class, rest, program=f"-m internvl_mpo.publish {kind}", about=__doc__)
    print(show_settings(settings, f"publish {kind}"), flush=True)
    uploads = settings.push and not settings.dry_run
    if uploads:
        check_access(settings.push, repo_type=kind, private=settings.private)
    try:
        built = build(settings)
    except BadInputError:
        raise
    except Exception as error:
        if is_disk_full(error):
            raise BadInputError(DISK_FULL) from error
        raise
    folder = built.folder
    print(f"built {folder}: {len(files_of(folder))} files, {format_size(_num_bytes(folder))}", flush=True)
    if settings.dry_run:
        print(_preview(folder, kind, settings))
    elif settings.push:
        pushed = push_folder(
            folder,
            settings.push,
            repo_type=kind,
            private=settings.private,
            create_pr=settings.create_pr,
            revision=settings.revision,
            overwrite=settings.overwrite,
            attempts=settings.attempts,
        )
        print(f"pushed to {pushed.address}", flush=True)
        if kind == "dataset":
            verify_dataset(settings, built, pushed)
    return 0


def _preview(folder: Path, kind: str, settings: Any) -> str:
    """What a push would change; without a repository, the files and their sizes."""
    if settings.push:
        return str(preview(folder, settings.push, repo_type=kind, revision=settings.revision))
    return "\n".join(f"  {format_size(path.stat().st_size):>10}  {name}" for name, path in files_of(folder).items())


def _num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_of(folder).values())


if __name__ == "__main__":
    sys.exit(run_program(main))
