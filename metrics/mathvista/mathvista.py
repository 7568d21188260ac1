"""MathVista as an `evaluate` metric: `evaluate.load("./metrics/mathvista")`. The rules are those of internvl_mpo."""

from typing import Any

import datasets
import evaluate

from internvl_mpo.benchmarks import mathvista as benchmark
from internvl_mpo.benchmarks.common import Rule
from internvl_mpo.benchmarks.metric import REFERENCE_FIELDS, compute_metric

_TYPES = {
    "text": datasets.Value("string"),
    "number": datasets.Value("int64"),
    "texts": datasets.List(datasets.Value("string")),
}
_CITATION = """\
@inproceedings{lu2024mathvista,
title={MathVista: Evaluating Mathematical Reasoning of Foundation Models in Visual Contexts},
author={Lu, Pan and Bansal, Hritik and Xia, Tony and Liu, Jiacheng and Li, Chunyuan and Hajishirzi, Hannaneh
    and Cheng, Hao and Chang, Kai-Wei and Galley, Michel and Gao, Jianfeng},
booktitle={ICLR},
year={2024}}
"""


class Mathvista(evaluate.Metric):
    """MathVista: accuracy of choices, numbers and lists."""

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
