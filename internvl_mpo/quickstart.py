"""The whole path on the embedded default: data, start model, preference pairs, training, evaluation, report.

Each stage is a program that a user can call by itself; its command is printed before it runs. Finished stages are
skipped when the same command is given again, so a killed run goes on where it stopped.

    python -m internvl_mpo.quickstart --output outputs/mini
"""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.files import atomic_writer
from internvl_mpo.jsonl import read_whole_lines
from internvl_mpo.programs import HOME, program, spelled
from internvl_mpo.records import content_id
from internvl_mpo.settings import parse_settings, read_yaml, setting

# name -> what it changes in configs/mini.yaml; "start" is not trained
METHODS = {
    "sft": ["--preference", "none", "--quality", "none"],
    "dpo": ["--quality", "none", "--generation", "none", "--preference_weight", "1"],
    "bco": ["--preference", "none", "--generation", "none", "--quality_weight", "1"],
    "mpo": [],
}


@dataclass
class QuickstartSettings:
    """Settings of `python -m internvl_mpo.quickstart`."""

    output: str = setting("outputs/mini", help="folder for everything the run makes")
    config: str = setting("configs/mini.yaml", help="settings of the training runs")
    seed: int = setting(0, help="of the world, the start model, the samples, the pairs and the data order")
    methods: list[str] = setting(list(METHODS), help="training runs to compare; mpo is needed for the model")


@dataclass(frozen=True)
class Stage:
    """One command and the file that tells it is finished."""

    name: str
    about: str
    command: list[str]
    makes: Path


def stages(settings: QuickstartSettings) -> list[Stage]:
    """Return the stages in the order they run."""
    out, seed = Path(settings.output), str(settings.seed)
    world, start, data = out / "world", out / "start", out / "data"

    mini = program("-m internvl_mpo.mini")

    def sample(name: str, about: str, questions: str, *options: str) -> Stage:
        target = data / f"{name}.jsonl"
        command = [
            *program("dataset_scripts/sample_responses.py"),
            "--model", str(start), "--questions", str(world / questions), "--image_root", str(world),
            "--output", str(target), "--max_new_tokens", "64", "--batch_size", "256", "--seed", seed, *options,
        ]  # fmt: skip
        return Stage(name, about, command, target)

    def evaluate(method: str, model: Path) -> Stage:
        target = out / "eval" / method
        command = [
            *program("evaluate_mpo.py"),
            "--model", str(model), "--benchmarks", "mini", "--data", str(world), "--mode", "direct,cot",
            "--output", str(target), "--batch_size", "150", "--max_new_tokens", "64",
        ]  # fmt: skip
        return Stage(f"evaluate_{method}", f"questions about unseen digits, {method}", command, target / "scores.json")

    plan = [
        Stage("world", "pictures of handwritten digits, questions, annotations",
              [*mini, "world", "--output", str(world), "--seed", seed], world / "test.jsonl"),
        Stage("start", "a start model of 1 M weights, from scratch",
              [*mini, "start", "--world", str(world), "--output", str(start), "--seed", seed],
              start / "config.json"),
        evaluate("start", start),
        sample("responses", "8 chains of thought for each question", "questions.jsonl",
               "--style", "cot", "--num_samples", "8", "--temperature", "1.0"),
        sample("open_responses", "one description of each picture", "open_questions.jsonl",
               "--style", "plain", "--num_samples", "1", "--temperature", "0"),
        Stage("pairs_correctness", "right against wrong answers",
              [*program("dataset_scripts/build_correctness_pairs.py"), "--responses", str(data / "responses.jsonl"),
               "--output", str(data / "pairs_correctness.jsonl"), "--pairs_per_question", "4", "--seed", seed],
              data / "pairs_correctness.jsonl"),
        Stage("pairs_dropout_ntp", "descriptions against their second half written without the picture",
              [*program("dataset_scripts/build_dropout_ntp_pairs.py"), "--model", str(start),
               "--responses", str(data / "open_responses.jsonl"), "--output", str(data / "pairs_dropout_ntp.jsonl"),
               "--max_new_tokens", "64", "--batch_size", "256", "--seed", seed],
              data / "pairs_dropout_ntp.jsonl"),
    ]  # fmt: skip
    for method in settings.methods:
        model = out / "model" if method == "mpo" else out / "train" / method / "model"
        command = [
            *program("train_mpo.py"), "--config", settings.config, "--model", str(start),
            "--data", f"{data / 'pairs_correctness.jsonl'},{data / 'pairs_dropout_ntp.jsonl'}",
            "--image_root", str(world), "--output_dir", str(out / "train" / method), "--model_dir", str(model),
            "--reference_cache", str(out / "reference"), "--seed", str(42 + settings.seed), *METHODS[method],
        ]  # fmt: skip
        plan.append(Stage(f"train_{method}", f"100 steps of {method.upper()}", command, model / "config.json"))
        plan.append(evaluate(method, model))
    return plan


def run_stages(plan: list[Stage], folder: Path, run: Callable[[Stage], None]) -> dict[str, dict]:
    """Run what is not finished yet; return `seconds` and `peak_mib` (largest process so far) of every stage.

    A stage is finished when its marker holds the digest of its command and of all commands before it.
    """
    finished: dict[str, dict] = {}
    digest = ""
    for number, stage in enumerate(plan, start=1):
        digest = content_id(digest, stage.command)
        marker = folder / f"{stage.name}.json"
        done = json.loads(marker.read_text(encoding="utf-8")) if marker.exists() else {}
        title = f"[{number}/{len(plan)}] {stage.name}: {stage.about}"
        if done.get("digest") == digest and stage.makes.exists():
            print(f"{title} - done before, {done['seconds']:.0f} s", flush=True)
        else:
            print(f"\n{title}\n$ {_short(stage.command)}", flush=True)
            begin = time.perf_counter()
            run(stage)
            done = {"digest": digest, "seconds": time.perf_counter() - begin, "peak_mib": _peak_mib()}
            with atomic_writer(marker) as out:
                json.dump(done, out)
        finished[stage.name] = done
    return finished


def _peak_mib() -> float | None:
    """Largest resident memory of any stage so far; None where the system does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def _run(stage: Stage) -> None:
    # One thread unless the user says otherwise: the number of threads decides how sums are rounded, and with it, after
    # 700 steps, the figures of the table. The models are too small to gain from a second one.
    result = subprocess.run(stage.command, env={"OMP_NUM_THREADS": "1", **os.environ}, check=False)
    if result.returncode == 130:
        raise KeyboardInterrupt
    if result.returncode != 0:
        raise BadInputError(f"stage '{stage.name}' ended with exit code {result.returncode}; its message stands above")
    if not stage.makes.exists():
        raise BadInputError(f"stage '{stage.name}' ended without making {stage.makes}")


def _short(command: list[str]) -> str:
    """The command as a user would type it."""
    words = ["python" if word == sys.executable else word.removeprefix(f"{HOME}/") for word in command]
    return spelled(shlex.join(words))


def results(settings: QuickstartSettings, finished: dict[str, dict]) -> dict:
    """Collect the scores of all methods in per cent, what they were made with, and the seconds of the stages."""
    out = Path(settings.output)
    methods = {}
    for method in ["start", *settings.methods]:
        scores = json.loads((out / "eval" / method / "scores.json").read_text(encoding="utf-8"))["mini"]
        methods[method] = {
            "direct_accuracy": scores["direct"]["accuracy"],
            "cot_accuracy": scores["cot"]["accuracy"],
            "unparsable": scores["cot"]["unparsable"],
            "reward_accuracy": _reward_accuracy(out / "train" / method / "log.jsonl"),
        }
    return {
        "methods": methods,
        "stages": {name: round(stage["seconds"], 1) for name, stage in finished.items()},
        "total_seconds": round(sum(stage["seconds"] for stage in finished.values()), 1),
        "peak_memory_mib": max((s["peak_mib"] for s in finished.values() if s["peak_mib"]), default=None),
        "num_test_questions": scores["cot"]["num_examples"],
        "seed": settings.seed,
        "config": read_yaml(settings.config),
        "machine": {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count()},
        "date": time.strftime("%Y-%m-%d"),
    }


def _reward_accuracy(log: Path) -> float | None:
    """Per cent of held-out pairs whose chosen response has the larger reward; None for an untrained model."""
    if not log.exists():
        return None
    shares = [row["eval_rewards/accuracy"] for row in read_whole_lines(log) if "eval_rewards/accuracy" in row]
    return 100 * shares[-1] if shares else None


def table(found: dict) -> str:
    """Return the closing table."""
    names = {"start": "start model", "sft": "SFT on chosen", "dpo": "DPO", "bco": "BCO", "mpo": "MPO"}
    lines = [
        "                 direct    chain of   unparsable   reward",
        "                accuracy   thought     answers    accuracy",
    ]
    for method, row in found["methods"].items():
        reward = "   -  " if row["reward_accuracy"] is None else f"{row['reward_accuracy']:5.1f} %"
        lines.append(
            f"{names[method]:<15} {row['direct_accuracy']:6.1f} %   {row['cot_accuracy']:6.1f} %"
            f"    {row['unparsable']:6.1f} %    {reward}"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Run the path and write results.json and report.html."""
    settings = parse_settings(
        QuickstartSettings, argv or ["--output", "outputs/mini"], program="-m internvl_mpo.quickstart", about=__doc__,
        config=False,
    )  # fmt: skip
    if "mpo" not in settings.methods:
        raise BadInputError("methods must hold mpo, which makes the model and one side of the report")
    unknown = [method for method in settings.methods if method not in METHODS]
    if unknown:
        raise BadInputError(f"unknown method '{unknown[0]}', expected some of {', '.join(METHODS)}")
    out = Path(settings.output)
    found = results(settings, run_stages(stages(settings), out / "stages", _run))
    with atomic_writer(out / "results.json") as file:
        json.dump(found, file, indent=2)

    from internvl_mpo.mini.report import write_report

    write_report(out, found)
    print(f"\n{table(found)}\n")
    print(f"{found['num_test_questions']} questions about digits that no training picture shows; "
          f"{found['total_seconds']:.0f} s in all")  # fmt: skip
    print(f"report   {out / 'report.html'}\nnumbers  {out / 'results.json'}\nmodel    {out / 'model'}")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
