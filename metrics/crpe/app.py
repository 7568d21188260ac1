"""The Space of this metric."""

from internvl_mpo.benchmarks.metric import build_demo

if __name__ == "__main__":
    build_demo("crpe").launch()
