"""Runs the training program several times in one process group, since starting ranks costs more than training.

    torchrun --nproc_per_node 2 tests/distributed_worker.py CASES.json

CASES.json is a list of [arguments, poison]; the exit codes of all ranks go to CASES.json.done, one line per case.
A poison is null, or ["loss" or "gradient", pair id]: what that pair makes not finite, on the rank that has it.
"""

import gc
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_mpo  # noqa: E402
from internvl_mpo import logps  # noqa: E402
from internvl_mpo.errors import run_program  # noqa: E402
from internvl_mpo.packing import Pack  # noqa: E402
from internvl_mpo.training import trainer  # noqa: E402
from internvl_mpo.training.distributed import from_all_ranks  # noqa: E402


def main(path: str) -> None:
    torch.set_num_threads(1)
    plain = trainer.score_pairs
    for arguments, poison in json.loads(Path(path).read_text()):
        trainer.score_pairs = _poisoned(*poison) if poison else plain
        codes = from_all_ranks(
            run_program(train_mpo.main, arguments), Namespace(world_size=int(os.environ["WORLD_SIZE"]))
        )
        _forget_deepspeed()
        if torch.distributed.get_rank() == 0:
            with open(f"{path}.done", "a") as out:
                out.write(",".join(map(str, codes)) + "\n")


def _poisoned(what: str, pair_id: str) -> Callable:
    plain = logps.score_pairs

    def score_pairs(model: torch.nn.Module, pack: Pack, *, likeness: bool = False) -> logps.PairScores:
        found = plain(model, pack, likeness=likeness)
        if pair_id not in pack.pair_ids:
            return found
        zeros = ((found.chosen - found.chosen.detach()) ** 2).sqrt()  # with a gradient of 0/0
        return found._replace(chosen=found.chosen * torch.nan if what == "loss" else found.chosen + zeros)

    return score_pairs


def _forget_deepspeed() -> None:
    """A program trains once; DeepSpeed and accelerate keep what they know of its engine in globals and variables."""
    from accelerate.state import AcceleratorState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    AcceleratorState._reset_state()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    gc.collect()


if __name__ == "__main__":
    main(sys.argv[1])
