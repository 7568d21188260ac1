"""Three rounds of MPO beside one round with as many steps in all, over seeds: the figures of docs/rounds.md.

    python bench/rounds_seeds.py --seeds 3 --output outputs/rounds_seeds

Every seed has a world, a start model, samples and pairs of its own; a world and a start model that lie in
OUTPUT/seed_N are used. A killed run goes on with the same command; `--config none` only shows what is there.
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without installation

from internvl_mpo.ablation.intervals import difference, estimate
from internvl_mpo.errors import run_program
from internvl_mpo.files import read_json
from internvl_mpo.jsonl import iter_jsonl
from internvl_mpo.programs import program
from internvl_mpo.quickstart import first_stages
from internvl_mpo.settings import parse_settings, setting
from internvl_mpo.stages import Lane, Stages


@dataclass
class Settings:
    """Settings of the program; `--help` prints them."""

    output: str = setting("outputs/rounds_seeds", help="folder of everything")
    seeds: int = setting(3, help="seeds 0, 1, ..")
    config: str | None = setting("configs/rounds_mini.yaml", help="settings of the rounds; none only shows results")


def main(argv: list[str]) -> int:
    """Run the seeds one after the other, then print the table."""
    settings = parse_settings(
        Settings, argv or ["--seeds", "3"], program="bench/rounds_seeds.py", about=__doc__, config=False
    )
    folders = [Path(settings.output) / f"seed_{seed}" for seed in range(settings.seeds)]
    for seed, folder in enumerate(folders if settings.config else ()):
        if not (folder / "start" / "config.json").exists():
            Stages(folder / "stages").run_all([Lane(first_stages(folder, seed))])
        subprocess.run(rounds_command(settings.config, folder, seed), check=True)
    print(table([folder / "rounds" for folder in folders if (folder / "rounds" / "results.json").exists()]))
    return 0


def rounds_command(config: str, folder: Path, seed: int) -> list[str]:
    """Return the command of the rounds of a seed."""
    world = folder / "world"
    return [
        *program("-m internvl_mpo.rounds"), "--config", config, "--output", str(folder / "rounds"),
        "--model", str(folder / "start"), "--questions", str(world / "questions.jsonl"),
        "--open_questions", str(world / "open_questions.jsonl"), "--image_root", str(world),
        "--held_out", str(world), "--seed", str(seed),
    ]  # fmt: skip


def table(runs: list[Path]) -> str:
    """Return right held-out answers of every arm and round, and how much more rounds have than one round."""
    arms = {arm: len(rows["rounds"]) - 1 for arm, rows in read_json(runs[0] / "results.json")["arms"].items()}
    first, *others = arms
    lines = ["| arm | round | " + " | ".join(run.parent.name.replace("_", " ") for run in runs) + " | mean [95 %] |"]
    lines.append("|" + "---|" * (len(runs) + 3))
    for arm, last in arms.items():
        for number in range(last + 1) if arm == first else range(1, last + 1):
            found = [verdicts(run, arm, number) for run in runs]
            shares = " | ".join(f"{100 * sum(one) / len(one):.1f}" for one in found)
            lines.append(f"| {arm} | {number or 'start'} | {shares} | {estimate(found).text()} |")
    for other in others:
        ends = [[verdicts(run, arm, arms[arm]) for run in runs] for arm in (first, other)]
        lines.append(f"\n{first} after {arms[first]} rounds is {difference(*ends).text(signed=True)} from {other}")
    return "\n".join(lines)


def verdicts(run: Path, arm: str, number: int) -> list[float]:
    """Return the verdicts of a policy on the held-out questions, in the order of the file."""
    folder = run / arm / f"round_{number}" / "eval" if number else run / "start" / "eval"
    return [row["value"] for _, row in iter_jsonl(folder / "verdicts.jsonl")]


if __name__ == "__main__":
    sys.exit(run_program(main))
