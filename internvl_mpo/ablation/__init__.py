"""Methods compared on the mini world, over seeds and settings; `runs/ablation.py` is the program.

plan        configs/ablation.yaml -> cells: a method, what is varied, a seed
lanes       the commands of a cell, and of the world it stands on
intervals   differences between cells with 95 % intervals over seeds and questions
page        docs/ablation.md and its figures from what was measured
"""
