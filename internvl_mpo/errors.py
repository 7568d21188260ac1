"""The exceptions for what a user can get wrong, and the door every program leaves by."""

import errno
import importlib.util
import sys
from collections.abc import Callable

EXIT_BAD_INPUT = 2
EXIT_STOPPED = 75  # "try again" in sysexits.h: the same command goes on
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch and safetensors report a full disk without its number
_FULL_WORDS = ("No space left on device", "Disk quota exceeded", "File too large")
_TORCH_WORDS = ("PytorchStreamWriter failed writing", "] . unexpected pos ")


class BadInputError(ValueError):
    """Input a user can put right. The message is one sentence that names the offender and the way out."""


class RowError(BadInputError):
    """One row is unusable; `where` is its position in the file, `reason` says why without it."""

    def __init__(self, reason: str, where: str = ""):
        super().__init__(f"{where}: {reason}" if where else reason)
        self.reason, self.where = reason, where


class StoppedError(Exception):
    """A signal asked the program to stop; the message says where the same command goes on, empty says nothing.

    `code` is the exit code.
    """

    def __init__(self, message: str = "", code: int = EXIT_STOPPED):
        super().__init__(message)
        self.code = code


def full_disk(error: BaseException | None) -> str | None:
    """Return what a full disk, a quota or a limit on file sizes says in an error or one behind it, or None."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in _FULL:
            return error.strerror or str(error)
        text = str(error)
        found = next((words for words in _FULL_WORDS if words in text), None)
        if found or any(words in text for words in _TORCH_WORDS):
            return found or _FULL_WORDS[0]
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def run_program(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> int:
    """Run a program's `main(argv)`; a `BadInputError` or a full disk becomes one line on stderr and exit code 2.

    A `StoppedError` becomes one line and its code, Ctrl-C one line and 130.

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
    except StoppedError as stopped:
        if str(stopped):
            print(stopped, file=sys.stderr)
        return stopped.code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" at {error.filename}" if error.filename else ""
        print(f"error: the disk is full{where}; what is done stays, free some space and the same command goes on",
              file=sys.stderr)  # fmt: skip
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted; finished work is kept, the same command goes on from there", file=sys.stderr)
        return 130
    except Exception as error:
        reason = full_disk(error)
        if reason is None:
            raise
        where = f" {error.filename}" if isinstance(error, OSError) and error.filename else ""
        print(f"error: cannot write{where}: {reason}; make room and give the same command again", file=sys.stderr)
        return EXIT_BAD_INPUT


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
