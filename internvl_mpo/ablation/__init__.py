"""Methods compared on the mini world, over seeds and settings; `runs/ablation.py` is the program.

plan        configs/ablation.yaml -> cells: a method, what is varied, a seed
lanes       the commands of a cell, and of the world it stands on
results     what was measured of a cell, over its seeds
intervals   differences between cells with 95 % intervals over seeds and questions
costs       processor time, from the markers of the stages
signs       what the logs of training runs said beforehand
figures     accuracy over what is varied
page        docs/ablation.md and its figures from what was measured
"""
