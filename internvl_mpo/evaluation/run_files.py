"""The append-only files of a run: one JSON object per line, keyed, valid after any interruption."""

import json
import os
from pathlib import Path
from typing import IO, Any, Self

from internvl_mpo.errors import BadInputError


class Log:
    """Rows by key, kept in memory and appended to a file as they come.

    A line cut off by a kill or a full disk is dropped when the file is opened again, so its row is simply missing.
    Several processes may share a log: each appends to a file of its own (`answers.1.jsonl` for rank 1), all are read.

    Args:
        path: the file, `NAME.jsonl`.
        rank: number of this process; 0 writes `path` itself.

    Attributes:
        rows: key -> row; the key is stored in the row as "key".
    """

    def __init__(self, path: str | Path, rank: int = 0):
        self.path = Path(path)
        self.rows: dict[str, dict[str, Any]] = {}
        own = self.path if rank == 0 else self._of_rank(rank)
        own.parent.mkdir(parents=True, exist_ok=True)
        _drop_unfinished_line(own)
        self._file: IO[str] = open(own, "a", encoding="utf-8", errors="surrogatepass")  # noqa: SIM115 - closed by __exit__
        self.reload()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self._file.close()

    def reload(self) -> None:
        """Read what all processes have written; an unfinished last line of another process is passed over.

        Raises:
            BadInputError: a whole line is not a row of a log.
        """
        for file in (self.path, *sorted(self.path.parent.glob(f"{self.path.stem}.*{self.path.suffix}"))):
            if not file.exists():
                continue
            lines = file.read_text(encoding="utf-8", errors="surrogatepass").split("\n")
            for number, line in enumerate(lines[:-1], start=1):
                try:
                    row = json.loads(line)
                    self.rows[row["key"]] = row
                except (json.JSONDecodeError, KeyError, TypeError) as error:
                    raise BadInputError(f"{file}:{number} is not a row of this file; delete the line") from error

    def append(self, key: str, row: dict[str, Any]) -> None:
        """Add a row and hand it to the operating system before returning."""
        row = {"key": key, **row}
        self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()
        self.rows[key] = row

    def _of_rank(self, rank: int) -> Path:
        return self.path.with_suffix(f".{rank}{self.path.suffix}")


def _drop_unfinished_line(path: Path) -> None:
    if not path.exists():
        return
    with open(path, "rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
            file.flush()
            os.fsync(file.fileno())
