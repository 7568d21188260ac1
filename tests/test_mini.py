"""The embedded default: what its pictures, questions and annotations promise."""

import json
import random
import re
from pathlib import Path

import pytest

from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.mini.__main__ import main
from internvl_mpo.mini.choices import guess, is_guess, make_options
from internvl_mpo.mini.digits import DIGIT_PIXELS, Painter
from internvl_mpo.mini.report import has_curve, lucky_guess, write_report
from internvl_mpo.mini.start_model import StartSettings, token_weights, train_start_model, train_tokenizer
from internvl_mpo.mini.tasks import TASKS, chain_of_thought
from internvl_mpo.mini.world import WorldSettings, make_world
from internvl_mpo.quickstart import METHODS, table
from internvl_mpo.quickstart import main as quickstart
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


def numbers_in(text: str) -> list[int]:
    return [int(found) for found in re.findall(r"\d+", text)]


def test_every_question_offers_the_right_result_and_another_one_in_either_order(world):
    questions = read_rows(world / "test.jsonl", Question)
    places = []
    for row in questions:
        options = numbers_in(row.question)
        assert len(set(options)) == 2
        places.append(options.index(int(row.answer)))
    assert set(places) == {0, 1}, "the place of an option must not give it away"


def test_a_guess_reads_the_digits_and_names_an_option_that_is_right_about_half_the_time():
    rng = random.Random(0)
    right = 0
    for _ in range(400):
        task, digits = rng.choice(TASKS), [rng.randint(0, 9) for _ in range(3)]
        digits = digits[: len(task.operations) + 1]
        options = make_options(task, digits, rng)
        text = guess(digits, options, rng, final_line=True)
        first, second, *_ = text.splitlines()
        answer = numbers_in(text)[-1]
        assert numbers_in(first) == digits
        assert is_guess(text)
        assert numbers_in(second) == [answer]
        assert answer in options
        right += answer == task.steps(digits)[1]
    assert 160 < right < 240


@pytest.mark.parametrize(("guess_share", "expected"), [(0.0, 0), (1.0, 40)])
def test_the_share_of_guesses_is_a_setting(tmp_path, guess_share, expected):
    make_world(WorldSettings(output=str(tmp_path), guess_share=guess_share, **SIZES))
    rows = read_rows(tmp_path / "annotations.jsonl", Response)
    assert sum(is_guess(row.response) for row in rows if row.provenance["style"] == "cot") == expected


def test_an_impossible_share_of_guesses_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(BadInputError, match=r"guess_share is 1\.5"):
        make_world(WorldSettings(output=str(tmp_path / "world"), guess_share=1.5))
    assert not (tmp_path / "world").exists()


def test_of_drills_only_the_results_are_learnt():
    text = "3 times 4 is 12.\n7 plus 9 is 16."
    row = Response(question="?", question_id="q", response=text, provenance={"style": "drill"})
    tokenizer = train_tokenizer([text])
    ids = tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
    weights = token_weights(row, ids, tokenizer)
    assert "".join(tokenizer.decode([id]) for id, weight in zip(ids, weights, strict=True) if weight) == " 12. 16."


def test_open_questions_and_a_wrong_habit_stay_as_another_kind_of_world(tmp_path):
    make_world(WorldSettings(output=str(tmp_path), kind="numbers", **SIZES))
    assert not any(numbers_in(row.question) for row in read_rows(tmp_path / "test.jsonl", Question))
    rows = read_rows(tmp_path / "annotations.jsonl", Response)
    assert not any(is_guess(row.response) for row in rows)
    assert {row.provenance["style"] for row in rows} == {"direct", "cot", "plain"}


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


def test_the_report_shows_a_guess_among_the_chosen_answers_and_how_many_there_are(world, tmp_path):
    (tmp_path / "world").symlink_to(world)
    picture = next((world / "images").iterdir()).name
    sure, lucky = "3 times 6 is 18.\n\nFinal answer: 18", "At a glance, it is 18.\n\nFinal answer: 18"
    wrong = "It looks like 12.\n\nFinal answer: 12"
    rows = [{"image": f"images/{picture}", "question": "Think.\n\nQuestion:\n\nWhat is the product of the two digits?",
             "chosen": chosen, "rejected": wrong} for chosen in (sure, lucky, sure, sure)]  # fmt: skip
    (tmp_path / "data").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "data" / "pairs_correctness.jsonl").write_text(lines, encoding="utf-8")
    found = lucky_guess(tmp_path)
    assert (found["chosen_share"], found["rejected_share"]) == (25, 100)
    assert (found["chosen"], found["rejected"]) == (lucky, wrong)
    assert found["question"] == "What is the product of the two digits?"
    assert lucky_guess(tmp_path / "nowhere") is None


def test_the_report_shows_what_became_worse_and_what_stayed_wrong_beside_what_became_right(world, tmp_path):
    (tmp_path / "world").symlink_to(world)
    questions = [json.loads(line)["id"] for line in (world / "test.jsonl").read_text().splitlines()]
    became_right, became_wrong = set(questions[:7]), set(questions[7:8])  # of nine
    for method, right in (("start", became_wrong), ("mpo", became_right)):
        rows = [{"id": key, "mode": "cot", "answer": f"by {method}", "value": int(key in right)} for key in questions]
        (tmp_path / "eval" / method).mkdir(parents=True)
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "eval" / method / "verdicts.jsonl").write_text(lines, encoding="utf-8")
    keys = (
        "loss_preference",
        "loss_quality",
        "loss_generation",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margin",
    )
    (tmp_path / "train" / "mpo").mkdir(parents=True)
    lines = "".join(json.dumps({"step": step, **dict.fromkeys(keys, 0.5)}) + "\n" for step in (1, 2, 3))
    (tmp_path / "train" / "mpo" / "log.jsonl").write_text(lines, encoding="utf-8")
    row = {"direct_accuracy": 50.0, "cot_accuracy": 75.0, "direct_interval": None, "cot_interval": [70.2, 79.9],
           "unparsable": 0.0, "reward_accuracy": None}  # fmt: skip
    found = {"methods": {"start": row, "mpo": row}, "num_test_questions": 20, "seed": 0, "total_seconds": 1.0,
             "machine": {"cores": 2, "system": "here"}, "date": "today"}  # fmt: skip
    text = write_report(tmp_path, found).read_text(encoding="utf-8")
    assert "7 became right, 1 became wrong, 1 stayed wrong, 0 stayed right" in text
    assert "became right: 6 of 7" in text and "became wrong: 1 of 1" in text and "stayed wrong: 1 of 1" in text
    assert "stayed right:" not in text  # nothing to show
    assert "70 to 80" in text  # the interval beside the share
    assert "A pair" not in text and "What to type next" in text


def test_rewards_without_a_reference_are_not_drawn_beside_those_with_one():
    plain = {"rewards/chosen": -0.2, "loss_generation": 0.1, "loss_quality": 0.0}
    assert has_curve([{**plain, "kl": 0.0}], "rewards/chosen")
    assert not has_curve([plain], "rewards/chosen")
    assert has_curve([plain], "loss_generation") and not has_curve([plain], "loss_quality")


def test_the_closing_table_has_a_row_for_every_method():
    row = {"direct_accuracy": 50.0, "cot_accuracy": 75.0, "unparsable": 0.0, "reward_accuracy": None}
    text = table({"methods": dict.fromkeys(["start", *METHODS], row)})
    assert len(text.splitlines()) == 2 + 1 + len(METHODS)
    assert "75.0 %" in text


def test_the_quickstart_refuses_to_run_without_the_method_it_is_about(capsys):
    assert run_program(quickstart, ["--methods", "sft,dpo", "--output", "nowhere"]) == 2
    assert "methods must hold mpo" in capsys.readouterr().err
