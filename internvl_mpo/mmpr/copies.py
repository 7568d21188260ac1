"""Copies and near copies among the pairs of a release."""

import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from internvl_mpo.mmpr.findings import Finding, Part

NEAR_BITS = 8  # of 64, between the hashes of two rows: about one changed word in twenty


MIN_NEAR_WORDS = 40  # of both responses; in shorter ones a changed word changes the answer


# --- copies -----------------------------------------------------------------------------------------------------------


def similarity_hash(chosen: str, rejected: str) -> int:
    """Return 64 bits of which few change when few words of the two responses change; 0 for short ones.

    The sign of the sum, over all runs of three words, of the bits of their hashes (Charikar 2002).
    """
    words = [*chosen.lower().split(), "|", *rejected.lower().split()]
    if len(words) < MIN_NEAR_WORDS:
        return 0
    codes = np.array([zlib.crc32(word.encode("utf-8", "replace")) for word in words], dtype=np.uint64)
    runs = codes[:-2] * np.uint64(0x9E3779B97F4A7C15) ^ codes[1:-1] * np.uint64(0xC2B2AE3D27D4EB4F) ^ codes[2:]
    runs = (runs ^ runs >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    runs = (runs ^ runs >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    bits = np.unpackbits((runs ^ runs >> np.uint64(31)).view(np.uint8).reshape(-1, 8), axis=1)
    return int(np.packbits(2 * bits.sum(axis=0, dtype=np.int64) > len(bits)).view(np.uint64)[0])


def find_copies(parts: Sequence[Part]) -> Iterator[Finding]:
    """Yield rows that say what an earlier one said, over all parts."""
    columns = {
        key: np.concatenate([np.frombuffer(part.rows[key], np.uint64) for part in parts] or [np.zeros(0, np.uint64)])
        for key in ("content", "id", "prompt", "near")
    }
    starts = np.cumsum([0, *(len(part.numbers) for part in parts)])

    def place(row: int) -> tuple[str, str]:
        part = parts[int(np.searchsorted(starts, row, side="right")) - 1]
        inner = row - int(starts[int(np.searchsorted(starts, row, side="right")) - 1])
        name, _, group = part.name.partition("#")
        number = part.numbers[inner]
        return (f"{name}:row {number}" if group else f"{name}:{number}"), part.subsets[part.members[inner]]

    copies = set()
    for first, row in repeated_ids(columns["content"]):
        copies.add(row)
        where, subset = place(row)
        yield Finding("same row", where, subset, f"equals {place(first)[0]}")
    for first, row in repeated_ids(columns["id"]):
        if columns["content"][first] != columns["content"][row]:
            where, subset = place(row)
            yield Finding("same id", where, subset, f"its id is also that of {place(first)[0]}")
    for group in copy_groups(columns["prompt"]):
        members = [row for row in group.tolist() if row not in copies and columns["near"][row]]
        hashes = columns["near"][members]
        for position in range(1, len(members)):
            near = np.flatnonzero(np.bitwise_count(hashes[:position] ^ hashes[position]) <= NEAR_BITS)
            if len(near):
                where, subset = place(members[position])
                yield Finding("near copy", where, subset, f"nearly {place(members[int(near[0])])[0]}")


def copy_groups(values: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the positions of every value that occurs more than once, in order."""
    order = np.argsort(values, kind="stable")
    edges = np.flatnonzero(values[order][1:] != values[order][:-1]) + 1
    yield from (group for group in np.split(order, edges) if len(group) > 1)


def repeated_ids(values: np.ndarray) -> Iterator[tuple[int, int]]:
    for group in copy_groups(values):
        for row in group[1:].tolist():
            yield int(group[0]), row
