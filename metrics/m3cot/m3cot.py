"""M3CoT as an `evaluate` metric: `evaluate.load("./metrics/m3cot")`. The rules are those of internvl_mpo."""

from internvl_mpo.benchmarks import evaluate_metric


class M3cot(evaluate_metric.BenchmarkMetric):
    """M3CoT: accuracy of multiple-choice answers."""

    BENCHMARK = "m3cot"
    CITATION = """\
@inproceedings{chen2024m3cot,
title={M3CoT: A Novel Benchmark for Multi-Domain Multi-step Multi-modal Chain-of-Thought},
author={Chen, Qiguang and Qin, Libo and Zhang, Jin and Chen, Zhi and Xu, Xiao and Che, Wanxiang},
booktitle={ACL},
year={2024}}
"""
