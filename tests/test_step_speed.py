"""The benchmark runs, and the FLOP of our step do not grow. Run: pytest tests/test_step_speed.py"""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))

import step_speed
from instruments import count_flop
from step_sides import build_side
from step_world import PRESETS, Settings, World

from internvl_mpo.errors import BadInputError

pytestmark = pytest.mark.slow


def test_every_side_of_ours_trains_on_the_same_pairs(tmp_path):
    path = tmp_path / "result.json"
    argv = ["--preset", "tiny", "--rounds", "1", "--memory_runs", "0", "--sides", "ours_live,ours_cached,twin"]
    assert step_speed.main([*argv, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    live, cached, twin = result["ours"]["live"], result["ours"]["cached"], result["twin"]
    assert live["loss_of_first_step"] == pytest.approx(twin["loss_of_first_step"], rel=1e-5)
    assert live["loss_of_first_step"] == cached["loss_of_first_step"]
    assert cached["gflop"] < live["gflop"] < twin["gflop"]
    assert result["ratio_details"]["twin_over_cached"]["min"] > 0


def test_trl_computes_the_same_loss(tmp_path):
    pytest.importorskip("trl")
    path = tmp_path / "result.json"
    argv = ["--preset", "tiny", "--rounds", "1", "--memory_runs", "0", "--sides", "ours_live,trl"]
    assert step_speed.main([*argv, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    # The two image processors round pixels differently, hence not closer.
    assert result["trl"]["loss_of_first_step"] == pytest.approx(result["ours"]["live"]["loss_of_first_step"], rel=2e-4)


def test_qwen_computes_trls_loss_with_less_arithmetic(tmp_path):
    pytest.importorskip("trl")
    path = tmp_path / "result.json"
    argv = ["--family", "qwen2_5_vl", "--preset", "tiny", "--rounds", "1", "--memory_runs", "0"]
    assert step_speed.main([*argv, "--sides", "ours_live,ours_cached,trl", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    live, cached, trl = result["ours"]["live"], result["ours"]["cached"], result["trl"]
    # the same processor on both sides, so closer than for InternVL
    assert trl["loss_of_first_step"] == pytest.approx(live["loss_of_first_step"], rel=2e-5)
    assert cached["gflop"] < live["gflop"] < trl["gflop"]


@pytest.mark.parametrize(("side", "limit"), [("ours_live", 172.2), ("ours_cached", 130.6), ("twin", 391.2)])
def test_flop_of_a_step_stay_where_they_are(tmp_path, side, limit):
    settings = Settings(preset="proportional")
    world = World(PRESETS["proportional"], settings, tmp_path)
    gflop = count_flop(build_side(side, world, settings)) / 1e9
    assert limit - 1 < gflop < limit


def test_flop_without_trimming_the_last_layer_are_what_they_were(tmp_path):
    settings = Settings(preset="proportional", trim=False)
    world = World(settings.shape, settings, tmp_path)
    gflop = count_flop(build_side("ours_cached", world, settings)) / 1e9
    assert 162.2 < gflop < 163.2


def test_with_lora_every_side_of_ours_starts_from_the_same_loss(tmp_path):
    path = tmp_path / "result.json"
    sides = "ours_live,ours_cached,twin"
    argv = ["--preset", "tiny", "--rounds", "1", "--lora_rank", "2", "--sides", sides, "--memory_runs", "1"]
    assert step_speed.main([*argv, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    live, cached, twin = result["ours"]["live"], result["ours"]["cached"], result["twin"]
    assert live["loss_of_first_step"] == pytest.approx(twin["loss_of_first_step"], rel=1e-5)
    assert live["loss_of_first_step"] == pytest.approx(cached["loss_of_first_step"], rel=1e-6)
    assert cached["peak_mib"] < twin["peak_mib"]


def test_unknown_presets_and_sides_are_refused():
    with pytest.raises(BadInputError, match="preset is 'huge', expected one of tiny"):
        Settings(preset="huge")
    with pytest.raises(BadInputError, match="expected some of ours_live"):
        Settings(sides=["theirs"])
