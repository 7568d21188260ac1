"""Start ranks as torchrun does, and let them stop in peace.

    python -m internvl_mpo.launch --nproc_per_node 8 train_mpo.py --config RUN.yaml

Every option is torchrun's. What differs: SIGTERM and Ctrl-C reach each rank once, which then finishes its step and
writes a checkpoint however long that takes (torchrun kills after 30 seconds), and the exit code is that of the ranks:
75 if they stopped so, 2 if they refused something. torchrun itself gives 1 and a traceback of its own for both.
"""

import contextlib
import os
import signal
import sys

from internvl_mpo.errors import EXIT_BAD_INPUT, EXIT_STOPPED


def main(argv: list[str]) -> int:
    """Run the ranks of this machine and return their exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    args = parse_args(argv)
    args.signals_to_handle = "SIGHUP"  # torch's handler would end the ranks
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _pass_on)
    try:
        run(args)
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        return _exit_code([failure.exitcode for failure in error.failures.values()])
    return 0


def _pass_on(number: int, frame: object) -> None:
    """Send a signal to the ranks, and to nothing that they have started."""
    import psutil

    ranks = [child for child in psutil.Process().children() if "LOCAL_RANK" in _environment(child)]
    if not ranks:
        sys.exit(EXIT_STOPPED)
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank.pid, number)


def _environment(process: object) -> dict[str, str]:
    import psutil

    try:
        return process.environ()
    except psutil.Error:
        return {}


def _exit_code(codes: list[int]) -> int:
    """What the ranks agree on: one that refuses or stops is followed by others that its end has torn down."""
    for code in (EXIT_BAD_INPUT, EXIT_STOPPED):
        if code in codes:
            return code
    return next((code if code > 0 else 128 - code for code in codes), 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
