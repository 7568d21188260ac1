"""The mini world: a small place of real pictures in which every program of this package runs on a laptop.

world         pictures, questions, annotations
start_model   the model that stands in for InternVL2-8B, trained from scratch
release       the same world in the layout of an MMPR release
report        the page that `quickstart` ends with
digits        the handwritten digits it is made of
"""
