"""Packs as literal rows, and the planning of packs. Run: pytest tests/test_packing.py"""

import pickle
import random
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import dense_mask

from internvl_mpo.pack_plan import PairSize, fill_packs, group_tokens, plan_packs
from internvl_mpo.packing import Group, Segment, pack_groups, tree_tokens, unpack_groups

X, Y, Z, W, V, END = 10, 11, 12, 13, 14, 99


def stemmed_group() -> Group:
    """The group that packing.py draws: a = x y z end, b = x y w end, c = v end."""
    return Group(
        prompt_ids=[1, 2, 3],
        responses=[[X, Y, Z, END], [X, Y, W, END], [V, END]],
        pairs=[(0, 1), (0, 2)],
        pair_ids=["ab", "ac"],
    )


def plain_group(name: str = "p") -> Group:
    return Group(prompt_ids=[5], responses=[[7, END], [8, END]], pairs=[(1, 0)], pair_ids=[name])


def test_pack_is_laid_out_as_drawn():
    pack = pack_groups([stemmed_group(), plain_group()])
    #                                        prompt  stem   z  w  v | prompt, two branches
    assert pack.input_ids.tolist() == [[1, 2, 3, X, Y, Z, W, V, 5, 7, 8]]
    assert pack.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 5, 3, 0, 1, 1]]
    assert pack.layout.visible_until_T.tolist() == [8, 8, 8, 7, 7, 6, 7, 8, 11, 10, 11]
    assert pack.layout.segments == [
        Segment(0, 3, -1),
        Segment(3, 5, 0),
        Segment(5, 6, 1),
        Segment(6, 7, 1),
        Segment(7, 8, 0),
        Segment(8, 9, -1),
        Segment(9, 10, 5),
        Segment(10, 11, 5),
    ]
    assert pack.chosen_index_P.tolist() == [0, 0, 4]
    assert pack.rejected_index_P.tolist() == [1, 2, 3]
    assert pack.pair_ids == ["ab", "ac", "p"]
    assert pack.lengths_R.tolist() == [4, 4, 2, 2, 2]
    assert pack.chosen_lengths_P.tolist() == [4, 4, 2]
    assert pack.rejected_lengths_P.tolist() == [4, 2, 2]


def test_last_token_of_a_parent_predicts_every_branch():
    pack = pack_groups([stemmed_group()])
    #                                          stem     z       w       v
    assert pack.target_ids_S.tolist() == [X, Y, Z, END, W, END, V, END]
    assert pack.predict_index_S.tolist() == [2, 3, 4, 5, 4, 6, 2, 7]


def test_a_stem_is_scored_once_and_counts_for_every_response():
    pack = pack_groups([stemmed_group()])
    by_response = [pack.entry_scored_E[pack.entry_response_E == r].tolist() for r in range(3)]
    assert by_response == [[0, 1, 2, 3], [0, 1, 4, 5], [6, 7]]


def test_no_branch_sees_another_and_no_group_sees_another():
    pack = pack_groups([stemmed_group(), plain_group()])
    assert dense_mask(pack.layout).int().tolist() == [
        # p0 p1 p2 x  y  z  w  v  | 5  7  8
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0],  # x
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0],  # y
        [1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0],  # z
        [1, 1, 1, 1, 1, 0, 1, 0, 0, 0, 0],  # w sees the stem, not z
        [1, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0],  # v sees the prompt only
        [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1],
    ]


def test_one_token_responses_run_nothing_but_the_prompt():
    pack = pack_groups([Group([1, 2], [[3], [4]], [(0, 1)], ["a"])])
    assert pack.input_ids.tolist() == [[1, 2]]
    assert pack.predict_index_S.tolist() == [1, 1]
    assert pack.target_ids_S.tolist() == [3, 4]


def test_a_stem_of_all_responses_lengthens_the_prompt_segment():
    pack = pack_groups([Group([1, 2], [[3, 4, 5], [3, 4, 6]], [(0, 1)], ["a"])])
    assert pack.layout.segments == [Segment(0, 4, -1)]
    assert pack.position_ids.tolist() == [[0, 1, 2, 3]]


def test_a_response_that_is_the_beginning_of_another_ends_inside_it():
    # Cutting at the length limit can leave one response a prefix of another.
    pack = pack_groups([Group([1], [[3, 4], [3, 4, 5]], [(0, 1)], ["a"])])
    assert pack.input_ids.tolist() == [[1, 3, 4]]
    assert [pack.entry_scored_E[pack.entry_response_E == r].tolist() for r in range(2)] == [[0, 1], [0, 1, 2]]


token_lists = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=6, unique_by=tuple)


@given(st.lists(st.tuples(st.integers(1, 4), token_lists), min_size=1, max_size=4))
@settings(max_examples=200, deadline=None)
def test_every_response_can_be_read_back_from_its_path(shapes):
    groups = [
        Group(list(range(50, 50 + size)), responses, [(0, len(responses) - 1)], [str(number)])
        for number, (size, responses) in enumerate(shapes)
    ]
    pack = pack_groups(groups)
    mask_TT = dense_mask(pack.layout)
    expected = [(group.prompt_ids, response) for group in groups for response in group.responses]
    for number, (prompt, response) in enumerate(expected):
        scored = pack.entry_scored_E[pack.entry_response_E == number]
        assert pack.target_ids_S[scored].tolist() == response
        last = pack.predict_index_S[scored[-1]]
        path = mask_TT[last].nonzero()[:, 0]  # all that the token before the last one sees
        assert pack.input_ids[0, path].tolist() == prompt + response[:-1]
        assert pack.position_ids[0, path].tolist() == list(range(len(path)))
    assert unpack_groups(pack) == groups
    assert pack.num_tokens == sum(group.num_tokens for group in groups)
    covered = [index for start, stop, _ in pack.layout.segments for index in range(start, stop)]
    assert covered == list(range(pack.num_tokens))


def test_half_a_response_shared_saves_its_tokens():
    # A Dropout-NTP pair at 5 tiles: 1,330 prompt tokens, 250 a response, half of the chosen one repeated.
    def tokens(stem: list[int]) -> int:
        return pack_groups([Group([1] * 1330, [stem + [2] * 125, stem + [3] * 125], [(0, 1)], ["a"])]).num_tokens

    apart = pack_groups([Group([1] * 1330, [[2] * 250, [3] * 250], [(0, 1)], ["a"])]).num_tokens
    assert apart == 1330 + 249 + 249
    assert tokens(list(range(125))) == apart - 125
    assert round(100 * 125 / apart) == 7


@given(token_lists.filter(lambda responses: len(responses) > 1), st.integers(1, 4), st.randoms())
@settings(max_examples=200, deadline=None)
def test_the_planned_size_of_a_group_is_that_of_its_pack_or_a_little_more(responses, prompt, rng):
    pairs = [tuple(rng.sample(range(len(responses)), 2)) for _ in range(rng.randint(1, 6))]
    sizes = []
    for ends in pairs:
        lengths = [len(responses[end]) for end in ends]
        stem = sum(lengths) - 2 - tree_tokens([responses[end] for end in ends])
        sizes.append(PairSize(prompt, *lengths, stem=stem, chosen_key=ends[0], rejected_key=ends[1]))
        pack = pack_groups([Group([9] * prompt, [responses[end] for end in ends], [(0, 1)], ["a"])])
        assert sizes[-1].num_tokens == pack.num_tokens
    used = sorted({end for ends in pairs for end in ends})
    group = Group([9] * prompt, [responses[end] for end in used], [(0, 1)], ["a"])
    assert group.num_tokens == pack_groups([group]).num_tokens
    assert group.num_tokens <= group_tokens(sizes) <= prompt + sum(len(responses[end]) - 1 for end in used)
    if len({frozenset(ends) for ends in pairs}) == len(used) * (len(used) - 1) // 2:
        assert group_tokens(sizes) == group.num_tokens  # every two responses are a pair, so every stem is known


def test_cost_grows_linearly_from_1_to_64_groups():
    def seconds(count: int) -> float:
        groups = [Group([1] * 100, [[i, *range(40)] for i in range(6)], [(0, 1)], [str(i)]) for i in range(count)]
        best = float("inf")
        for _ in range(3):
            start = time.process_time()
            pack = pack_groups(groups)
            best = min(best, time.process_time() - start)
        assert pack.num_tokens == count * (100 + 6 * 40)
        return best

    assert seconds(64) < 3 * 16 * seconds(4) + 0.02


def test_to_moves_every_tensor_and_keeps_the_rest():
    pack = pack_groups([stemmed_group()])
    moved = pack.to("meta")
    assert moved.layout.visible_until_T.device.type == "meta"
    for name, value in vars(moved).items():
        if isinstance(value, torch.Tensor):
            assert value.device.type == "meta", name
    assert moved.pair_ids == pack.pair_ids
    assert pickle.loads(pickle.dumps(pack)).layout.segments == pack.layout.segments  # DataLoader workers send packs


@pytest.mark.parametrize(
    ("group", "reason"),
    [
        (Group([], [[1]], [], []), "prompt of group without pairs is empty"),
        (Group([1], [[1], []], [(0, 1)], ["a"]), "group a has an empty response"),
        (Group([1], [], [], []), "empty response or none"),
        (Group([1], [[1]], [(0, 1)], ["a"]), "not among its 1"),
        (Group([1], [[1], [2]], [(0, -1)], ["a"]), "not among its 2"),
        (Group([1], [[1], [2]], [(0, 1)], []), "1 pairs but 0 pair ids"),
    ],
)
def test_a_group_that_cannot_be_laid_out_is_named(group, reason):
    with pytest.raises(ValueError, match=reason):
        pack_groups([group])


def test_zero_groups_are_refused():
    with pytest.raises(ValueError, match="at least one group"):
        pack_groups([])


def test_pairs_that_share_responses_in_a_ring_share_each_begin_once():
    """Three responses, each in two pairs: what the third pair shares is known from the other two."""

    def size(keys: tuple[int, int], stem: int) -> PairSize:
        lengths = {0: 9, 1: 8, 2: 7, 3: 6}
        return PairSize(20, lengths[keys[0]], lengths[keys[1]], stem=stem, chosen_key=keys[0], rejected_key=keys[1])

    ring = [size((0, 1), 4), size((0, 2), 3), size((1, 2), 3)]
    assert group_tokens(ring) == group_tokens(ring[::-1]) == 20 + 8 + 7 + 6 - 4 - 3
    assert group_tokens([*ring, size((2, 3), 5)]) == 20 + 8 + 7 + 6 + 5 - 5 - 4 - 3
    assert group_tokens([size((0, 1), 2), size((2, 3), 1), size((0, 3), 0)]) == 20 + 8 + 7 + 6 + 5 - 3
    assert group_tokens(ring[:1]) == ring[0].num_tokens == 20 + 8 + 7 - 4
    assert PairSize(20, 9, 8) == PairSize(20, 9, 8, 0, 0, 0, 0, 1)


def test_plan_packs_balances_and_leaves_no_pack_empty():
    assert plan_packs([7, 1, 5, 3, 4, 4], 2) == [[0, 1, 5], [2, 3, 4]]  # 12 and 12
    assert plan_packs([0, 0, 0], 3) == [[0], [1], [2]]
    assert plan_packs([9, 1, 1], 3) == [[0], [1], [2]]
    with pytest.raises(ValueError, match="2 groups cannot fill 3 packs"):
        plan_packs([5, 5], 3)


@given(st.lists(st.integers(1, 9000), min_size=8, max_size=80), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_plan_packs_holds_every_group_once_and_stays_near_the_mean(costs, num_packs):
    packs = plan_packs(costs, num_packs)
    assert sorted(index for pack in packs for index in pack) == list(range(len(costs)))
    assert plan_packs(costs, num_packs) == packs
    loads = [sum(costs[index] for index in pack) for pack in packs]
    assert max(loads) <= sum(costs) / num_packs + max(costs)  # the bound of longest-first


def test_fill_packs_keeps_to_the_budget_and_names_what_does_not_fit():
    assert fill_packs([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert fill_packs([2, 10, 4, 6], 10) == [[0], [1], [2, 3]]
    assert fill_packs([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]
    with pytest.raises(ValueError, match="group 1 has 11 tokens, more than the budget of 10"):
        fill_packs([3, 11], 10)


def mmpr_like_costs(count: int, seed: int) -> list[int]:
    """Tokens of pairs with the published means of MMPR: 25 or 80 of question, 211/171 or 300/350 of answers."""
    rng = random.Random(seed)
    costs = []
    for _ in range(count):
        tiles = rng.choices([1, 3, 5, 7, 13], weights=[25, 15, 25, 25, 10])[0]
        question, chosen, rejected = (25, 211, 171) if rng.random() < 0.23 else (80, 300, 350)
        answers = [min(4097, max(17, int(rng.lognormvariate(0, 0.6) * mean * 0.835))) for mean in (chosen, rejected)]
        costs.append(256 * tiles + 50 + question + sum(answers))
    return costs


def test_under_5_percent_of_the_budget_is_wasted_on_mmpr_lengths():
    costs = mmpr_like_costs(256, seed=0)  # one optimizer step of the published recipe
    packs = fill_packs(costs, 16384)
    used = sum(costs) / (16384 * len(packs))
    assert used > 0.95
    assert sorted(index for pack in packs for index in pack) == list(range(256))
    assert all(sum(costs[index] for index in pack) <= 16384 for pack in packs)


def test_what_towers_need_beside_pixels_goes_back_to_the_groups_that_brought_it():
    """Pictures of some groups only, two of one group, another kind of numbers, positions of several axes."""
    grid, sizes = torch.tensor([[1, 2, 3], [1, 4, 4], [1, 6, 6]]), torch.tensor([[7, 7]])
    inputs = [{"grid": grid[:2]}, {}, {"grid": grid[2:], "sizes": sizes}, {}]
    groups = [
        Group([1, 2, 3], [[4, 5], [6]], [(0, 1)], [str(number)], image_inputs=given,
              tiles=torch.full((2 if number == 0 else 1, 3, 2, 2), float(number)) if given else None)
        for number, given in enumerate(inputs)
    ]  # fmt: skip
    pack = pack_groups(groups)
    assert {name: rows.tolist() for name, rows in pack.image_inputs.items()} == {
        "grid": grid.tolist(), "sizes": sizes.tolist()
    }  # fmt: skip
    assert pack.num_image_rows == {"grid": [2, 0, 1, 0], "sizes": [0, 0, 1, 0]}
    for group, again in zip(groups, unpack_groups(pack), strict=True):
        assert {name: rows.tolist() for name, rows in again.image_inputs.items()} == {
            name: rows.tolist() for name, rows in group.image_inputs.items()
        }
        assert (again.tiles is None) == (group.tiles is None)
        assert group.tiles is None or torch.equal(again.tiles, group.tiles)


def test_positions_of_several_axes_are_those_of_the_prompts_and_count_on_in_the_responses():
    axes = torch.tensor([[0, 5, 6], [0, 7, 8], [0, 9, 10]])
    groups = [Group([1, 2], [[3, 4], [5]], [(0, 1)], ["a"]),
              Group([1, 2, 3], [[4, 5, 6], [7]], [(0, 1)], ["b"], positions=axes)]  # fmt: skip
    plain, several = pack_groups(groups[:1]).position_ids, pack_groups(groups).position_ids
    assert (plain.shape[0], several.shape[:2]) == (1, (3, 1))
    start = plain.shape[1]
    assert torch.equal(several[:, :, :start], plain.expand(3, 1, start))
    assert torch.equal(several[:, 0, start : start + 3], axes)
    behind = pack_groups([Group([1, 2, 3], [[4, 5, 6], [7]], [(0, 1)], ["b"])]).position_ids[:, 3:]
    again = pack_groups(groups[1:] * 2).position_ids
    assert again.shape[:2] == (3, 1) and torch.equal(*again.chunk(2, dim=-1))
    assert torch.equal(several[:, :, start + 3 :], (behind + 8).expand(3, 1, behind.shape[1])), "from 11 on, not from 3"
