"""The pass over the start model's log-probs: which are computed, when, by whom, and that they are its own.

pytest tests/test_reference_pass.py
"""

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from test_trainer_built import as_rank, pairs, settings  # noqa: F401 - pairs is a fixture
from tiny import tiny_model, tiny_processor

from internvl_mpo.encoding import encode_group
from internvl_mpo.logps import attach_scoring, pair_logps
from internvl_mpo.packing import pack_groups
from internvl_mpo.training import distributed, reference_pass
from internvl_mpo.training.reference_cache import ReferenceCache
from internvl_mpo.training.reference_pass import ReferencePass
from internvl_mpo.training.signals import keep_from_signals

# Pairs 3, 4, 5 are of the question of step 0, pairs 6, 7, 8 of step 1, and 0, 1, 2 come up in step 2.
ONE_STEP = {"reference_ahead_steps": 1, "max_steps": 3, "max_tokens_per_pack": 500, "pairs_per_step": 2, "seed": 1}


@pytest.fixture
def passes(pairs, tmp_path):
    """Makes passes over nine pairs to train on and three held-out ones; all fill one cache on the disk."""

    def make(rank=0, num_ranks=1, held_out=3, name="cache", **more) -> ReferencePass:
        args = as_rank(settings(tmp_path, **{**ONE_STEP, **more}), rank, num_ranks)
        first, last = pairs.select(np.arange(12 - held_out)), pairs.select(np.arange(12 - held_out, 12))
        return ReferencePass(ReferenceCache(tmp_path / name, {}, pairs.digests), tiny_processor(), first, last, args)

    return make


@pytest.fixture(scope="module")
def wanted(pairs) -> dict[str, tuple[float, float]]:
    """Log-probs of chosen and rejected of each pair under the start model, one pair at a time, by id."""
    model, found = attach_scoring(tiny_model()), {}
    for row in pairs.rows:
        group = encode_group(tiny_processor(), [row.pair], row.image_root, max_tiles=4, max_length=900)
        with torch.no_grad():
            found[row.pair.id] = tuple(value.item() for value in pair_logps(model, pack_groups([group])))
    return found


def shards(found: ReferencePass) -> dict[str, list[str]]:
    """Digests of the pairs in each shard on the disk."""
    paths = sorted(found.cache.folder.glob("part-*.parquet"))
    return {path.name: pyarrow.parquet.read_table(path)["digest"].to_pylist() for path in paths}


def known(found: ReferencePass) -> list[int]:
    """Numbers of the pairs, held-out ones last, that have log-probs on the disk."""
    written = {int(digest, 16) for digests in shards(found).values() for digest in digests}
    return [number for number, digest in enumerate(found.plan.digests.tolist()) if digest in written]


def check(found: ReferencePass, wanted: dict, numbers: Any) -> None:
    ids = [found.plan.pairs.rows[number].pair.id for number in numbers]
    for side, values in enumerate(found.cache.lookup(ids, torch.float64)):
        assert values.tolist() == pytest.approx([wanted[pair_id][side] for pair_id in ids], rel=1e-5)


def test_a_pass_before_training_fills_in_what_the_start_model_says(passes, wanted, monkeypatch):
    one, bars = passes(), []
    monkeypatch.setattr(ReferencePass, "_bar", counting(bars))
    assert not one.is_complete()
    state, model = torch.get_rng_state(), tiny_model().train()
    one.before(model)
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state), "the random numbers of the run stay where they are"
    assert known(one) == list(range(12))
    check(one, wanted, range(12))
    assert (bars[0].total, bars[0].done) == (12, 12)
    assert one.is_complete()
    monkeypatch.setattr(reference_pass, "inference_engine", lambda *given: pytest.fail("an engine for nothing"))
    for again in (one, passes()):
        again.before(tiny_model())


def counting(bars: list) -> Callable:
    """A progress bar that counts, in the place of `_bar`."""

    class Bar(SimpleNamespace):
        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def update(self, count):
            self.done += count

    return lambda self, num_pairs, what="": bars.append(Bar(total=num_pairs, what=what, done=0)) or bars[-1]


def test_shares_of_a_pass_are_every_nth_pack_whatever_others_have_done(passes, wanted):
    alone = [passes(name=str(turn)) for turn in range(3)]
    for turn, one in enumerate(alone):
        one.before(tiny_model(), share=(turn, 3))
    found = [known(one) for one in alone]
    assert sorted(row for some in found for row in some) == list(range(12))
    assert all(len(some) < 12 for some in found)
    for turn in (2, 0, 1):  # into one cache, in another order
        passes().before(tiny_model(), share=(turn, 3))
    both = passes()
    assert both.is_complete()
    check(both, wanted, range(12))
    in_order = [pack for questions in both._all_questions() for pack in both.plan.packs(questions)]
    for turn, some in enumerate(found):
        assert some == sorted(row for pack in in_order[turn::3] for group in pack for row in group)


def of_step(one: ReferencePass, step: int) -> set[int]:
    """Pairs of the questions that a step's pairs belong to."""
    rows = [row for group in one.pairs.sampler(one.args).steps()[step] for row in group]
    return set(np.flatnonzero(np.isin(one.plan.questions, one.plan.questions[rows])).tolist())


def test_a_step_waits_for_its_own_questions_and_the_copy_of_the_start_weights_goes_with_the_last(
    passes, wanted, monkeypatch
):
    one, model, bars = passes(), attach_scoring(tiny_model()).train(), []
    monkeypatch.setattr(ReferencePass, "_bar", counting(bars))
    one.follow(model)
    assert one.follows and one.start is not None
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0)
    assert one.prepare(0)
    assert set(known(one)) == of_step(one, 0)
    took = one.seconds
    assert 0 < took < 60
    assert one.prepare(0)
    assert (set(known(one)), one.seconds) == (of_step(one, 0), took)
    one.prepare_held_out()
    assert set(known(one)) == of_step(one, 0) | {9, 10, 11}
    assert one.start is not None
    assert one.prepare(1)
    assert set(known(one)) == of_step(one, 0) | of_step(one, 1) | {9, 10, 11}
    assert one.prepare(2) and one.prepare(3)
    assert known(one) == list(range(12))
    assert one.start is None
    check(one, wanted, range(12))
    assert model.training
    names = ["reference log-probs, steps 1 to 1", "reference log-probs, held-out pairs"]
    assert [bar.what for bar in bars][:2] == names
    assert sum(bar.total for bar in bars) == sum(bar.done for bar in bars) == 12


def test_what_is_there_is_not_looked_for_again(passes, monkeypatch):
    one = passes()
    one.follow(attach_scoring(tiny_model()))
    one.prepare_held_out()
    monkeypatch.setattr(ReferencePass, "_with_start_weights", lambda *given: pytest.fail("looked again"))
    one.prepare_held_out()
    monkeypatch.undo()
    assert one.prepare(3)
    later = passes()
    later.follow(attach_scoring(tiny_model()))
    assert later.follows and later.start is None
    monkeypatch.setattr(ReferencePass, "_with_start_weights", lambda *given: pytest.fail("looked again"))
    later.prepare_held_out()
    assert later.prepare(0)


def test_a_run_that_goes_on_later_computes_what_it_has_passed_as_well(passes):
    one = passes()
    one.follow(attach_scoring(tiny_model()))
    assert one.prepare(2)
    assert known(one) == list(range(9))
    one.prepare_held_out()
    assert (known(one), one.start) == (list(range(12)), None)
    alone = passes(held_out=0, name="alone")
    alone.follow(attach_scoring(tiny_model()))
    assert alone.prepare(2)
    assert (known(alone), alone.start) == (list(range(12)), None)


def test_a_pass_that_is_stopped_says_so_and_goes_on_from_what_it_has(passes, wanted):
    one = passes(max_tokens_per_pack=150)  # several packs a step
    one.follow(attach_scoring(tiny_model()))
    asked = []
    assert not one.prepare(0, lambda: asked.append(1) or len(asked) < 3)
    assert (len(asked), len(known(one)) > 0) == (3, True)
    assert set(known(one)) < of_step(one, 0)
    before = shards(one)
    assert not one.prepare(0, lambda: False)
    assert shards(one) == before
    assert one.prepare(0)
    assert set(known(one)) == of_step(one, 0)
    assert before.items() < shards(one).items()
    check(one, wanted, of_step(one, 0))


def test_a_window_looks_at_what_other_programs_have_written_since(passes, wanted, monkeypatch):
    one = passes()
    one.follow(attach_scoring(tiny_model()))
    passes().before(tiny_model())
    monkeypatch.setattr(ReferencePass, "_compute", lambda *given: pytest.fail("computed twice"))
    assert one.prepare(2)
    check(one, wanted, range(9))


@pytest.mark.parametrize(
    ("more", "held_out", "num_steps"),
    [
        ({"preference": "orpo", "quality": "none"}, 3, 0),
        ({"preference": "none", "quality": "none"}, 0, 0),
        ({"reference_sync_steps": 1}, 3, 1),  # then it moves away from the start model
        ({"reference_sync_steps": 9}, 0, 3),
    ],
)
def test_only_steps_that_look_at_the_start_model_are_computed(passes, more, held_out, num_steps):
    one = passes(held_out=held_out, **more)
    assert one.plan.num_steps == num_steps
    one.before(tiny_model())
    rows = set().union(*(of_step(one, step) for step in range(num_steps))) | set(range(12 - held_out, 12))
    assert known(one) == sorted(rows)
    assert one.is_complete()


def test_a_single_pair_that_is_missing_is_noticed_among_the_held_out_ones_too(passes):
    for gone in (0, 8, 9, 11):
        one = passes(name=str(gone))
        digests = np.delete(one.plan.digests, gone)
        one.cache.take(digests, np.zeros((11, 2)))
        assert not one.is_complete()
        one.before(tiny_model())
        assert one.is_complete()
        assert gone in known(one), "with the pack it stands in"


def test_weights_that_fsdp_will_cut_are_kept_only_once_they_are_cut(passes, monkeypatch):
    one = passes()
    monkeypatch.setattr(reference_pass, "uses_fsdp", lambda args: True)
    one.follow(tiny_model())
    assert (one.follows, one.start) == (False, None)
    monkeypatch.setattr(reference_pass, "is_partitioned", lambda model: True)
    one.follow(tiny_model())
    assert one.follows and one.start is not None


def test_pairs_are_encoded_under_the_limits_of_the_run_and_by_workers_that_outlive_signals(passes):
    one = passes(max_tiles=3, max_length=800, ld_alpha=0.5, dataloader_num_workers=2)
    assert (one.data.max_tiles, one.data.max_length) == (3, 800)
    assert one.data.token_weights == one.args.token_weights
    assert [row.pair.id for row in one.data.rows] == [row.pair.id for row in one.plan.pairs.rows]
    loader = one._load([[(0,)]])
    assert (loader.dataset, loader.num_workers, loader.collate_fn) == (one.data, 1, pack_groups)
    assert loader.worker_init_fn is keep_from_signals
    assert one._load([[(0,)]] * 5).num_workers == 2


@pytest.mark.parametrize(
    ("precision", "stage", "dtype"),
    [({}, None, None), ({"bf16": True}, None, torch.bfloat16), ({"bf16": True}, 2, None), ({"fp16": True}, 0, None)],
)
def test_the_start_model_computes_in_the_precision_of_training_and_without_gradients(
    passes, monkeypatch, precision, stage, dtype
):
    """DeepSpeed has a precision of its own."""
    seen = []

    def look(model, pack):
        on = torch.is_autocast_enabled("cpu")
        seen.append((torch.get_autocast_dtype("cpu") if on else None, torch.is_grad_enabled()))
        return torch.zeros(pack.num_pairs), torch.zeros(pack.num_pairs)

    one = passes()
    for name, value in precision.items():
        setattr(one.args, name, value)
    monkeypatch.setattr(reference_pass, "pair_logps", look)
    monkeypatch.setattr(reference_pass, "zero_stage", lambda args: stage)
    one.before(tiny_model())
    assert set(seen) == {(dtype, False)}


def test_half_precision_of_fp16_is_float16(passes, monkeypatch):
    seen = []
    monkeypatch.setattr(
        reference_pass.torch, "autocast", lambda *given, **more: seen.append((given, more)) or torch.no_grad()
    )
    one = passes()
    one.args.fp16 = True
    one.before(tiny_model())
    assert seen[0] == (("cpu", torch.float16), {"enabled": True})


def test_a_model_that_is_not_cut_in_pieces_goes_to_the_device_of_its_rank(passes, monkeypatch):
    class Moved(Exception):
        """Stops the pass."""

    def move(self, device):
        raise Moved(device)

    model = tiny_model()
    monkeypatch.setattr(type(model), "to", move)
    with pytest.raises(Moved, match="cpu"):
        passes().before(model)
    monkeypatch.setattr(reference_pass, "is_partitioned", lambda model: True)
    monkeypatch.setattr(distributed, "is_partitioned", lambda model: False)
    one = passes()
    one.before(model)
    assert one.is_complete()


# --- two ranks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_two_ranks(monkeypatch):
    """Runs a function for both ranks, each in a thread, with collectives that meet there."""
    barrier, rank = threading.Barrier(2, timeout=60), threading.local()
    box: list = [None, None]

    def gather(value, args):
        assert args.process_index == rank.number
        box[rank.number] = value
        barrier.wait()
        values = list(box)
        barrier.wait()
        return values

    monkeypatch.setattr(reference_pass, "from_all_ranks", gather)
    monkeypatch.setattr(reference_pass, "agree", lambda value, args: gather(value, args)[0])

    def run(work: Callable[[int, Any], Any]) -> list:
        found: list = [None, None]
        models = [attach_scoring(tiny_model()) for _ in range(2)]  # here: all threads have one seed

        def one(number: int) -> None:
            rank.number = number
            try:
                found[number] = work(number, models[number])
            except BaseException as error:
                found[number] = error
                barrier.abort()

        threads = [threading.Thread(target=one, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for value in found:
            if isinstance(value, BaseException):
                raise value
        return found

    return run


@pytest.mark.parametrize("is_cut", [False, True])
def test_two_ranks_share_the_packs_know_all_results_and_write_each_once(
    passes, wanted, on_two_ranks, monkeypatch, is_cut
):
    calls, bars = [], []
    monkeypatch.setattr(reference_pass, "is_partitioned", lambda model: is_cut)
    monkeypatch.setattr(distributed, "is_partitioned", lambda model: False)
    monkeypatch.setattr(ReferencePass, "_bar", counting(bars))

    def look(model, pack):
        calls.append(threading.current_thread().name)
        return pair_logps(model, pack)

    monkeypatch.setattr(reference_pass, "pair_logps", look)

    def work(rank, model):
        one = passes(rank, 2, name=f"rank{rank}", max_tokens_per_pack=150)
        one.before(model)
        return one

    ranks = on_two_ranks(work)
    packs = [ranks[0].plan.packs(questions) for questions in ranks[0]._all_questions()]
    rounds = sum(-(-len(some) // 2) for some in packs)
    each = {name: calls.count(name) for name in set(calls)}
    if is_cut:  # all ranks call the model equally often, since all hold pieces of it
        assert set(each.values()) == {rounds}
    else:
        assert sorted(each.values()) == sorted(sum(len(some[rank::2]) for some in packs) for rank in range(2))
    for one in ranks:
        check(one, wanted, range(12))
    written = [digest for one in ranks for digests in shards(one).values() for digest in digests]
    assert len(written) == len(set(written)) == 12
    assert [str(bar.total) for bar in bars] == ["6", "6"]
    assert sum(bar.done for bar in bars) == 12


def test_what_another_program_has_written_is_read_by_the_first_rank_and_told_to_the_others(
    passes, wanted, on_two_ranks, monkeypatch
):
    def work(rank, model):
        one = passes(rank, 2, name=f"rank{rank}")
        one.follow(model)
        return one

    ranks = on_two_ranks(work)
    passes(name="rank0").before(tiny_model())  # another program, after both have opened the cache
    monkeypatch.setattr(ReferencePass, "_compute", lambda *given: pytest.fail("computed twice"))
    ranks[1].cache.refresh = lambda: pytest.fail("all ranks look at the disk at once")
    assert on_two_ranks(lambda rank, model: ranks[rank].prepare(2)) == [True, True]
    for one in ranks:
        check(one, wanted, range(9))


def test_a_window_on_two_ranks_gives_both_what_its_step_needs(passes, wanted, on_two_ranks, monkeypatch):
    bars = []
    monkeypatch.setattr(ReferencePass, "_bar", counting(bars))

    def work(rank, model):
        one = passes(rank, 2, name=f"rank{rank}", max_tokens_per_pack=150)
        one.follow(model)
        assert one.prepare(0)
        one.prepare_held_out()
        return one

    for one in on_two_ranks(work):
        check(one, wanted, of_step(one, 0) | {9, 10, 11})
    assert [str(bar.total) for bar in bars] == ["1"] * 4  # half of three pairs


def test_a_rank_takes_no_number_for_a_pair_that_is_not_computed_yet(passes, on_two_ranks):
    def work(rank, model):
        one = passes(rank, 2, name=f"rank{rank}")
        one.follow(model)
        if rank == 0:  # of the first question two pairs are known, which is not enough
            one.cache.take(one.plan.digests[[3, 4]], np.zeros((2, 2)))
        assert not one.prepare(0, lambda: False)
        return one.cache.has(one.plan.digests).tolist()

    first, second = on_two_ranks(work)
    assert [number for number, is_known in enumerate(first) if is_known] == [3, 4]
    assert not any(second)
