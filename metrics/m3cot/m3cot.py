"""M3CoT as an `evaluate` metric: `evaluate.load("./metrics/m3cot")`. The rules are those of internvl_mpo."""

from typing import Any

import datasets
import evaluate

from internvl_mpo.benchmarks import m3cot as benchmark
from internvl_mpo.benchmarks.common import Rule
from internvl_mpo.benchmarks.metric import REFERENCE_FIELDS, compute_metric

_TYPES = {
    "text": datasets.Value("string"),
    "number": datasets.Value("int64"),
    "texts": datasets.List(datasets.Value("string")),
}
_CITATION = """\
@inproceedings{chen2024m3cot,
title={M3CoT: A Novel Benchmark for Multi-Domain Multi-step Multi-modal Chain-of-Thought},
author={Chen, Qiguang and Qin, Libo and Zhang, Jin and Chen, Zhi and Xu, Xiao and Che, Wanxiang},
booktitle={ACL},
year={2024}}
"""


class M3cot(evaluate.Metric):
    """M3CoT: accuracy of multiple-choice answers."""

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
