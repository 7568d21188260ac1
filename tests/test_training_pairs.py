"""Pairs of a run: which ones, how often, in what order, what is held out, and what is refused.

pytest tests/test_training_pairs.py
"""

import hashlib
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from test_trainer_built import as_rank
from tiny import tiny_processor

from internvl_mpo.errors import BadInputError
from internvl_mpo.settings import parse_settings
from internvl_mpo.training import pairs as module
from internvl_mpo.training.pairs import (
    PairDigests,
    PairRows,
    PairSizes,
    TrainingPairs,
    hold_out,
    plan,
    read_pairs,
    rejects_of,
    stop_on_rejects,
)
from internvl_mpo.training.preflight import Preflight
from internvl_mpo.training.settings import TrainSettings


def rows_of(count: int, name: str) -> list[dict]:
    """Pairs of a subset, two of each question, some with a picture."""
    rows = []
    for number in range(count):
        row = {"id": f"{name}{number}", "question": f"{name} {number // 2}?", "chosen": "yes " * (1 + number % 4)}
        rows.append({**row, "rejected": f"no {number}", **({"image": "1.png"} if number % 4 > 1 else {})})
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three subsets: 20 pairs seen once, 10 seen one and a half times, 4 that are never seen."""
    folder = tmp_path_factory.mktemp("pairs")
    Image.new("RGB", (56, 28)).save(folder / "1.png")
    meta = {}
    for name, count, repeat_time in (("one", 20, 1), ("often", 10, 1.5), ("never", 4, 0)):
        lines = [json.dumps(row) + "\n" for row in rows_of(count, name)]
        (folder / f"{name}.jsonl").write_text("".join(lines))
        meta[name] = {"root": ".", "annotation": f"{name}.jsonl", "repeat_time": repeat_time}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def settings(folder: Path, output: Path, **more) -> TrainSettings:
    given = {"pairs_per_step": 4, "max_tokens_per_pack": 400, "max_tiles": 4, "max_length": 300}
    return TrainSettings(
        model="start", data=[str(folder / "meta.json")], output_dir=str(output), use_cpu=True, report_to=[],
        preflight_workers=0, **{**given, **more},
    )  # fmt: skip


@pytest.fixture(scope="module")
def pairs(folder) -> TrainingPairs:
    options = {"max_tiles": 4, "max_length": 300, "num_workers": 0}
    table = Preflight(tiny_processor(), folder / "found", [folder / "meta.json"], **options).run()
    assert len(table) == 34
    return TrainingPairs(table, np.arange(34), np.ones(34, np.int32))


# --- views of a table -------------------------------------------------------------------------------------------------


def test_views_show_the_pairs_they_were_asked_for(pairs):
    table, indices = pairs.table, np.array([7, 3, 30])
    rows, sizes = PairRows(table, indices), PairSizes(table, indices)
    assert [row.pair.id for row in rows] == ["one7", "one3", "never0"]
    assert list(sizes) == [table.size(index) for index in (7, 3, 30)]
    assert len(rows) == len(sizes) == 3
    some = pairs.select(indices)
    assert [row.pair.id for row in some.rows] == ["one7", "one3", "never0"]
    assert [size.num_tokens for size in some.sizes] == some.column("num_tokens").tolist()
    assert [row.pair.id for row in some.rows_of(["never0", "one3", "never0"])] == ["one3", "never0"]
    assert [row.pair.id for row in pairs.rows_of(["one8", "one1"])] == ["one1", "one8"]  # a set has 8 before 1
    with pytest.raises(ValueError, match="3 pairs, 2 counts"):
        TrainingPairs(table, indices, np.ones(2, np.int32))


def test_digests_are_found_by_ids_in_any_order_of_the_pairs(pairs, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 4)
    indices = np.random.default_rng(0).permutation(34)[:30]
    digests = PairDigests(pairs.table, indices)
    plain = {pairs.table.row(int(index)).pair.id: pairs.table.row(int(index)).digest for index in indices}
    assert list(digests.items()) == list(plain.items())
    assert (list(digests), len(digests)) == (list(plain), 30)
    assert {pair_id: digests[pair_id] for pair_id in plain} == plain
    for number in range(200):  # hashes before, between and behind those that are there
        with pytest.raises(KeyError):
            digests[f"absent {number}"]
    assert PairDigests(pairs.table, np.zeros(0, np.int64)).get("one1") is None


def test_pairs_are_chosen_and_joined_with_their_counts(pairs):
    counted = TrainingPairs(pairs.table, np.arange(34), np.arange(34))
    some = counted.select(np.array([5, 2]))
    both = some + counted.select(np.arange(34) > 32)
    assert (both.indices.tolist(), both.counts.tolist()) == ([5, 2, 33], [5, 2, 33])
    assert (len(both), both.num_seen) == (3, 40)


def test_a_digest_of_a_run_follows_the_pairs_their_order_and_how_often_each_is_seen(pairs, monkeypatch):
    some = pairs.select(np.arange(10))
    lines = [f"{row.digest} 1\n" for row in some.rows]
    plain = hashlib.sha256("".join(lines).encode()).hexdigest()[:16]
    assert some.digest() == plain
    monkeypatch.setattr(module, "_CHUNK", 3)
    assert some.digest() == plain
    counts = np.ones(10, np.int32)
    counts[9] = 2
    others = [
        pairs.select(np.arange(9)),
        pairs.select(np.arange(10)[::-1]),
        TrainingPairs(pairs.table, np.arange(10), counts),
    ]
    assert len({plain, *(other.digest() for other in others)}) == 4


def test_the_sampler_of_a_rank_follows_the_settings(pairs, folder, tmp_path):
    args = settings(folder, tmp_path / "run", pairs_per_group=2, seed=7, gradient_accumulation_steps=2)
    sampler = pairs.sampler(args)
    expected = {"pairs_per_step": 4, "pairs_per_group": 2, "max_tokens": 400, "num_ranks": 1, "rank": 0, "seed": 7,
                "gradient_accumulation_steps": 2, "epoch": 0}  # fmt: skip
    assert {name: getattr(sampler, name) for name in expected} == expected
    assert sampler.keys.tolist() == pairs.column("key").tolist()
    assert sampler.tokens.tolist() == pairs.column("num_tokens").tolist()
    assert (sampler.counts.tolist(), len(sampler.sizes)) == ([1] * 34, 34)
    for data_seed in (0, 3):
        assert pairs.sampler(settings(folder, tmp_path, data_seed=data_seed, seed=7)).seed == data_seed


@pytest.mark.parametrize(
    ("more", "steps"), [({"max_steps": 5}, 5), ({"num_train_epochs": 1.5}, 14), ({"num_train_epochs": 1}, 9)]
)
def test_a_run_has_the_steps_it_was_asked_for_or_those_of_its_epochs(pairs, folder, tmp_path, more, steps):
    assert pairs.total_steps(settings(folder, tmp_path, **more)) == steps  # 34 pairs, 4 a step


# --- held out ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_questions_are_held_out_whole_by_a_number_of_their_own(pairs, share):
    kept, held = hold_out(share, pairs)
    numbers = pairs.column("share") / 2**56
    assert held.indices.tolist() == [index for index, number in enumerate(numbers) if number < share]
    assert sorted([*kept.indices, *held.indices]) == list(range(34))
    questions = [{row.pair.question for row in some.rows} for some in (kept, held)]
    assert not questions[0] & questions[1]
    alone, apart = hold_out(share, pairs.select(np.arange(20, 34)))  # other data beside it changes nothing
    assert set(alone.indices) <= set(kept.indices) and set(apart.indices) <= set(held.indices)


def test_a_share_of_nothing_holds_out_nothing_and_a_small_one_the_question_with_the_smallest_number(pairs):
    kept, held = hold_out(0, pairs)
    assert (kept, len(held)) == (pairs, 0)
    kept, held = hold_out(1e-12, pairs)
    smallest = pairs.column("share").min()
    assert set(held.column("share")) == {smallest}
    assert len(kept) + len(held) == 34
    with pytest.raises(BadInputError, match=r"held_out_share 0.5 leaves no question to train on"):
        hold_out(0.5, pairs.select(pairs.column("share") == smallest))


# --- what cannot be trained on ----------------------------------------------------------------------------------------


class Table(SimpleNamespace):
    """What `rejects_of` looks at."""

    def where(self, index):
        return f"row {index}"


def test_rows_that_are_unusable_too_long_or_of_a_taken_id_are_told_in_this_order():
    source = SimpleNamespace(where=lambda number: f"line {number}")
    table = Table(
        columns={"num_tokens": np.array([10, 401, 400, 500, 7])},
        unusable=[(1, 9, "no picture")], sources=[None, source],
        clashes={1: "taken, and too long", 4: "taken"},
    )  # fmt: skip
    rejects, usable = rejects_of(table, 400)
    assert [(error.where, error.reason) for error in rejects] == [
        ("line 9", "no picture"),
        ("row 1", "the pair has 401 tokens, more than max_tokens_per_pack 400"),
        ("row 3", "the pair has 500 tokens, more than max_tokens_per_pack 400"),
        ("row 4", "taken"),
    ]
    assert usable.tolist() == [0, 2]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("on_bad_row", "num_good", "stops"), [("stop", 5, True), ("skip", 5, False), ("skip", 0, True)]
)
def test_unusable_rows_stop_a_run_unless_they_may_be_left_out_and_some_are_good(
    tmp_path, capsys, rank, on_bad_row, num_good, stops
):
    asked = SimpleNamespace(output_dir=f"{tmp_path}/run/", process_index=rank, on_bad_row=on_bad_row)
    rejects = [module.RowError("no picture", "line 9"), module.RowError("too long", "row 1")]
    listed = tmp_path / "run.rejects.jsonl"
    stop_on_rejects(asked, [], num_good)
    assert not listed.exists()
    if stops:
        words = rf"line 9.*no picture.* \(2 of {2 + num_good} rows are unusable, listed in {listed}\); repair them"
        with pytest.raises(BadInputError, match=words):
            stop_on_rejects(asked, rejects, num_good)
    else:
        stop_on_rejects(asked, rejects, num_good)
    said = f"left out 2 unusable rows, listed in {listed}\n" if rank == 0 and not stops else ""
    assert capsys.readouterr().out == said
    found = [json.loads(line) for line in listed.read_text().splitlines()] if listed.exists() else []
    rows = [{"row": "line 9", "reason": "no picture"}, {"row": "row 1", "reason": "too long"}]
    assert found == (rows if rank == 0 else [])


# --- read and planned -------------------------------------------------------------------------------------------------


def test_reading_shows_lengths_and_keeps_them_beside_the_run(folder, tmp_path, capsys):
    asked = settings(folder, f"{tmp_path}/run/")
    found = read_pairs(asked, tiny_processor())
    assert (found.indices.tolist(), found.counts.tolist()) == (list(range(34)), [1] * 34)
    assert "tokens of a pair" in capsys.readouterr().out
    report = json.loads((tmp_path / "run.preflight.json").read_text())
    assert (report["num_pairs"], report["num_rejected"], report["data"]) == (34, 0, asked.data)
    assert report["prompt"]["max"] == int(found.column("prompt").max())
    assert (tmp_path / "run.preflight").is_dir()
    with pytest.raises(BadInputError, match="more than max_tokens_per_pack 30"):
        read_pairs(settings(folder, tmp_path / "run", max_tokens_per_pack=30), tiny_processor())


def test_what_reading_is_told_reaches_the_look_at_the_pairs(folder, tmp_path, monkeypatch):
    given = []

    class Stop(Exception):
        """Goes no further."""

    def look(*args, **more):
        given.append((args, more))
        raise Stop

    monkeypatch.setattr("internvl_mpo.training.preflight.Preflight", look)
    more = {"image_root": "pictures", "verify_images": "full", "preflight_cache": "found"}
    with pytest.raises(Stop):
        read_pairs(settings(folder, tmp_path / "run", **more), "processor")
    limits = {"max_tiles": 4, "max_length": 300, "num_workers": 0, "image_root": "pictures", "verify_images": "full"}
    assert given == [(("processor", "found", [str(folder / "meta.json")]), limits)]


def test_other_ranks_wait_for_what_the_first_one_finds_and_write_nothing(folder, tmp_path, monkeypatch, capsys):
    first = read_pairs(settings(folder, tmp_path / "run"), tiny_processor())
    capsys.readouterr()
    mine = as_rank(settings(folder, tmp_path / "run"), 1, 2)
    (tmp_path / "run.preflight.json").unlink()
    token = next((tmp_path / "run.preflight").glob("*/*/started")).read_text()
    monkeypatch.setattr("internvl_mpo.training.distributed.agree", lambda value, args: token if value is None else "")
    monkeypatch.setattr(Preflight, "run", lambda self: pytest.fail("looked twice"))
    monkeypatch.setattr("internvl_mpo.training.distributed.from_all_ranks", lambda value, args: [value] * 2)
    other = read_pairs(mine, tiny_processor())
    assert other.digest() == first.digest()
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "run.preflight.json").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_goes_on_when_all_have_seen_that_the_first_is_done(rank, folder, tmp_path, monkeypatch):
    read_pairs(settings(folder, tmp_path / "run"), tiny_processor())
    done, found = next((tmp_path / "run.preflight").glob("*/*/done")), []
    token = (done.parent / "started").read_text()
    monkeypatch.setattr("internvl_mpo.training.distributed.agree", lambda value, args: value or token)
    wait = Preflight.wait
    monkeypatch.setattr(Preflight, "wait", lambda self, token: found.append("waited") or wait(self, token))
    monkeypatch.setattr(
        "internvl_mpo.training.distributed.from_all_ranks", lambda value, args: found.append(done.exists())
    )
    read_pairs(as_rank(settings(folder, tmp_path / "run"), rank, 2), tiny_processor())
    assert found == ([True] if rank == 0 else ["waited", True])


def test_data_without_a_pair_is_refused_by_its_names(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("\n")
    asked = settings(tmp_path, tmp_path / "run")
    asked.data = [f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl"]
    with pytest.raises(BadInputError, match=f"^{tmp_path}/a.jsonl, {tmp_path}/b.jsonl holds no preference pair"):
        read_pairs(asked, tiny_processor())


def test_a_plan_repeats_subsets_leaves_out_those_of_zero_and_cuts_steps_to_the_budget(pairs, folder, tmp_path, capsys):
    asked, planned = plan(settings(folder, tmp_path, max_tokens_per_pack=450), pairs)
    subsets = [row.subset for row in planned.rows]
    assert (subsets.count("one"), subsets.count("often"), subsets.count("never")) == (20, 10, 0)
    assert sorted(planned.counts.tolist()) == [1] * 25 + [2] * 5
    assert set(planned.counts[:20].tolist()) == {1}
    assert planned.num_seen == 35
    fewest = asked.gradient_accumulation_steps
    sampler = planned.sampler(asked)
    assert fewest == 2
    assert not any(sampler.is_over_budget(step) for step in sampler.steps())
    sampler.gradient_accumulation_steps = fewest - 1
    assert any(sampler.is_over_budget(step) for step in sampler.steps())
    said = capsys.readouterr().out
    assert (
        f"30 pairs (35 a pass), {sampler.num_steps} steps a pass of 4 pairs, in 1 x {fewest} packs of at most 450"
        in said
    )
    assert "often" in said and "note:" not in said


def test_the_seed_and_the_way_of_resampling_decide_how_often_each_pair_is_seen(pairs, folder, tmp_path):
    def counts(**more):
        _, planned = plan(settings(folder, tmp_path, **more), pairs)
        return dict(zip((row.pair.id for row in planned.rows), planned.counts.tolist(), strict=True))

    assert counts(seed=1) == counts(seed=1) != counts(seed=2)
    even = counts(resample="sqrt")
    assert sum(even.values()) == 35
    number = sum(count for pair_id, count in even.items() if pair_id.startswith("often"))
    assert number == round(35 * math.sqrt(15) / (math.sqrt(15) + math.sqrt(20)))


def test_plans_that_cannot_be_kept_are_refused(pairs, folder, tmp_path):
    plan(settings(folder, tmp_path, pairs_per_step=35), pairs)
    with pytest.raises(BadInputError, match="one epoch has 35 pairs, fewer than the 36 of one step"):
        plan(settings(folder, tmp_path, pairs_per_step=36), pairs)
    with pytest.raises(BadInputError, match="raise max_tokens_per_pack or pairs_per_step"):
        plan(settings(folder, tmp_path, max_tokens_per_pack=30), pairs)


def test_the_budget_is_kept_for_the_steps_or_epochs_that_are_run(pairs, folder, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(module, "fit_to_budget", lambda sampler, **more: given.append(more))
    for max_steps, num_epochs in ((-1, 2.5), (9, 1)):
        plan(settings(folder, tmp_path, max_steps=max_steps, num_train_epochs=num_epochs), pairs)
        assert given.pop() == {"num_epochs": num_epochs, "max_steps": max_steps}


def test_a_loss_that_sorts_within_a_pack_is_told_where_steps_are_cut(pairs, folder, tmp_path, capsys):
    for preference, budget, says in (("aot", 450, True), ("aot", 4000, False), ("dpo", 450, False)):
        plan(settings(folder, tmp_path, preference=preference, max_tokens_per_pack=budget), pairs)
        assert (f"note: {preference} compares the pairs of one pack" in capsys.readouterr().out) is says


def test_only_the_first_rank_speaks(pairs, folder, tmp_path, capsys):
    asked = as_rank(settings(folder, tmp_path, preference="aot", max_tokens_per_pack=450), 1, 2)
    asked, planned = plan(asked, pairs)
    assert (capsys.readouterr().out, len(planned)) == ("", 30)


CHOICES = {
    "verify_images": "header full", "on_bad_row": "stop skip", "resample": "none sqrt",
    "reference": "cache adapter_off", "reference_pass": "ahead before only", "dtype": "float32 bfloat16 float16",
    "lora_on": "language vision both", "quality": "bco none", "generation": "sft sft_token none",
    "reward_shift": "previous inclusive ema none", "packed_attention": "auto segments",
    "preference": "dpo dpo_norm cdpo robust_dpo dpop discopop exo ipo rso hinge nca sppo apo_zero apo_down aot "
                  "aot_unpaired simpo orpo none",
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_of_the_documents_is_one_and_no_other(folder, tmp_path, name):
    more = ("--lora_rank", "2") if name == "lora_on" else ()
    data = str(folder / "meta.json")
    common = ["--model", "start", "--data", data, "--output_dir", str(tmp_path), "--use_cpu", "true"]
    for choice in CHOICES[name].split():
        extra = {"adapter_off": ("--lora_rank", "2"), "exo": ("--label_smoothing", "0.01"),
                 "cdpo": ("--label_smoothing", "0.1"), "robust_dpo": ("--label_smoothing", "0.1"),
                 "simpo": ("--quality", "none"), "orpo": ("--quality", "none")}.get(choice, ())  # fmt: skip
        given = parse_settings(TrainSettings, [*common, *more, *extra, f"--{name}", choice], program="x", about="x")
        assert getattr(given, name) == choice
    with pytest.raises(BadInputError, match=name):
        parse_settings(TrainSettings, [*common, *more, f"--{name}", choice + "_"], program="x", about="x")
