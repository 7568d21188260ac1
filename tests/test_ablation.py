"""The ablation: a cell has one name, intervals cover what they claim, pages show only what was measured."""

import json
from pathlib import Path

import numpy as np
import pytest

from internvl_mpo.ablation.__main__ import AblationSettings, main, run_groups
from internvl_mpo.ablation.costs import cost_text
from internvl_mpo.ablation.intervals import difference, estimate
from internvl_mpo.ablation.lanes import Lanes
from internvl_mpo.ablation.page import write_page
from internvl_mpo.ablation.plan import Cell, read_plan
from internvl_mpo.ablation.results import Results
from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.mini.measure import calculation_errors
from internvl_mpo.settings import parse_settings
from internvl_mpo.stages import Usage

PLAN = """
train: configs/mini.yaml
num_test: 30
methods:
  sft: {preference: none, quality: none}
  mpo: {}
groups:
  main: {title: all, seeds: 3, methods: [sft, mpo]}
  beta: {title: beta, seeds: 2, methods: [sft, mpo], vary: {beta: [0.1, 1.0]}}
  guesses: {title: guesses, seeds: 2, methods: [sft, mpo], vary: {guess_share: [0.0, 0.8]}, figure: {x: guess_share}}
  rounds: {title: rounds, seeds: 1, methods: [mpo], vary: {rounds: [2]}}
"""


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "ablation.yaml"
    path.write_text(PLAN, encoding="utf-8")
    return read_plan(str(path))


def names(plan, group: str) -> list[str]:
    return [cell.name for one in plan.groups if one.name == group for cell in one.cells]


def test_a_value_that_is_the_default_anyway_names_the_same_cell(plan):
    assert names(plan, "main") == ["sft", "mpo"]
    assert names(plan, "beta") == ["sft", "mpo", "mpo,beta=1.0"]
    assert names(plan, "guesses") == ["sft,guess_share=0.0", "sft", "mpo,guess_share=0.0", "mpo"]


def test_every_option_of_the_shipped_plan_is_one_of_the_training_program(tmp_path):
    from internvl_mpo.ablation.plan import OWN
    from internvl_mpo.training.arguments import MPOArguments

    shipped = read_plan("configs/ablation.yaml")
    given = {key for method in shipped.methods.values() for key in method}
    given |= {key for group in shipped.groups for cell in group.cells for key, _ in cell.varied} - set(OWN)
    assert given <= set(MPOArguments.__dataclass_fields__)


def test_every_method_of_the_shipped_plan_is_accepted_by_the_training_program(tmp_path):
    from internvl_mpo.training.settings import TrainSettings

    shipped = read_plan("configs/ablation.yaml")
    for method in shipped.methods.values():
        options = [word for key, value in method.items() for word in (f"--{key}", str(value))]
        argv = ["--config", shipped.train, "--output_dir", str(tmp_path), *options]
        parse_settings(TrainSettings, argv, program="train_mpo.py", about="")


def test_a_method_that_the_file_does_not_have_is_named(tmp_path):
    path = tmp_path / "ablation.yaml"
    path.write_text(PLAN.replace("[sft, mpo]}", "[sft, ppo]}", 1), encoding="utf-8")
    with pytest.raises(BadInputError, match=r"group 'main' .* 'ppo'"):
        read_plan(str(path))


def test_a_cell_trains_on_the_pairs_of_its_own_world_and_seed(plan, tmp_path):
    lanes = Lanes(plan, tmp_path)
    cell = Cell("mpo", (("guess_share", 0.0), ("beta", 1.0)), seed=2)
    lane = lanes.cell(cell)
    train, measure = lane.stages
    world = tmp_path / "worlds" / "guess_share=0.0" / "seed_2"
    assert train.command[train.command.index("--model") + 1] == str(world / "start")
    assert train.command[train.command.index("--beta") + 1] == "1.0"
    assert "--guess_share" not in train.command
    assert measure.makes == lanes.measured(cell)
    assert [stage.makes for stage in lane.needs] == [stage.makes for stage in lanes.world(cell).stages]


def test_another_round_samples_the_model_of_the_round_before(plan, tmp_path):
    lane = Lanes(plan, tmp_path).cell(Cell("mpo", (("rounds", 2),)))
    first = next(stage for stage in lane.stages if stage.name.endswith("train_1")).makes.parent
    sample = next(stage for stage in lane.stages if stage.name.endswith("round_2.responses"))
    second = next(stage for stage in lane.stages if stage.name.endswith("train_2"))
    assert sample.command[sample.command.index("--model") + 1] == str(first)
    assert second.command[second.command.index("--model") + 1] == str(first)
    assert str(sample.makes.parent) in second.command[second.command.index("--data") + 1]


def test_every_training_of_the_plan_is_given_files_that_its_stages_make(plan, tmp_path):
    """A comma in a path would be taken for the end of it."""
    lanes = Lanes(plan, tmp_path)
    for cell in {cell for group in plan.groups for cell in group.all_cells(1)}:
        lane = lanes.cell(cell)
        made = {str(stage.makes) for stage in (*lane.needs, *lane.stages)}
        for stage in lane.stages:
            if "--data" in stage.command:
                assert set(stage.command[stage.command.index("--data") + 1].split(",")) <= made, cell


def test_stages_of_the_whole_plan_have_names_and_files_of_their_own(plan, tmp_path):
    lanes = Lanes(plan, tmp_path)
    cells = {cell for group in plan.groups for cell in group.all_cells()}
    stages = [stage for cell in cells for stage in lanes.cell(cell).stages]
    assert len({stage.name for stage in stages}) == len(stages)
    assert len({stage.makes for stage in stages}) == len(stages)


def test_intervals_cover_the_truth_where_seeds_differ_more_than_questions():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        seeds = rng.normal(0.7, 0.1, size=8).clip(0, 1)
        found = estimate([rng.random(100) < rate for rate in seeds])
        covered += found.interval[0] <= 70 <= found.interval[1]
    assert covered >= 48  # a bootstrap over questions alone covers about 30


def test_a_single_seed_has_no_interval():
    assert estimate([[1, 0, 1, 1]]).interval is None


def test_a_difference_is_paired_by_question():
    verdicts = [[1, 0] * 50] * 3
    found = difference(verdicts, verdicts)
    assert (found.mean, found.interval) == (0.0, (0.0, 0.0))


def test_false_calculations_are_counted_over_those_stated():
    assert calculation_errors(["3 times 4 is 12.\n12 plus 9 is 20.", "It looks like 7."]) == 0.5
    assert calculation_errors(["It looks like 7."]) is None


def finish(lanes: Lanes, cell: Cell, cot: list[int]) -> None:
    """Write the file of a finished cell."""
    path = lanes.measured(cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"num_samples": 8, "direct": cot, "cot": cot, "right_samples": cot, "unparsable": 0.0, "guesses": 0.5,
             "calculation_errors": None, "tokens": 20.0, "divergence": 1.0}  # fmt: skip
    path.write_text(json.dumps(found), encoding="utf-8")


def test_the_page_shows_what_was_measured_and_names_what_was_not(plan, tmp_path):
    lanes = Lanes(plan, tmp_path / "out")
    for seed in (0, 1):
        finish(lanes, Cell("sft", seed=seed), [1, 0, 0, 0])
        finish(lanes, Cell("mpo", seed=seed), [1, 1, 1, 0])
    page = tmp_path / "ablation.md"
    page.write_text(
        "By hand.\n<!-- results: main -->\nold\n<!-- /results -->\n<!-- results: beta --><!-- /results -->\n"
    )
    assert write_page(page, tmp_path / "images", plan, Results(lanes, 3)) == ["main", "beta"]
    text = page.read_text(encoding="utf-8")
    assert text.startswith("By hand.\n")
    assert "old" not in text
    (line,) = [line for line in text.split("<!-- /results -->")[0].splitlines() if line.startswith("| MPO")]
    assert "| 75.0 [" in line
    assert "| +50.0 [" in line
    assert line.endswith("| 2 |")
    assert "Not run yet: `mpo,beta=1.0`. `python runs/ablation.py --groups beta` runs them." in text
    before = page.read_bytes()
    write_page(page, tmp_path / "images", plan, Results(lanes, 3))
    assert page.read_bytes() == before


def test_a_seed_that_one_row_alone_has_moves_no_row_of_its_table(plan, tmp_path):
    lanes = Lanes(plan, tmp_path / "out")
    finish(lanes, Cell("sft", seed=0), [1, 1, 0, 0])
    finish(lanes, Cell("mpo", seed=0), [1, 1, 1, 0])
    finish(lanes, Cell("mpo", seed=2), [0, 0, 0, 0])
    page = tmp_path / "ablation.md"
    page.write_text("<!-- results: main --><!-- /results -->", encoding="utf-8")
    write_page(page, tmp_path / "images", plan, Results(lanes, 3))
    (line,) = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| MPO")]
    assert line.startswith("| MPO | 75.0 | 75.0 |")
    assert line.endswith("| 1 |")


def test_a_figure_is_drawn_where_something_varies(plan, tmp_path):
    lanes = Lanes(plan, tmp_path / "out")
    for share in ((), (("guess_share", 0.0),)):
        for method in ("start", "sft", "mpo"):
            for seed in (0, 1):
                finish(lanes, Cell(method, share, seed), [1, 0, 0, 1])
    page = tmp_path / "ablation.md"
    page.write_text("<!-- results: guesses --><!-- /results -->", encoding="utf-8")
    write_page(page, tmp_path / "images", plan, Results(lanes, 2))
    assert "](images/ablation_guesses.png)" in page.read_text(encoding="utf-8")
    assert (tmp_path / "images" / "ablation_guesses.png").stat().st_size > 5000


def test_the_page_shows_the_last_evaluation_of_every_log_beside_what_was_measured(plan, tmp_path):
    lanes = Lanes(plan, tmp_path / "out")
    for seed, change in ((0, -0.5), (1, 0.25)):
        finish(lanes, Cell("mpo", seed=seed), [1, 0, 0, 1 - seed])
        folder = lanes.measured(Cell("mpo", seed=seed)).parent / "model_run"
        folder.mkdir()
        held_out = {"eval_nll": 1.0, "eval_logps/chosen_change": change, "eval_logps/rejected_change": -1.0,
                    "eval_rewards/accuracy": 0.8, "eval_rewards/margin": 0.5}  # fmt: skip
        lines = [{"step": 1, "logps/chosen_change": 0.1}, {**held_out, "eval_rewards/margin": 9.0}, held_out]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    page = tmp_path / "ablation.md"
    page.write_text("<!-- signs: main --><!-- /signs -->", encoding="utf-8")
    write_page(page, tmp_path / "images", plan, Results(lanes, 2))
    text = page.read_text(encoding="utf-8")
    wanted = "| MPO | -0.50 to +0.25 | -1.00 | 0.80 | 0.50 | 25.0 to 50.0 | 0.0% | 0.0% | 2 |"
    assert wanted in text
    assert "](images/ablation_signs.png)" in text and (tmp_path / "images" / "ablation_signs.png").exists()


def test_the_page_says_what_cells_and_worlds_took_where_that_is_on_record(plan, tmp_path):
    lanes = Lanes(plan, tmp_path)
    assert cost_text(plan, lanes).endswith("none of 13 models, trained and measured.")
    took = {("sft", 0): 30.0, ("mpo", 0): 50.0, ("mpo", 1): 70.0, ("sft", 2): None}
    (tmp_path / "stages").mkdir()
    for (method, seed), seconds in took.items():
        for stage in lanes.cell(Cell(method, seed=seed)).stages:
            marker = {"digest": "x", "seconds": 900.0, "cpu_seconds": seconds and seconds / 2}
            (tmp_path / "stages" / f"{stage.name}.json").write_text(json.dumps(marker), encoding="utf-8")
    assert "3 of 13 models, trained and measured, 50 s each, 0.04 h together." in cost_text(plan, lanes)
    assert "The whole plan takes" not in cost_text(plan, lanes)  # no world is on record
    for stage in lanes.world(Cell("start")).stages:
        marker = {"digest": "x", "seconds": 900.0, "cpu_seconds": 60.0}
        (tmp_path / "stages" / f"{stage.name}.json").write_text(json.dumps(marker), encoding="utf-8")
    # 5 worlds of 7 stages; sft 3 x 30, mpo 50 + 70 + their mean, the other seven cells at the mean of all
    assert f"takes {(5 * 420 + 90 + 180 + 350) / 3600:.1f} hours of one core" in cost_text(plan, lanes)


class Programs:
    """Stands in for the programs: makes their files, and is killed before the n-th."""

    def __init__(self, kill_before: int | None = None):
        self.ran: list[str] = []
        self.kill_before = kill_before

    def __call__(self, stage, log) -> Usage:
        if len(self.ran) == self.kill_before:
            raise KeyboardInterrupt
        self.ran.append(stage.name)
        stage.makes.parent.mkdir(parents=True, exist_ok=True)
        found = {"num_samples": 8, "direct": [1], "cot": [1], "right_samples": [8], "unparsable": 0.0, "guesses": 0.0,
                 "calculation_errors": 0.0, "tokens": 9.0, "divergence": 0.1}  # fmt: skip
        stage.makes.write_text(json.dumps(found), encoding="utf-8")
        return Usage()


def test_a_killed_ablation_goes_on_and_runs_nothing_twice(plan, tmp_path):
    settings = AblationSettings(output=str(tmp_path), groups=["main", "beta"], jobs=1)
    lanes = Lanes(plan, tmp_path)
    whole = Programs()
    run_groups(AblationSettings(output=str(tmp_path / "other"), groups=["main", "beta"], jobs=1), plan, lanes, whole)
    assert len(whole.ran) == 3 * 7 + 3 * 2 * 2 + 2 * 1 * 2  # worlds, cells of main, cells that beta adds
    killed, again = Programs(kill_before=17), Programs()
    with pytest.raises(KeyboardInterrupt):
        run_groups(settings, plan, lanes, killed)
    run_groups(settings, plan, lanes, again)
    assert killed.ran + again.ran == whole.ran


def test_a_plan_of_ones_own_is_read_as_a_plan_not_as_settings(tmp_path, capsys):
    path = tmp_path / "ablation.yaml"
    path.write_text(PLAN, encoding="utf-8")
    assert run_program(main, ["--config", str(path), "--groups", "moon", "--output", str(tmp_path)]) == 2
    assert "no group 'moon'" in capsys.readouterr().err


def test_a_group_that_the_plan_does_not_have_is_named(plan, tmp_path):
    with pytest.raises(BadInputError, match="no group 'moon'"):
        run_groups(AblationSettings(output=str(tmp_path), groups=["moon"]), plan, Lanes(plan, tmp_path), Programs())


def test_the_page_names_only_groups_that_the_plan_has(plan, tmp_path):
    page = tmp_path / "ablation.md"
    page.write_text("<!-- results: moon --><!-- /results -->", encoding="utf-8")
    with pytest.raises(BadInputError, match="'moon'"):
        write_page(page, tmp_path / "images", plan, Results(Lanes(plan, tmp_path), 1))


def test_the_shipped_page_shows_groups_of_the_shipped_plan():
    page = Path("docs/ablation.md")
    known = {group.name for group in read_plan("configs/ablation.yaml").groups}
    shown = {part.split(" ")[0] for part in page.read_text(encoding="utf-8").split("<!-- results: ")[1:]}
    assert shown == known
