"""The growing logs of a run: one JSON object per line, each with the step it belongs to."""

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from internvl_mpo.jsonl import AppendLog, write_jsonl


class RunLog:
    """A file that a run appends to and that a resumed run cuts back to its checkpoint."""

    def __init__(self, path: str | Path):
        """Keep the path; nothing is opened or made yet."""
        self.path = Path(path)

    def append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add lines; they are on their way to the disk when this returns."""
        with AppendLog(self.path) as log:
            for row in rows:
                log.append(row)

    def keep_until(self, step: int) -> list[dict[str, Any]]:
        """Drop lines of later steps, which a resumed run repeats, and what is no line of a run.

        Args:
            step: last step to keep; 0 drops all.

        Returns:
            What is kept.
        """
        if not self.path.exists():
            return []
        kept = []
        for line in self.path.read_bytes().split(b"\n"):  # splitlines would also cut at U+2028 inside a text
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = json.loads(line)
                if row["step"] <= step:
                    kept.append(row)
        write_jsonl(kept if step else (), self.path)
        return kept if step else []
