"""Nothing private goes out: no secret, no path of this computer, no name of its user in a published file."""

import getpass
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from internvl_mpo.errors import BadInputError
from internvl_mpo.publish.hub import files_of

_SECRETS = re.compile(
    rb"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{30,}|\bAKIA[0-9A-Z]{16}\b"
    rb"|\bglpat-[\w-]{16,}|\bxox[abp]-[\w-]{10,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)
_FOLDERS = "home root Users mnt tmp data work workspace scratch var opt private nfs gpfs lustre fsx srv media content"
_ABSOLUTE = re.compile(
    rb"(?<![\w:/.~<)\]}-])/(?:" + "|".join(_FOLDERS.split()).encode() + rb")/[\w.-]+|[A-Z]:\\Users\\"
)
_PATH_COLUMN = re.compile(r"path|root|provenance|image")  # of a data set; its other texts may well talk about paths
# Bytes that are no text: an absolute path in them would be chance, a key would not.
_PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".ico", ".model"}
_CODE = {".py", ".js", ".css"}  # ours, and the same on every computer
_NO_NAMES = {"root", "user", "admin", "ubuntu", "runner", "jovyan", "docker", "nobody", "localhost", "debian", "work"}
_KEYS = ("HF_TOKEN", "OPENAI_API_KEY", "JUDGE_API_KEY", "MODEL_API_KEY", "WANDB_API_KEY", "HUGGING_FACE_HUB_TOKEN")


def check_nothing_private(folder: Path, *, owner: str | None = None) -> None:
    """Read every file of a folder that is to be published: of weights the header, of Parquet the texts.

    Rows of a data set may talk about paths; there, only paths of this computer and secrets count.

    Args:
        folder: what was built.
        owner: name on the Hub, which may well be the local user's name.

    Raises:
        BadInputError: naming the file and what was found in it, secrets left out.
    """
    private = _private_words(owner)
    for name, path in files_of(folder).items():
        if path.suffix == ".parquet":
            for column, text in _parquet_texts(path):
                _check(name, text, private)
                if _PATH_COLUMN.search(column):
                    _check_paths(f"column '{column}' of {name}", text)
        elif path.suffix == ".safetensors":
            _check(name, _safetensors_header(path), private)
        else:
            content = _as_utf_8(path.read_bytes())
            _check(name, content, private)
            if path.suffix not in _CODE | _PICTURES:
                _check_paths(name, content)


def _as_utf_8(content: bytes) -> bytes:
    """Return a text in UTF-16, with or without its mark, in UTF-8: a key hides well between zeros."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return content.decode("utf-16", errors="replace").encode()
    for half, encoding in ((1, "utf-16-le"), (0, "utf-16-be")):
        sample = content[half:2000:2]
        if sample and sample.count(0) > 0.7 * len(sample):
            return content.decode(encoding, errors="replace").encode()
    return content


def _check_paths(name: str, content: bytes) -> None:
    if match := _ABSOLUTE.search(content):
        raise BadInputError(f"{name} holds the absolute path '{match[0].decode()}'; it is not published")


def _check(name: str, content: bytes, private: dict[str, re.Pattern[bytes]]) -> None:
    if _SECRETS.search(content):
        raise BadInputError(f"{name} holds what looks like a secret key; remove it, and revoke the key")
    for what, pattern in private.items():
        if match := pattern.search(content):
            shown = "" if what == "a secret of this session" else f" ('{match[0].decode(errors='replace')}')"
            raise BadInputError(f"{name} holds {what}{shown}; it is not published")


def _private_words(owner: str | None) -> dict[str, re.Pattern[bytes]]:
    """What identifies this computer and session, as patterns."""
    from huggingface_hub import get_token

    secrets = {value for value in (*map(os.environ.get, _KEYS), get_token()) if value and len(value) > 7}
    folders = {str(Path.home()), str(Path.cwd())} - {"/", "/root"}
    user = _user_name()
    names = {name for name in (user, socket.gethostname()) if len(name) > 3 and name not in _NO_NAMES | {owner}}
    found = {
        "a secret of this session": "|".join(map(re.escape, sorted(secrets))),
        "a path of this computer": "|".join(map(re.escape, sorted(folders, key=len, reverse=True))),
        "the name of its user or computer": "|".join(rf"\b{re.escape(name)}\b" for name in sorted(names)),
    }
    return {what: re.compile(pattern.encode()) for what, pattern in found.items() if pattern}


def _user_name() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run under a number without a name
        return ""


def _safetensors_header(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def _parquet_texts(path: Path) -> Iterator[tuple[str, bytes]]:
    """Column and text of the metadata, and of a batch of rows at a time; pictures are not read."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        yield "metadata", repr(file.schema_arrow.metadata).encode()
        columns = [
            column.path
            for index in range(len(file.schema.names))
            if (column := file.schema.column(index)).logical_type.type == "STRING"
        ]
        for batch in file.iter_batches(batch_size=2000, columns=columns) if columns else ():
            for name, values in batch.to_pydict().items():
                yield name, repr(values).encode(errors="replace")
