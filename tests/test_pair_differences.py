"""Where the responses of a pair part, and how likely a model finds both.

pytest tests/test_pair_differences.py
"""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from tiny_world import make_model_folder, make_training_pairs
from transformers import AutoProcessor

from internvl_mpo.encoding import encode_group
from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.likelihood_gap import likelihood_gaps
from internvl_mpo.logps import twin_logps
from internvl_mpo.mmpr.differences import Differences, compare
from internvl_mpo.mmpr.reading import iter_pairs
from internvl_mpo.records import RowError

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("chosen", "rejected", "place", "common", "one_word"),
    [
        ("The sum is 9 .", "The sum is 8 .", 3 / 5, 4 / 5, True),
        ("The sum is 9", "The sum is not 9", 3 / 4, 8 / 9, True),  # added
        ("The sum is 9", "The is 9", 1 / 4, 6 / 7, True),  # left out
        ("The sum is 9", "The sum is 9 so 9", 1.0, 8 / 10, False),  # two added at the end
        ("a b c d", "b a c d", 0.0, 1.0, False),  # order
        ("a b a b", "a a a b", 1 / 4, 6 / 8, True),  # a word counts as often as it occurs
        ("a a", "a", 1 / 2, 2 / 3, True),  # beginning and end may not share a word
        ("yes", "no", 0.0, 0.0, True),
        ("和是九。", "和是八。", 2 / 4, 3 / 4, True),
        ("", "x", 0.0, 0.0, True),
    ],
)
def test_differences_by_hand(chosen, rejected, place, common, one_word):
    assert compare(chosen, rejected) == pytest.approx((place, common, one_word))


def test_parts_add_up_to_the_whole():
    pairs = [("a b c", "a b d"), ("x y", "z"), ("same start then", "same start else more")]
    whole, first, second = Differences(), Differences(), Differences()
    for number, (chosen, rejected) in enumerate(pairs):
        for differences in (whole, second if number else first):
            differences.add(("m3cot", "correctness"), compare(chosen, rejected))
    first.merge(second)
    assert first.mean(("m3cot", "correctness")) == pytest.approx(whole.mean(("m3cot", "correctness")))
    assert whole.mean(("m3cot", "correctness")).one_word == pytest.approx(1 / 3)


# --- under a model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A model folder, pictures, and 12 pairs."""
    folder = tmp_path_factory.mktemp("world")
    make_model_folder(folder / "start")
    make_training_pairs(folder)
    return folder


def test_the_gap_is_that_of_the_log_probs_a_token(world):
    rows = list(iter_pairs(world / "pairs.jsonl"))
    (gap,) = likelihood_gaps(rows, str(world / "start"), num_pairs=99, device="cpu").values()
    assert gap.pairs == 12
    processor = AutoProcessor.from_pretrained(world / "start", trust_remote_code=True)
    means = []
    for row in rows:
        group = encode_group(processor, [row.pair], row.image_root)
        with torch.no_grad():
            logps = twin_logps(tiny_model(), [group]) / torch.tensor([len(ids) for ids in group.responses])
        means.append(logps[list(group.pairs[0])])
    chosen, rejected = torch.stack(means).T
    assert gap.chosen == pytest.approx(chosen.mean().item(), rel=1e-5)
    assert gap.rejected == pytest.approx(rejected.mean().item(), rel=1e-5)
    assert gap.gap == pytest.approx((chosen - rejected).mean().item(), abs=1e-5)
    assert gap.chosen_likelier == pytest.approx((chosen > rejected).float().mean().item())


def test_the_sample_does_not_depend_on_the_order_of_rows_and_passes_over_bad_ones(world):
    rows = list(iter_pairs(world / "pairs.jsonl"))
    bad = RowError("no JSON", "x:1")
    too_long = replace(rows[0], pair=replace(rows[0].pair, question="q" * 7000, source="long"))
    forward = likelihood_gaps([bad, *rows], str(world / "start"), num_pairs=4, device="cpu")
    backward = likelihood_gaps([too_long, *rows[::-1]], str(world / "start"), num_pairs=4, device="cpu")
    assert forward == backward
    assert [gap.pairs for gap in forward.values()] == [4]


def test_a_model_that_is_none_is_refused(world):
    with pytest.raises(BadInputError, match=r"config\.json"):
        likelihood_gaps([], str(world), num_pairs=4, device="cpu")


def test_table_page_and_json_show_both(world, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("check_mmpr", ROOT / "dataset_scripts/check_mmpr.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    arguments = [str(world / "pairs.jsonl"), "--output", str(tmp_path)]
    assert run_program(program.main, arguments) == 0
    (plain,) = json.loads((tmp_path / "report.json").read_text())["differences"]
    assert plain["likelihood"] is None
    assert run_program(program.main, [*arguments, "--model", str(world / "start"), "--model_pairs", "5"]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    (row,) = report["differences"]
    assert {**row, "likelihood": None} == plain
    assert (row["pairs"], row["likelihood"]["pairs"]) == (12, 5)
    gap = f"{row['likelihood']['gap']:+.2f}"
    shown, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    for text in (shown, page):
        assert gap in text
        assert "pairs that differ in one word" in text
        assert f"{row['common']:.0%}" in text
    assert str(world / "start") in page
    assert run_program(program.main, [*arguments, "--model_pairs", "0"]) == 2
