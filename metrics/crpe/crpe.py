"""CRPE as an `evaluate` metric: `evaluate.load("./metrics/crpe")`. The rules are those of internvl_mpo."""

from internvl_mpo.benchmarks import evaluate_metric


class Crpe(evaluate_metric.BenchmarkMetric):
    """CRPE: circular accuracy of relation questions."""

    BENCHMARK = "crpe"
    CITATION = """\
@inproceedings{wang2024allseeing,
title={The All-Seeing Project V2: Towards General Relation Comprehension of the Open World},
author={Wang, Weiyun and Ren, Yiming and Luo, Haowen and Li, Tiantong and Yan, Chenxiang and Chen, Zhe and
    Wang, Wenhai and Li, Qingyun and Lu, Lewei and Zhu, Xizhou and Qiao, Yu and Dai, Jifeng},
booktitle={ECCV},
year={2024}}
"""
