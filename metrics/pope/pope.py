"""POPE as an `evaluate` metric: `evaluate.load("./metrics/pope")`. The rules are those of internvl_mpo."""

from internvl_mpo.benchmarks import evaluate_metric


class Pope(evaluate_metric.BenchmarkMetric):
    """POPE: F1 of yes, mean of three categories."""

    BENCHMARK = "pope"
    CITATION = """\
@inproceedings{li2023pope,
title={Evaluating Object Hallucination in Large Vision-Language Models},
author={Li, Yifan and Du, Yifan and Zhou, Kun and Wang, Jinpeng and Zhao, Wayne Xin and Wen, Ji-Rong},
booktitle={EMNLP},
year={2023}}
"""
