"""`internvl-mpo COMMAND`, or `python -m internvl_mpo COMMAND` behind a launcher, starts a program of this package."""

import os
import sys

from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.programs import COMMANDS, HOME, program

_HELP = """\
usage: internvl-mpo COMMAND [--key value ...]

Mixed Preference Optimization for vision-language models: from preference data to evaluation.

{commands}

`internvl-mpo COMMAND --help` tells more. Run files, such as configs/internvl2_8b.yaml, are found by these names; they
lie in {home}. On several GPUs: torchrun --nproc_per_node 8 -m internvl_mpo train --config configs/internvl2_8b.yaml
"""


def main(argv: list[str]) -> int:
    """Become the program of a command, so that launchers and Ctrl+C find one process.

    Raises:
        BadInputError: there is no such command.
    """
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        commands = "\n".join(f"  {name:<{width}}  {about}" for name, (_, about) in COMMANDS.items())
        print(_HELP.format(commands=commands, home=HOME / "configs"))
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        raise BadInputError(f"unknown command '{argv[0]}', expected one of {', '.join(COMMANDS)}")
    command = [*program(COMMANDS[argv[0]][0]), *argv[1:]]
    sys.stdout.flush()
    os.execv(command[0], command)


def run() -> int:
    """Entry point of the console command."""
    return run_program(main)


if __name__ == "__main__":
    sys.exit(run())
