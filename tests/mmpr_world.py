"""The mini release in every layout, its Parquet form, and ways to damage a copy: for the tests of mmpr/."""

import hashlib
import json
import struct
from pathlib import Path

import pyarrow.parquet as pq

from internvl_mpo.mini.release import MMPRSettings, make_release
from internvl_mpo.mmpr.card import write_card
from internvl_mpo.mmpr.convert import convert
from internvl_mpo.mmpr.lines import read_lines
from internvl_mpo.mmpr.release import read_subsets
from internvl_mpo.mmpr.shard_plan import Options

ROOT = Path(__file__).resolve().parents[1]
RELEASES = ("v1.0", "v1.1", "v1.2", "folders")


def make_world(folder: Path) -> Path:
    """Every layout of the mini release under its name, and `parquet/`, made from v1.2 in several shards per source."""
    for release in RELEASES:
        make_release(MMPRSettings(output=str(folder / release), release=release, num_pictures=12))
    result = convert(Options(str(folder / "v1.2"), shard_bytes=6000), folder / "parquet")
    assert result.num_rejects == 0
    write_card(folder / "parquet", name="me/mini")
    return folder


def raw_rows(release: Path) -> dict[str, list[dict]]:
    """Subset -> its rows, read by nothing but the json module."""
    return {
        subset.name: [json.loads(line) for _, _, line in read_lines(subset.annotation)]
        for subset in read_subsets(release)
    }


def raw_pictures(release: Path) -> dict[tuple[str, str], bytes]:
    found = {}
    for subset in read_subsets(release):
        for _, _, line in read_lines(subset.annotation):
            for name in subset.pair(json.loads(line), "").images:
                found[subset.name, name] = subset.pictures.read(name)
    return found


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def damaged(world: Path, folder: Path) -> Path:
    make_release(MMPRSettings(output=str(folder), release="folders", num_pictures=4))
    return folder


def annotation(folder: Path) -> Path:
    return folder / "annotations" / "CLEVR_math_digits_pairs_vqa_correctness_rules.jsonl"


def run(folder: Path, **options) -> tuple[list[dict], list[str], list[str]]:
    """Convert; return the rejects, ids converted, and problems of archives."""
    output = folder.with_name(f"{folder.name}.parquet")
    result = convert(Options(str(folder), **options), output)
    rejects = output.with_name(f"{output.name}.rejects.jsonl")
    lines = rejects.read_text().splitlines() if rejects.is_file() else []
    ids = [row for path in sorted(output.glob("data/*/*.parquet")) for row in pq.read_table(path)["id"].to_pylist()]
    assert result.num_rejects == len(lines)
    assert result.num_rows == len(ids)
    return [json.loads(line) for line in lines], ids, result.problems


def replace_line(path: Path, number: int, change) -> bytes:
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = change(lines[number - 1])
    path.write_bytes(b"\n".join(lines))
    return lines[number - 1]


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises more pixels than it holds."""
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def zipped(folder: Path, parts: int = 3) -> list[Path]:
    make_release(MMPRSettings(output=str(folder), release="v1.2", num_pictures=30, num_parts=parts))
    return sorted(folder.glob("images.zip_*"))
