"""Zip archives read in place: also when a release ships them as byte-concatenated parts, and also when damaged.

    images.zip              one file
    images.zip_a, _b        MMPR-v1.1
    images.zip_aa .. _ac    MMPR-v1.2; images.zip.001 .. is understood too

Nothing is ever unpacked to the disk. The index keeps 40 bytes per entry, so that a million pictures fit anywhere.
When the central directory is gone (the last part was cut off), entries are found by their local headers; what is whole
stays readable, and `Archive.problems` says what is not.
"""

import io
import struct
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path, PurePosixPath

import numpy as np

from internvl_mpo.errors import BadInputError
from internvl_mpo.mmpr.joined_parts import JoinedParts

_LOCAL, _CENTRAL, _END, _END64, _LOCATOR64 = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_MAX32, _MAX16 = 0xFFFFFFFF, 0xFFFF
_STORED, _DEFLATED = 0, 8
_ENCRYPTED, _SIZES_FOLLOW, _UTF8 = 0x1, 0x8, 0x800
_FIELDS = ("hash", "header", "packed", "size", "crc", "method")
_SCAN_STEP = 4 << 20
_STEP = 1 << 20


@dataclass(frozen=True)
class Entry:
    """A file inside an archive; `header` is the offset of its local header, sizes are in bytes."""

    name: str
    header: int
    packed: int
    size: int
    crc: int
    method: int


class Archive:
    """The index of a zip file in one or several parts.

    Attributes:
        name: file name, that of the first part where there are several.
        problems: sentences about what cannot be read, each naming the file.
        folders: every folder in it, `""` for the top.
        texts: names of its `.json` and `.jsonl` files.
    """

    def __init__(self, parts: Sequence[Path]):
        """Read the index.

        Raises:
            BadInputError: not a zip file.
        """
        self.parts = list(parts)
        self.name = str(parts[0]) if len(parts) == 1 else f"{parts[0]} .. {parts[-1].name}"
        self.problems: list[str] = []
        self.folders: set[str] = {""}
        self.texts: list[str] = []
        self._file = JoinedParts(self.parts)
        self._columns = {field: array("Q") for field in _FIELDS}
        self._shifts = (0,)
        directory = self._find_directory()
        if directory is None:
            self._scan()
        else:
            self._read_directory(*directory)
        order = np.argsort(np.frombuffer(self._columns["hash"], dtype=np.uint64), kind="stable")
        self._index = {
            field: np.frombuffer(column, dtype=np.uint64)[order] if len(column) else np.zeros(0, np.uint64)
            for field, column in self._columns.items()
        }
        del self._columns

    def __len__(self) -> int:
        return len(self._index["hash"])

    def __reduce__(self) -> tuple:
        return Archive, (self.parts,)

    def find(self, name: str) -> Entry | None:
        """Return the entry of a name, or None."""
        wanted = _hash(name)
        hashes = self._index["hash"]
        position = int(np.searchsorted(hashes, np.uint64(wanted), side="right")) - 1  # the last of equal names counts
        if position < 0 or int(hashes[position]) != wanted:
            return None
        return Entry(name, *(int(self._index[field][position]) for field in _FIELDS[1:]))

    def read(self, entry: Entry, max_bytes: int) -> bytes:
        """Return the content of an entry, checked against its length and checksum.

        Raises:
            BadInputError: damaged, larger than `max_bytes`, or packed in a way that is not understood.
        """
        where = f"{entry.name} in {self.name}"
        if entry.size > max_bytes:
            raise BadInputError(f"{where} unpacks to {entry.size:,} bytes, over the limit of {max_bytes:,}")
        packed = self._packed(entry, where)
        if entry.method == _DEFLATED:
            unpacker = zlib.decompressobj(-15)
            try:
                content = unpacker.decompress(packed, entry.size + 1)  # never more than the header promises
            except zlib.error as error:
                raise BadInputError(f"{where} is damaged ({error})") from error
        elif entry.method == _STORED:
            content = packed
        else:
            raise BadInputError(f"{where} is packed with method {entry.method}; only stored and deflated are read")
        if len(content) != entry.size:
            raise BadInputError(f"{where} does not unpack to the {entry.size:,} bytes its header promises")
        if zlib.crc32(content) != entry.crc:
            raise BadInputError(f"{where} is damaged (its checksum differs)")
        return content

    def stream(self, entry: Entry) -> Iterator[bytes]:
        """Yield the content of a large entry piece by piece.

        Raises:
            BadInputError: damaged, or packed in a way that is not understood.
        """
        where = f"{entry.name} in {self.name}"
        start = self._content_start(entry, where)
        if entry.method not in (_STORED, _DEFLATED):
            raise BadInputError(f"{where} is packed with method {entry.method}; only stored and deflated are read")
        packed = self._pieces(start, entry.packed, where)
        crc, size = 0, 0
        try:
            for content in packed if entry.method == _STORED else _unpacked(packed):
                crc, size = zlib.crc32(content, crc), size + len(content)
                if size > entry.size:
                    break
                yield content
        except zlib.error as error:
            raise BadInputError(f"{where} is damaged ({error})") from error
        if size != entry.size or crc != entry.crc:
            raise BadInputError(f"{where} is damaged (its length or checksum differs)")

    def _pieces(self, start: int, length: int, where: str) -> Iterator[bytes]:
        for position in range(start, start + length, _STEP):
            piece = self._read_at(position, wanted := min(_STEP, start + length - position))
            if len(piece) < wanted:
                raise BadInputError(f"{where} is cut off: the archive ends inside it")
            yield piece

    # --- index --------------------------------------------------------------------------------------------------------

    def _find_directory(self) -> tuple[int, int] | None:
        """Return (offset, number of entries) of the central directory, or None where there is none."""
        size = self._file.size
        tail_start = max(0, size - 22 - _MAX16)
        tail = self._read_at(tail_start, size - tail_start)
        position = tail.rfind(_END)
        if position < 0 or len(tail) - position < 22:
            return None
        num_entries, length, start = struct.unpack("<HII", tail[position + 10 : position + 20])
        end = tail_start + position
        locator = self._read_at(end - 20, 20)
        if locator[:4] == _LOCATOR64:  # Python writes it from 2 GB on, where the plain record still holds all numbers
            record = self._read_at(end64 := struct.unpack("<Q", locator[8:16])[0], 56)
            if record[:4] != _END64:  # parts are missing or bytes stand before the archive
                record = self._read_at(end64 := end - 20 - 56, 56)
            if record[:4] != _END64:
                return None
            num_entries, length, start = struct.unpack("<QQQ", record[32:56])
            end = end64
        found = end - length
        if found < 0 or (num_entries and self._read_at(found, 4) != _CENTRAL):
            return None
        if found != start:
            self._shifts = (0, found - start)
            missing = f"{start - found:,} bytes are missing" if found < start else f"{found - start:,} bytes too many"
            self.problems.append(f"{self.name}: {missing} before its directory; a part is not as it was published")
        return found, num_entries

    def _read_directory(self, start: int, num_entries: int) -> None:
        self._file.seek(start)
        file = io.BufferedReader(_NoClose(self._file), 1 << 20)
        for number in range(num_entries):
            head = file.read(46)
            if len(head) < 46 or head[:4] != _CENTRAL:
                self.problems.append(f"{self.name}: its directory ends after {number:,} of {num_entries:,} entries")
                return
            flags, method = struct.unpack("<HH", head[8:12])
            crc, packed, size, name_length, extra_length, comment_length = struct.unpack("<IIIHHH", head[16:34])
            header = struct.unpack("<I", head[42:46])[0]
            name, extra = file.read(name_length), file.read(extra_length)
            if comment_length:
                file.read(comment_length)
            if _MAX32 in (packed, size, header):
                size, packed, header = _zip64(extra, size, packed, header)
            self._add(_decode_name(name, flags), flags, header, packed, size, crc, method)

    def _scan(self) -> None:
        """Find entries by their local headers, for an archive whose directory was cut off."""
        if self._read_at(0, 4) != _LOCAL:
            raise BadInputError(f"{self.name} is not a zip file")
        position, total = 0, self._file.size
        while True:
            head = self._read_at(position, 30)
            if len(head) < 30 or head[:4] != _LOCAL:
                position = self._next_header(position)
                if position is None:
                    break
                continue
            flags, method = struct.unpack("<HH", head[6:10])
            crc, packed, size, name_length, extra_length = struct.unpack("<IIIHH", head[14:30])
            rest = self._read_at(position + 30, name_length + extra_length)
            if _MAX32 in (packed, size):
                size, packed, _ = _zip64(rest[name_length:], size, packed, 0)
            name = _decode_name(rest[:name_length], flags)
            content = position + 30 + name_length + extra_length
            if flags & _SIZES_FOLLOW and not packed:
                following = self._next_header(content)
                end = total if following is None else following
                tail = self._read_at(max(content, end - 16), min(16, end - content))
                if following is None or tail[:4] != b"PK\x07\x08":
                    break
                crc, packed, size = struct.unpack("<III", tail[4:16])
            if content + packed > total:
                break
            self._add(name, flags, position, packed, size, crc, method)
            position = content + packed
        self.problems.append(
            f"{self.name} is cut off: it has no directory at its end; the {len(self._columns['hash']):,} whole entries "
            "before the cut are read, download the last part again"
        )

    def _next_header(self, position: int) -> int | None:
        while block := self._read_at(position, _SCAN_STEP):
            found = block.find(_LOCAL, 0 if block[:4] != _LOCAL else 4)
            if found >= 0:
                return position + found
            position += max(1, len(block) - 3)
        return None

    def _add(self, name: str, flags: int, header: int, packed: int, size: int, crc: int, method: int) -> None:
        if name.endswith("/"):
            return
        if flags & _ENCRYPTED:
            self.problems.append(f"{self.name}: entry '{name}' is encrypted and not read")
            return
        if leaves_folder(name):
            self.problems.append(f"{self.name}: entry {name!r} leads out of its folder and is not read")
            return
        folder = name.rpartition("/")[0]
        while folder not in self.folders:
            self.folders.add(folder)
            folder = folder.rpartition("/")[0]
        if name.endswith((".json", ".jsonl")):
            self.texts.append(name)
        for field, value in zip(_FIELDS, (_hash(name), header, packed, size, crc, method), strict=True):
            self._columns[field].append(value)

    # --- bytes --------------------------------------------------------------------------------------------------------

    def _packed(self, entry: Entry, where: str) -> bytes:
        packed = self._read_at(self._content_start(entry, where), entry.packed)
        if len(packed) < entry.packed:
            raise BadInputError(f"{where} is cut off: the archive ends inside it")
        return packed

    def _content_start(self, entry: Entry, where: str) -> int:
        for shift in self._shifts:
            position = entry.header + shift
            if position < 0:
                continue
            head = self._read_at(position, 30)
            if len(head) == 30 and head[:4] == _LOCAL:
                name_length, extra_length = struct.unpack("<HH", head[26:30])
                if _decode(self._read_at(position + 30, name_length), head) == entry.name:
                    return position + 30 + name_length + extra_length
        raise BadInputError(f"{where} is not where the archive's directory says; a part is cut off or missing")

    def _read_at(self, position: int, count: int) -> bytes:
        self._file.seek(position)
        pieces = []
        while count > 0:
            piece = self._file.read(count)
            if not piece:
                break
            pieces.append(piece)
            count -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _unpacked(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Unpack a stream in steps of limited size: a megabyte may unpack to a gigabyte."""
    unpacker = zlib.decompressobj(-15)
    for piece in pieces:
        while piece:
            yield unpacker.decompress(piece, _STEP)
            piece = unpacker.unconsumed_tail
    while rest := unpacker.decompress(b"", _STEP):
        yield rest


class _NoClose(io.RawIOBase):
    """Lets a BufferedReader be collected without closing the file below."""

    def __init__(self, file: JoinedParts):
        self.file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        return self.file.readinto(buffer)


def leaves_folder(name: str) -> bool:
    """Return whether a relative path would lead out of the folder it is joined to, on any system."""
    plain = name.replace("\\", "/")
    return "\0" in name or plain.startswith("/") or ":" in plain.split("/")[0] or ".." in PurePosixPath(plain).parts


def _hash(name: str) -> int:
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _word(head: bytes, position: int) -> int:
    return struct.unpack("<H", head[position : position + 2])[0]


def _decode(name: bytes, local_header: bytes) -> str:
    return _decode_name(name, _word(local_header, 6))


def _decode_name(name: bytes, flags: int) -> str:
    """File names are UTF-8 where the flag says so; many tools write UTF-8 without it."""
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        return name.decode("utf-8" if flags & _UTF8 else "cp437", "surrogateescape")


def _zip64(extra: bytes, size: int, packed: int, header: int) -> tuple[int, int, int]:
    """Return (size, packed, header) with what the zip64 extra field says in place of 0xFFFFFFFF."""
    position = 0
    while position + 4 <= len(extra):
        kind, length = struct.unpack("<HH", extra[position : position + 4])
        if kind == 1:
            values = iter(struct.unpack(f"<{length // 8}Q", extra[position + 4 : position + 4 + 8 * (length // 8)]))
            return tuple(next(values, value) if value == _MAX32 else value for value in (size, packed, header))
        position += 4 + length
    return size, packed, header
