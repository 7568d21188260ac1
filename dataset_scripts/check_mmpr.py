r"""Look for what is wrong with MMPR, raw or as Parquet: rows, pictures, copies, habits, and benchmark questions in it.

Prints a table, writes an HTML report and a rejects file with every finding (file, line, reason), and exits with 1 when
there are errors. Warnings alone are 0. The list of what is looked for is in `internvl_mpo/mmpr_check.py`.

    python dataset_scripts/check_mmpr.py MMPR-v1.2 --output outputs/check --workers 16
    python dataset_scripts/check_mmpr.py outputs/MMPR-v1.2 --output outputs/check \
        --benchmarks pope=data/pope,mathvista=data/mathvista --benchmark_images pope=data/coco/val2014
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without installation

from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.files import atomic_writer
from internvl_mpo.mmpr.check import check
from internvl_mpo.mmpr.check_report import text_table, write_report
from internvl_mpo.mmpr.contamination import build_index
from internvl_mpo.settings import parse_settings, setting, show_settings


@dataclass
class Settings:
    """Settings of the program; `--help` prints them."""

    data: str = setting(help="release (folder, meta.json, JSONL) or converted folder; may be given without --data")
    output: str = setting("mmpr_check", help="folder for report.html and rejects.jsonl")
    image_root: str | None = setting(None, help="another folder to look for images and zip archives in")
    benchmarks: list[str] = setting([], help="NAME=FOLDER of each benchmark to look for, with commas between")
    benchmark_images: list[str] = setting([], help="NAME=FOLDER of pictures that do not lie beside the questions")
    decode: bool = setting(True, help="decode every picture; without, only headers are read")
    workers: int = setting(1, help="processes")


def main(argv: list[str]) -> int:
    """Run the program; see the module's text."""
    if argv and not argv[0].startswith("-"):
        argv = ["--data", *argv]
    settings = parse_settings(Settings, argv, program="dataset_scripts/check_mmpr.py", about=__doc__)
    print(show_settings(settings, "Checking MMPR"))
    index = None
    if settings.benchmarks:
        index = build_index(_named(settings.benchmarks), _named(settings.benchmark_images))
    output = Path(settings.output)
    with atomic_writer(output / "rejects.jsonl") as rejects:
        report = check(
            settings.data,
            image_root=settings.image_root,
            index=index,
            decode=settings.decode,
            workers=settings.workers,
            rejects=rejects,
        )
    write_report(report, output / "report.html")
    print(text_table(report))
    errors, warnings = report.num("error"), report.num("warning")
    print(f"\n{errors:,} errors, {warnings:,} warnings -> {output}/report.html, {output}/rejects.jsonl")
    return 1 if errors else 0


def _named(pairs: list[str]) -> dict[str, str]:
    named = dict(pair.partition("=")[::2] for pair in pairs)
    for name, folder in named.items():
        if not folder:
            raise BadInputError(f"'{name}' must be NAME=FOLDER, as in pope=data/pope")
    return named


if __name__ == "__main__":
    sys.exit(run_program(main))
