"""Where the files of an MMPR release lie: on disk, or in its zip archives, which are read without unpacking.

meta.json names image folders and annotation files as they were on the cluster it was written on. A name is looked for
as it stands, relative to the release, and then with more and more of its leading folders left out:

    /mnt/cluster/user/MMPR/annotations/x.jsonl  ->  MMPR/annotations/x.jsonl, annotations/x.jsonl, x.jsonl
"""

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from internvl_mpo.errors import BadInputError, RowError
from internvl_mpo.mmpr.archives import Archive, Entry, leaves_folder
from internvl_mpo.mmpr.joined_parts import find_archives

MAX_FILE_BYTES = 256 << 20  # of one picture; the largest files of MMPR are a few MB
MAX_PIXELS = 178_956_970  # Pillow refuses larger pictures as decompression bombs, and so do all readers of the data set
MAX_LINE_BYTES = 64 << 20


def suffixes(name: str) -> Iterator[str]:
    """Yield a path without its scheme, root and `..`, then the same with more and more leading folders left out."""
    plain = name.replace("\\", "/").partition("://")[2] if "://" in name else name.replace("\\", "/")
    parts = [part for part in plain.split("/") if part not in ("", ".", "..") and not part.endswith(":")]
    for start in range(len(parts)):
        yield "/".join(parts[start:])


def relative(name: str) -> str:
    """Return a path that stays below the folder it is joined to; of an absolute one the last two parts.

    What is published holds no path of the cluster it was made on.
    """
    whole = next(suffixes(name), ".")
    return "/".join(whole.split("/")[-2:]) if _is_absolute(name) else whole


def _is_absolute(name: str) -> bool:
    return name.startswith(("/", "\\")) or "://" in name


@dataclass(frozen=True)
class Member:
    """A text file inside an archive."""

    archive: Archive
    entry: Entry

    def __str__(self) -> str:
        return f"{self.archive.parts[0]}/{self.entry.name}"


class ReleaseFiles:
    """The files of one release.

    Attributes:
        bases: folders looked in, best first.
    """

    def __init__(self, *bases: str | Path):
        """Remember the folders; archives are indexed when the first file is not found on disk."""
        self.bases = [Path(base) for base in bases]

    def __reduce__(self) -> tuple:
        return _opened, tuple(self.bases)  # a process indexes the archives once

    @cached_property
    def archives(self) -> list[Archive]:
        """The zip archives in the folders."""
        folders = {base.resolve(): base for base in self.bases if base.is_dir()}
        return [Archive(parts) for base in folders.values() for parts in find_archives(base)]

    @property
    def problems(self) -> list[str]:
        """What the archives that were opened could not offer."""
        return [problem for archive in self.__dict__.get("archives", []) for problem in archive.problems]

    def text(self, name: str) -> Path | Member | None:
        """Return where an annotation file lies, or None."""
        found = self._on_disk(name, Path.is_file)
        if found is not None:
            return found
        for suffix in suffixes(name):
            for archive in self.archives:
                for entry_name in archive.texts:
                    if entry_name == suffix or entry_name.endswith(f"/{suffix}"):
                        return Member(archive, archive.find(entry_name))
        return None

    def pictures(self, root: str) -> "PictureFolder":
        """Return the image folder that meta.json calls `root`; it may turn out not to be anywhere."""
        return PictureFolder(self, root)

    def _on_disk(self, name: str, is_right: Any) -> Path | None:
        for base in self.bases:
            if is_right(base / name):
                return base / name
        for suffix in suffixes(name):
            for base in self.bases:
                if is_right(base / suffix):
                    return base / suffix
        return None


@lru_cache(maxsize=4)
def _opened(*bases: Path) -> ReleaseFiles:
    return ReleaseFiles(*bases)


class PictureFolder:
    """The pictures of one subset, on disk or in archives."""

    def __init__(self, files: ReleaseFiles, root: str):
        """Find the folder when the first picture is asked for."""
        self.files, self.root = files, root

    def __reduce__(self) -> tuple:
        return PictureFolder, (self.files, self.root)

    def __str__(self) -> str:
        return str(self.path or self.root)

    @cached_property
    def version(self) -> str:
        """Differs when an archive has another size."""
        return " ".join(str(part.stat().st_size) for archive in self.files.archives for part in archive.parts)

    @cached_property
    def path(self) -> Path | None:
        """The folder on disk, or None."""
        return self.files._on_disk(self.root, Path.is_dir)

    @cached_property
    def prefixes(self) -> list[tuple[Archive, str]]:
        """The folder inside the archives."""
        found = []
        for archive in self.files.archives:
            for suffix in suffixes(self.root):
                if suffix in archive.folders:
                    found.append((archive, suffix))
                    break
                inner = [folder for folder in archive.folders if folder.endswith(f"/{suffix}")]
                if inner:
                    found.append((archive, min(inner)))
                    break
        return found

    def size(self, name: str) -> int:
        """Return the bytes of a picture, 0 where it cannot be read."""
        try:
            found = self._find(name)
        except RowError:
            return 0
        return found.stat().st_size if isinstance(found, Path) else found[1].size

    def below(self, name: str) -> str:
        """Return an absolute path of another machine as the path below this folder on disk, any other as it is."""
        if self.path is None or not _is_absolute(name) or os.path.isfile(name):
            return name
        return next((suffix for suffix in suffixes(name) if os.path.isfile(self.path / suffix)), name)

    def read(self, name: str) -> bytes:
        """Return a picture's file as it is.

        Raises:
            RowError: it is nowhere, leads out of its folder, is damaged in its archive, or is far too large.
        """
        found = self._find(name)
        try:
            if isinstance(found, Path):
                size = found.stat().st_size
                if size > MAX_FILE_BYTES:
                    raise RowError(f"image '{found}' has {size:,} bytes, over the limit of {MAX_FILE_BYTES:,}")
                return found.read_bytes()
            return found[0].read(found[1], MAX_FILE_BYTES)
        except RowError:
            raise
        except BadInputError as error:
            raise RowError(f"image {error}") from error
        except OSError as error:
            raise RowError(f"image '{found}' cannot be read ({error.strerror})") from error

    def _find(self, name: str) -> Path | tuple[Archive, Entry]:
        absolute = _is_absolute(name)
        if not name or (leaves_folder(name) and not absolute) or "\0" in name:
            raise RowError(f"image {name!r} leads out of its folder")
        for candidate in suffixes(name) if absolute else (name,):
            if self.path is not None:
                try:
                    if (self.path / candidate).is_file():
                        return self.path / candidate
                except OSError:  # a name the file system cannot hold
                    pass
            for archive, prefix in self.prefixes:
                entry = archive.find(f"{prefix}/{candidate}".lstrip("/"))
                if entry is not None:
                    return archive, entry
        if self.path is None and not self.prefixes:
            looked = ", ".join(map(str, self.files.bases))
            raise RowError(f"image folder '{self.root}' does not exist below {looked}, nor in a zip archive there")
        raise RowError(f"image '{name}' is not in '{self}'")


def read_lines(text: Path | Member, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int, bytes]]:
    """Yield (byte offset, number of bytes, line) of a JSONL file from byte `start`, the begin of a line, to `stop`.

    Lines over `MAX_LINE_BYTES` are cut to one byte more than that; their rest is passed over.

    Raises:
        BadInputError: the file cannot be read.
    """
    try:
        with _open(text, start) as file:
            offset = start
            while stop is None or offset < stop:
                line = file.readline(MAX_LINE_BYTES + 1)
                if not line:
                    return
                length = len(line)
                while len(line) > MAX_LINE_BYTES and (rest := file.readline(MAX_LINE_BYTES)):
                    length += len(rest)
                    if rest.endswith(b"\n"):
                        break
                yield offset, length, line
                offset += length
    except OSError as error:
        raise BadInputError(f"cannot read {text}: {error.strerror}") from error


def _open(text: Path | Member, start: int) -> Any:
    if isinstance(text, Path):
        file = open(text, "rb", buffering=1 << 20)  # noqa: SIM115 (the caller closes it)
        file.seek(start)
        return file
    return io.BufferedReader(_Unpacked(text.archive.stream(text.entry), start), 1 << 20)


class _Unpacked(io.RawIOBase):
    """A stream of pieces as a file, its first `skip` bytes left out."""

    def __init__(self, pieces: Iterator[bytes], skip: int):
        self.pieces, self.skip, self.rest = pieces, skip, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self.rest:
            piece = next(self.pieces, None)
            if piece is None:
                return 0
            self.rest = memoryview(piece)[min(self.skip, len(piece)) :]
            self.skip -= min(self.skip, len(piece))
        count = min(len(buffer), len(self.rest))
        buffer[:count] = self.rest[:count]
        self.rest = self.rest[count:]
        return count


def check_picture(content: bytes, name: str, *, decode: bool) -> tuple[int, int, str]:
    """Return (width, height, format) of a picture, as it is stored.

    Args:
        content: the file.
        name: for messages.
        decode: also decode every pixel, which finds files that were cut off.

    Raises:
        RowError: not a picture, damaged, or over `MAX_PIXELS`.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise RowError(f"image '{name}' has {width} x {height} pixels, over the limit of {MAX_PIXELS:,}")
            if decode:
                image.load()
            return width, height, image.format or "?"
    except RowError:
        raise
    except Image.DecompressionBombError as error:
        raise RowError(f"image '{name}' is a decompression bomb: over {MAX_PIXELS:,} pixels") from error
    except Exception as error:  # decoders of broken files raise nearly anything
        raise RowError(f"image '{name}' cannot be decoded ({error or type(error).__name__})") from error
