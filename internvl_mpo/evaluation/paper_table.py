"""The main table of "Enhancing the Reasoning Ability of Multimodal Large Language Models via MPO" (arXiv 2411.10442).

Thirteen models, eight benchmarks, as printed in version 1 of the paper and in the InternVL documentation; where later
versions print another figure, `OTHER_PRINTINGS` has it. It is no level field: see `PROTOCOLS` and docs/benchmarks.md.
"""

from typing import NamedTuple

COLUMNS = ("m3cot", "mathvista", "mathvision", "mmvet", "llava_bench", "pope", "crpe", "mmhal_bench")


class Protocol(NamedTuple):
    """How a column's numbers came about.

    Attributes:
        number: which of our summary's numbers the column is.
        scale: largest value of the column.
        judge: who judged or extracted, None where rules alone decide.
        program: whose scripts made the InternVL rows, by the authors' account.
        caution: what a reader has to know before comparing.
    """

    number: str
    scale: float
    judge: str | None
    program: str
    caution: str


PROTOCOLS = {
    "m3cot": Protocol(
        "accuracy", 100, None, "InternVL scripts", "M3CoT's train split is part of MMPR, so the MPO row is in-domain."
    ),
    "mathvista": Protocol(
        "accuracy",
        100,
        "GPT-4-0613 or GPT-4-Turbo (not established)",
        "VLMEvalKit, by the maintainers",
        "A judge reads the answers; without one scores are far lower.",
    ),
    "mathvision": Protocol(
        "accuracy", 100, "GPT-4-Turbo", "VLMEvalKit", "The MINI split of 304 questions: one question is 0.33 points."
    ),
    "mmvet": Protocol("total", 100, "GPT-4-Turbo", "VLMEvalKit", "Not comparable with the official web evaluator."),
    "llava_bench": Protocol(
        "relative", 105, "GPT-4-Turbo", "VLMEvalKit", "Relative to reference answers; reviews differ by a point."
    ),
    "pope": Protocol("f1", 100, None, "InternVL scripts", "Mean of three F1 on the label files of 8,910 questions."),
    "crpe": Protocol(
        "per_row", 100, None, "VLMEvalKit", "InternVL rows count single rows; LLaVA-1.5-13B's is the circular number."
    ),
    "mmhal_bench": Protocol("rating", 6, "GPT-4o", "InternVL scripts", "96 questions; one decimal is printed."),
}

# InternVL2 rows are direct answers, the MPO row chain-of-thought answers; most other rows are copied from papers.
MODES = {"InternVL2-8B": "direct", "InternVL2-8B-MPO": "cot"}

ROWS: dict[str, tuple[float | None, ...]] = {
    "Gemini-1.5-Pro": (None, 63.9, 19.2, None, None, None, None, None),
    "GPT-4o": (64.3, 63.8, 30.4, 69.1, 97.6, 86.9, 76.6, 4.0),
    "GPT-4o-Mini": (61.9, 52.4, 27.3, 66.9, 95.4, 85.1, 73.1, 3.6),
    "LLaVA-1.5-13B": (39.5, 27.6, 11.1, 36.3, 70.7, 85.9, 55.6, 2.4),
    "Qwen2-VL-7B": (57.8, 58.2, 21.1, 60.6, 67.7, 88.1, 74.4, 3.4),
    "MiniCPM-V-2-6-8B": (56.0, 60.6, 23.4, 57.4, 83.4, 87.3, 75.2, 3.6),
    "LLaVA-OneVision-7B": (52.3, 63.2, 18.4, 51.4, 79.9, 88.4, 73.7, 3.1),
    "InternVL2-26B": (58.2, 59.4, 23.4, 62.1, 92.3, 88.0, 75.6, 3.7),
    "InternVL2-40B": (63.6, 63.7, 21.4, 65.5, 100.5, 88.4, 77.3, 3.9),
    "InternVL2-76B": (65.4, 67.5, 23.7, 65.7, 99.3, 89.0, 77.8, 3.8),
    "InternVL2-Pro": (65.6, 66.3, 18.8, 69.4, 99.5, 88.2, 77.6, 3.7),
    "InternVL2-8B": (59.3, 58.3, 20.4, 54.2, 73.2, 86.9, 75.5, 3.3),
    "InternVL2-8B-MPO": (79.2, 67.0, 25.7, 56.2, 76.7, 88.1, 75.4, 3.5),
}

OTHER_PRINTINGS = {("InternVL2-76B", "mathvista"): (67.2,), ("InternVL2-8B", "crpe"): (75.0,)}

# LLaVA-1.5-13B's row is put together from several publications; these cells could be traced and recomputed.
LLAVA_SOURCES = {
    "m3cot": "M3CoT's own chain-of-thought run, 39.47",
    "mmvet": "LLaVA's own three GPT-4 grades, 36.3 (not GPT-4-Turbo)",
    "pope": "mean F1 of LLaVA's published answers, 85.947",
    "crpe": "all-seeing's circular mean of three categories, 55.63",
    "llava_bench": "the LLaVA-1.5 paper",
}


def column(name: str) -> dict[str, float]:
    """Return model -> value of one benchmark, models without a value left out."""
    position = COLUMNS.index(name)
    return {model: values[position] for model, values in ROWS.items() if values[position] is not None}
