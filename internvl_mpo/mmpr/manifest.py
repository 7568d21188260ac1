"""The manifest of a converted release: what was made from what, with sizes and hashes."""

import hashlib
import json
from pathlib import Path
from typing import Any

from internvl_mpo.errors import BadInputError

MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return manifest.json of a converted folder.

    Raises:
        BadInputError: it is not there or not whole.
    """
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInputError(f"{folder} holds no {MANIFEST}, so convert_mmpr.py has not finished it") from error
    except ValueError as error:
        raise BadInputError(f"{folder / MANIFEST} is not valid JSON ({error}); convert again") from error


# --- files ------------------------------------------------------------------------------------------------------------


def safe_name(source: str) -> str:
    """Return the folder and configuration name of a source."""
    plain = "".join(letter if letter.isalnum() or letter in "_.+-" else "_" for letter in source)
    return plain.lstrip(".") or "unnamed"


def file_facts(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file."""
    with open(path, "rb") as file:
        return {"num_bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
