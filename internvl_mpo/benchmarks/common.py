"""What the benchmarks share: `Example` in, `Score` out, the contract every benchmark file answers, and the summary.

A benchmark file reads top to bottom as: where it comes from; `examples(source)`; `prompt(example, mode)`;
`score(example, answer, rule)`; `summarise(scores)`. Scoring is text in, verdict out: no model, no network, no clock.
A missing answer is an outcome of its own (`extracted` is None); a verdict nobody gave is another (`value` is None).
"""

import io
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from PIL import Image

from internvl_mpo.errors import BadInputError
from internvl_mpo.pictures import damage

Mode = Literal["direct", "cot"]
Rule = Literal["ours", "official", "vlmevalkit", "internvl"]
T = TypeVar("T")
Picture = Path | bytes | Callable[[], bytes]  # a file, an encoded picture, or what reads one

NUM_RESAMPLES = 1000
MAX_REPLY = 2_000_000  # characters
SLOW_REPLY = 200_000  # where a rule passes over the reply dozens of times
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, kw_only=True)
class Example:
    """One question of a benchmark.

    Attributes:
        id: unique within the benchmark.
        question: the question's own text, without options or instructions.
        answer: gold answer as the benchmark states it; for multiple choice the letter. None where a judge decides.
        images: opened by `open_image` only when a model or the report needs them.
        choices: option texts, A first; empty for open questions.
        groups: breakdowns, name -> the values this question counts under ("skill" -> two skills).
        cluster: what it shares with other questions (its picture), which are resampled together; "" for nothing.
        details: what only this benchmark knows (answer type, precision, hint, reference answer, ...).
    """

    id: str
    question: str
    answer: str | None = None
    images: tuple[Picture, ...] = ()
    choices: tuple[str, ...] = ()
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    cluster: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Score:
    """The verdict on one answer.

    Attributes:
        id: the example's id.
        value: 0 to 1 (MMHal-Bench: 0 to 6); None means unscored: no answer was generated or no judge reply parsed.
        extracted: what was taken from the answer as its final answer; None means unanswered.
        reason: which step of the rule decided, in a few words.
        groups: the example's breakdowns.
        cluster: the example's cluster.
        details: what `summarise` needs beyond the value (label, question of a rotation, scores per judge run).
    """

    id: str
    value: float | None
    extracted: str | None
    reason: str
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    cluster: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


class Benchmark(Protocol):
    """What a benchmark's module provides.

    A judged benchmark has `JUDGE_PROMPT` and `JUDGE_MAX_NEW_TOKENS` too, a function `judge_request(example, answer,
    template)` that returns what a judge is asked (None where no judge is needed), and takes `replies` in `score`. Where
    its original repeats requests, `JUDGE_RETRIES` holds the temperatures by rule, `JUDGE_REMINDER` what is added to the
    request, and `is_readable(reply, rule)` says when.
    """

    NAME: str
    TITLE: str
    HUB_ID: str | None  # data set on the Hub, with a split after a colon; None: local data only
    RULES: tuple[Rule, ...]
    MAX_NEW_TOKENS: Mapping[Mode, int]  # per mode the benchmark is asked in
    CLUSTER: str  # what questions may share, in the plural: "pictures"

    def examples(self, source: "Source", image_root: str | Path | None = None) -> list[Example]:
        """Return the questions of a local copy, a Hub data set, or rows already read.

        Args:
            source: see `internvl_mpo.benchmarks.sources.read_rows`.
            image_root: folder of the pictures where it is not the folder of the rows.
        """

    def prompt(self, example: Example, mode: Mode) -> str:
        """Return the user's text for a model, without image placeholders."""

    def score(self, example: Example, answer: str | None, rule: Rule = "ours", mode: Mode = "cot") -> Score:
        """Return the verdict on a model's raw answer, which was asked for in `mode`. Never raises."""

    def summarise(self, scores: Sequence[Score], rule: Rule = "ours") -> dict[str, Any]:
        """Return the numbers the paper reports, in per cent where the paper does so, with breakdowns.

        `headline` names the key that stands in the table, `interval` is its 95 % bootstrap interval, and `resampled`
        what was drawn for it.
        """


Source = str | Path | Iterable[Mapping[str, Any]]


def reply_text(answer: str | None, longest: int = MAX_REPLY) -> str:
    """Return the answer as text: None is empty, and of a runaway reply the middle is left out (scoring stays quick)."""
    text = "" if answer is None else str(answer)
    return text if len(text) <= longest else text[: longest // 2] + text[-longest // 2 :]


def picture_bytes(source: bytes | Callable[[], bytes]) -> bytes:
    """Return the encoded bytes of a picture that is no file of its own."""
    return source() if callable(source) else source


def open_image(source: Picture) -> Image.Image:
    """Return an RGB picture.

    Raises:
        BadInputError: it is missing or no picture.
    """
    content = source if isinstance(source, Path) else picture_bytes(source)
    name = f"picture {content}" if isinstance(content, Path) else f"an embedded picture of {len(content)} bytes"
    try:
        with Image.open(content if isinstance(content, Path) else io.BytesIO(content)) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BadInputError(f"cannot open {name}: {damage(error)}") from error


# The chain-of-thought prompt's own rule (OpenGVLab/InternVL `extract_answer`, VLMEvalKit `mpo_post_processing`):
# the rest of the line after the *first* marker. A self-corrected answer is therefore scored on what it discarded.
_FIRST_MARKER = re.compile(r"(?:final answer:|answer:)\s*(.*)", re.IGNORECASE)


def first_marked_answer(text: str) -> str:
    """Return what upstream extracts from a chain of thought: the line after the first marker, else the whole text."""
    if "answer:" not in text.casefold():  # most of a long text is searched far quicker than by the pattern
        return text
    match = _FIRST_MARKER.search(text)
    return match.group(1).strip() if match else text


def percent(values: Sequence[float]) -> float | None:
    """Return the mean in per cent; None for no values."""
    return 100 * sum(values) / len(values) if values else None


def bootstrap_interval(
    items: Sequence[T],
    statistic: Callable[[Sequence[T]], float | None],
    clusters: Sequence[str] = (),
    *,
    seed: int = 0,
) -> list[float] | None:
    """Return the 95 % percentile interval of a statistic under resampling of questions, or of clusters of them.

    Questions about one picture are answered right or wrong together, so drawing them one by one makes the interval too
    narrow: whole clusters are drawn with replacement.

    Args:
        items: one outcome per question.
        statistic: a sample's number, None where undefined (such samples are left out).
        clusters: the cluster of each item, "" for an item by itself; empty where no item shares anything.
        seed: equal seeds give equal intervals.

    Returns:
        `[low, high]`, or None where fewer than two clusters or no sample gave a number.
    """
    parts = list(_by_cluster(items, clusters).values()) if any(clusters) else [[item] for item in items]
    if len(parts) < 2:
        return None
    draw = random.Random(seed)
    samples = (statistic(list(chain.from_iterable(draw.choices(parts, k=len(parts))))) for _ in range(NUM_RESAMPLES))
    numbers = sorted(number for number in samples if number is not None)
    if not numbers:
        return None
    return [numbers[int(0.025 * (len(numbers) - 1))], numbers[round(0.975 * (len(numbers) - 1))]]


def _by_cluster(items: Sequence[T], clusters: Sequence[str]) -> dict[Any, list[T]]:
    parts: dict[Any, list[T]] = {}
    for number, (item, cluster) in enumerate(zip(items, clusters, strict=True)):
        parts.setdefault(cluster or number, []).append(item)
    return parts


def resampled(clusters: Sequence[str], unit: str) -> dict[str, Any]:
    """Return what `bootstrap_interval` draws: how many clusters there are, and of what."""
    named = len(_by_cluster(clusters, clusters))
    return {"unit": unit if any(clusters) else "questions", "num": named}


def summarise_accuracy(scores: Sequence[Score], unit: str) -> dict[str, Any]:
    """Return accuracy in per cent with its interval, the unanswered share, and the breakdowns of `Score.groups`.

    Unscored questions are counted and left out of every mean. `unit` says what the clusters are.
    """
    scored = [score for score in scores if score.value is not None]
    values, clusters = [score.value for score in scored], [score.cluster for score in scored]
    summary: dict[str, Any] = {
        "headline": "accuracy",
        "accuracy": percent(values),
        "interval": bootstrap_interval(values, percent, clusters),
        "resampled": resampled(clusters, unit),
        **count_outcomes(scores),
    }
    summary["breakdown"] = breakdown(scored, lambda part: percent([score.value for score in part]))
    return summary


def count_outcomes(scores: Sequence[Score]) -> dict[str, Any]:
    """Return how many questions there were, how many nobody scored, and the share without an answer (per cent)."""
    scored = [score for score in scores if score.value is not None]
    return {
        "num_examples": len(scores),
        "num_unscored": len(scores) - len(scored),
        "unanswered": percent([score.extracted is None for score in scored]),
    }


def breakdown(
    scores: Sequence[Score], statistic: Callable[[Sequence[Score]], float | None]
) -> dict[str, dict[str, dict[str, Any]]]:
    """Return group -> value -> {"score", "num_examples"}; a question counts under each of its values."""
    parts: dict[str, dict[str, list[Score]]] = {}
    for score in scores:
        for name, values in score.groups.items():
            for value in values:
                parts.setdefault(name, {}).setdefault(value, []).append(score)
    return {
        name: {value: {"score": statistic(part), "num_examples": len(part)} for value, part in sorted(by_value.items())}
        for name, by_value in parts.items()
    }
