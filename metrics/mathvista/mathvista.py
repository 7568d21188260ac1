"""MathVista as an `evaluate` metric: `evaluate.load("./metrics/mathvista")`. The rules are those of internvl_mpo."""

from internvl_mpo.benchmarks import evaluate_metric


class Mathvista(evaluate_metric.BenchmarkMetric):
    """MathVista: accuracy of choices, numbers and lists."""

    BENCHMARK = "mathvista"
    CITATION = """\
@inproceedings{lu2024mathvista,
title={MathVista: Evaluating Mathematical Reasoning of Foundation Models in Visual Contexts},
author={Lu, Pan and Bansal, Hritik and Xia, Tony and Liu, Jiacheng and Li, Chunyuan and Hajishirzi, Hannaneh
    and Cheng, Hao and Chang, Kai-Wei and Galley, Michel and Gao, Jianfeng},
booktitle={ICLR},
year={2024}}
"""
