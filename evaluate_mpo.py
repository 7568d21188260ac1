r"""Answer the questions of benchmarks with a model, then score the answers.

Example (the mini world, direct and chain-of-thought answers):

    python evaluate_mpo.py --model outputs/mini/model --benchmarks mini --data outputs/mini/world --mode direct,cot \
        --output outputs/mini/eval

Answers are kept in OUTPUT/answers.jsonl and never generated twice; `--score_only` scores them again without a model.
`--num_samples 8 --temperature 1` asks every question eight times: mean accuracy, pass@k, majority vote, and with a
judge the best of eight.
MM-Vet, LLaVA-Bench and MMHal-Bench need a judge (`--judge MODEL --judge_url URL`, any OpenAI-compatible server, its key
in the environment variable JUDGE_API_KEY); MathVista reads answers better with one. Its replies are kept likewise.

    python evaluate_mpo.py compare RUN_A RUN_B

tells two runs apart: the paired difference on every benchmark with its interval, the questions that flipped, and both
models' answers side by side in RUN_B/compare.html.

    python evaluate_mpo.py card RUN MODEL_FOLDER

writes a run's numbers on the model's card: `model-index` in README.md and `.eval_results/`.
"""

import dataclasses
import datetime
import hashlib
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from internvl_mpo.benchmarks import load_benchmark
from internvl_mpo.benchmarks.common import Benchmark, Picture, Score, open_image, picture_bytes
from internvl_mpo.engines import Engine, Request, Sampling
from internvl_mpo.engines.journal import sample_seed
from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.evaluation.comparison import compare_runs
from internvl_mpo.evaluation.judge import JudgeReplies, judge_tasks
from internvl_mpo.evaluation.model_card import add_to_card
from internvl_mpo.evaluation.report import MAX_QUESTIONS, report_html
from internvl_mpo.evaluation.run_files import KeyedLog
from internvl_mpo.evaluation.samples import numbers_of, summarise_samples
from internvl_mpo.evaluation.selection import choose_best
from internvl_mpo.evaluation.settings import EvalTask, EvaluateSettings
from internvl_mpo.files import atomic_writer
from internvl_mpo.jsonl import json_line
from internvl_mpo.settings import parse_settings, show_settings, write_settings


def main(argv: Sequence[str]) -> int:
    """Answer, judge, score and report."""
    if argv[:1] == ["compare"]:
        return compare(argv[1:])
    if argv[:1] == ["card"]:
        return card(argv[1:])
    settings = parse_settings(EvaluateSettings, argv, program="evaluate_mpo.py", about=__doc__)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    output = Path(settings.output)
    tasks = load_tasks(settings)
    if rank == 0:
        print(show_settings(settings, "evaluate_mpo.py"))
        write_settings(settings, output / ("settings.score.yaml" if settings.score_only else "settings.yaml"))
    with KeyedLog(output / "answers.jsonl", rank) as answers:
        if not settings.score_only:
            answer_tasks(tasks, answers, settings, rank, world_size)
            wait_for_other_processes(world_size)
            answers.reload()
        if rank > 0:
            return 0
    judged = judge_tasks(tasks, answers, settings)
    verdicts = score_tasks(tasks, answers, judged, settings)
    scores = write_scores(verdicts, answers, judged, settings)
    write_report([output], output / "report.html")
    print(format_table(scores, settings.max_unscored))
    return 0


def load_tasks(settings: EvaluateSettings) -> list[EvalTask]:
    """Return the questions of every benchmark and mode asked for."""
    tasks = []
    for name in settings.benchmarks:
        benchmark = load_benchmark(name)
        if settings.rule not in benchmark.RULES:
            raise BadInputError(f"{name} has no rule '{settings.rule}'; choose from {', '.join(benchmark.RULES)}")
        source = data_source(settings, benchmark)
        try:
            examples = benchmark.examples(source, settings.image_root)[: settings.limit]
        except KeyError as error:
            raise BadInputError(f"a row of {source} has no field {error}, which {name} needs") from error
        twice = [id for id, count in Counter(example.id for example in examples).items() if count > 1]
        if twice:
            raise BadInputError(f"{source} holds the question '{twice[0]}' of {name} more than once")
        for mode in settings.mode:
            if mode in benchmark.MAX_NEW_TOKENS:
                tasks.append(EvalTask(name, mode, benchmark, examples))
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


def answer_tasks(
    tasks: Sequence[EvalTask], answers: KeyedLog, settings: EvaluateSettings, rank: int, world_size: int
) -> None:
    """Generate the answers that are missing and append each to the log as it comes."""
    questions = [(key, task, example) for task in tasks for key, example in task.keys(settings.num_samples)]
    refuse_other_temperature(answers, settings, [key for key, _, _ in questions])
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
            images=tuple(for_engine(image, engine) for image in example.images),
            seed=sample_seed(0, key, 0) if settings.temperature else 0,
            sampling=Sampling(
                temperature=settings.temperature,
                max_new_tokens=settings.max_new_tokens or task.benchmark.MAX_NEW_TOKENS[task.mode],
            ),
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
                "temperature": settings.temperature,
            },
        )
    if num_failed:
        print(f"{num_failed} questions got no answer; the same command asks only these again", file=sys.stderr)


def refuse_other_temperature(answers: KeyedLog, settings: EvaluateSettings, keys: Sequence[str]) -> None:
    """Raise BadInputError where the run holds such answers drawn at another temperature."""
    for key in keys:
        kept = answers.rows.get(key, {}).get("temperature", 0.0)  # older runs are greedy
        if key in answers.rows and kept != settings.temperature:
            raise BadInputError(
                f"{settings.output} holds answers at temperature {kept}, not {settings.temperature}; choose another "
                "--output"
            )


def make_engine(settings: EvaluateSettings) -> Engine:
    """Return what answers the questions; models are loaded here and nowhere else."""
    if settings.engine == "http":
        from internvl_mpo.engines.http_engine import HttpEngine

        key = os.environ.get("MODEL_API_KEY")
        return HttpEngine(settings.base_url, settings.model, concurrency=settings.batch_size, api_key=key)
    import torch

    from internvl_mpo.engines.loading import load_model_engine

    local_rank = os.environ.get("LOCAL_RANK")
    device = settings.device
    if device == "auto" and local_rank is not None and torch.cuda.is_available():
        device = f"cuda:{local_rank}"
    return load_model_engine(
        settings.model,
        device=device,
        dtype=settings.dtype,
        batch_size=settings.batch_size,
        max_tiles=settings.max_tiles,
        trust_remote_code=settings.trust_remote_code,
    )


def for_engine(image: Picture, engine: Engine) -> Any:
    """Return a picture as an engine takes it: decoded one by one for requests that are sent, undecoded for batches."""
    if isinstance(image, Path):
        return image
    return open_image(image) if engine.name == "http" else io.BytesIO(picture_bytes(image))


class Scored(NamedTuple):
    """The verdicts on a task: the answers to each question, in the order of the questions."""

    task: EvalTask
    scores: list[list[Score]]
    chosen: dict[str, int] | None  # question id -> the answer a judge found best, with several answers and a judge


def score_tasks(
    tasks: Sequence[EvalTask], answers: KeyedLog, judged: JudgeReplies, settings: EvaluateSettings
) -> list[Scored]:
    """Return the verdict on every answer; a question without an answer is unscored."""
    verdicts = []
    for task in tasks:
        scores: list[Score] = []
        keys = list(task.keys(settings.num_samples))
        for key, example in tqdm(keys, desc=f"scores {task.name} {task.mode}", unit="answer", leave=False):
            row = answers.rows.get(key)
            replies = judged.replies.get(key)
            extra = {"replies": replies} if replies else {}
            if row is None:
                reason = "no answer generated"
                scores.append(Score(id=example.id, value=None, extracted=None, reason=reason, cluster=example.cluster))
            else:
                scores.append(task.benchmark.score(example, row["answer"], settings.rule, task.mode, **extra))
        by_question = [
            scores[start : start + settings.num_samples] for start in range(0, len(scores), settings.num_samples)
        ]
        asks = settings.judge is not None and settings.num_samples > 1
        verdicts.append(Scored(task, by_question, choose_best(task, by_question, answers, settings) if asks else None))
    return verdicts


def write_scores(
    verdicts: Sequence[Scored], answers: KeyedLog, judged: JudgeReplies, settings: EvaluateSettings
) -> dict[str, Any]:
    """Write scores.json (the numbers) and verdicts.jsonl (question, answer, verdict, reason); return the numbers."""
    output = Path(settings.output)
    scores: dict[str, Any] = {}
    with atomic_writer(output / "verdicts.jsonl") as file:
        for task, task_scores, chosen in verdicts:
            if settings.num_samples > 1:
                summary = summarise_samples(task, task_scores, settings.rule, chosen)
            else:
                summary = task.benchmark.summarise([score for (score,) in task_scores], settings.rule)
            if judged.identity and (hasattr(task.benchmark, "JUDGE_PROMPT") or chosen is not None):
                summary["judge"] = {**judged.identity, **judged.retries[task.label]}
            scores.setdefault(task.name, {})[task.mode] = {"rule": settings.rule, **summary}
            flat = [score for part in task_scores for score in part]
            for number, ((key, example), score) in enumerate(zip(task.keys(settings.num_samples), flat, strict=True)):
                shown = example.images if number < MAX_QUESTIONS else ()
                row = {
                    "benchmark": task.name,
                    "mode": task.mode,
                    **dataclasses.asdict(score),
                    "sample": number % settings.num_samples,
                    "question": example.question,
                    "choices": example.choices,
                    "gold": example.answer,
                    "images": [kept_picture(image, output) for image in shown],
                    "answer": answers.rows.get(key, {}).get("answer"),
                }
                file.write(json_line(row))
    with atomic_writer(output / "scores.json") as file:
        json.dump(scores, file, indent=2, ensure_ascii=False)
    return scores


def kept_picture(image: Picture, output: Path) -> str:
    """Return a path at which the report finds the picture; embedded ones are written to the run folder once."""
    if isinstance(image, Path):
        return str(image.resolve())
    content = picture_bytes(image)
    path = output / "pictures" / hashlib.sha256(content).hexdigest()[:16]
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return str(path.resolve())


def write_report(runs: Sequence[Path], path: Path) -> None:
    """Write the report of one run or of two runs side by side."""
    with atomic_writer(path) as file:
        file.write(report_html(runs))


def compare(argv: Sequence[str]) -> int:
    """Print what changed between two runs, and write both side by side to RUN_B/compare.html."""
    if len(argv) != 2:
        raise BadInputError(f"compare takes two run folders, got {len(argv)}; give RUN_A RUN_B")
    runs = [Path(run) for run in argv]
    for difference in compare_runs(*runs):
        print(difference.text())
    write_report(runs, runs[1] / "compare.html")
    print(f"side by side: {runs[1] / 'compare.html'}")
    return 0


def card(argv: Sequence[str]) -> int:
    """Write a run's numbers on a model's card."""
    if len(argv) != 2:
        raise BadInputError(f"card takes a run folder and a model folder, got {len(argv)} arguments")
    for path in add_to_card(Path(argv[0]), Path(argv[1])):
        print(path)
    return 0


def format_table(scores: dict[str, Any], max_unscored: float) -> str:
    """Return the headline numbers as lines of text; none for a benchmark with too many unscored questions."""
    head = ("benchmark", "mode", "rule", "number", "score", "95 % interval", "resampled", "unanswered", "unscored")
    rows = [(*head, "questions")]
    for name, modes in scores.items():
        for mode, summary in modes.items():
            is_scored = summary["num_unscored"] <= max_unscored * summary["num_examples"]
            counts = (
                "{num} {unit}".format(**summary["resampled"]),
                _number(summary["unanswered"]) + " %",
                str(summary["num_unscored"]),
                str(summary["num_examples"]),
            )
            for number, score, interval in numbers_of(summary):
                shown = _number(score) if is_scored else "too few scored"
                spread = " - ".join(_number(end) for end in interval) if interval else "-"
                rows.append((load_benchmark(name).TITLE, mode, summary["rule"], number, shown, spread, *counts))
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
