"""POPE as an `evaluate` metric: `evaluate.load("./metrics/pope")`. The rules are those of internvl_mpo."""

from typing import Any

import datasets
import evaluate

from internvl_mpo.benchmarks import pope as benchmark
from internvl_mpo.benchmarks.common import Rule
from internvl_mpo.benchmarks.metric import REFERENCE_FIELDS, compute_metric

_TYPES = {
    "text": datasets.Value("string"),
    "number": datasets.Value("int64"),
    "texts": datasets.List(datasets.Value("string")),
}
_CITATION = """\
@inproceedings{li2023pope,
title={Evaluating Object Hallucination in Large Vision-Language Models},
author={Li, Yifan and Du, Yifan and Zhou, Kun and Wang, Jinpeng and Zhao, Wayne Xin and Wen, Ji-Rong},
booktitle={EMNLP},
year={2023}}
"""


class Pope(evaluate.Metric):
    """POPE: F1 of yes, mean of three categories."""

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
