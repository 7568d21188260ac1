"""The whole path on the embedded default: data, start model, preference pairs, training, evaluation, report.

Each stage is a program that a user can call by itself; its command is printed before it runs. Stages that need nothing
of each other run side by side, one thread each. Finished stages are skipped when the same command is given again, so a
killed run goes on where it stopped.

    python -m internvl_mpo.quickstart --output outputs/mini
    python -m internvl_mpo.quickstart --output outputs/mini_numbers --world numbers
"""

import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.files import atomic_writer
from internvl_mpo.jsonl import read_whole_lines
from internvl_mpo.mini.report import NAMES, write_report
from internvl_mpo.programs import program
from internvl_mpo.rounds.lanes import Sampler, words
from internvl_mpo.rounds.settings import ARMS
from internvl_mpo.settings import parse_settings, read_yaml, setting
from internvl_mpo.stages import Lane, Stage, Stages

# name -> what it changes in configs/mini.yaml; "start" is not trained
METHODS = {method: words(changed) for method, changed in ARMS.items()}
FIRST = ("sft", "mpo")  # what the method has to beat, and the method
# kind of world -> options of `mini world`, of `mini start`, and of the training runs
WORLDS = {
    "choices": ([], [], []),
    "numbers": (
        ["--kind", "numbers", "--num_drills", "2500", "--num_questions", "1200"],
        ["--optimizer", "adamw", "--steps", "600"],
        ["--learning_rate", "3e-5"],
    ),
}


@dataclass
class QuickstartSettings:
    """Settings of `python -m internvl_mpo.quickstart`."""

    output: str = setting("outputs/mini", help="folder for everything the run makes")
    world: Literal["choices", "numbers"] = setting(
        "choices", help="choices: multiple choice, chains of thought guess; numbers: open questions, a wrong habit"
    )
    config: str = setting("configs/mini.yaml", help="settings of the training runs")
    seed: int = setting(
        1, help="of world, start model, samples, pairs and data order; 1 has the order of the means over 0 to 4"
    )
    methods: list[str] = setting(list(METHODS), help="training runs to compare; mpo is needed for the model")
    jobs: int = setting(min(2, os.cpu_count() or 1), help="stages that run at the same time, one thread each")

    def __post_init__(self) -> None:
        if "mpo" not in self.methods:
            raise BadInputError("methods must hold mpo, which makes the model and one side of the report")
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown:
            raise BadInputError(f"unknown method '{unknown[0]}', expected some of {', '.join(METHODS)}")
        if self.jobs < 1:
            raise BadInputError(f"jobs is {self.jobs}, expected 1 or more")


def first_stages(out: Path, seed: int, world: Sequence[str] = (), start: Sequence[str] = ()) -> list[Stage]:
    """Return the stages that make the world and the start model.

    Args:
        out: gets `world/` and `start/`.
        seed: of both.
        world: further options of `mini world`.
        start: further options of `mini start`.
    """
    mini, seeded = program("-m internvl_mpo.mini"), ["--seed", str(seed)]
    make_world = [*mini, "world", "--output", str(out / "world"), *seeded, *world]
    make_start = [*mini, "start", "--world", str(out / "world"), "--output", str(out / "start"), *seeded, *start]
    return [
        Stage("world", "pictures of handwritten digits, questions, annotations", make_world,
              out / "world" / "test.jsonl"),
        Stage("start", "a start model of 1 M weights, from scratch", make_start, out / "start" / "config.json"),
    ]  # fmt: skip


def pair_stages(
    out: Path, model: Path, data: Path, seed: int, *, pairs_per_question: int = 4, ratio: float = 0.5
) -> tuple[list[Stage], list[Stage]]:
    """Return the stages that sample responses of a model and make pairs of them: by correctness, and by Dropout-NTP.

    Args:
        out: holds `world/`.
        model: answers.
        data: gets `pairs_correctness.jsonl` and `pairs_dropout_ntp.jsonl`.
        seed: of every draw.
        pairs_per_question: most of them by correctness.
        ratio: share of a description that Dropout-NTP keeps.
    """
    world = out / "world"
    sampler = Sampler(model=model, image_root=world, options={"max_new_tokens": 64, "batch_size": 256}, seed=seed)
    return (
        sampler.correctness_stages(world / "questions.jsonl", data, pairs_per_question=pairs_per_question),
        sampler.dropout_ntp_stages(world / "open_questions.jsonl", data, ratio=ratio),
    )


def training_command(out: Path, config: str, model: Path, data: Path, seed: int) -> list[str]:
    """Return the command of a training run, without where its results go.

    Args:
        out: holds `world/`.
        config: settings of all runs.
        model: start model and reference.
        data: folder of the pairs.
        seed: 42 more is that of the data order.
    """
    return [
        *program("train_mpo.py"), "--config", config, "--model", str(model),
        "--data", f"{data / 'pairs_correctness.jsonl'},{data / 'pairs_dropout_ntp.jsonl'}",
        "--image_root", str(out / "world"), "--seed", str(42 + seed),
    ]  # fmt: skip


def evaluation(out: Path, method: str, model: Path) -> Stage:
    """Return the stage that asks a model the held-out questions."""
    target = out / "eval" / method
    command = [
        *program("evaluate_mpo.py"), "--model", str(model), "--benchmarks", "mini", "--data", str(out / "world"),
        "--mode", "direct,cot", "--output", str(target), "--batch_size", "150", "--max_new_tokens", "64",
    ]  # fmt: skip
    return Stage(f"evaluate_{method}", f"questions about unseen digits, {NAMES[method]}", command,
                 target / "scores.json")  # fmt: skip


def comparison(settings: QuickstartSettings, methods: Sequence[str], needs: Sequence[Stage]) -> list[Lane]:
    """Return a lane for each method: train, then evaluate."""
    out = Path(settings.output)
    shared = training_command(out, settings.config, out / "start", out / "data", settings.seed)

    def lane(method: str) -> Lane:
        model = out / "model" if method == "mpo" else out / "train" / method / "model"
        command = [
            *shared, "--output_dir", str(out / "train" / method), "--model_dir", str(model),
            "--reference_cache", str(out / "reference"), *WORLDS[settings.world][2], *METHODS[method],
        ]  # fmt: skip
        train = Stage(f"train_{method}", f"100 steps of {NAMES[method]}", command, model / "config.json")
        return Lane([train, evaluation(out, method, model)], needs)

    return [lane(method) for method in methods]


def results(settings: QuickstartSettings, done: Stages) -> dict:
    """Collect the scores of all methods in per cent, what they were made with, and the seconds of the stages."""
    out = Path(settings.output)
    methods = {}
    for method in ["start", *settings.methods]:
        scores = _scores(out, method)
        methods[method] = {
            "direct_accuracy": scores["direct"]["accuracy"],
            "cot_accuracy": scores["cot"]["accuracy"],
            "direct_interval": scores["direct"]["interval"],
            "cot_interval": scores["cot"]["interval"],
            "unparsable": scores["cot"]["unparsable"],
            "reward_accuracy": _reward_accuracy(out / "train" / method / "log.jsonl"),
        }
    return {
        "methods": methods,
        "world": settings.world,
        "stages": {name: round(stage["seconds"], 1) for name, stage in done.finished.items()},
        "total_seconds": round(done.seconds, 1),
        "peak_memory_mib": done.peak_mib or None,
        "num_test_questions": scores["cot"]["num_examples"],
        "seed": settings.seed,
        "config": read_yaml(settings.config),
        "machine": {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count()},
        "date": time.strftime("%Y-%m-%d"),
    }


def _scores(out: Path, method: str) -> dict:
    return json.loads((out / "eval" / method / "scores.json").read_text(encoding="utf-8"))["mini"]


def _reward_accuracy(log: Path) -> float | None:
    """Per cent of held-out pairs whose chosen response has the larger reward; None for an untrained model."""
    if not log.exists():
        return None
    shares = [row["eval_rewards/accuracy"] for row in read_whole_lines(log) if "eval_rewards/accuracy" in row]
    return 100 * shares[-1] if shares else None


def table(found: dict) -> str:
    """Return the closing table."""
    lines = [
        "                 direct    chain of   unparsable   reward",
        "                accuracy   thought     answers    accuracy",
    ]
    for method, row in found["methods"].items():
        reward = "   -  " if row["reward_accuracy"] is None else f"{row['reward_accuracy']:5.1f} %"
        lines.append(
            f"{NAMES[method]:<15} {row['direct_accuracy']:6.1f} %   {row['cot_accuracy']:6.1f} %"
            f"    {row['unparsable']:6.1f} %    {reward}"
        )
    return "\n".join(lines)


def first_line(settings: QuickstartSettings, done: Stages) -> str:
    """Return the comparison that matters most, as soon as it is known."""
    methods = ["start", *(method for method in FIRST if method in settings.methods)]
    shares = [f"{NAMES[name]} {_scores(Path(settings.output), name)['cot']['accuracy']:.1f} %" for name in methods]
    return f"right chains of thought: {', '.join(shares)} (after {done.seconds:.0f} s)"


def main(argv: list[str]) -> int:
    """Run the path and write results.json and report.html."""
    settings = parse_settings(
        QuickstartSettings, argv or ["--output", "outputs/mini"], program="-m internvl_mpo.quickstart", about=__doc__,
        config=False,
    )  # fmt: skip
    out = Path(settings.output)
    first = first_stages(out, settings.seed, *WORLDS[settings.world][:2])
    by_correctness, by_dropout = pair_stages(out, out / "start", out / "data", settings.seed)
    pairs = [Lane(by_correctness, first), Lane([*by_dropout, evaluation(out, "start", out / "start")], first)]
    needs = [*first, *by_correctness, *by_dropout]
    done = Stages(out / "stages", settings.jobs)
    done.run_all([Lane(first)], pairs, comparison(settings, [m for m in FIRST if m in settings.methods], needs))
    print(f"\n{first_line(settings, done)}", flush=True)
    done.run_all(comparison(settings, [m for m in settings.methods if m not in FIRST], needs))
    found = results(settings, done)
    with atomic_writer(out / "results.json") as file:
        json.dump(found, file, indent=2)

    write_report(out, found)
    print(f"\n{table(found)}\n")
    print(f"{found['num_test_questions']} questions about digits that no training picture shows; "
          f"{found['total_seconds']:.0f} s in all")  # fmt: skip
    print(f"report   {out / 'report.html'}\nnumbers  {out / 'results.json'}\nmodel    {out / 'model'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
