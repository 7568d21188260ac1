"""CRPE as an `evaluate` metric: `evaluate.load("./metrics/crpe")`. The rules are those of internvl_mpo."""

from typing import Any

import datasets
import evaluate

from internvl_mpo.benchmarks import crpe as benchmark
from internvl_mpo.benchmarks.common import Rule
from internvl_mpo.benchmarks.metric import REFERENCE_FIELDS, compute_metric

_TYPES = {
    "text": datasets.Value("string"),
    "number": datasets.Value("int64"),
    "texts": datasets.List(datasets.Value("string")),
}
_CITATION = """\
@inproceedings{wang2024allseeing,
title={The All-Seeing Project V2: Towards General Relation Comprehension of the Open World},
author={Wang, Weiyun and Ren, Yiming and Luo, Haowen and Li, Tiantong and Yan, Chenxiang and Chen, Zhe and
    Wang, Wenhai and Li, Qingyun and Lu, Lewei and Zhu, Xizhou and Qiao, Yu and Dai, Jifeng},
booktitle={ECCV},
year={2024}}
"""


class Crpe(evaluate.Metric):
    """CRPE: circular accuracy of relation questions."""

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
