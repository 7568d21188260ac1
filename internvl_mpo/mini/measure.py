"""What an ablation asks of a model of the mini world: more than the greedy accuracy, and one verdict per question."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl_mpo.errors import BadInputError
from internvl_mpo.files import atomic_writer
from internvl_mpo.mini.choices import is_guess
from internvl_mpo.records import Question, read_rows
from internvl_mpo.settings import setting

_CALCULATION = re.compile(r"(\d+) (times|plus) (\d+) is (\d+)\b")


@dataclass
class MeasureSettings:
    """Settings of `python -m internvl_mpo.mini measure`."""

    model: str = setting(help="model folder")
    start: str = setting(help="folder of the start model, for the divergence from it")
    world: str = setting(help="folder made by `world`; its test.jsonl is asked")
    output: str = setting(help="JSON file to write")
    num_samples: int = setting(8, help="chains of thought drawn for each question at temperature 1")
    num_divergence: int = setting(150, help="questions whose samples are scored under both models")
    batch_size: int = setting(256, help="answers generated at the same time")
    max_new_tokens: int = setting(64, help="longest answer in tokens")

    def __post_init__(self) -> None:
        if self.num_samples < 1 or self.num_divergence < 1:
            raise BadInputError("num_samples and num_divergence must be at least 1")


def measure(settings: MeasureSettings) -> None:
    """Ask every held-out question directly, with a chain of thought, and several times at temperature 1.

    Writes for each question `direct`, `cot` (0 or 1) and `right_samples` (of `num_samples`); and as means over answers
    `unparsable` and `guesses` (shares of greedy chains of thought), `calculation_errors` (share of the calculations
    they state), `tokens` (of a greedy chain of thought, its end included) and `divergence` from the start model.
    """
    from internvl_mpo.engines.internvl_engine import InternVLEngine

    world = Path(settings.world)
    questions = read_rows(world / "test.jsonl", Question)
    engine = InternVLEngine(settings.model, device="cpu", batch_size=settings.batch_size)
    direct = _answers(engine, questions, world, "direct", settings)
    cot = _answers(engine, questions, world, "cot", settings)
    samples = _answers(engine, questions, world, "cot", settings, settings.num_samples)
    texts = [replies[0].text for replies in cot]
    parsable, right = _verdicts(questions, cot, "marker")
    found = {
        "num_samples": settings.num_samples,
        "direct": [sum(one) for one in _verdicts(questions, direct, "text")[1]],
        "cot": [sum(one) for one in right],
        "right_samples": [sum(one) for one in _verdicts(questions, samples, "marker")[1]],
        "unparsable": 1 - sum(sum(one) for one in parsable) / len(texts),
        "guesses": sum(map(is_guess, texts)) / len(texts),
        "calculation_errors": calculation_errors(texts),
        "tokens": sum(replies[0].num_tokens for replies in cot) / len(cot),
        "divergence": _divergence(engine, questions, samples, settings),
    }
    with atomic_writer(settings.output) as out:
        json.dump(found, out)


def calculation_errors(texts: Sequence[str]) -> float | None:
    """Return the share of stated calculations that are false; None where none is stated."""
    stated = [found for text in texts for found in _CALCULATION.findall(text)]
    wrong = [1 for a, word, b, c in stated if int(c) != (int(a) * int(b) if word == "times" else int(a) + int(b))]
    return len(wrong) / len(stated) if stated else None


def _answers(
    engine: Any, questions: Sequence[Question], world: Path, style: str, settings: MeasureSettings, num_samples: int = 0
) -> list[list[Any]]:
    """Replies of each question: one greedy one, or samples at temperature 1."""
    from internvl_mpo.engines import Request, Sampling
    from internvl_mpo.engines.journal import sample_seed
    from internvl_mpo.prompts import ask

    sampling = Sampling(temperature=float(num_samples > 0), max_new_tokens=settings.max_new_tokens)
    count = num_samples or 1
    requests = [
        Request(
            id=f"{index}/{number}",
            question=ask(question.question, style),
            images=tuple(str(world / image) for image in question.images),
            seed=sample_seed(0, question.id, number),
            sampling=sampling,
        )
        for index, question in enumerate(questions)
        for number in range(count)
    ]
    replies = {reply.id: reply for reply in engine.generate(requests)}
    failed = [reply for reply in replies.values() if reply.error]
    if failed:
        raise BadInputError(f"a question could not be asked: {failed[0].error}")
    return [[replies[f"{index}/{number}"] for number in range(count)] for index in range(len(questions))]


def _verdicts(
    questions: Sequence[Question], answers: Sequence[Sequence[Any]], answer_format: str
) -> tuple[list[list[bool]], list[list[bool]]]:
    """Whether each answer of each question can be read, and whether it is right."""
    from internvl_mpo.answers import Outcome, judge_response

    outcomes = [
        [judge_response(reply.text, question.answer or "", answer_format=answer_format).outcome for reply in replies]
        for question, replies in zip(questions, answers, strict=True)
    ]
    parsable = [[outcome is not Outcome.UNPARSABLE for outcome in one] for one in outcomes]
    return parsable, [[outcome is Outcome.RIGHT for outcome in one] for one in outcomes]


def _divergence(
    engine: Any, questions: Sequence[Question], samples: Sequence[Sequence[Any]], settings: MeasureSettings
) -> float:
    """KL(policy || start model) in nats a response: the mean log-ratio over samples of the policy at temperature 1."""
    import torch

    from internvl_mpo.engines.internvl_engine import InternVLEngine
    from internvl_mpo.logps import attach_scoring, response_logps
    from internvl_mpo.packing import pack_groups

    groups = _groups(engine, questions[: settings.num_divergence], samples, Path(settings.world))
    models = [engine.model, InternVLEngine(settings.start, device="cpu").model]
    for model in models:
        attach_scoring(model)
    total, count = 0.0, 0
    with torch.inference_mode():
        for first in range(0, len(groups), 16):
            pack = pack_groups([group for group, _ in groups[first : first + 16]])
            repeats = torch.tensor([number for _, counts in groups[first : first + 16] for number in counts])
            policy, start = (response_logps(model, pack) for model in models)
            total += float((repeats * (policy - start)).sum())
            count += int(repeats.sum())
    return total / count


def _groups(
    engine: Any, questions: Sequence[Question], samples: Sequence[Sequence[Any]], world: Path
) -> list[tuple[Any, list[int]]]:
    """Each question's distinct samples as a group to score, and how often each was drawn."""
    from PIL import Image

    from internvl_mpo.packing import Group
    from internvl_mpo.prompts import ask

    processor, groups = engine.processor, []
    for question, replies in zip(questions, samples, strict=False):
        prompt = engine.render(ask(question.question, "cot"), len(question.images))
        images = [Image.open(world / image) for image in question.images]
        features = processor(text=[prompt], images=[images])
        counts: dict[tuple[int, ...], int] = {}
        for reply in replies:
            end = "<|im_end|>" * (reply.finish_reason == "stop")
            ids = tuple(processor.tokenizer(reply.text + end, add_special_tokens=False)["input_ids"])
            if ids:
                counts[ids] = counts.get(ids, 0) + 1
        group = Group(list(features["input_ids"][0]), list(map(list, counts)), [], [], features["pixel_values"])
        groups.append((group, list(counts.values())))
    return groups
