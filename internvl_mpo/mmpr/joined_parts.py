"""Archives that were cut into parts (images.zip_aa, _ab, ..), read as one file."""

import io
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from internvl_mpo.errors import BadInputError

_PART = re.compile(r"(?P<name>.+\.zip)(?:_(?P<letters>[a-z]{1,3})|\.(?P<number>\d{2,4}))?$", re.IGNORECASE)


class JoinedParts(io.RawIOBase):
    """The parts of a split file as one file that can be read and sought."""

    def __init__(self, paths: Sequence[Path]):
        """Open nothing yet; a part is opened when it is read."""
        self.paths = list(paths)
        self.starts = [0]
        for path in self.paths:
            self.starts.append(self.starts[-1] + path.stat().st_size)
        self._position = 0
        self._open: tuple[int, BinaryIO] | None = None

    @property
    def size(self) -> int:
        """Bytes of all parts."""
        return self.starts[-1]

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Position over all parts."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; see `io.RawIOBase`."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:
        """Fill the buffer up to the end of the current part."""
        if self._position >= self.size:
            return 0
        number = bisect_right(self.starts, self._position) - 1
        if self._open is None or self._open[0] != number:
            self.close_part()
            self._open = (number, open(self.paths[number], "rb"))  # noqa: SIM115 (kept open)
        file = self._open[1]
        file.seek(self._position - self.starts[number])
        count = file.readinto(buffer)
        self._position += count
        return count

    def close_part(self) -> None:
        """Close the part that is open, if any."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def close(self) -> None:
        """Close everything."""
        self.close_part()
        super().close()


def find_archives(folder: Path) -> list[list[Path]]:
    """Return the archives of a folder, each as its parts in order.

    Raises:
        BadInputError: a part in the middle is missing.
    """
    groups: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _PART.match(path.name)
        if match and path.is_file():
            groups.setdefault(match["name"], {})[match["letters"] or match["number"] or ""] = path
    found = []
    for name, parts in groups.items():
        whole = parts.pop("", None)
        if whole is not None:  # unsplit file beside its parts: somebody joined them already
            found.append([whole])
            continue
        keys = sorted(parts, key=lambda key: (len(key), key))
        numbers = [_part_number(key) for key in keys]
        for before, after in pairwise(numbers):
            if after != before + 1:
                first, second = (parts[keys[numbers.index(number)]].name for number in (before, after))
                raise BadInputError(f"{folder / name}: a part is missing between {first} and {second}")
        if keys[0].strip("a0") not in ("", "1"):
            raise BadInputError(f"{folder / name}: the first part is missing, {parts[keys[0]].name} is not the first")
        found.append([parts[key] for key in keys])
    return found


def _part_number(key: str) -> int:
    if key.isdigit():
        return int(key)
    number = 0
    for letter in key.lower():
        number = 26 * number + ord(letter) - ord("a")
    return number
