"""MathVision as an `evaluate` metric: `evaluate.load("./metrics/mathvision")`. The rules are those of internvl_mpo."""

from internvl_mpo.benchmarks import evaluate_metric


class Mathvision(evaluate_metric.BenchmarkMetric):
    """MathVision: accuracy of choices and formulas."""

    BENCHMARK = "mathvision"
    CITATION = """\
@inproceedings{wang2024mathvision,
title={Measuring Multimodal Mathematical Reasoning with MATH-Vision Dataset},
author={Wang, Ke and Pan, Junting and Shi, Weikang and Lu, Zimu and Ren, Houxing and Zhou, Aojun and Zhan,
    Mingjie and Li, Hongsheng},
booktitle={NeurIPS Datasets and Benchmarks},
year={2024}}
"""
