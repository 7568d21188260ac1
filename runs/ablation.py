"""Compare methods on the mini world: `python runs/ablation.py --help`, docs/ablation.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a checkout without installation

from internvl_mpo.ablation.__main__ import main
from internvl_mpo.errors import run_program

if __name__ == "__main__":
    sys.exit(run_program(main))
