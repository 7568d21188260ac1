"""Benchmarks as metrics: predictions and references in, numbers out. The `metrics/` folders are thin over this file.

A reference is a row of the benchmark without its picture; `REFERENCE_FIELDS` says which fields scoring needs.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from internvl_mpo.benchmarks import load_benchmark
from internvl_mpo.benchmarks.common import Rule
from internvl_mpo.errors import BadInputError

# benchmark -> field -> "text", "number" or "texts"; numbers and lists may be empty where a question has none.
REFERENCE_FIELDS: dict[str, dict[str, str]] = {
    "pope": {"question_id": "text", "label": "text", "category": "text"},
    "m3cot": {"id": "text", "choices": "texts", "answer": "text"},
    "mathvista": {
        "pid": "text",
        "choices": "texts",
        "answer": "text",
        "question_type": "text",
        "answer_type": "text",
        "precision": "number",
    },
    "mathvision": {"id": "text", "options": "texts", "answer": "text"},
    "crpe": {"question_id": "text", "text": "text", "category": "text", "correct_option": "text"},
}


def compute_metric(
    name: str, predictions: Sequence[str | None], references: Sequence[Mapping[str, Any]], rule: Rule = "ours"
) -> dict[str, Any]:
    """Return a benchmark's numbers for a model's raw answers.

    Args:
        name: a key of `REFERENCE_FIELDS`.
        predictions: answers as generated, one per reference; None is unanswered.
        references: rows with the fields of `REFERENCE_FIELDS`.
        rule: one of the benchmark's rules; its file says what each does.

    Raises:
        BadInputError: unknown rule, lists of different length, or a reference without a field.
    """
    benchmark = load_benchmark(name)
    if rule not in benchmark.RULES:
        raise BadInputError(f"{name} has no rule '{rule}'; choose from {', '.join(benchmark.RULES)}")
    if len(predictions) != len(references):
        raise BadInputError(f"{len(predictions)} predictions for {len(references)} references; give one for each")
    for number, row in enumerate(references):
        missing = [field for field in REFERENCE_FIELDS[name] if field not in row]
        if missing:
            raise BadInputError(f"reference {number} of {name} has no field '{missing[0]}'")
    if name == "crpe":  # the rotations of a question are found by their order
        examples = benchmark.examples(references)
    else:
        examples = [benchmark.examples([{"question": "", **row}])[0] for row in references]
    scores = [benchmark.score(example, text, rule) for example, text in zip(examples, predictions, strict=True)]
    return benchmark.summarise(scores, rule)


def build_demo(name: str) -> Any:
    """Return the Gradio page of a metric's Space: answers and references as JSON lines, numbers as JSON."""
    import gradio as gr

    benchmark = load_benchmark(name)
    fields = ", ".join(REFERENCE_FIELDS[name])

    def run(predictions: str, references: str, rule: Rule) -> dict[str, Any]:
        try:
            rows = [json.loads(line) for line in references.split("\n") if line.strip()]
            answers = [json.loads(line) for line in predictions.split("\n") if line.strip()]
            return compute_metric(name, answers, rows, rule)
        except (BadInputError, ValueError) as error:
            raise gr.Error(str(error)) from error

    return gr.Interface(
        run,
        [
            gr.Textbox(lines=8, label="Answers, one JSON text per line"),
            gr.Textbox(lines=8, label=f"References, one JSON object per line: {fields}"),
            gr.Dropdown(list(benchmark.RULES), value="ours", label="Rule"),
        ],
        gr.JSON(label="Numbers"),
        title=benchmark.TITLE,
        description=(benchmark.__doc__ or "").split("\n\n", 1)[0],
    )
