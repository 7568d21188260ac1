"""MathVision as an `evaluate` metric: `evaluate.load("./metrics/mathvision")`. The rules are those of internvl_mpo."""

from typing import Any

import datasets
import evaluate

from internvl_mpo.benchmarks import mathvision as benchmark
from internvl_mpo.benchmarks.common import Rule
from internvl_mpo.benchmarks.metric import REFERENCE_FIELDS, compute_metric

_TYPES = {
    "text": datasets.Value("string"),
    "number": datasets.Value("int64"),
    "texts": datasets.List(datasets.Value("string")),
}
_CITATION = """\
@inproceedings{wang2024mathvision,
title={Measuring Multimodal Mathematical Reasoning with MATH-Vision Dataset},
author={Wang, Ke and Pan, Junting and Shi, Weikang and Lu, Zimu and Ren, Houxing and Zhou, Aojun and Zhan,
    Mingjie and Li, Hongsheng},
booktitle={NeurIPS Datasets and Benchmarks},
year={2024}}
"""


class Mathvision(evaluate.Metric):
    """MathVision: accuracy of choices and formulas."""

    def _info(self) -> evaluate.MetricInfo:
        fields = {field: _TYPES[kind] for field, kind in REFERENCE_FIELDS[benchmark.NAME].items()}
        return evaluate.MetricInfo(
            description=benchmark.__doc__ or "",
            citation=_CITATION,
            inputs_description=f"predictions: raw answers. references: objects with {', '.join(fields)}.",
            features=datasets.Features({"predictions": datasets.Value("string"), "references": fields}),
        )

    def _compute(self, predictions: list[str], references: list[dict[str, Any]], rule: Rule = "ours") -> dict[str, Any]:
        return compute_metric(benchmark.NAME, predictions, references, rule)
