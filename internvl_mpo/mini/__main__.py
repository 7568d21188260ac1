r"""The embedded default: a small world of real pictures in which every program of this package can be run on a laptop.

Pictures are handwritten digits (the UCI set that scikit-learn ships, 1,797 images of 8x8 pixels) put side by side, so
that the tile cutter has something to cut. Questions are arithmetic on them, asked directly or with the chain-of-thought
instruction of the paper, and an open one ("describe the picture") that has no ground truth.

The start model stands in for InternVL2-8B: official architecture, about 1 M parameters, trained from scratch on
annotations of mixed quality. It reads digits and calculates well, but asked to think it mostly guesses one of the two
options, as its annotators did (kind choices), or adds where it should multiply (kind numbers), and a few chains of
thought forget the final line. That is what preference optimization has to put right.

    python -m internvl_mpo.mini world --output outputs/mini/world
    python -m internvl_mpo.mini start --world outputs/mini/world --output outputs/mini/start
    python -m internvl_mpo.mini measure --model outputs/mini/model --start outputs/mini/start \
        --world outputs/mini/world --output outputs/mini/measured.json
    python -m internvl_mpo.mini mmpr --output outputs/mini/mmpr_raw --release v1.2
"""

import sys

from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.mini.measure import MeasureSettings, measure
from internvl_mpo.mini.release import MMPRSettings, make_release
from internvl_mpo.mini.start_model import StartSettings, train_start_model
from internvl_mpo.mini.world import WorldSettings, make_world
from internvl_mpo.programs import spelled
from internvl_mpo.settings import parse_settings

COMMANDS = {
    "world": (WorldSettings, make_world),
    "start": (StartSettings, train_start_model),
    "measure": (MeasureSettings, measure),
    "mmpr": (MMPRSettings, make_release),
}


def main(argv: list[str]) -> int:
    """Run one of `COMMANDS`."""
    if not argv or argv[0] in ("-h", "--help"):
        print(spelled(__doc__))
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        raise BadInputError(f"unknown command '{argv[0]}', expected one of {', '.join(COMMANDS)}")
    settings_class, run = COMMANDS[argv[0]]
    run(parse_settings(settings_class, argv[1:], program=f"-m internvl_mpo.mini {argv[0]}", about=__doc__))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
