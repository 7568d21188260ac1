"""Sample, judge, pair, train, evaluate, and again with what came out: preference optimization in rounds.

settings     what a run is told
lanes        the commands of a round
selection    which questions a round asks, by how often the policy was right before
pass_rates   how often a policy is right on each question
fixed_pairs  pairs that were there before, drawn at a share
results      what was measured of every arm and round
loop         the rounds of every arm, until accuracy no longer rises
page         report.html
"""
