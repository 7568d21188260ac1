"""Groups of preference pairs -> one row of tokens, and back again.

A group is one prompt with its distinct responses. Responses that begin alike share that stem too, so a group is a tree:

    prompt p0 p1 p2    responses a = (x y z end), b = (x y w end), c = (v end)    pairs (a, b) and (a, c)

    token       p0 p1 p2  x  y  z  w  v | q0 q1 ...    the next group
    position     0  1  2  3  4  5  5  3 |  0  1        a branch goes on counting where its parent stopped
    visible to   7  7  7  6  6  5  6  7 |              last token that may see this one, see below
    predicts     .  .  x  y  z  .  .  . |              and p2 predicts v too, y predicts w, z, w and v their end

- The token that closes a response predicts nothing, so it is scored but never run through the model.
- The last token of a parent predicts the first token of **each** of its branches.
- Tokens lie in depth-first order. A token and all that may see it (itself and what grows from it) are one interval, so
  the whole attention mask is one number per token: `q` sees `k` if and only if `k <= q < visible_until_T[k]`.
- A stem is scored once; its log-probs count for every response that runs through it.

Letters: T tokens of a pack, S scored tokens (each stem once), E (response, scored token) entries, R responses, P pairs.
"""

import bisect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """One encoded prompt with its distinct responses and the preference pairs among them.

    Attributes:
        prompt_ids: token ids of the prompt, image tokens included.
        responses: token ids of each distinct response; the end-of-turn token is the last unless it was cut off.
        pairs: (chosen, rejected) as indices into `responses`.
        pair_ids: ids of the rows the pairs come from.
        tiles: pixels of the prompt's images in reading order; None for a text-only prompt. Shape: (I, 3, S, S), or
            (patches, width) where a family cuts no tiles
        token_weights: of each pair, the weights of the tokens of its chosen and of its rejected response; None where
            all are 1. See `token_weights.py`.
        image_inputs: what the vision tower needs beside the pixels, by name; rows in reading order.
        positions: rotary positions of the prompt where they have several axes; None counts the tokens.
            Shape: (axes, prompt tokens)
    """

    prompt_ids: list[int]
    responses: list[list[int]]
    pairs: list[tuple[int, int]]
    pair_ids: list[str]
    tiles: Tensor | None = None
    token_weights: list[tuple[list[float], list[float]]] | None = None
    image_inputs: dict[str, Tensor] = field(default_factory=dict)
    positions: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens the group adds to a pack."""
        return len(self.prompt_ids) + tree_tokens(self.responses)


class Segment(NamedTuple):
    """A run of tokens without a fork: a prompt, a stem or a branch.

    Attributes:
        start: index of its first token in the pack.
        stop: index after its last token.
        parent: index of the segment it grows from, -1 for a prompt.
    """

    start: int
    stop: int
    parent: int


@dataclass(frozen=True)
class Layout:
    """Who may see whom in a pack; all that an attention implementation needs.

    Attributes:
        segments: parents come before their branches; together they cover the pack in order.
        visible_until_T: index after the last token that may see this one. Shape: (T,)
        scored_index_U: tokens that predict a scored one, ascending: all that is read of the last layer. In each segment
            they are its last tokens. Shape: (U,)
        plan: place where an attention implementation keeps what it derived from the segments.
    """

    segments: list[Segment]
    visible_until_T: Tensor
    scored_index_U: Tensor
    plan: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def move(self, function: Callable[[Tensor], Tensor]) -> "Layout":
        """Return the layout with `function` applied to its tensors; plans, which hold tensors too, are left behind."""
        return Layout(self.segments, function(self.visible_until_T), function(self.scored_index_U))


class PairTokens(NamedTuple):
    """Weighted tokens of both responses of every pair of a pack.

    Attributes:
        entry_W: index of the token among the entries. Shape: (W,)
        side_W: p for the chosen response of pair p, P + p for its rejected one. Shape: (W,)
        weight_W: how much the token counts. Shape: (W,)
    """

    entry_W: Tensor
    side_W: Tensor
    weight_W: Tensor


@dataclass(frozen=True)
class Pack:
    """Groups laid out in one row without padding; responses and pairs are numbered through the pack.

    Attributes:
        input_ids: token ids that run through the model. Shape: (1, T)
        position_ids: place of each token on its own path. Shape: (1, T), or (axes, 1, T)
        pixel_values: tiles of all groups in order, None if there are none. Shape: (I, 3, S, S), or (patches, width)
        layout: who may see whom.
        predict_index_S: index of the token whose hidden state predicts each scored token. Shape: (S,)
        target_ids_S: token ids of the scored tokens. Shape: (S,)
        entry_scored_E: index into the scored tokens, for each token of each response in order. Shape: (E,)
        entry_response_E: index of the response it belongs to, ascending. Shape: (E,)
        lengths_R: number of scored tokens of each response. Shape: (R,)
        chosen_index_P: chosen response of each pair. Shape: (P,)
        rejected_index_P: rejected response of each pair. Shape: (P,)
        pair_ids: ids of the rows the pairs come from.
        num_tiles: tiles of each group.
        pair_tokens: weights of tokens in the log-ratios of the pairs; None where all are 1.
        image_inputs: what the vision tower needs beside the pixels, by name; rows of all groups in order.
        num_image_rows: rows of each group in each of them.
    """

    input_ids: Tensor
    position_ids: Tensor
    pixel_values: Tensor | None
    layout: Layout
    predict_index_S: Tensor
    target_ids_S: Tensor
    entry_scored_E: Tensor
    entry_response_E: Tensor
    lengths_R: Tensor
    chosen_index_P: Tensor
    rejected_index_P: Tensor
    pair_ids: list[str]
    num_tiles: list[int]
    pair_tokens: PairTokens | None = None
    image_inputs: dict[str, Tensor] = field(default_factory=dict)
    num_image_rows: dict[str, list[int]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Tokens that run through the language model."""
        return self.input_ids.shape[1]

    @property
    def num_pairs(self) -> int:
        """Preference pairs in the pack."""
        return len(self.pair_ids)

    @property
    def num_responses(self) -> int:
        """Distinct responses in the pack."""
        return len(self.lengths_R)

    @property
    def chosen_lengths_P(self) -> Tensor:
        """Scored tokens of the chosen response of each pair. Shape: (P,)"""
        return self.lengths_R[self.chosen_index_P]

    @property
    def rejected_lengths_P(self) -> Tensor:
        """Scored tokens of the rejected response of each pair. Shape: (P,)"""
        return self.lengths_R[self.rejected_index_P]

    def response_sums(self, values_E: Tensor) -> Tensor:
        """Return the sum over the tokens of each response. Shape: (R,)"""
        return values_E.new_zeros(self.num_responses).index_add(0, self.entry_response_E, values_E)

    def pair_sums(self, values_E: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted sums over the tokens of the chosen and of the rejected response. Shape: 2 x (P,)"""
        if self.pair_tokens is None:
            sums_R = self.response_sums(values_E)
            return sums_R[self.chosen_index_P], sums_R[self.rejected_index_P]
        entry_W, side_W, weight_W = self.pair_tokens
        values_W = values_E[entry_W] * weight_W.to(values_E.dtype)
        sums = values_E.new_zeros(2 * self.num_pairs).index_add(0, side_W, values_W)
        return sums[: self.num_pairs], sums[self.num_pairs :]

    @property
    def weight_sums(self) -> tuple[Tensor, Tensor]:
        """Sums of the token weights of chosen and rejected: their lengths where all are 1. Shape: 2 x (P,)"""
        return self.pair_sums(torch.ones_like(self.entry_scored_E, dtype=torch.float32))

    def to(self, device: torch.device | str) -> "Pack":
        """Return the pack with every tensor on `device`."""
        return self._with_each(lambda tensor: tensor.to(device))

    def _with_each(self, function: Callable[[Tensor], Tensor]) -> "Pack":
        """Return the pack with `function` applied to every tensor."""
        changed = {name: function(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        if self.pair_tokens is not None:
            changed["pair_tokens"] = PairTokens(*map(function, self.pair_tokens))
        changed["image_inputs"] = {name: function(value) for name, value in self.image_inputs.items()}
        return replace(self, **changed, layout=self.layout.move(function))


def pack_groups(groups: Sequence[Group]) -> Pack:
    """Lay groups out in one row.

    Raises:
        ValueError: no group, an empty prompt or response, or a pair that names a response which is not there.
    """
    if not groups:
        raise ValueError("a pack needs at least one group")
    row = _Row()
    for group in groups:
        _check(group)
        row.add(group)
    tiles = [group.tiles for group in groups if group.tiles is not None]
    entry_response = torch.tensor(row.entry_response)
    order = entry_response.argsort(stable=True)  # the tree is walked stem by stem
    return Pack(
        input_ids=torch.tensor([row.input_ids]),
        position_ids=_positions(groups, row),
        pixel_values=torch.cat(tiles) if tiles else None,
        layout=Layout(row.segments, torch.tensor(row.visible_until), torch.tensor(sorted({*row.predict_index}))),
        predict_index_S=torch.tensor(row.predict_index),
        target_ids_S=torch.tensor(row.target_ids),
        entry_scored_E=torch.tensor(row.entry_scored)[order],
        entry_response_E=entry_response[order],
        lengths_R=torch.tensor(row.lengths),
        chosen_index_P=torch.tensor(row.chosen_index, dtype=torch.long),
        rejected_index_P=torch.tensor(row.rejected_index, dtype=torch.long),
        pair_ids=[pair_id for group in groups for pair_id in group.pair_ids],
        num_tiles=[0 if group.tiles is None else len(group.tiles) for group in groups],
        pair_tokens=_pair_tokens(groups, row),
        **_image_inputs(groups),
    )


def _positions(groups: Sequence[Group], row: "_Row") -> Tensor:
    """Return the positions of a row. Shape: (1, T), or (axes, 1, T) where a prompt has several axes"""
    positions = torch.tensor([row.positions])
    starts = [segment.start for segment in row.segments if segment.parent < 0]
    for group, start in zip(groups, starts, strict=True):
        if group.positions is not None:
            if positions.ndim == 2:
                positions = positions.repeat(len(group.positions), 1, 1)
            positions[:, 0, start : start + len(group.prompt_ids)] = group.positions
    return positions


def _image_inputs(groups: Sequence[Group]) -> dict[str, dict]:
    """Return the two fields of a pack that hold what the vision tower needs beside the pixels."""
    inputs: dict[str, list[Tensor]] = {}
    for group in groups:
        for name, rows in group.image_inputs.items():
            inputs.setdefault(name, []).append(rows)
    num_rows = {name: [len(group.image_inputs.get(name, ())) for group in groups] for name in inputs}
    return {"image_inputs": {name: torch.cat(rows) for name, rows in inputs.items()}, "num_image_rows": num_rows}


def _pair_tokens(groups: Sequence[Group], row: "_Row") -> PairTokens | None:
    """Return the weighted tokens of the pairs of a row, None where no group has weights."""
    if all(group.token_weights is None for group in groups):
        return None
    weights = [pair for group in groups for pair in group.token_weights or _equal_weights(group)]
    ends = list(itertools.accumulate(row.lengths))
    tokens: tuple[list[int], list[int], list[float]] = [], [], []
    sides = [(index, chosen) for index, (chosen, _) in zip(row.chosen_index, weights, strict=True)]
    sides += [(index, rejected) for index, (_, rejected) in zip(row.rejected_index, weights, strict=True)]
    for side, (index, values) in enumerate(sides):
        tokens[0].extend(range(ends[index] - row.lengths[index], ends[index]))
        tokens[1].extend([side] * row.lengths[index])
        tokens[2].extend(values)
    return PairTokens(*map(torch.tensor, tokens))


def _equal_weights(group: Group) -> list[tuple[list[float], list[float]]]:
    ones = [[1.0] * len(response) for response in group.responses]
    return [(ones[chosen], ones[rejected]) for chosen, rejected in group.pairs]


def unpack_groups(pack: Pack) -> list[Group]:
    """Return the groups of a pack, without weights of tokens: the inverse of `pack_groups`."""
    input_ids, targets, predicts = pack.input_ids[0].tolist(), pack.target_ids_S.tolist(), pack.predict_index_S.tolist()
    scored_R: list[list[int]] = [[] for _ in pack.lengths_R]
    for response, scored in zip(pack.entry_response_E.tolist(), pack.entry_scored_E.tolist(), strict=True):
        scored_R[response].append(scored)
    starts = [segment.start for segment in pack.layout.segments if segment.parent < 0]
    home_R = [bisect.bisect_right(starts, predicts[scored[0]]) - 1 for scored in scored_R]  # group of each response
    pairs = list(zip(pack.chosen_index_P.tolist(), pack.rejected_index_P.tolist(), pack.pair_ids, strict=True))
    tiles = iter([] if pack.pixel_values is None else pack.pixel_values.split([n for n in pack.num_tiles if n]))
    image_inputs = {name: rows.split(pack.num_image_rows[name]) for name, rows in pack.image_inputs.items()}
    groups = []
    for number, start in enumerate(starts):
        first, count = home_R.index(number), home_R.count(number)
        end = predicts[scored_R[first][0]] + 1
        own = [pair for pair in pairs if home_R[pair[0]] == number]
        groups.append(
            Group(
                prompt_ids=input_ids[start:end],
                responses=[[targets[index] for index in scored] for scored in scored_R[first : first + count]],
                pairs=[(chosen - first, rejected - first) for chosen, rejected, _ in own],
                pair_ids=[pair_id for _, _, pair_id in own],
                tiles=next(tiles) if pack.num_tiles[number] else None,
                image_inputs={name: rows[number] for name, rows in image_inputs.items() if len(rows[number])},
                positions=pack.position_ids[:, 0, start:end] if pack.position_ids.ndim == 3 else None,
            )
        )
    return groups


def tree_tokens(responses: Sequence[Sequence[int]]) -> int:
    """Return the tokens that run for the responses of a group: common stems once, last tokens not at all."""
    rows = sorted(list(response[:-1]) for response in responses)
    return sum(map(len, rows)) - sum(map(num_common, rows, rows[1:]))


def num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
    differences = (index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differences, min(len(first), len(second)))


class _Row:
    """The growing row of a pack, as plain lists."""

    def __init__(self) -> None:
        self.input_ids: list[int] = []
        self.positions: list[int] = []
        self.visible_until: list[int] = []
        self.segments: list[Segment] = []
        self.predict_index: list[int] = []
        self.target_ids: list[int] = []
        self.entry_scored: list[int] = []
        self.entry_response: list[int] = []
        self.lengths: list[int] = []
        self.chosen_index: list[int] = []
        self.rejected_index: list[int] = []

    def add(self, group: Group) -> None:
        """Append the prompt and the tree of responses of one group."""
        first = len(self.lengths)
        self.chosen_index += [first + chosen for chosen, _ in group.pairs]
        self.rejected_index += [first + rejected for _, rejected in group.pairs]
        self.lengths += [len(response) for response in group.responses]
        self._grow(group, list(range(len(group.responses))), depth=0, parent=-1, first=first)

    def _grow(self, group: Group, through: list[int], *, depth: int, parent: int, first: int) -> None:
        """Append the segment on which some responses agree, then everything that grows from it.

        Args:
            group: the group that is laid out.
            through: the responses that run through this segment; each has more than `depth` tokens.
            depth: response tokens that lie on the path before this segment.
            parent: segment it grows from, -1 for the prompt.
            first: number of the group's first response in the pack.
        """
        going_on, end = through, depth
        while going_on and len({group.responses[index][end] for index in going_on}) == 1:
            longest, end = going_on[0], end + 1
            going_on = [index for index in going_on if len(group.responses[index]) > end]
        scored = group.responses[longest][depth:end] if end > depth else []
        run = scored if going_on else scored[:-1]

        prompt = group.prompt_ids if parent < 0 else []
        start = len(self.input_ids)
        stop = start + len(prompt) + len(run)
        before = start + len(prompt) - 1 if parent < 0 else self.segments[parent].stop - 1
        path = len(group.prompt_ids) + depth - len(prompt)  # tokens on the path before this segment
        self.input_ids += prompt + run
        # responses go on counting from the largest position of the prompt, which pictures with several axes lower
        after = 0 if group.positions is None else int(group.positions.max()) + 1 - len(group.prompt_ids)
        self.positions += [*range(len(prompt)), *range(path + len(prompt) + after, path + after + stop - start)]

        first_scored = len(self.target_ids)
        self.target_ids += scored
        inside = range(start + len(prompt), start + len(prompt) + len(scored) - 1)
        self.predict_index += [before, *inside][: len(scored)]
        for index in through:
            taken = min(len(group.responses[index]), end) - depth
            self.entry_scored += range(first_scored, first_scored + taken)
            self.entry_response += [first + index] * taken

        number = parent
        if stop > start:
            number = len(self.segments)
            self.segments.append(Segment(start, stop, parent))
            self.visible_until += [0] * (stop - start)
        branches: dict[int, list[int]] = {}
        for index in going_on:
            branches.setdefault(group.responses[index][end], []).append(index)
        for branch in branches.values():
            self._grow(group, branch, depth=end, parent=number, first=first)
        self.visible_until[start:stop] = [len(self.input_ids)] * (stop - start)


def _check(group: Group) -> None:
    """Refuse a group that cannot be laid out; `encode_group` never makes one."""
    name = group.pair_ids[0] if group.pair_ids else "without pairs"
    if not group.prompt_ids:
        raise ValueError(f"the prompt of group {name} is empty")
    if not group.responses or not all(group.responses):
        raise ValueError(f"group {name} has an empty response or none at all")
    if len(group.pairs) != len(group.pair_ids):
        raise ValueError(f"group {name} has {len(group.pairs)} pairs but {len(group.pair_ids)} pair ids")
    if any(not 0 <= index < len(group.responses) for pair in group.pairs for index in pair):
        raise ValueError(f"a pair of group {name} names a response that is not among its {len(group.responses)}")
    lengths = [tuple(len(group.responses[index]) for index in pair) for pair in group.pairs]
    if group.token_weights is not None and [tuple(map(len, pair)) for pair in group.token_weights] != lengths:
        raise ValueError(f"group {name} has another number of token weights than of tokens")
