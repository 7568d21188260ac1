"""The exceptions for what a user can get wrong, and the door every program leaves by."""

import importlib.util
import sys
from collections.abc import Callable

EXIT_BAD_INPUT = 2


class BadInputError(ValueError):
    """Input a user can put right. The message is one sentence that names the offender and the way out."""


class RowError(BadInputError):
    """One row is unusable; `where` is its position in the file, `reason` says why without it."""

    def __init__(self, reason: str, where: str = ""):
        super().__init__(f"{where}: {reason}" if where else reason)
        self.reason, self.where = reason, where


def run_program(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Run a program's `main(argv)`; a `BadInputError` becomes one line on stderr and exit code 2.

    Args:
        main: takes the command-line arguments without the program name, returns an exit code or None for 0.
        argv: the arguments; None means those of this process.

    Returns:
        The exit code, for `sys.exit`.
    """
    try:
        return main(sys.argv[1:] if argv is None else argv) or 0
    except BadInputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; finished work is kept, the same command goes on from there", file=sys.stderr)
        return 130


def need_package(package: str, asker: str) -> None:
    """Refuse a setting whose package is not installed.

    Args:
        package: its name, for Python and for pip.
        asker: the setting, for the message.

    Raises:
        BadInputError: naming both.
    """
    if importlib.util.find_spec(package) is None:
        raise BadInputError(f"{asker} needs the package {package}; pip install {package}, or leave it out")
