"""Which pairs a step holds must not depend on ranks, packs or interruptions."""

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl_mpo.mmpr.pairs import mixture_table, repeats
from internvl_mpo.mmpr.reading import iter_pairs
from internvl_mpo.mmpr.release import read_meta, split_subset_name
from internvl_mpo.pack_plan import PairSize
from internvl_mpo.steps import StepSampler, fit_to_budget, plan_steps, split_step

KEYS = ["q0"] * 5 + ["q1"] * 3 + ["q2", "q3", "q4", "q5"]


def sizes(tokens: int, count: int = len(KEYS)) -> list[PairSize]:
    """Pairs of `tokens` tokens without anything in common but the prompt, which is four fifths of them."""
    length = tokens // 10
    return [
        PairSize(tokens - 2 * length, length + 1, length + 1, chosen_key=2 * i, rejected_key=2 * i + 1)
        for i in range(count)
    ]


def sampler(num_ranks=1, rank=0, accumulation=1, keys=KEYS, pairs_per_step=4, **changes) -> StepSampler:
    return StepSampler(
        keys,
        changes.get("counts", [1] * len(keys)),
        changes.get("sizes", sizes(10, len(keys))),
        pairs_per_step=pairs_per_step,
        pairs_per_group=changes.get("pairs_per_group", 2),
        max_tokens=changes.get("max_tokens", 1000),
        num_ranks=num_ranks,
        rank=rank,
        gradient_accumulation_steps=accumulation,
        seed=0,
    )


def pairs_of(step) -> list[int]:
    return sorted(row for group in step for row in group)


def test_every_pair_is_seen_once_and_steps_are_full():
    steps = sampler().steps()
    assert [len(pairs_of(step)) for step in steps] == [4, 4, 4]
    assert sorted(row for step in steps for row in pairs_of(step)) == list(range(12))


def test_a_group_holds_pairs_of_one_question_and_at_most_so_many():
    for step in sampler().steps():
        for group in step:
            assert len({KEYS[row] for row in group}) == 1
            assert len(group) <= 2


@pytest.mark.parametrize(("num_ranks", "accumulation"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_ranks_and_accumulation_do_not_change_what_a_step_holds(num_ranks, accumulation):
    expected = [pairs_of(step) for step in sampler().steps()]
    ranks = [list(sampler(num_ranks, rank, accumulation)) for rank in range(num_ranks)]
    assert {len(packs) for packs in ranks} == {len(expected) * accumulation}
    for number, step in enumerate(expected):
        packs = [rank[number * accumulation + turn] for rank in ranks for turn in range(accumulation)]
        assert all(packs), "a rank without a pack would wait for the others for ever"
        assert sorted(row for pack in packs for group in pack for row in group) == step


def test_epochs_differ_and_repeat_exactly():
    one, other = sampler(), sampler()
    first = list(one)
    one.set_epoch(1)
    assert list(one) != first
    assert list(other) == first


def test_a_last_step_without_enough_pairs_for_every_rank_is_left_out():
    keys = [f"q{i}" for i in range(9)]
    assert sampler(keys=keys, pairs_per_step=4).num_steps == 3
    assert sampler(keys=keys, pairs_per_step=4, accumulation=2).num_steps == 2


def test_repeated_pairs_never_share_a_group():
    steps = plan_steps(["q"] * 2, [3, 2], pairs_per_step=5, pairs_per_group=5, seed=0, epoch=0)
    groups = [group for step in steps for group in step]
    assert sorted(row for group in groups for row in group) == [0, 0, 0, 1, 1]
    assert all(len(set(group)) == len(group) for group in groups)


def test_a_step_too_small_for_the_ranks_is_refused():
    with pytest.raises(ValueError, match="2 pairs cannot fill 3 packs"):
        split_step([(0, 1)], sizes(10, 2), 3, 100)


def test_a_prompt_shared_in_a_group_counts_once_towards_the_budget():
    # Each pair has 80 tokens of prompt and 2 x 10 of responses: three pairs of a question are 80 + 60, not 300.
    grouped = sampler(keys=["q"] * 3, pairs_per_step=3, pairs_per_group=3, sizes=sizes(100, 3), max_tokens=140)
    fit_to_budget(grouped, num_epochs=1)
    assert grouped.gradient_accumulation_steps == 1
    grouped.max_tokens = 139
    fit_to_budget(grouped, num_epochs=1)
    assert grouped.gradient_accumulation_steps == 2
    assert sorted(len(group) for pack in grouped for group in pack) == [1, 2]


def test_every_pack_of_every_epoch_keeps_to_the_budget():
    rng = random.Random(0)
    data = [
        PairSize(rng.randint(20, 400), rng.randint(5, 90), rng.randint(5, 90), 3, 2 * i, 2 * i + 1) for i in range(12)
    ]
    data = [size._replace(prompt=data[KEYS.index(key)].prompt) for size, key in zip(data, KEYS, strict=True)]
    plan = sampler(sizes=data, pairs_per_step=6, pairs_per_group=4, max_tokens=600)
    fit_to_budget(plan, num_epochs=3)
    assert 1 < plan.gradient_accumulation_steps < 6
    for epoch in range(3):
        plan.set_epoch(epoch)
        assert max(plan.largest_pack(step) for step in plan.steps()) <= 600
    plan.gradient_accumulation_steps -= 1  # and no smaller number does
    epochs = [(plan.set_epoch(epoch), plan.steps())[1] for epoch in range(3)]
    assert max(plan.largest_pack(step) for steps in epochs for step in steps) > 600


def test_the_budget_never_changes_which_pairs_share_a_step():
    wide = [pairs_of(step) for step in sampler(pairs_per_group=4).steps()]
    narrow = sampler(pairs_per_group=4, max_tokens=12)
    fit_to_budget(narrow, num_epochs=1)
    assert narrow.gradient_accumulation_steps > 1
    assert [pairs_of(step) for step in narrow.steps()] == wide


def test_a_step_that_ranks_cannot_share_within_the_budget_is_refused():
    with pytest.raises(ValueError, match="a step of 3 pairs cannot be cut for 2 ranks into packs of at most 15 tokens"):
        fit_to_budget(sampler(num_ranks=2, keys=["a", "b", "c"], pairs_per_step=3, max_tokens=15), num_epochs=1)


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=40),
    st.integers(1, 7),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_the_plan_is_that_of_plain_lists(questions, pairs_per_step, pairs_per_group, epoch):
    """Steps are a function of the seed alone, and stay so: a checkpoint of an earlier version goes on with them."""
    counts = [question % 3 for question in questions]
    rng = random.Random(f"steps 1 {epoch}")
    members: dict = {}
    for index, (key, count) in enumerate(zip(questions, counts, strict=True)):
        for turn in range(count):
            members.setdefault((key, turn), []).append(index)
    groups = []
    for rows in members.values():
        rng.shuffle(rows)
        groups += [tuple(rows[i : i + pairs_per_group]) for i in range(0, len(rows), pairs_per_group)]
    rng.shuffle(groups)
    seen = [(row, number) for number, group in enumerate(groups) for row in group]
    planned = plan_steps(
        np.array(questions), counts, pairs_per_step=pairs_per_step, pairs_per_group=pairs_per_group, seed=1, epoch=epoch
    )
    for step in range(len(planned)):
        own = seen[step * pairs_per_step : (step + 1) * pairs_per_step]
        twin = [tuple(row for row, _ in group) for _, group in itertools.groupby(own, key=lambda pair: pair[1])]
        assert planned[step] == twin
    assert sum(len(group) for step in planned for group in step) == len(seen)


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=40),
    st.integers(1, 7),
    st.integers(1, 4),
    st.integers(0, 3),
)
def test_any_data_is_seen_exactly_as_often_as_asked(questions, pairs_per_step, pairs_per_group, epoch):
    counts = [question % 3 for question in questions]
    steps = plan_steps(
        questions, counts, pairs_per_step=pairs_per_step, pairs_per_group=pairs_per_group, seed=1, epoch=epoch
    )
    seen = [row for step in steps for group in step for row in group]
    assert [seen.count(row) for row in range(len(questions))] == counts
    assert all(sum(map(len, step)) == pairs_per_step for step in list(steps)[:-1])


def test_a_step_that_is_not_there_is_no_step():
    steps = sampler().steps()
    for step in (-1, len(steps)):
        with pytest.raises(IndexError):
            steps[step]


def test_the_order_of_an_epoch_takes_four_bytes_a_pair():
    assert sampler().steps().order.dtype == np.int32


def test_the_loader_knows_how_many_packs_come():
    one = sampler(accumulation=2)
    assert len(one) == len(list(one)) == 6


def test_a_step_is_cut_no_further_than_it_has_packs_and_the_largest_groups_first():
    step = [(0, 1, 2), (3, 4, 5), (6,), (7, 8)]
    data = sizes(10, 9)
    assert split_step(step, data, 1, 1000) == [step]
    assert sorted(split_step(step, data, 4, 1000)) == [[group] for group in step]
    parts = [[(0,)], [(1, 2)], [(3, 4, 5)], [(6,)], [(7, 8)]]
    assert sorted(split_step(step, data, 5, 1000)) == parts
    assert sorted(split_step(step, data, 6, 1000)) == [*parts[:2], [(3,)], [(4, 5)], *parts[3:]]


def test_lengths_that_are_at_hand_change_no_pack_and_save_looking_at_single_pairs():
    data = [size._replace(prompt=8 + index) for index, size in enumerate(sizes(10))]
    tokens = np.array([size.num_tokens for size in data])
    plain = sampler(sizes=data, pairs_per_group=3, pairs_per_step=6, accumulation=2, max_tokens=25)
    quick = sampler(sizes=data, pairs_per_group=3, pairs_per_step=6, accumulation=2, max_tokens=25)
    quick.tokens = tokens
    assert list(quick) == list(plain)
    largest = [plain.largest_pack(step) for step in plain.steps()]
    assert [quick.largest_pack(step) for step in quick.steps()] == largest
    assert [quick.is_over_budget(step) for step in quick.steps()] == [size > 25 for size in largest]
    assert split_step([(0,), (1,), (2,)], None, 2, 25, tokens) == [[(2,)], [(0,), (1,)]]


def packs_needed(prompts: list[int], max_tokens: int, num_epochs: float, max_steps: int = 0) -> tuple[int, int]:
    """Packs that a run of pairs with these prompts needs, and the epoch that the sampler is left at."""
    data = [PairSize(prompt, 2, 2, chosen_key=2 * i, rejected_key=2 * i + 1) for i, prompt in enumerate(prompts)]
    plan = sampler(keys=list(range(len(data))), sizes=data, max_tokens=max_tokens)
    fit_to_budget(plan, num_epochs=num_epochs, max_steps=max_steps)
    return plan.gradient_accumulation_steps, plan.epoch


def test_the_budget_is_looked_at_in_every_epoch_that_the_run_reaches_and_in_no_other():
    growing = range(0, 240, 20)  # three steps an epoch; the second epoch has one of more than 650 tokens
    assert packs_needed(growing, 650, num_epochs=1) == packs_needed(growing, 650, num_epochs=9, max_steps=3) == (1, 0)
    assert packs_needed(growing, 650, num_epochs=1.1) == packs_needed(growing, 650, 1, max_steps=4) == (2, 0)


def test_more_packs_that_leave_out_a_last_step_reach_one_epoch_more():
    prompts = [10, 40, 100, 40, 10, 100, 40, 100, 20]  # nine pairs: with two packs a step of one pair is left out
    assert packs_needed(prompts, 150, num_epochs=1) == (2, 0)
    assert packs_needed(prompts, 150, num_epochs=1, max_steps=3) == packs_needed(prompts, 150, num_epochs=2) == (3, 0)


def test_epochs_of_a_single_step_are_all_looked_at():
    data = [
        PairSize(tokens, 2, 2, chosen_key=2 * i, rejected_key=2 * i + 1)
        for i, tokens in enumerate((10, 50, 50, 50, 20))
    ]
    for max_steps, needed in ((2, 2), (3, 3)):  # the third epoch leaves out the small pair
        plan = sampler(keys=list(range(5)), sizes=data, max_tokens=100, accumulation=2)
        fit_to_budget(plan, num_epochs=1, max_steps=max_steps)
        assert (plan.num_steps, plan.gradient_accumulation_steps) == (1, needed)


def test_a_run_without_a_whole_step_needs_no_more_packs():
    short = sampler(keys=["q"], accumulation=2)
    fit_to_budget(short, num_epochs=1, max_steps=5)
    assert (short.num_steps, short.gradient_accumulation_steps) == (0, 2)


def test_a_pair_that_is_larger_than_the_budget_is_refused():
    with pytest.raises(ValueError, match="a step of 3 pairs cannot be cut for 1 ranks into packs of at most 9 tokens"):
        fit_to_budget(sampler(keys=["a", "b", "c"], pairs_per_step=3, max_tokens=9), num_epochs=1)


def subsets(*sizes: tuple[str, int, float]) -> tuple[list[tuple[str, float]], np.ndarray]:
    """Names and repeat times of subsets of (name, rows, repeat_time), and the subset of each row."""
    return [(name, repeat_time) for name, _, repeat_time in sizes], np.repeat(
        np.arange(len(sizes)), [count for _, count, _ in sizes]
    )


@pytest.mark.parametrize(("repeat_time", "total"), [(0, 0), (0.25, 25), (1, 100), (2.5, 250), (3, 300)])
def test_repeat_time_is_honoured_exactly_also_above_one(repeat_time, total):
    counts = repeats(*subsets(("s", 100, repeat_time)), seed=0)
    assert sum(counts) == total
    assert max(counts) - min(counts) <= 1


def test_another_seed_repeats_other_rows_and_subsets_do_not_move_together():
    data = subsets(("a", 40, 1.5), ("b", 40, 1.5))
    draws = [repeats(*data, seed=seed).tolist() for seed in range(4)]
    assert len({tuple(draw[:40]) for draw in draws}) == 4
    assert all(draw[:40] != draw[40:] for draw in draws)
    assert repeats(*data, seed=0).tolist() == draws[0]


def test_repeat_time_belongs_to_its_subset():
    assert repeats(*subsets(("a", 4, 0.5), ("b", 2, 2)), seed=0)[4:].tolist() == [2, 2]


def test_the_rows_that_are_drawn_stay_the_same_between_versions():
    """A checkpoint knows its data by which rows were drawn: those that `random.sample` gives of the rows themselves."""
    rows = list(range(4, 24))
    drawn = random.Random("7 b").sample(rows, 7)
    counts = repeats(*subsets(("a", 4, 1), ("b", 20, 0.35)), seed=7)
    assert np.flatnonzero(counts[4:]).tolist() == [row - 4 for row in sorted(drawn)]


@pytest.mark.parametrize("repeat_time", [0.1, 0.3, 1.1, 1.7, 2.999])
def test_fractions_hold_for_any_number_of_rows(repeat_time):
    for count in range(1, 60):
        counts = repeats(*subsets(("s", count, repeat_time)), seed=count).tolist()
        assert sum(counts) == round(count * repeat_time)
        assert set(counts) <= {int(repeat_time), int(repeat_time) + 1}


def test_the_square_root_keeps_the_total_and_evens_out_the_subsets():
    data = subsets(("large", 900, 1), ("small", 100, 1), ("repeated", 50, 2), ("unused", 7, 0))
    plain, sqrt = repeats(*data, seed=0), repeats(*data, seed=0, resample="sqrt")
    assert sum(plain) == sum(sqrt) == 1100
    assert [sum(sqrt[:900]), sum(sqrt[900:1000]), sum(sqrt[1000:1050])] == [660, 220, 220]  # 30 : 10 : 10
    assert sum(sqrt[1050:]) == 0
    assert set(sqrt[900:1000].tolist()) == {2, 3}


def test_the_table_shows_what_each_subset_adds():
    data = subsets(("a", 4, 0.5), ("b", 2, 2))
    table = mixture_table(*data, repeats(*data, seed=0), np.array([10] * 4 + [40] * 2))
    cells = {line.split()[0]: line.split()[1:] for line in table.splitlines()[1:]}
    assert cells["a"] == ["4", "0.5", "2", "33.3%", "10"]
    assert cells["b"] == ["2", "2", "4", "66.7%", "40"]
    assert cells["all"] == ["6", "6", "100.0%", "30"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("geo170k_pairs_vqa_correctness_rules", ("geo170k", "correctness")),
        ("dvqa_pairs_vqa_format_rules", ("dvqa", "format")),
        ("m3cot_prefix_pair_sr0.5_wo_image", ("m3cot", "dropout_ntp")),
        ("gqa_prefix_pair_sr0.0_with_image", ("gqa", "prefix_with_image")),
        ("RLAIF-V", ("RLAIF-V", "other")),
    ],
)
def test_subset_names_tell_source_and_rule(name, expected):
    assert split_subset_name(name) == expected


def test_meta_json_is_read_relative_to_itself(tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations" / "a.jsonl").write_text(
        '{"image": "1.png", "question": "q", "chosen": "c", "rejected": "r"}\n'
        '{"image": "1.png", "question": "q", "chosen": "c", "rejected": "c"}\n'
    )
    meta = tmp_path / "meta.json"
    meta.write_text(
        '{"a_pairs_vqa_correctness_rules": {"root": "images", "annotation": "annotations/a.jsonl", '
        '"repeat_time": 0.5, "max_dynamic_patch": 6}}'
    )
    good, bad = iter_pairs(meta)
    assert (good.pair.rule, good.pair.source, good.max_tiles) == ("correctness", "a", 6)
    assert good.image_root == tmp_path / "images"
    assert str(bad).startswith(f"{tmp_path / 'annotations' / 'a.jsonl'}:2: 'chosen' equals 'rejected'")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must be an object of subsets"),
        ('{"a": {"root": "x", "repeat_time": 1}}', "subset 'a': key 'annotation' is missing"),
        ('{"a": {"root": "x", "annotation": "no.jsonl", "repeat_time": 1}}', "no.jsonl does not exist"),
        ('{"a": {"root": "x", "annotation": "no.jsonl", "repeat_time": "1"}}', "'repeat_time' has the wrong type"),
    ],
)
def test_a_broken_meta_json_is_named(tmp_path, text, words):
    from internvl_mpo.errors import BadInputError

    (tmp_path / "meta.json").write_text(text)
    with pytest.raises(BadInputError, match=words):
        read_meta(tmp_path / "meta.json")
