"""The benchmarks of the MPO table, the mini world's test and a user's own questions.

One file each, all answering the same five questions.

`load_benchmark("pope")` returns the module; the contract it answers is `internvl_mpo.benchmarks.common.Benchmark`.
"""

from importlib import import_module

from internvl_mpo.benchmarks.common import Benchmark
from internvl_mpo.errors import BadInputError

BENCHMARKS = ("mini", "m3cot", "mathvista", "mathvision", "mmvet", "llava_bench", "pope", "crpe", "mmhal_bench", "own")


def load_benchmark(name: str) -> Benchmark:
    """Return the module of a benchmark.

    Raises:
        BadInputError: there is no benchmark of that name.
    """
    if name not in BENCHMARKS:
        raise BadInputError(f"unknown benchmark '{name}'; choose from {', '.join(BENCHMARKS)}")
    return import_module(f"internvl_mpo.benchmarks.{name}")
