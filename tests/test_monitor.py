"""What is logged, what is warned about, which samples are shown.

pytest tests/test_monitor.py
"""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_train_mpo import arguments, train, world  # noqa: F401 - `world` is a fixture
from tiny import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from internvl_mpo.logps import attach_scoring, response_logps
from internvl_mpo.objective import sequence_kl
from internvl_mpo.packing import Group, pack_groups
from internvl_mpo.preference_terms import REFERENCE_FREE, SMOOTHED, TERMS
from internvl_mpo.training import throughput
from internvl_mpo.training.callbacks import ConsoleCallback
from internvl_mpo.training.held_out import repetition
from internvl_mpo.training.throughput import FlopModel, device_peak, num_visible, peak_tflops
from internvl_mpo.training.watch import Watch, expected_first_loss, expected_first_terms, rounding_noise


def lines(folder: Path, name: str = "log.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


# --- warnings ---------------------------------------------------------------------------------------------------------


def feed(watch: Watch, name: str, values: list[float]) -> list[str]:
    return [text for step, value in enumerate(values, start=1) for text in watch.look(step, {name: value})]


def test_chosen_log_probs_that_fall_for_long_are_told_once():
    falling = [-0.004 * step for step in range(60)]
    (text,) = feed(Watch(window=10), "logps/chosen_change", falling)
    assert "log-probs of chosen responses fall" in text
    assert text.startswith("step 20: ")  # the first two windows are -0.018 and -0.058


@pytest.mark.parametrize(
    "values",
    [
        [0.004 * step for step in range(60)],  # rising
        [-0.06 + 0.001 * step for step in range(60)],  # low, but coming back
        [-0.0005 * step for step in range(60)],  # falling, but hardly
        [-0.2, 0.1] * 5 + [-0.004 * step for step in range(9)],  # not for long yet
    ],
)
def test_log_probs_that_rise_or_only_swing_are_not(values):
    assert feed(Watch(window=10), "logps/chosen_change", values) == []


@pytest.mark.parametrize(
    ("values", "warned"),
    [
        ([0.0] * 30, True),  # learning rate 0 or everything frozen
        ([1e-5] + [1.5e-5] * 30, True),  # rounding noise stays rounding noise
        ([0.0] + [1e-5] * 30, True),  # also where the first packs were those of the reference pass
        ([1e-5] * 8 + [2e-3] * 30, False),
        ([0.9] * 30, False),  # a resumed run whose log was lost, or dropout
        ([0.0] * 9, False),  # too early to tell
    ],
)
def test_rewards_that_stay_equal_are_told(values, warned):
    assert bool(feed(Watch(window=10), "rewards/std", values)) is warned


@pytest.mark.parametrize(
    ("settings", "noise"),
    [
        ({}, 0.001),
        ({"bf16": True}, 0.05),
        ({"dtype": "bfloat16"}, 0.05),
        ({"beta": 0.01}, 0.0001),  # rewards are beta times a log-ratio
    ],
)
def test_what_counts_as_equal_follows_precision_and_beta(settings, noise):
    args = SimpleNamespace(**{"beta": 0.1, "bf16": False, "fp16": False, "dtype": "float32", **settings})
    assert rounding_noise(args) == pytest.approx(noise)


def resumed(folder: Path, rows: list[dict], step: int) -> ConsoleCallback:
    """A console that goes on after `step` of a run that has logged `rows`."""
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = SimpleNamespace(beta=0.1, bf16=False, fp16=False)
    state = SimpleNamespace(is_world_process_zero=True, max_steps=999, global_step=step)
    console = ConsoleCallback(folder)
    console.on_train_begin(args, state, None)
    return console


def test_a_resumed_run_remembers_what_it_has_seen_and_said(tmp_path):
    learning = [{"step": step, "rewards/std": 0.02 * step, "logps/chosen_change": 0.0} for step in range(1, 46)]
    console = resumed(tmp_path, learning, 45)
    assert feed(console.watch, "rewards/std", [1e-5] * 60) == []  # it has learnt before
    falling = feed(console.watch, "logps/chosen_change", [-0.2] * 60)
    assert [text.split(":")[0] for text in falling] == ["step 55"]  # the 45 lines before belong to the two windows

    still = [{"step": step, "rewards/std": 1e-6} for step in range(1, 51)]
    still.append({"step": 50, "warning": "step 50: the rewards of all pairs are still equal"})
    console = resumed(tmp_path, still, 50)
    assert feed(console.watch, "rewards/std", [1e-6] * 60) == []


def test_lines_cut_off_by_a_kill_or_with_a_line_separator_in_a_text_do_not_stop_a_resume(tmp_path):
    samples = [{"step": 1, "answer": "one\u2028two\u2029three\u0085four"}, {"step": 2, "answer": "later"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in samples) + '{"step": 1, "answer": "{é}'
    path = tmp_path / "samples.jsonl"
    for cut in (0, 1, 2):  # also inside a letter of two bytes
        path.write_bytes(text.encode()[: -1 - cut] if cut else text.encode())
        resumed(tmp_path, [{"step": 1, "loss": 1.0}], 1)
        assert path.read_text(encoding="utf-8") == json.dumps(samples[0], ensure_ascii=False) + "\n"


@pytest.mark.parametrize(
    ("values", "warned"), [([0.1, 0.15, 0.31], True), ([0.1, 0.2, 0.25], False), ([0.9, 0.9, 0.9], False)]
)
def test_repetition_that_rises_is_told(values, warned):
    assert bool(feed(Watch(), "eval_samples/repetition", values)) is warned


def test_repetition_counts_fourgrams_that_were_there_before():
    assert repetition([1, 2, 3, 4, 5, 6, 7]) == 0
    assert repetition([7] * 10) == pytest.approx(6 / 7)
    assert repetition([1, 2, 3]) == 0


@pytest.mark.slow
def test_a_run_that_learns_nothing_says_so(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Watch.__init__, "__kwdefaults__", {**Watch.__init__.__kwdefaults__, "window": 3})
    more = ("--max_steps", "5", "--save_strategy", "no")
    assert train(world, tmp_path / "still", "--learning_rate", "0", *more) == 0
    warnings = [row["warning"] for row in lines(tmp_path / "still") if "warning" in row]
    assert len(warnings) == 1
    assert "nothing is learnt" in warnings[0]
    assert warnings[0] in "".join(capsys.readouterr())
    assert train(world, tmp_path / "learning", *more) == 0
    assert not [row for row in lines(tmp_path / "learning") if "warning" in row]


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_kl_is_the_k3_estimator_of_the_mean_log_ratio():
    policy, reference, lengths = torch.tensor([-12.0, -8.0]), torch.tensor([-10.0, -8.0]), torch.tensor([4, 3])
    assert sequence_kl(policy, reference, lengths).tolist() == pytest.approx([math.exp(-0.5) - 1 + 0.5, 0.0])
    assert (sequence_kl(torch.randn(99), torch.randn(99), torch.ones(99)) >= 0).all()


def test_the_words_of_the_first_preference_term_spell_its_value():
    log, eps, beta = math.log, 0.1, 0.3
    spelled = {
        "1": 1,
        "1/(2 beta)^2": 1 / (2 * beta) ** 2,
        "2/(2 beta)^2": 2 / (2 * beta) ** 2,
        "ln 2": log(2),
        "2 ln 2": 2 * log(2),
        "(1 + ln 2)/2": (1 + log(2)) / 2,
        "-ln(4 eps (1 - eps))/2": -log(4 * eps * (1 - eps)) / 2,
    }
    seen = set()
    for preference in TERMS.keys() - set(REFERENCE_FREE):
        args = SimpleNamespace(preference=preference, quality="none", beta=beta, label_smoothing=eps, wpo=False)
        value, words = expected_first_terms(args)["loss_preference"]
        assert value == pytest.approx(spelled[words], rel=1e-6), preference
        seen.add(words)
    assert seen == spelled.keys()


@pytest.mark.parametrize(
    "preference", ["dpo", "cdpo", "robust_dpo", "exo", "aot", "rso", "ipo", "sppo", "discopop", "orpo", "simpo", "none"]
)
def test_the_first_loss_is_the_expected_one_for_every_variant(world, tmp_path, preference, capsys):
    quality = "none" if preference in REFERENCE_FREE else "bco"
    smoothing = 0.1 if preference in SMOOTHED else 0.0
    more = ["--preference", preference, "--quality", quality, "--max_steps", "1", "--save_strategy", "no"]
    assert train(world, tmp_path / "run", *more, "--label_smoothing", str(smoothing)) == 0
    first = lines(tmp_path / "run")[0]
    args = SimpleNamespace(
        preference=preference, quality=quality, generation="sft", beta=0.1, preference_weight=0.8, quality_weight=0.2,
        generation_weight=1.0, label_smoothing=smoothing, wpo=False,
    )  # fmt: skip
    expected, words = expected_first_loss(args, first["loss_generation"])
    shown = "".join(capsys.readouterr())
    terms = {name: value for name, (value, _) in expected_first_terms(args).items()}
    assert terms.keys() == ({"loss_preference", "loss_quality"} if quality == "bco" else set())
    if terms:  # the others have no reference to start equal to
        terms |= dict.fromkeys(("rewards/chosen", "rewards/rejected", "reward_shift"), 0.0)
    for name, value in terms.items():
        assert first[name] == pytest.approx(value, rel=1e-3, abs=1e-3)
        assert f"{name} {first[name]:.4f}, expected {value:.4f}" in shown
    if preference in ("orpo", "simpo"):
        assert expected is None
        assert "no fixed value" in shown
    else:
        assert first["loss"] == pytest.approx(expected, rel=1e-3)
        assert f"expected {expected:.4f} = {words}" in shown
        assert "not the same model" not in shown


def test_every_number_is_logged_and_means_what_it_says(world, tmp_path):
    assert train(world, tmp_path / "run", "--peak_tflops", "0.001", "--save_strategy", "no") == 0
    first, *_, last = (row for row in lines(tmp_path / "run") if "loss" in row)
    names = (
        "loss_preference loss_quality loss_generation reward_shift grad_norm learning_rate rewards/chosen "
        "rewards/rejected rewards/margin rewards/accuracy rewards/std kl length/chosen length/rejected logps/chosen "
        "logps/rejected pairs_per_second tokens_per_second model_tflops mfu memory/process_gib memory/device_peak_gib"
    )
    for name in names.split():
        assert math.isfinite(last[name]), name
    assert first["rewards/std"] < 1e-3 < last["rewards/std"]  # policy = reference, then not
    assert first["kl"] < 1e-6 < last["kl"]
    assert last["mfu"] == pytest.approx(last["model_tflops"] / 0.001)
    assert 0.05 < last["memory/process_gib"] < 10
    assert last["memory/device_peak_gib"] == 0  # a CPU
    terms = 0.8 * last["loss_preference"] + 0.2 * last["loss_quality"] + last["loss_generation"]
    assert last["loss"] == pytest.approx(terms, rel=1e-5)


def test_no_mfu_where_the_peak_is_not_known():
    assert device_peak(torch.device("cpu")) is None
    assert device_peak(torch.device("cpu"), 2.0) == 2e12
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989
    assert peak_tflops("NVIDIA H100 PCIe") == 756
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312
    assert peak_tflops("NVIDIA RTX A4000") is None  # not an A40
    assert "mfu" not in throughput.speed(1, 1, 1, 1, None)


@pytest.mark.parametrize("frozen", [(), ("vision_model",), ("vision_model", "mlp1"), ("language_model",)])
def test_counted_flop_are_those_of_the_matrix_products(frozen):
    model = attach_scoring(tiny_model("llama")).train()
    for name in frozen:
        getattr(model, name).requires_grad_(False)
    groups = [
        Group(
            [5] * 9 + [model.config.image_token_id] * 2, [[6, 7, 8], [6, 9]], [(0, 1)], ["a"], torch.randn(2, 3, 28, 28)
        ),
        Group([5] * 20, [[6] * 8, [9] * 5, [10] * 6], [(0, 1), (0, 2)], ["b", "c"]),
    ]
    pack = pack_groups(groups)
    with FlopCounterMode(display=False) as counter:
        response_logps(model, pack).sum().backward()
    matrices = counter.get_total_flops()  # attention runs in kernels that torch's table does not know
    flops = FlopModel(model)
    for name in ("vision", "language", "scored"):
        part = getattr(flops, name)
        setattr(flops, name, throughput._Part(part.num_weights, part.num_trained, 0))
    logits_again = 2 * len(pack.target_ids_S) * flops.head.num_weights  # which the method does not need
    assert flops.of(pack) == pytest.approx(matrices - logits_again, rel=5e-3)


def test_visible_pairs_are_counted_along_the_tree():
    pack = pack_groups(
        [
            Group([1, 2, 3], [[4, 5, 6], [4, 7], [8]], [(0, 1), (0, 2)], ["a", "b"]),
            Group([1], [[2], [3]], [(0, 1)], ["c"]),
        ]
    )
    until = pack.layout.visible_until_T
    place = torch.arange(len(until))
    dense = (place[None] <= place[:, None]) & (place[:, None] < until[None])
    assert num_visible(pack.layout) == int(dense.sum())
    assert num_visible(pack.layout, scored_only=True) == int(dense[pack.layout.scored_index_U].sum())


# --- samples and trackers ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_held_out_questions_are_answered_at_every_evaluation(world, tmp_path, monkeypatch):
    output = tmp_path / "run"
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    more = ("--held_out_share", "0.4", "--pairs_per_step", "2", "--eval_steps", "2", "--num_eval_samples", "2",
            "--eval_sample_tokens", "5", "--report_to", "tensorboard", "--max_steps", "4")  # fmt: skip
    assert train(world, output, *more) == 0
    samples = lines(output, "samples.jsonl")
    assert {sample["step"] for sample in samples} == {2, 4}
    assert all(0 < sample["num_tokens"] <= 5 for sample in samples)
    held_out = {sample["question"] for sample in samples}
    pairs = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    assert held_out < {pair["question"] for pair in pairs}
    evaluations = [row for row in lines(output) if "eval_rewards/accuracy" in row]
    assert [row["step"] for row in evaluations][:2] == [2, 4]
    assert all("eval_samples/repetition" in row and "eval_nll" in row for row in evaluations)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    tracked = [event.value for event in events.Scalars("train/loss")]
    assert tracked == pytest.approx([row["loss"] for row in lines(output) if "loss" in row], rel=1e-5)
    assert len(events.Scalars("eval/rewards/accuracy")) >= 2
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("eval/samples/text_summary")]
    assert samples[0]["question"] in texts[0]


def test_trackio_gets_numbers_and_samples_without_a_network(world, tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    from trackio import sqlite_storage, utils
    from trackio.sqlite_storage import SQLiteStorage

    for module in (sqlite_storage, utils):
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    more = ("--held_out_share", "0.4", "--pairs_per_step", "2", "--num_eval_samples", "1", "--eval_sample_tokens", "3",
            "--report_to", "trackio", "--max_steps", "2", "--project", "mpo-test", "--run_name", "r1")  # fmt: skip
    assert train(world, tmp_path / "run", *more) == 0
    logs = SQLiteStorage.get_logs("mpo-test", "r1")
    losses = [row["train/loss"] for row in logs if "train/loss" in row]
    assert losses == pytest.approx([row["loss"] for row in lines(tmp_path / "run") if "loss" in row])
    assert any("eval/samples" in row for row in logs)
