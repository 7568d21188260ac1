"""Rounds: which questions are asked, when an arm stops, what is shared, kept, removed and drawn; nothing done twice."""

import errno
import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from tiny_world import make_pictures, make_training_pairs

from internvl_mpo.errors import BadInputError, run_program
from internvl_mpo.jsonl import iter_jsonl, write_jsonl
from internvl_mpo.mmpr.reading import iter_pairs
from internvl_mpo.quickstart import pair_stages
from internvl_mpo.records import Question, Response, read_rows, write_rows
from internvl_mpo.rounds.__main__ import main
from internvl_mpo.rounds.fixed_pairs import draw
from internvl_mpo.rounds.lanes import RoundLanes
from internvl_mpo.rounds.loop import Loop, write_results
from internvl_mpo.rounds.page import write_page
from internvl_mpo.rounds.selection import Asked, choose
from internvl_mpo.rounds.settings import RoundsSettings
from internvl_mpo.settings import build_settings
from internvl_mpo.stages import Stage, Usage

BAND = (0.1, 0.7)


# --- which questions --------------------------------------------------------------------------------------------------


def test_no_question_is_asked_twice_while_another_was_never_asked():
    ids = list("abcdef")
    first = choose(ids, {}, 3, band=BAND, seed=0)
    second = choose(ids, {id: Asked(1, 0.5) for id in first}, 3, band=BAND, seed=1)
    assert len(first) == len(second) == 3
    assert not first & second


def test_questions_always_right_or_always_wrong_are_not_asked_again_and_mixed_ones_of_the_band_come_first():
    asked = {id: Asked(1, rate) for id, rate in {"a": 0.0, "b": 1.0, "c": 0.9, "d": 0.4, "e": 0.05}.items()}
    assert choose(list("abcde"), asked, None, band=BAND, seed=0) == {"c", "d", "e"}
    assert choose(list("abcde"), asked, 1, band=BAND, seed=0) == {"d"}


def test_of_equal_questions_the_one_asked_longest_ago_comes_first():
    asked = {"a": Asked(2, 0.5), "b": Asked(1, 0.5), "c": Asked(2, 0.5)}
    assert choose(list("abc"), asked, 1, band=BAND, seed=0) == {"b"}


def test_the_newest_pass_rate_counts_and_the_order_of_the_files_stays(tmp_path):
    rows = [Question(question=f"What is {number}?", answer="1") for number in range(4)]
    write_rows(rows, tmp_path / "q.jsonl")
    write_jsonl([{"id": row.id, "pass_rate": 1.0} for row in rows[:3]], tmp_path / "one.jsonl")
    write_jsonl([{"id": rows[2].id, "pass_rate": 0.5}], tmp_path / "two.jsonl")
    words = ["--questions", str(tmp_path / "q.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert run_program(main, ["select", *words, "--asked", f"{tmp_path / 'one.jsonl'},{tmp_path / 'two.jsonl'}"]) == 0
    assert [row.id for row in read_rows(tmp_path / "out.jsonl", Question)] == [row.id for row in rows[2:]]


def test_when_no_question_is_worth_asking_that_is_said(tmp_path, capsys):
    rows = [Question(question="What?", answer="1")]
    write_rows(rows, tmp_path / "q.jsonl")
    write_jsonl([{"id": rows[0].id, "pass_rate": 0.0}], tmp_path / "asked.jsonl")
    words = ["--questions", str(tmp_path / "q.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert run_program(main, ["select", *words, "--asked", str(tmp_path / "asked.jsonl")]) == 2
    assert "neither always right nor always wrong" in capsys.readouterr().err


def test_pass_rates_count_what_the_matcher_says(tmp_path):
    texts = ["So.\nFinal answer: 12", "So.\nFinal answer: 13", "I do not know.", "So.\nFinal answer: twelve"]
    rows = [
        Response(question_id="q", question="6 + 6?", answer="12", response=text, provenance={"num_tokens": 5, "n": n})
        for n, text in enumerate(texts)
    ]
    write_rows(rows, tmp_path / "r.jsonl")
    assert main(["judge", "--responses", str(tmp_path / "r.jsonl"), "--output", str(tmp_path / "out.jsonl")]) == 0
    ((_, row),) = iter_jsonl(tmp_path / "out.jsonl")
    assert row == {"id": "q", "pass_rate": 0.5, "right": 2, "wrong": 1, "unparsable": 1, "undecided": 0, "tokens": 20}


# --- fixed pairs ------------------------------------------------------------------------------------------------------


def test_fixed_pairs_are_drawn_at_their_share_with_their_own_pictures(tmp_path):
    (tmp_path / "fixed").mkdir()
    (tmp_path / "root").mkdir()
    source = make_training_pairs(tmp_path / "fixed")
    make_pictures(tmp_path / "root", 1)  # other pictures of the same names
    write_jsonl(({"id": str(number)} for number in range(16)), tmp_path / "own.jsonl")
    words = ["--pairs", str(tmp_path / "own.jsonl"), "--fixed", str(source), "--share", "0.2"]
    assert main(["mix", *words, "--output", str(tmp_path / "mixed")]) == 0
    drawn = list(iter_pairs(tmp_path / "mixed", tmp_path / "root"))  # as train_mpo.py reads it beside other pairs
    assert len(drawn) == 4
    originals = {row.pair.id: row for row in iter_pairs(source)}
    for row in drawn:
        before = originals[row.pair.id]
        assert (row.pair.chosen, row.pair.rejected) == (before.pair.chosen, before.pair.rejected)
        for new, old in zip(row.pair.images, before.pair.images, strict=True):
            assert Path(row.image_root, new).read_bytes() == Path(before.image_root, old).read_bytes()
    assert main(["mix", *words, "--output", str(tmp_path / "next"), "--drawn", str(tmp_path / "mixed")]) == 0
    again = {row.pair.id for row in iter_pairs(tmp_path / "next")}
    assert len(again) == 4
    assert not again & {row.pair.id for row in drawn}


def test_votes_of_the_demo_are_fixed_pairs(tmp_path):
    (picture,) = make_pictures(tmp_path, 1)
    vote = {"image": Path(picture).name, "question": "What?", "chosen": "Red.", "rejected": "Blue.", "rule": "vote"}
    write_jsonl([vote], tmp_path / "votes.jsonl")
    write_jsonl([{"id": "1"}], tmp_path / "own.jsonl")
    words = ["--pairs", str(tmp_path / "own.jsonl"), "--fixed", str(tmp_path / "votes.jsonl")]
    assert main(["mix", *words, "--output", str(tmp_path / "mixed")]) == 0
    (row,) = iter_pairs(tmp_path / "mixed")
    assert row.pair.rule == "vote"


def test_pictures_of_fixed_pairs_may_lie_in_the_image_root_of_the_questions(tmp_path, capsys):
    (tmp_path / "root").mkdir()
    (picture,) = make_pictures(tmp_path / "root", 1)
    pair = {"image": Path(picture).name, "question": "What?", "chosen": "Red.", "rejected": "Blue.", "rule": "judged"}
    write_jsonl([pair], tmp_path / "judged.jsonl")
    write_jsonl([{"id": "1"}], tmp_path / "own.jsonl")
    words = ["--pairs", str(tmp_path / "own.jsonl"), "--fixed", str(tmp_path / "judged.jsonl")]
    assert run_program(main, ["mix", *words, "--output", str(tmp_path / "mixed")]) == 2
    assert "cannot read image '0.png'" in capsys.readouterr().err
    assert main(["mix", *words, "--output", str(tmp_path / "mixed"), "--image_root", str(tmp_path / "root")]) == 0
    (row,) = iter_pairs(tmp_path / "mixed")
    assert Path(row.image_root, row.pair.images[0]).read_bytes() == Path(picture).read_bytes()


def test_pairs_drawn_before_come_again_only_when_no_other_is_left():
    assert draw(list("abc"), {"a", "b"}, 2, seed=0)[0] == "c"
    assert set(draw(list("abc"), set("abc"), 3, seed=0)) == set("abc")


# --- the loop ---------------------------------------------------------------------------------------------------------


class Runner:
    """Stands for the programs: writes what they would, and remembers the names of the stages."""

    def __init__(self, accuracies: dict[str, list[float]], failing: str = ""):
        self.accuracies, self.failing, self.ran = accuracies, failing, []

    def __call__(self, stage: Stage, log: Path | None) -> Usage:
        self.ran.append(stage.name)
        if stage.name == self.failing:
            raise BadInputError(f"no {stage.name}")
        stage.makes.parent.mkdir(parents=True, exist_ok=True)
        kind = stage.name.rpartition(".")[2]
        if kind in ("questions", "open_questions", "fixed"):
            main(stage.command[stage.command.index("internvl_mpo.rounds") + 1 :])
        elif kind == "pass_rates":
            row = {"pass_rate": 0.5, "right": 1, "wrong": 1, "unparsable": 0, "undecided": 0, "tokens": 9}
            ids = [row["id"] for _, row in iter_jsonl(stage.makes.with_name("questions.jsonl"))]
            write_jsonl(({"id": id, **row} for id in ids), stage.makes)
        elif kind == "evaluate":
            self.evaluate(stage)
        elif kind == "train":
            stage.makes.write_text("{}")
            (stage.makes.parent / "model.safetensors").write_bytes(b"weights")
        else:
            write_jsonl([], stage.makes)
        return Usage(1.0, 1.0)

    def evaluate(self, stage: Stage) -> None:
        arm, _, round_name = stage.name.partition(".")
        number = int(round_name.split("_")[1].split(".")[0]) if arm != "start" else 0
        accuracy = self.accuracies[arm][number - 1] if number else 50.0
        scores = {"headline": "accuracy", "accuracy": accuracy, "interval": [accuracy - 5, accuracy + 5],
                  "unanswered": 1.0, "num_examples": 4}  # fmt: skip
        stage.makes.write_text(json.dumps({"mini": {"cot": scores}}))
        same = {"benchmark": "mini", "mode": "cot", "question": "<b>?", "gold": "1", "images": [], "answer": "1"}
        rows = [{**same, "id": str(n), "cluster": str(n), "value": float(n < accuracy / 25)} for n in range(4)]
        write_jsonl(rows, stage.makes.with_name("verdicts.jsonl"))


@pytest.fixture
def given(tmp_path, monkeypatch) -> dict:
    monkeypatch.setattr("internvl_mpo.rounds.loop.write_page", lambda lanes, found: None)  # draws for a second
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "config.json").write_text("{}")
    write_rows([Question(question=f"What is {n}?", answer="1") for n in range(9)], tmp_path / "q.jsonl")
    (tmp_path / "train.yaml").write_text("max_steps: 10\n")
    return {"output": str(tmp_path / "out"), "model": str(tmp_path / "start"), "questions": str(tmp_path / "q.jsonl"),
            "image_root": str(tmp_path), "held_out": str(tmp_path), "train": str(tmp_path / "train.yaml"),
            "patience": 0}  # fmt: skip


def settings_of(given: dict, **more) -> RoundsSettings:
    return build_settings(RoundsSettings, {**given, **more})


def test_a_second_start_does_nothing_and_more_rounds_go_on(given):
    run = Runner({"mpo": [60.0, 70.0, 80.0]})
    assert Loop(settings_of(given, num_rounds=2), run).run() == {}
    first = run.ran.copy()
    assert len(first) == len(set(first))
    Loop(settings_of(given, num_rounds=2), run).run()
    assert run.ran == first
    Loop(settings_of(given, num_rounds=3), run).run()
    assert {name.partition(".round_")[2][0] for name in run.ran[len(first) :]} == {"3"}


def test_an_arm_stops_when_it_gets_no_better_and_others_go_on(given, capsys):
    run = Runner({"mpo": [60.0, 70.0, 80.0, 85.0], "sft": [55.0, 55.0, 54.0, 90.0]})
    loop = Loop(settings_of(given, num_rounds=4, arms="mpo,sft", patience=2), run)
    assert loop.run() == {}
    assert loop.rounds == {"mpo": 4, "sft": 3}
    assert "sft stops after round 3: no better than round 1" in capsys.readouterr().out
    found = write_results(loop)
    assert (found["arms"]["sft"]["best"], found["arms"]["mpo"]["best"]) == (1, 4)


def test_an_arm_that_has_stopped_is_not_asked_again(given, capsys):
    run = Runner({"mpo": [60.0, 70.0, 80.0, 85.0, 86.0], "sft": [55.0, 54.0]})
    loop = Loop(settings_of(given, num_rounds=5, arms="mpo,sft", patience=1), run)
    assert loop.run() == {}
    assert loop.rounds == {"mpo": 5, "sft": 2}
    assert capsys.readouterr().out.count("sft stops") == 1


def test_an_arm_that_fails_leaves_the_others_and_goes_on_next_time(given):
    run = Runner({"mpo": [60.0, 70.0], "sft": [55.0, 56.0]}, failing="mpo.round_2.responses")
    loop = Loop(settings_of(given, num_rounds=2, arms="mpo,sft"), run)
    assert [(arm, str(error)) for arm, error in loop.run().items()] == [("mpo", "no mpo.round_2.responses")]
    assert loop.rounds == {"mpo": 1, "sft": 2}
    run.failing = ""
    before = len(run.ran)
    assert Loop(settings_of(given, num_rounds=2, arms="mpo,sft"), run).run() == {}
    assert run.ran[before] == "mpo.round_2.responses"


def test_arms_share_the_first_data_and_each_samples_its_own_policy_then(given):
    lanes = RoundLanes(settings_of(given, num_rounds=2, arms="mpo,sft"))
    assert lanes.data("mpo", 1) == lanes.data("sft", 1)
    for arm in ("mpo", "sft"):
        stages = {stage.name: stage.command for stage in lanes.all_of(arm, 2)}
        policy = str(lanes.policy(arm, 1))
        for name in ("responses", "train"):
            command = stages[f"{arm}.round_2.{name}"]
            assert command[command.index("--model") + 1] == policy
        assert f"{lanes.data(arm, 2)}/pairs_correctness.jsonl" in stages[f"{arm}.round_2.train"]


def test_one_round_has_as_many_steps_as_all_rounds(given):
    lanes = RoundLanes(settings_of(given, num_rounds=3, arms="mpo,mpo_one_round"))
    train = next(stage.command for stage in lanes.all_of("mpo_one_round", 1) if stage.name.endswith("train"))
    assert train[train.index("--max_steps") + 1] == "30"
    assert lanes.settings.rounds_of("mpo_one_round") == 1


@pytest.mark.parametrize("reference", ["round", "first"])
def test_every_round_trains_the_policy_before_it_and_the_first_model_may_stay_the_reference(given, reference):
    lanes = RoundLanes(settings_of(given, num_rounds=2, reference=reference))
    for number, start in ((1, given["model"]), (2, str(lanes.policy("mpo", 1)))):
        train = next(stage.command for stage in lanes.all_of("mpo", number) if stage.name.endswith("train"))
        assert train[train.index("--model") + 1] == start
        assert ("--reference_model" in train) == (reference == "first" and number == 2)
    if reference == "first":
        assert train[train.index("--reference_model") + 1] == given["model"]


def test_a_launcher_stands_in_front_of_the_training_program_alone(given):
    lanes = RoundLanes(settings_of(given, launcher="torchrun --nproc_per_node 8"))
    train, evaluate = lanes.all_of("mpo", 1)
    assert train.command[:3] == ["torchrun", "--nproc_per_node", "8"]
    assert train.command[3].endswith("train_mpo.py")
    assert "torchrun" not in evaluate.command


def test_seeds_and_temperatures_move_with_the_rounds(given):
    lanes = RoundLanes(settings_of(given, num_rounds=3, temperatures="1.0,0.8"))
    commands = [next(s.command for s in lanes.before("mpo", 3) + lanes.all_of("mpo", 3) if s.name.endswith(name))
                for name in ("round_1.responses", "round_2.responses", "round_3.responses")]  # fmt: skip
    value = lambda command, key: command[command.index(key) + 1]  # noqa: E731
    assert [value(command, "--temperature") for command in commands] == ["1.0", "0.8", "0.8"]
    assert [value(command, "--seed") for command in commands] == ["0", "1000", "2000"]


def test_only_weights_that_no_round_needs_are_removed_and_nothing_is_trained_again(given):
    run = Runner({"mpo": [60.0, 90.0, 70.0, 80.0]})
    settings = settings_of(given, num_rounds=4, remove_policies=True)
    loop = Loop(settings, run)
    loop.run()
    kept = [loop.lanes.policy("mpo", n).joinpath("model.safetensors").exists() for n in (1, 2, 3, 4)]
    assert kept == [False, True, False, True]
    rows = write_results(loop)["arms"]["mpo"]["rounds"]
    assert [row["is_removed"] for row in rows[1:]] == [True, False, True, False]
    before = len(run.ran)
    Loop(settings, run).run()
    assert len(run.ran) == before


def test_other_questions_in_the_same_file_are_other_questions(given):
    run = Runner({"mpo": [60.0]})
    Loop(settings_of(given, num_rounds=1), run).run()
    before = len(run.ran)
    write_rows([Question(question="Another?", answer="2")], given["questions"])
    Loop(settings_of(given, num_rounds=1), run).run()
    assert run.ran[before] == "round_1.questions"


def test_the_page_escapes_what_models_say_and_says_whether_rounds_end_above_one_round(given):
    run = Runner({"mpo": [50.0, 100.0], "mpo_one_round": [50.0]})
    loop = Loop(settings_of(given, num_rounds=2, arms="mpo,mpo_one_round"), run)
    loop.run()
    page = write_page(loop.lanes, write_results(loop)).read_text(encoding="utf-8")
    assert "&lt;b&gt;?" in page
    assert "<b>?" not in page
    words = " ".join(page.split())
    assert "mpo after 2 rounds, beside mpo_one_round with as many steps in all: <b>+50.0 points</b>" in words


def test_servers_stand_around_every_sampling_stage_and_must_have_the_policy(given):
    given |= {"open_questions": given["questions"], "serve": "serve {model} {port}", "replicas": 2}
    lanes = RoundLanes(settings_of(given))
    commands = {stage.name: stage.command for stage in lanes.all_of("mpo", 2)}
    for name in ("responses", "open_responses", "pairs_dropout_ntp"):
        command = commands[f"mpo.round_2.{name}"]
        assert "internvl_mpo.engines.with_server" in command
        assert command[command.index("--served_from") + 1] == str(lanes.policy("mpo", 1))
    assert "internvl_mpo.engines.with_server" not in commands["mpo.round_2.train"]


def test_a_judge_rates_samples_of_each_rounds_own_policy_and_its_pairs_are_trained_on(given):
    judge = {"engine": "http", "base_url": "http://localhost:1/v1", "num_rated": 3}
    given |= {"open_questions": given["questions"], "judge": judge, "serve": "serve {model} {port}"}
    lanes = RoundLanes(settings_of(given, temperatures="1.0,0.8"))
    stages = {stage.name.removeprefix("mpo.round_2."): stage for stage in lanes.all_of("mpo", 2)}
    sampled, rated = stages["judged_responses"].command, stages["pairs_judged"].command
    assert sampled[sampled.index("--served_from") + 1] == str(lanes.policy("mpo", 1))
    assert [sampled[sampled.index(key) + 1] for key in ("--num_samples", "--temperature")] == ["3", "0.8"]
    assert rated[rated.index("--base_url") + 1] == "http://localhost:1/v1"
    assert rated[rated.index("--responses") + 1] == str(stages["judged_responses"].makes)
    assert "internvl_mpo.engines.with_server" not in rated
    train = stages["train"].command
    assert str(stages["pairs_judged"].makes) in train[train.index("--data") + 1].split(",")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"judge": {"engine": "http", "base_url": "http://localhost:1"}}, "give open_questions"),
        ({"judge": {"engine": "http"}, "open_questions": "q.jsonl"}, "--engine http needs --base_url"),
        ({"judge": {"num_rate": 3}}, "did you mean 'num_rated'"),
        ({"judge": {"seed": 3}}, "judge holds 'seed'"),
        ({"arms": "mpo,ppo"}, "unknown arm 'ppo'"),
        ({"arms": "mpo_one_round", "training": {"max_steps": -1}}, "needs max_steps"),
        ({"training": {"learning_rat": 1}}, "did you mean 'learning_rate'"),
        ({"training": {"model": "x"}}, "'model', which every round sets itself"),
        ({"training": {"reference_model": "x"}}, "'reference_model', which every round sets itself"),
        ({"reference": "first", "training": {"reference_sync_steps": 8}}, "reference_sync_steps 8"),
        ({"reference": "first", "training": {"reference": "adapter_off"}}, "reference adapter_off"),
        ({"serve": "vllm serve {model}"}, "{model} and {port}"),
        ({"serve": "s {model} {port}", "sampling": {"engine": "vllm"}}, "take engine"),
        ({"temperatures": "0"}, "above 0"),
        ({"sampling": {"batch_sise": 8}}, "did you mean 'batch_size'"),
        ({"sampling": {"temperature": 1.2}}, "sampling holds 'temperature'"),
        ({"evaluation": {"limits": 8}}, "did you mean 'limit'"),
        ({"benchmark": "minni"}, "minni"),
        ({"held_out": "none.jsonl"}, "held_out 'none.jsonl' does not exist"),
        ({"questions": "none.jsonl"}, "questions 'none.jsonl' does not exist"),
        ({"fixed_share": 1}, "fixed_share is 1"),
        ({"model": "nowhere"}, "no model folder"),
        ({"min_pass_rate": 0.9}, "no band"),
        ({"num_rounds": 0}, "num_rounds is 0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sampled(changed, message, given, tmp_path, capsys):
    config = tmp_path / "rounds.yaml"
    config.write_text(yaml.safe_dump({**given, **changed}))
    assert run_program(main, ["--config", str(config)]) == 2
    assert message in capsys.readouterr().err
    assert not Path(given["output"]).exists()


def test_the_quickstart_is_a_round_that_asks_all_questions_in_file_order(given, tmp_path):
    """The commands of the two differ in the questions' file alone, which the round writes in the same order."""
    given |= {"sampling": {"max_new_tokens": 64, "batch_size": 256}, "image_root": str(tmp_path / "o" / "world"),
              "open_questions": given["questions"], "model": str(tmp_path / "o" / "start")}  # fmt: skip
    lanes = RoundLanes(settings_of(given))
    data = lanes.data("mpo", 1)
    quick = [stage for part in pair_stages(tmp_path / "o", tmp_path / "o" / "start", data, 0) for stage in part]
    own = {stage.name.removeprefix("round_1."): stage.command for stage in lanes.first_data()}
    for stage in quick:
        differing = [(mine, word) for mine, word in zip(own[stage.name], stage.command, strict=True) if mine != word]
        assert all(Path(mine).name == Path(word).name for mine, word in differing)
        assert len(differing) == (stage.name in ("responses", "open_responses"))


# --- on a cluster, and on a full disk ---------------------------------------------------------------------------------


def stub(path: Path, *lines: str) -> None:
    path.write_text("\n".join(("#!/usr/bin/env bash", *lines)), encoding="utf-8")
    path.chmod(0o755)


def test_a_slurm_job_whose_time_is_up_waits_for_the_checkpoint_of_its_group_and_asks_for_its_place_again(tmp_path):
    stub(tmp_path / "scontrol", f'echo "$@" $(cat {tmp_path / "checkpoint"}) > {tmp_path / "asked"}')
    stub(
        tmp_path / "train",
        f"trap 'sleep 1; echo whole > {tmp_path / 'checkpoint'}; exit' TERM",
        f"echo $$ > {tmp_path / 'child'}",
        "sleep 60 & wait",
    )
    stub(
        tmp_path / "python",
        f'echo "$@" > {tmp_path / "words"}',
        str(tmp_path / "train"),
    )
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"),
                   "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7"}  # fmt: skip
    script = Path(__file__).parents[1] / "runs" / "rounds.slurm"
    job = subprocess.Popen(["bash", str(script), "my.yaml", "--num_rounds", "4"], env=environment)
    deadline = time.monotonic() + 60
    while not ((tmp_path / "child").exists() and (tmp_path / "child").read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    job.terminate()
    assert job.wait(30) == 0
    assert (tmp_path / "asked").read_text().split() == ["requeue", "7", "whole"]
    assert (tmp_path / "words").read_text().split() == [
        "-m", "internvl_mpo.rounds", "--config", "my.yaml", "--num_rounds", "4"
    ]  # fmt: skip
    child = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/status")
    assert not child.exists() or "(zombie)" in child.read_text()


def test_a_full_disk_is_one_sentence_and_the_same_command_goes_on(given, tmp_path, monkeypatch, capsys):
    run = Runner({"mpo": [60.0]})
    monkeypatch.setattr("internvl_mpo.rounds.__main__.Loop", lambda settings: Loop(settings, run))
    config = tmp_path / "rounds.yaml"
    config.write_text(yaml.safe_dump({**given, "num_rounds": 1}))
    full = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "out" / "results.json"))
    with monkeypatch.context() as patch:
        patch.setattr("internvl_mpo.rounds.loop.results", lambda *given: (_ for _ in ()).throw(full))
        assert run_program(main, ["--config", str(config)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert "the disk is full at" in error[0]
    done = len(run.ran)
    assert run_program(main, ["--config", str(config)]) == 0
    assert len(run.ran) == done
