"""How many tokens a pair costs, and which pairs share a pack. Numbers only, no tensors."""

import bisect
import heapq
from collections.abc import Sequence
from typing import NamedTuple


class PairSize(NamedTuple):
    """What one preference pair adds to a pack, and what other pairs of its question can share.

    Attributes:
        prompt: tokens of the prompt, image tokens included.
        chosen: scored tokens of the chosen response; the last one of a response is never run.
        rejected: scored tokens of the rejected response.
        num_tiles: tiles of all images.
        num_cut: responses that lose their end to the length limit.
        stem: first tokens that both responses run alike, so that they run once.
        chosen_key: equal for equal responses of one question.
        rejected_key: the same of the rejected one.
    """

    prompt: int
    chosen: int
    rejected: int
    num_tiles: int = 0
    num_cut: int = 0
    stem: int = 0
    chosen_key: int = 0
    rejected_key: int = 1

    @property
    def num_tokens(self) -> int:
        """Tokens of a pack that holds this pair alone."""
        return self.prompt + self.chosen - 1 + self.rejected - 1 - self.stem


def group_tokens(sizes: Sequence[PairSize]) -> int:
    """Return the tokens that pairs of one question add to a pack as one group.

    The prompt counts once, and so does a response that several pairs use. Stems are known within pairs only, so the
    tree may turn out smaller where responses of different pairs begin alike, never larger.
    """
    if len(sizes) == 1:
        return sizes[0].num_tokens
    lengths: dict[int, int] = {}
    for size in sizes:
        lengths[size.chosen_key] = size.chosen - 1
        lengths[size.rejected_key] = size.rejected - 1
    # A tree of strings has as many nodes as the strings have tokens less a maximum spanning tree of common prefixes.
    root = {key: key for key in lengths}
    shared = 0
    for size in sorted(sizes, key=lambda size: -size.stem):
        ends = []
        for key in (size.chosen_key, size.rejected_key):
            while root[key] != key:
                key = root[key]
            ends.append(key)
        if ends[0] != ends[1]:
            root[ends[0]] = ends[1]
            shared += size.stem
    return sizes[0].prompt + sum(lengths.values()) - shared


def plan_packs(costs: Sequence[float], num_packs: int) -> list[list[int]]:
    """Split the groups of one optimizer step into exactly `num_packs` packs of nearly equal cost.

    Longest first onto the least loaded pack; equal input gives equal output on every rank.

    Args:
        costs: cost of each group, usually its tokens.
        num_packs: number of ranks times gradient accumulation steps.

    Returns:
        Indices into `costs` for each pack, ascending; no pack is empty.

    Raises:
        ValueError: fewer groups than packs, so that a rank would have nothing to do.
    """
    if len(costs) < num_packs:
        raise ValueError(f"{len(costs)} groups cannot fill {num_packs} packs; every pack needs at least one group")
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    # An empty pack comes before every other, so that each gets a group even where costs are zero.
    loads = [(0, 0.0, pack) for pack in range(num_packs)]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        _, load, pack = loads[0]
        packs[pack].append(index)
        heapq.heapreplace(loads, (1, load + costs[index], pack))
    return [sorted(pack) for pack in packs]


def fill_packs(costs: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Pack groups into as few packs of at most `max_tokens` as best-fit-decreasing finds.

    Args:
        costs: tokens of each group.
        max_tokens: token budget of a pack.

    Returns:
        Indices into `costs` for each pack, ascending; packs in order of their first group.

    Raises:
        ValueError: a group is larger than the budget; the message names it.
    """
    free: list[tuple[int, int]] = []  # (tokens left, pack), sorted
    packs: list[list[int]] = []
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        cost = costs[index]
        if cost > max_tokens:
            raise ValueError(f"group {index} has {cost} tokens, more than the budget of {max_tokens} tokens a pack")
        place = bisect.bisect_left(free, (cost,))
        if place == len(free):
            packs.append([])
            left, pack = max_tokens, len(packs) - 1
        else:
            left, pack = free.pop(place)
        packs[pack].append(index)
        bisect.insort(free, (left - cost, pack))
    return sorted(sorted(pack) for pack in packs)
