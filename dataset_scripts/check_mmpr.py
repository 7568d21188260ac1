r"""Look for what is wrong with MMPR, raw or as Parquet: rows, pictures, copies, habits, and benchmark questions in it.

Prints a table, writes an HTML report and a rejects file with every finding (file, line, reason), and exits with 1 when
there are errors. Warnings alone are 0. The list of what is looked for is in `internvl_mpo/mmpr/findings.py`. With
`--model` that model says of a sample of pairs how likely it finds both responses.

    python dataset_scripts/check_mmpr.py MMPR-v1.2 --output outputs/check --workers 16
    python dataset_scripts/check_mmpr.py outputs/MMPR-v1.2 --output outputs/check \
        --benchmarks pope=data/pope,mathvista=data/mathvista --benchmark_images pope=data/coco/val2014
    python dataset_scripts/check_mmpr.py outputs/MMPR-v1.2 --output outputs/check --model OpenGVLab/InternVL2-8B
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without installation

from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.files import atomic_writer
from internvl_mpo.mmpr.check import check
from internvl_mpo.mmpr.check_report import report_json, text_table, write_report
from internvl_mpo.mmpr.contamination import build_index
from internvl_mpo.mmpr.reading import forms_found, iter_pairs
from internvl_mpo.settings import parse_settings, setting, show_settings


@dataclass
class Settings:
    """Settings of the program; `--help` prints them."""

    data: str = setting(
        help="release, file of rows (forms in docs/data.md) or converted folder; --data may be left out"
    )
    output: str = setting("mmpr_check", help="folder for report.html, report.json and rejects.jsonl")
    image_root: str | None = setting(None, help="another folder to look for images and zip archives in")
    benchmarks: list[str] = setting([], help="NAME=FOLDER of each benchmark to look for, with commas between")
    benchmark_images: list[str] = setting([], help="NAME=FOLDER of pictures that do not lie beside the questions")
    decode: bool = setting(True, help="decode every picture; without, only headers are read")
    workers: int = setting(1, help="processes")
    model: str | None = setting(None, help="model folder or Hub id that says how likely it finds the responses")
    model_pairs: int = setting(64, help="pairs of each source and rule that it scores")
    device: str = setting("auto", help="of the model: cuda, cpu, mps; auto takes what is there")


def main(argv: list[str]) -> int:
    """Run the program; see the module's text."""
    if argv and not argv[0].startswith("-"):
        argv = ["--data", *argv]
    settings = parse_settings(Settings, argv, program="dataset_scripts/check_mmpr.py", about=__doc__)
    print(show_settings(settings, "Checking MMPR"))
    if settings.model_pairs < 1:
        raise BadInputError(f"model_pairs is {settings.model_pairs}, expected 1 or more")
    index = None
    if settings.benchmarks:
        index = build_index(_named(settings.benchmarks), _named(settings.benchmark_images))
    gaps = {}
    if settings.model:
        from internvl_mpo.likelihood_gap import likelihood_gaps  # imports torch

        rows = iter_pairs(settings.data, settings.image_root)
        gaps = likelihood_gaps(rows, settings.model, num_pairs=settings.model_pairs, device=settings.device)
    print(forms_found(settings.data, settings.image_root))
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
    report.model, report.gaps = settings.model or "", gaps
    write_report(report, output / "report.html")
    with atomic_writer(output / "report.json") as out:
        json.dump(report_json(report), out, indent=2, ensure_ascii=False)
    print(text_table(report))
    errors, warnings = report.num("error"), report.num("warning")
    print(f"\n{errors:,} errors, {warnings:,} warnings -> {output}/report.html, report.json, rejects.jsonl")
    return 1 if errors else 0


def _named(pairs: list[str]) -> dict[str, str]:
    named = dict(pair.partition("=")[::2] for pair in pairs)
    for name, folder in named.items():
        if not folder:
            raise BadInputError(f"'{name}' must be NAME=FOLDER, as in pope=data/pope")
    return named


if __name__ == "__main__":
    sys.exit(run_program(main))
