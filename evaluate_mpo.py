r"""Answer the questions of benchmarks with a model, then score the answers.

Example (the mini world, direct and chain-of-thought answers):

    python evaluate_mpo.py --model outputs/mini/model --benchmarks mini --data outputs/mini/world --mode direct,cot \
        --output outputs/mini/eval

Answers are kept in OUTPUT/answers.jsonl and never generated twice; `--score_only` scores them again without a model.
`python evaluate_mpo.py compare RUN_A RUN_B` tells two runs apart, question by question.
"""

import dataclasses
import datetime
import io
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from internvl_mpo.benchmarks import load_benchmark
from internvl_mpo.benchmarks.common import Benchmark, Example, Mode, Rule, Score
from internvl_mpo.benchmarks.run_files import Log
from internvl_mpo.engines import Engine, Request, Sampling
from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.records import atomic_writer
from internvl_mpo.settings import parse_settings, setting, show_settings, write_settings


@dataclass
class EvaluateSettings:
    """Settings of `evaluate_mpo.py`."""

    benchmarks: list[str] = setting(help="names, separated by commas: mini, m3cot, mathvista, ...")
    output: str = setting(help="folder of the run: answers, verdicts, scores, report")
    model: str | None = setting(None, help="model folder or Hub id; name of the served model with --engine http")
    data: str | None = setting(
        None, help="local copy: a file or folder, or a folder with one entry per benchmark; without it, the Hub"
    )
    image_root: str | None = setting(None, help="folder of the pictures where they do not lie beside the rows")
    mode: list[Mode] = setting(["direct"], help="direct, cot, or both")
    rule: Rule = setting("ours", help="ours, official, vlmevalkit or internvl")
    limit: int | None = setting(None, help="first questions of each benchmark only")
    engine: str = setting("transformers", help="transformers (in this process) or http (an OpenAI-compatible server)")
    base_url: str = setting("http://127.0.0.1:8000/v1", help="address of the server with --engine http")
    batch_size: int = setting(32, help="answers generated at the same time")
    max_new_tokens: int | None = setting(None, help="longest answer; without it, the benchmark's own limit")
    max_tiles: int | None = setting(6, help="most 448x448 crops per picture, thumbnail not counted")
    device: str = setting("auto", help="auto, cpu, cuda, cuda:1, mps")
    dtype: str = setting("auto", help="auto, float32, bfloat16, float16")
    trust_remote_code: bool = setting(False, help="run code inside the model folder (not needed for InternVL)")
    score_only: bool = setting(False, help="score the answers that are there; load no model")

    def __post_init__(self) -> None:
        for name in self.benchmarks:
            load_benchmark(name)
        if not self.score_only and not self.model:
            raise BadInputError("missing setting 'model'; give --model VALUE, or --score_only to score stored answers")
        for key in ("limit", "max_new_tokens", "batch_size"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise BadInputError(f"setting '{key}' is {value}; give at least 1")


class Task(NamedTuple):
    """One benchmark in one mode, with its questions."""

    name: str
    mode: Mode
    benchmark: Benchmark
    examples: list[Example]


def main(argv: Sequence[str]) -> int:
    """Answer, score and report."""
    settings = parse_settings(EvaluateSettings, argv, program="evaluate_mpo.py", about=__doc__)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    output = Path(settings.output)
    tasks = load_tasks(settings)
    if rank == 0:
        print(show_settings(settings, "evaluate_mpo.py"))
        write_settings(settings, output / "settings.yaml")
    with Log(output / "answers.jsonl", rank) as answers:
        if not settings.score_only:
            answer_tasks(tasks, answers, settings, rank, world_size)
            wait_for_other_processes(world_size)
            answers.reload()
        if rank > 0:
            return 0
        verdicts = score_tasks(tasks, answers, settings.rule)
    scores = write_scores(verdicts, settings)
    print(format_table(scores))
    return 0


def load_tasks(settings: EvaluateSettings) -> list[Task]:
    """Return the questions of every benchmark and mode asked for."""
    tasks = []
    for name in settings.benchmarks:
        benchmark = load_benchmark(name)
        if settings.rule not in benchmark.RULES:
            raise BadInputError(f"{name} has no rule '{settings.rule}'; choose from {', '.join(benchmark.RULES)}")
        examples = benchmark.examples(data_source(settings, benchmark), settings.image_root)[: settings.limit]
        for mode in settings.mode:
            if mode in benchmark.MAX_NEW_TOKENS:
                tasks.append(Task(name, mode, benchmark, examples))
            else:
                print(f"{name} is never asked in mode {mode}; left out", file=sys.stderr)
    return tasks


def data_source(settings: EvaluateSettings, benchmark: Benchmark) -> str | Path:
    """Return where a benchmark's rows are: its entry in `--data`, `--data` itself, or the Hub."""
    if settings.data is None:
        if benchmark.HUB_ID is None:
            raise BadInputError(f"{benchmark.NAME} is not on the Hub; give its folder with --data")
        return f"hub:{benchmark.HUB_ID}"
    entry = Path(settings.data) / benchmark.NAME
    if entry.exists():
        return entry
    if len(settings.benchmarks) > 1:
        raise BadInputError(f"{settings.data} holds no entry '{benchmark.NAME}', needed with several benchmarks")
    return settings.data


def answer_tasks(tasks: Sequence[Task], answers: Log, settings: EvaluateSettings, rank: int, world_size: int) -> None:
    """Generate the answers that are missing and append each to the log as it comes."""
    questions = [(answer_key(task, example), task, example) for task in tasks for example in task.examples]
    questions = questions[rank::world_size]
    num_missing = sum(key not in answers.rows for key, _, _ in questions)
    if not num_missing:
        return
    engine = make_engine(settings)
    identity = {"model": engine.model_id, "revision": getattr(engine, "revision", None)}
    for row in answers.rows.values():
        if {name: row[name] for name in identity} != identity:
            raise BadInputError(
                f"{settings.output} holds answers of {row['model']} (revision {row['revision']}), not of "
                f"{identity['model']} (revision {identity['revision']}); choose another --output"
            )
    prompts = {key: task.benchmark.prompt(example, task.mode) for key, task, example in questions}
    requests = (
        Request(
            id=key,
            question=prompts[key],
            images=tuple(io.BytesIO(image) if isinstance(image, bytes) else image for image in example.images),
            sampling=Sampling(max_new_tokens=settings.max_new_tokens or task.benchmark.MAX_NEW_TOKENS[task.mode]),
        )
        for key, task, example in questions
    )
    num_failed = 0
    replies = engine.generate(requests, done=set(answers.rows))
    for reply in tqdm(replies, total=num_missing, desc="answers", unit="answer", disable=rank > 0):
        if reply.error:
            num_failed += 1
            tqdm.write(f"no answer to {reply.id}: {reply.error}", file=sys.stderr)
            continue
        answers.append(
            reply.id,
            {
                **identity,
                "prompt": prompts[reply.id],
                "answer": reply.text,
                "finish_reason": reply.finish_reason,
                "num_tokens": reply.num_tokens,
            },
        )
    if num_failed:
        print(f"{num_failed} questions got no answer; the same command asks only these again", file=sys.stderr)


def make_engine(settings: EvaluateSettings) -> Engine:
    """Return what answers the questions; models are loaded here and nowhere else."""
    if settings.engine == "http":
        from internvl_mpo.engines.http_engine import HttpEngine

        return HttpEngine(settings.base_url, settings.model, concurrency=settings.batch_size)
    import torch

    from internvl_mpo.engines.transformers_engine import TransformersEngine

    local_rank = os.environ.get("LOCAL_RANK")
    device = settings.device
    if device == "auto" and local_rank is not None and torch.cuda.is_available():
        device = f"cuda:{local_rank}"
    return TransformersEngine(
        settings.model,
        device=device,
        dtype=settings.dtype,
        batch_size=settings.batch_size,
        max_tiles=settings.max_tiles,
        trust_remote_code=settings.trust_remote_code,
    )


def answer_key(task: Task, example: Example) -> str:
    """Return the name of an answer in the run's files."""
    return f"{task.name}/{task.mode}/{example.id}"


def score_tasks(tasks: Sequence[Task], answers: Log, rule: Rule) -> list[tuple[Task, list[Score]]]:
    """Return the verdict on every question; a question without an answer is unscored."""
    verdicts = []
    for task in tasks:
        scores = []
        for example in tqdm(task.examples, desc=f"scores {task.name} {task.mode}", unit="answer", leave=False):
            row = answers.rows.get(answer_key(task, example))
            if row is None:
                scores.append(Score(id=example.id, value=None, extracted=None, reason="no answer generated"))
            else:
                scores.append(task.benchmark.score(example, row["answer"], rule, task.mode))
        verdicts.append((task, scores))
    return verdicts


def write_scores(verdicts: Sequence[tuple[Task, list[Score]]], settings: EvaluateSettings) -> dict[str, Any]:
    """Write scores.json (the numbers) and verdicts.jsonl (every verdict with its reason); return the numbers."""
    output = Path(settings.output)
    scores: dict[str, Any] = {}
    with atomic_writer(output / "verdicts.jsonl") as file:
        for task, task_scores in verdicts:
            summary = task.benchmark.summarise(task_scores, settings.rule)
            scores.setdefault(task.name, {})[task.mode] = {"rule": settings.rule, **summary}
            for score in task_scores:
                row = {"benchmark": task.name, "mode": task.mode, **dataclasses.asdict(score)}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    with atomic_writer(output / "scores.json") as file:
        json.dump(scores, file, indent=2, ensure_ascii=False)
    return scores


def format_table(scores: dict[str, Any]) -> str:
    """Return the headline numbers as lines of text."""
    rows = [("benchmark", "mode", "rule", "number", "score", "95 % interval", "unanswered", "unscored", "questions")]
    for name, modes in scores.items():
        for mode, summary in modes.items():
            headline = summary["headline"]
            rows.append(
                (
                    load_benchmark(name).TITLE,
                    mode,
                    summary["rule"],
                    headline,
                    _number(summary[headline]),
                    " - ".join(_number(end) for end in summary["interval"]) if summary["interval"] else "-",
                    _number(summary["unanswered"]) + " %",
                    str(summary["num_unscored"]),
                    str(summary["num_examples"]),
                )
            )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def wait_for_other_processes(world_size: int) -> None:
    """Return when every process of a torchrun launch has come here."""
    if world_size == 1:
        return
    import torch.distributed as dist

    # Shards of a large benchmark may end hours apart.
    dist.init_process_group("gloo", timeout=datetime.timedelta(days=2))
    dist.barrier()
    dist.destroy_process_group()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


if __name__ == "__main__":
    sys.exit(run_program(main))
