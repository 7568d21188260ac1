"""The class behind `metrics/NAME/NAME.py`: a benchmark as a module of Hugging Face's `evaluate`.

`evaluate` takes the first class of its kind that it finds in a metric's own file, so the folders import this file and
not the class.
"""

from typing import Any

import datasets
import evaluate

from internvl_mpo.benchmarks import load_benchmark
from internvl_mpo.benchmarks.common import Rule
from internvl_mpo.benchmarks.metric import REFERENCE_FIELDS, compute_metric

_TYPES = {
    "text": datasets.Value("string"),
    "number": datasets.Value("int64"),
    "texts": datasets.List(datasets.Value("string")),
}


class BenchmarkMetric(evaluate.Metric):
    """A benchmark with the rules of this package.

    Attributes:
        BENCHMARK: a key of `REFERENCE_FIELDS`.
        CITATION: BibTeX of the benchmark's paper.
    """

    BENCHMARK: str
    CITATION: str

    def _info(self) -> evaluate.MetricInfo:
        fields = {field: _TYPES[kind] for field, kind in REFERENCE_FIELDS[self.BENCHMARK].items()}
        return evaluate.MetricInfo(
            description=load_benchmark(self.BENCHMARK).__doc__ or "",
            citation=self.CITATION,
            inputs_description=f"predictions: raw answers. references: objects with {', '.join(fields)}.",
            features=datasets.Features({"predictions": datasets.Value("string"), "references": fields}),
        )

    def _compute(self, predictions: list[str], references: list[dict[str, Any]], rule: Rule = "ours") -> dict[str, Any]:
        return compute_metric(self.BENCHMARK, predictions, references, rule)
