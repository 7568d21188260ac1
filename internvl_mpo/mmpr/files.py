"""Where the files of an MMPR release lie: on disk, or in its zip archives, which are read without unpacking.

meta.json names image folders and annotation files as they were on the cluster it was written on. A name is looked for
as it stands, relative to the release, and then with more and more of its leading folders left out:

    /mnt/cluster/user/MMPR/annotations/x.jsonl  ->  MMPR/annotations/x.jsonl, annotations/x.jsonl, x.jsonl

A name that could be two files is refused with both, and so is a file, or a link to one, outside the release.
"""

import io
import os
from collections.abc import Iterator
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from internvl_mpo.errors import BadInputError, RowError
from internvl_mpo.mmpr.archives import Archive, Entry, leaves_folder
from internvl_mpo.mmpr.joined_parts import find_archives
from internvl_mpo.mmpr.lines import Annotation, Member
from internvl_mpo.pictures import check_encodable, damage

MAX_FILE_BYTES = 256 << 20  # of one picture; the largest files of MMPR are a few MB
MAX_PIXELS = 178_956_970  # Pillow refuses larger pictures as decompression bombs, and so do all readers of the data set
_GIVE_ROOT = "so nothing of it is read; give the folder it lies in as --image_root"


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
    return "/".join(whole.split("/")[-2:]) if is_absolute(name) else whole


def is_absolute(name: str) -> bool:
    """Return whether a path, an address, or a path of another system says where it starts."""
    return name.startswith(("/", "\\")) or "://" in name


class ReleaseFiles:
    """The files of one release.

    Attributes:
        bases: folders looked in, best first.
    """

    def __init__(self, *bases: str | Path):
        """Remember the folders; archives are indexed when the first file is not found on disk."""
        self.bases = [Path(base) for base in bases]
        self._folders: dict[str, PictureFolder] = {}

    def __reduce__(self) -> tuple:
        return _opened, tuple(self.bases)  # a process indexes the archives once

    @cached_property
    def archives(self) -> list[Archive]:
        """The zip archives in the folders.

        Raises:
            BadInputError: one is a link that leads out of the release.
        """
        folders = {base.resolve(): base for base in self.bases if base.is_dir()}
        groups = [parts for base in folders.values() for parts in find_archives(base)]
        for part in (part for parts in groups for part in parts):
            if self.leads_out(part):
                raise BadInputError(f"{part} is a link that leads out of the release, {_GIVE_ROOT}")
        return [Archive(parts) for parts in groups]

    @property
    def problems(self) -> list[str]:
        """What the archives that were opened could not offer."""
        return [problem for archive in self.__dict__.get("archives", []) for problem in archive.problems]

    @cached_property
    def _grounds(self) -> list[Path]:
        """The folders that files of the release lie in. The Hub's cache keeps them in `blobs`, as links."""
        folders = [base.resolve() for base in self.bases]
        caches = [above.parent for folder in folders for above in folder.parents if above.name == "snapshots"]
        return folders + [cache / "blobs" for cache in caches]

    def leads_out(self, path: Path) -> bool:
        """Return whether a path, links followed, leads out of the release."""
        real = path.resolve()
        return not any(real.is_relative_to(ground) for ground in self._grounds)

    def text(self, name: str) -> Path | Member | None:
        """Return where an annotation file lies, or None.

        Raises:
            BadInputError: it could be two files, or leads out of the release.
        """
        found: Path | Member | None = self._on_disk(name, Path.is_file)
        if isinstance(found, Path) and self.leads_out(found):
            raise BadInputError(f"annotation file '{name}' leads out of the release, {_GIVE_ROOT}")
        return found if found is not None else self._in_archives(name)

    def _in_archives(self, name: str) -> Member | None:
        for suffix in suffixes(name):
            found = [
                Member(archive, archive.find(entry))
                for archive in self.archives
                for entry in archive.texts
                if entry == suffix or entry.endswith(f"/{suffix}")
            ]
            if len(found) > 1:
                raise BadInputError(f"annotation file '{name}' may be {found[0]} or {found[1]}; name one of them")
            if found:
                return found[0]
        return None

    def pictures(self, root: str) -> "PictureFolder":
        """Return the image folder that meta.json calls `root`; it may turn out not to be anywhere."""
        return self._folders.setdefault(root, PictureFolder(self, root))

    def _on_disk(self, name: str, is_right: Any) -> Path | None:
        """Return the file or folder a name stands for.

        Raises:
            BadInputError: there are two.
        """
        for base in self.bases:
            if is_right(base / name):
                return base / name
        found: list[Path] = []
        for suffix in suffixes(name):
            path = next((base / suffix for base in self.bases if is_right(base / suffix)), None)
            if path is not None and not (found and found[0].samefile(path)):
                found.append(path)
        if len(found) > 1:
            raise BadInputError(f"'{name}' may be {found[0]} or {found[1]} here; name one of them")
        return found[0] if found else None


@lru_cache(maxsize=4)
def _opened(*bases: Path) -> ReleaseFiles:
    return ReleaseFiles(*bases)


class PictureFolder:
    """The pictures of one subset, on disk or in archives.

    Attributes:
        annotations: files whose rows show its pictures.
        claims: picture -> absolute paths in those rows that stand for it; filled when the first one is met.
    """

    def __init__(self, files: ReleaseFiles, root: str):
        """Find the folder when the first picture is asked for."""
        self.files, self.root = files, root
        self.annotations: list[Annotation] = []
        self.claims: dict[str, set[str]] = {}

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
                inner = sorted(folder for folder in archive.folders if folder.endswith(f"/{suffix}"))
                if inner[1:]:
                    two = f"'{inner[0]}' or '{inner[1]}' in {archive.name}"
                    raise BadInputError(f"image folder '{self.root}' may be {two}; name one of them in meta.json")
                if inner:
                    found.append((archive, inner[0]))
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
        if self.path is None or not is_absolute(name) or os.path.isfile(name):
            return name
        return next((suffix for suffix in suffixes(name) if os.path.isfile(self.path / suffix)), name)

    def meant(self, name: str) -> str:
        """Return what an absolute path stands for here: the path below this folder, or itself where nothing is.

        Raises:
            RowError: it could be two pictures.
        """
        found: dict[str, str] = {}
        for suffix in suffixes(name):
            for place in self._places(suffix):
                found.setdefault(os.path.realpath(place) if isinstance(place, Path) else place[1].name, suffix)
                break
        if os.path.isfile(name):
            found[os.path.realpath(name)] = name
        if len(found) > 1:
            first, second, *_ = found.values()
            raise RowError(
                f"image '{name}' may be '{first}' or '{second}' here; write its path relative to the image folder"
            )
        return next(iter(found.values()), name)

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
        absolute = is_absolute(name)
        if not name or (leaves_folder(name) and not absolute) or "\0" in name:
            raise RowError(f"image {name!r} leads out of its folder")
        for candidate in suffixes(name) if absolute else (name,):
            for place in self._places(candidate):
                if isinstance(place, Path) and self.files.leads_out(place):
                    raise RowError(f"image '{place}' leads out of the release, {_GIVE_ROOT}")
                return place
        if self.path is None and not self.prefixes:
            looked = ", ".join(map(str, self.files.bases))
            raise RowError(f"image folder '{self.root}' does not exist below {looked}, nor in a zip archive there")
        raise RowError(f"image '{name}' is not in '{self}'")

    def _places(self, name: str) -> Iterator[Path | tuple[Archive, Entry]]:
        """Yield where a picture lies, the disk before the archives."""
        if self.path is not None:
            try:
                if (self.path / name).is_file():
                    yield self.path / name
            except OSError:  # a name the file system cannot hold
                pass
        for archive, prefix in self.prefixes:
            entry = archive.find(f"{prefix}/{name}".lstrip("/"))
            if entry is not None:
                yield archive, entry


def check_picture(content: bytes, name: str, *, decode: bool) -> tuple[int, int, str]:
    """Return (width, height, format) of a picture, as it is stored.

    Args:
        content: the file.
        name: for messages.
        decode: also decode every pixel, which finds files that were cut off.

    Raises:
        RowError: not a picture, damaged, over `MAX_PIXELS`, or refused by the encoder.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise RowError(f"image '{name}' has {width} x {height} pixels, over the limit of {MAX_PIXELS:,}")
            check_encodable(image, decode=decode)
            return width, height, image.format or "?"
    except RowError:
        raise
    except Image.DecompressionBombError as error:
        raise RowError(f"image '{name}' is a decompression bomb: over {MAX_PIXELS:,} pixels") from error
    except Exception as error:  # decoders of broken files raise nearly anything
        raise RowError(f"image '{name}' cannot be decoded ({damage(error)})") from error
