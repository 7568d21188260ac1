"""The append-only files of a run: one JSON object per line, keyed, valid after any interruption."""

from pathlib import Path
from typing import Any, Self

from internvl_mpo.errors import BadInputError
from internvl_mpo.jsonl import AppendLog, read_whole_lines


class KeyedLog:
    """Rows by key, kept in memory and appended to a file as they come.

    Several processes may share a log: each appends to a file of its own (`answers.1.jsonl` for rank 1), all are read.

    Args:
        path: the file, `NAME.jsonl`.
        rank: number of this process; 0 writes `path` itself.

    Attributes:
        rows: key -> row; the key is stored in the row as "key".

    Raises:
        BadInputError: another run writes the same file.
    """

    def __init__(self, path: str | Path, rank: int = 0):
        self.path = Path(path)
        self.rows: dict[str, dict[str, Any]] = {}
        self._own = AppendLog(self.path if rank == 0 else self.path.with_suffix(f".{rank}{self.path.suffix}"))
        self.reload()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._own.close()

    def reload(self) -> None:
        """Read what all processes have written; an unfinished last line of another process is passed over.

        Raises:
            BadInputError: a whole line is not a row of a log.
        """
        for file in (self.path, *sorted(self.path.parent.glob(f"{self.path.stem}.*{self.path.suffix}"))):
            for number, row in enumerate(read_whole_lines(file) if file.exists() else (), start=1):
                if "key" not in row:
                    raise BadInputError(f"{file}:{number} is not a row of this file; delete the line")
                self.rows[row["key"]] = row

    def append(self, key: str, row: dict[str, Any]) -> None:
        """Add a row and hand it to the operating system before returning."""
        self.rows[key] = {"key": key, **row}
        self._own.append(self.rows[key])
