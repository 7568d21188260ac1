"""The embedded default: what its pictures, questions and annotations promise, and how its stages are skipped."""

import json
import re
from pathlib import Path

import pytest

from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.mini.__main__ import main
from internvl_mpo.mini.digits import DIGIT_PIXELS, Painter
from internvl_mpo.mini.start_model import StartSettings, train_start_model
from internvl_mpo.mini.world import TASKS, WorldSettings, chain_of_thought, make_world
from internvl_mpo.quickstart import METHODS, Stage, run_stages, table
from internvl_mpo.records import Question, Response, read_rows

SIZES = {"num_annotated": 40, "num_drills": 3, "num_questions": 6, "num_open": 4, "num_test": 9}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_world(WorldSettings(output=str(folder), **SIZES))
    return folder


def test_the_same_seed_gives_the_same_bytes(world, tmp_path):
    make_world(WorldSettings(output=str(tmp_path), **SIZES))
    files = sorted(path.relative_to(world) for path in world.rglob("*") if path.is_file())
    assert len(files) > 50
    assert all((world / name).read_bytes() == (tmp_path / name).read_bytes() for name in files)


def test_digits_of_the_test_split_are_in_no_training_picture(tmp_path):
    one, other = (Painter(tmp_path, seed) for seed in (0, 1))
    train, test = set(one.split["train"]), set(one.split["test"])
    assert not train & test
    assert len(train | test) == 1797
    assert other.split == one.split, "another seed must not turn test digits into training digits"


def test_answers_are_what_the_digits_say(world):
    for row in read_rows(world / "test.jsonl", Question):
        a, b, *rest = row.provenance["digits"]
        expected = a * b if "product" in row.question else a + b if "sum" in row.question else a * b + rest[0]
        assert row.answer == str(expected)


def test_direct_annotations_are_right_and_chains_of_thought_only_partly(world):
    rows = read_rows(world / "annotations.jsonl", Response)
    direct = {row.images: row.response for row in rows if row.provenance["style"] == "direct"}
    chains = [row for row in rows if row.provenance["style"] == "cot"]
    right = sum(row.response.endswith(f"Final answer: {direct[row.images]}") for row in chains)
    assert 0.3 * len(chains) < right < 0.9 * len(chains)


@pytest.mark.parametrize("habit", [False, True])
def test_every_sentence_of_a_chain_of_thought_is_true_arithmetic(habit):
    for task in TASKS:
        text = chain_of_thought(task, [3, 4, 5][: len(task.operations) + 1], habit=habit, final_line=True)
        sentences = re.findall(r"(\d+) (times|plus) (\d+) is (\d+)\.", text)
        assert len(sentences) == len(task.operations)
        for a, word, b, c in sentences:
            assert int(c) == (int(a) * int(b) if word == "times" else int(a) + int(b))
        assert ("times" in text) == ("times" in task.operations and not habit)


def test_pictures_are_cut_into_one_tile_per_digit_and_a_thumbnail(world):
    from PIL import Image

    from modeling_internvl_mpo import dynamic_preprocess

    for row in read_rows(world / "test.jsonl", Question):
        image = Image.open(world / row.images[0])
        tiles = dynamic_preprocess(image, max_num=3, image_size=DIGIT_PIXELS, use_thumbnail=True)
        assert len(tiles) == len(row.provenance["digits"]) + 1


def test_a_start_model_is_trained_and_saved_with_one_token_per_tile(world, tmp_path):
    settings = StartSettings(world=str(world), output=str(tmp_path / "start"), steps=2, vision_steps=2)
    train_start_model(settings)
    config = json.loads((tmp_path / "start" / "config.json").read_text())
    assert config["architectures"] == ["InternVLChatModel"]
    assert config["llm_config"]["architectures"] == ["InternLM2ForCausalLM"]
    assert (tmp_path / "start" / "model.safetensors").stat().st_size < 6e6


def test_an_unknown_command_is_named(capsys):
    assert run_program(main, ["moon"]) == 2
    assert "unknown command 'moon', expected one of world, start" in capsys.readouterr().err


# --- the stages of the quickstart -------------------------------------------------------------------------------------


def make_plan(folder: Path, *names: str) -> list[Stage]:
    return [Stage(name, "about", ["make", name], folder / name) for name in names]


def test_finished_stages_are_skipped_and_a_changed_one_runs_with_all_after_it(tmp_path):
    ran = []

    def run(stage: Stage) -> None:
        ran.append(stage.name)
        stage.makes.touch()

    plan = make_plan(tmp_path, "a", "b", "c")
    assert run_stages(plan, tmp_path / "stages", run).keys() == {"a", "b", "c"}
    run_stages(plan, tmp_path / "stages", run)
    assert ran == ["a", "b", "c"]
    plan[1] = Stage("b", "about", ["make", "b", "--harder"], tmp_path / "b")
    run_stages(plan, tmp_path / "stages", run)
    assert ran == ["a", "b", "c", "b", "c"]


def test_a_failed_stage_is_not_marked_as_finished(tmp_path):
    def run(stage: Stage) -> None:
        raise BadInputError("no")

    with pytest.raises(BadInputError):
        run_stages(make_plan(tmp_path, "a"), tmp_path / "stages", run)
    assert not list((tmp_path / "stages").glob("*"))


def test_the_table_has_a_row_for_every_method():
    row = {"direct_accuracy": 50.0, "cot_accuracy": 75.0, "unparsable": 0.0, "reward_accuracy": None}
    text = table({"methods": dict.fromkeys(["start", *METHODS], row)})
    assert len(text.splitlines()) == 2 + 1 + len(METHODS)
    assert "75.0 %" in text
