"""The append-only logs of a run: one JSON object per line, each with the step it belongs to."""

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from internvl_mpo.files import atomic_writer


class RunLog:
    """A file of JSON lines that a run appends to and that a resumed run cuts back to its checkpoint."""

    def __init__(self, path: str | Path):
        """Keep the path; nothing is opened or made yet."""
        self.path = Path(path)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add lines; they are on their way to the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8", errors="backslashreplace") as out:
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def keep_until(self, step: int) -> list[dict[str, Any]]:
        """Drop lines of later steps, which a resumed run repeats, and what a kill left half-written.

        Args:
            step: last step to keep; 0 drops all.

        Returns:
            What is kept.
        """
        kept = []
        if self.path.exists() and step:
            for line in self.path.read_bytes().split(b"\n"):  # splitlines would also cut at U+2028 inside a text
                with contextlib.suppress(ValueError):
                    row = json.loads(line)
                    if row["step"] <= step:
                        kept.append(row)
        if self.path.exists():
            with atomic_writer(self.path) as out:
                out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
        return kept
