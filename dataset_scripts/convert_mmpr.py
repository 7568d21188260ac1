r"""Convert an MMPR release to Parquet with the pictures inside: the folder that goes to the Hub.

Reads any official or own release as it was published (a folder with meta.json; images in folders or in zip archives,
split or not; absolute cluster paths) or one JSONL file, and writes data/SOURCE/train-*.parquet, tiny/, README.md with a
configuration per source, statistics as pictures, and manifest.json with the hash of every shard.

    python dataset_scripts/convert_mmpr.py MMPR-v1.2 --output outputs/MMPR-v1.2 --name me/MMPR-v1.2 --workers 16
    python -c "import datasets; print(datasets.load_dataset('outputs/MMPR-v1.2', split='train')[0])"
    python dataset_scripts/convert_mmpr.py outputs/MMPR-v1.2 --output MMPR-raw --to_raw true      # and back again

Lines that cannot be converted go to OUTPUT.rejects.jsonl with file, line and reason, and the exit code is 1. A killed
run goes on when the same command is given again, and the shards have the same bytes.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without installation

from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.locks import held
from internvl_mpo.mmpr.card import write_card
from internvl_mpo.mmpr.convert import convert
from internvl_mpo.mmpr.reading import forms_found
from internvl_mpo.mmpr.restore import restore
from internvl_mpo.mmpr.shard_plan import MEGABYTE, Options
from internvl_mpo.settings import parse_settings, setting, show_settings


@dataclass
class Settings:
    """Settings of the program; `--help` prints them."""

    raw: str = setting(
        help="release (folder, meta.json) or file of rows (forms in docs/data.md); --raw may be left out"
    )
    output: str = setting(help="folder to make")
    image_root: str | None = setting(None, help="another folder to look for images and zip archives in")
    workers: int = setting(1, help="processes; each needs about 400 MB")
    shard_mb: int = setting(500, help="size of a shard before compression")
    decode: bool = setting(True, help="decode every picture once, to find files that were cut off")
    tokenizer: str | None = setting(
        None, help="model whose tokenizer counts tokens for the card; empty counts words only"
    )
    name: str = setting("org/MMPR", help="repository it will have on the Hub, for the examples of its card")
    title: str = setting("MMPR", help="heading of its card")
    to_raw: bool = setting(False, help="the other way: from the Parquet folder (or hub:OWNER/NAME) back to raw files")

    def __post_init__(self) -> None:
        if self.workers < 1 or self.shard_mb < 1:
            raise BadInputError("workers and shard_mb must be at least 1")


def main(argv: list[str]) -> int:
    """Run the program; see the module's text."""
    if argv and not argv[0].startswith("-"):
        argv = ["--raw", *argv]
    settings = parse_settings(Settings, argv, program="dataset_scripts/convert_mmpr.py", about=__doc__)
    print(show_settings(settings, "Converting MMPR"))
    output = Path(settings.output)
    with held(output.with_name(f".{output.name}.lock"), f"another conversion is writing {output}"):
        return _convert(settings, output)


def _convert(settings: Settings, output: Path) -> int:
    if settings.to_raw:
        num_rows, num_images = restore(settings.raw, output)
        print(f"{num_rows:,} rows and {num_images:,} pictures -> {output}")
        return 0
    options = Options(
        settings.raw, settings.image_root, settings.shard_mb * MEGABYTE, settings.decode, settings.tokenizer
    )
    print(forms_found(settings.raw, settings.image_root))
    rejects = output.with_name(f"{output.name}.rejects.jsonl")
    result = convert(options, output, workers=settings.workers, rejects=rejects)
    write_card(output, name=settings.name, title=settings.title)
    for problem in result.problems:
        print(f"warning: {problem}", file=sys.stderr)
    print(f"{result.num_rows:,} pairs in {len(result.shards)} files -> {output}")
    if result.num_rejects:
        print(f"{result.num_rejects:,} lines could not be converted, listed with reasons in {rejects}")
    return 1 if result.num_rejects else 0


if __name__ == "__main__":
    sys.exit(run_program(main))
