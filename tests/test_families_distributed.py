"""Two ranks, text-only rows among rows with pictures: the losses and the folder of one process, for other families too.

pytest tests/test_families_distributed.py                                    two families, as the suite does
FAMILIES="qwen3_vl idefics3" pytest tests/test_families_distributed.py       others of tiny_families.py
"""

import json
import os
from pathlib import Path

import pytest
import torch
from test_distributed import run_on_ranks, small_configs
from test_train_mpo import arguments, losses, train
from tiny_families import FAMILIES
from tiny_world import make_training_pairs

from internvl_mpo.families.registry import family_of_source

pytest.importorskip("deepspeed")
TRAINED = os.environ.get("FAMILIES", "internvl qwen2_5_vl").split()
ENGINES = ("ddp", "zero2", "zero3")
# packs of single groups, so that a rank meets packs without pictures while the other has some
SMALL = ("--max_tokens_per_pack", "400", "--pairs_per_group", "1", "--pairs_per_step", "6")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A run of one process for each family, and of two ranks for each family and engine, all in one process group."""
    folder = tmp_path_factory.mktemp("runs")
    configs = small_configs(folder)
    cases, outputs = [], {}
    for name in TRAINED:
        world = folder / name
        world.mkdir()
        FAMILIES[name](world / "start")
        make_training_pairs(world)
        assert train(world, outputs.setdefault(name, folder / f"{name}_alone"), *SMALL) == 0
        for engine in ENGINES:
            output = outputs[f"{name} {engine}"] = folder / f"{name}_{engine}"
            more = () if engine == "ddp" else ("--deepspeed", str(configs[engine]))
            cases.append((arguments(world, output, *SMALL, *more), None))
    codes, errors = run_on_ranks(2, folder, cases)
    assert codes == ["0,0"] * len(cases), errors[-3000:]
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", TRAINED)
def test_two_ranks_give_the_losses_and_the_folder_of_one_process(runs, name, engine):
    alone, together = runs[name], runs[f"{name} {engine}"]
    assert json.loads(alone.with_name(f"{alone.name}.preflight.json").read_text())["num_pairs"] == 12
    expected, found = losses(alone), losses(together)
    assert found.keys() == expected.keys()
    assert [found[step] for step in expected] == pytest.approx(list(expected.values()), rel=1e-5)
    # under ZeRO-3 transformers writes the names of its modules, elsewhere those of the start model's files
    family = family_of_source(str(alone / "model"))
    one, two = (dict(family.load_model(str(run / "model")).named_parameters()) for run in (alone, together))
    assert one.keys() == two.keys()
    for key, weight in one.items():
        torch.testing.assert_close(two[key], weight, rtol=1e-3, atol=2e-4)
