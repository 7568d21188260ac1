"""Scores of a run on a model's card: `model-index` in README.md, and `.eval_results/NAME.yaml` for leaderboards."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from internvl_mpo.benchmarks import load_benchmark
from internvl_mpo.errors import BadInputError


def add_to_card(run: Path, model: Path, model_name: str | None = None) -> list[Path]:
    """Write a run's headline numbers into a model folder and return the files written.

    Numbers of the same benchmark and mode are replaced, everything else on the card is kept.

    Args:
        run: folder of `evaluate_mpo.py`.
        model: model folder with a README.md.
        model_name: name in `model-index`; None keeps the card's own, or takes the folder's.

    Raises:
        BadInputError: the run has no scores, or the model folder no README.md.
    """
    from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, eval_result_entries_to_yaml

    card_path, scores_path = model / "README.md", run / "scores.json"
    for path, remedy in ((scores_path, "evaluate into it first"), (card_path, "build the model folder first")):
        if not path.exists():
            raise BadInputError(f"{path.parent} holds no {path.name}; {remedy}")
    scores = json.loads(scores_path.read_text(encoding="utf-8"))
    card = ModelCard.load(card_path)
    results = {(result.dataset_type, result.metric_name): result for result in card.data.eval_results or []}
    written = [card_path]
    for name, modes in scores.items():
        benchmark = load_benchmark(name)
        dataset, _, split = (benchmark.HUB_ID or name).partition(":")
        entries = []
        for mode, value, notes in _headlines(modes):
            headline = modes[mode]["headline"]
            label = f"{benchmark.TITLE} {headline} ({mode})"
            results[dataset, label] = EvalResult(
                task_type="image-text-to-text",
                dataset_type=dataset,
                dataset_name=benchmark.TITLE,
                dataset_split=split or None,
                metric_type=headline,
                metric_name=label,
                metric_value=value,
                metric_args={"notes": notes},
            )
            entries.append(EvalResultEntry(dataset_id=dataset, task_id=name, value=value, notes=notes))
        if entries and benchmark.HUB_ID:
            path = model / ".eval_results" / f"{name}.yaml"
            path.parent.mkdir(exist_ok=True)
            path.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False), encoding="utf-8")
            written.append(path)
    card.data.eval_results = list(results.values())
    card.data.model_name = model_name or card.data.model_name or model.name
    card.save(card_path)
    return written


def _headlines(modes: dict[str, Any]) -> Iterator[tuple[str, float, str]]:
    """Mode, headline number, and how it came about, of every mode with a number."""
    for mode, summary in modes.items():
        value = summary[summary["headline"]]
        if value is None:
            continue
        notes = [f"{mode} answers", f"rule {summary['rule']}", f"{summary['num_examples']} questions"]
        if summary["num_unscored"]:
            notes.append(f"{summary['num_unscored']} unscored")
        if summary.get("judge", {}).get("served"):
            notes.append(f"judge {', '.join(summary['judge']['served'])}")
        yield mode, round(value, 2), ", ".join(notes)
