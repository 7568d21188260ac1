"""Runs the training program several times in one process group, since starting ranks costs more than training.

    torchrun --nproc_per_node 2 tests/distributed_worker.py CASES.json

CASES.json is a list of argument lists; exit codes go to CASES.json.done, one line per case, from rank 0.
"""

import gc
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_mpo  # noqa: E402
from internvl_mpo.errors import run_program  # noqa: E402


def main(path: str) -> None:
    torch.set_num_threads(1)
    for arguments in json.loads(Path(path).read_text()):
        code = run_program(train_mpo.main, arguments)
        _forget_deepspeed()
        if torch.distributed.get_rank() == 0:
            with open(f"{path}.done", "a") as out:
                out.write(f"{code}\n")


def _forget_deepspeed() -> None:
    """A program trains once; DeepSpeed and accelerate keep what they know of its engine in globals."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    AcceleratorState._reset_state()
    gc.collect()


if __name__ == "__main__":
    main(sys.argv[1])
