"""Two ranks on the CPU (gloo): whatever cuts weights and pairs in pieces, the losses are those of one process.

pytest tests/test_distributed.py
"""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_train_mpo import ROOT, arguments, losses, train, world  # noqa: F401 - world is a fixture
from tiny_world import make_model_folder

sys.path.insert(0, str(ROOT / "bench"))
from kill_train import tiny_world, torture

from internvl_mpo.mmpr.reading import iter_pairs

pytest.importorskip("deepspeed")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
WEIGHTS = ("--ld_alpha", "0.25", "--after_difference_weight", "0.5", "--difference_tokens", "3", "--wpo")
LORA = ("--lora_rank", "2", "--lora_on", "both")
# case -> (the run of one process it must equal, arguments)
CASES = {
    "ddp": ("full", ()),
    "zero1": ("full", ("--deepspeed", "zero1")),
    "zero2": ("full", ("--deepspeed", "zero2")),
    "zero3": ("full", ("--deepspeed", "zero3")),
    "zero3, several packs a rank": ("full", ("--deepspeed", "zero3", "--max_tokens_per_pack", "650")),
    "zero3, offload": ("full", ("--deepspeed", "zero3_offload")),
    "zero3, held out": ("held_out", ("--deepspeed", "zero3")),
    "zero2, lora": ("lora", (*LORA, "--deepspeed", "zero2")),
    "zero3, lora": ("lora", (*LORA, "--deepspeed", "zero3", "--gradient_checkpointing", "true")),
    "zero3, lora, adapter off": ("lora", (*LORA, "--deepspeed", "zero3", "--reference", "adapter_off")),
    "fsdp": ("full", ("--fsdp", "true")),
    "fsdp, several packs a rank": ("full", ("--fsdp", "true", "--max_tokens_per_pack", "650")),
    "fsdp, held out": ("held_out", ("--fsdp", "true")),
    "fsdp, lora": ("lora", (*LORA, "--fsdp", "true", "--gradient_checkpointing", "true", "--save_adapter", "true")),
    "fsdp, bf16": ("bf16", ("--fsdp", "true")),
    "fsdp, offload": ("full", ("--fsdp", "true", "--fsdp_config", '{"cpu_offload": true}')),
    "ddp, other reference": ("reference", ()),
    "zero2, other reference": ("reference", ("--deepspeed", "zero2")),
    "zero3, other reference": ("reference", ("--deepspeed", "zero3")),
    "zero2, moving reference": ("moving", ("--deepspeed", "zero2")),
    "ddp, weights": ("weights", ("--max_tokens_per_pack", "650")),
    "zero3, weights": ("weights", ("--deepspeed", "zero3")),
}
ALONE = {
    "full": ("--weight_decay", "1.0"),  # large enough to see it given to weights that have none
    "held_out": ("--held_out_share", "0.4", "--pairs_per_step", "2", "--num_eval_samples", "1",
                 "--eval_sample_tokens", "4", "--eval_steps", "2", "--load_best_model_at_end", "true"),
    "lora": LORA,
    "bf16": ("--bf16", "true"),
    "reference": ("--reference_model", "first"),
    "moving": ("--reference_sync_steps", "2"),
    "weights": WEIGHTS,
}  # fmt: skip
# case of `CASES` -> how many ranks write its checkpoint, how many go on from it
MOVES = [("zero2, lora", 2, 1), ("zero3", 2, 1), ("zero1", 1, 2), ("zero3", 1, 2), ("fsdp, lora", 2, 2),
         ("fsdp", 2, 3)]  # fmt: skip


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory) -> Path:
    """Runs of one process."""
    folder = tmp_path_factory.mktemp("alone")
    make_model_folder(folder / "first", seed=1)
    for name, more in ALONE.items():
        assert train(world, folder / name, *[str(folder / word) if word == "first" else word for word in more]) == 0
    return folder


@pytest.fixture(scope="module")
def together(world, tmp_path_factory) -> Path:
    """The same on two ranks, all cases in one process group."""
    folder = tmp_path_factory.mktemp("together")
    cases = [(arguments(world, folder / name, *words_of(name, folder)), None) for name in CASES]
    codes, errors = run_on_ranks(2, folder, cases)
    assert codes == ["0,0"] * len(CASES), errors[-3000:]
    return folder


@pytest.fixture(scope="module")
def moved(world, together, tmp_path_factory) -> Path:
    """Runs that go on from step 2 of another, with as many ranks as `MOVES` says."""
    folder = tmp_path_factory.mktemp("moved")
    jobs = {ranks: [] for ranks in (1, 2, 3)}
    for name, written_by, ranks in MOVES:
        start = together / name
        if written_by == 1:
            start = folder / f"{name} on 1"
            jobs[1].append((arguments(world, start, *words_of(name, folder)), None))
        words = (*words_of(name, folder), "--resume", str(start / "checkpoint-2"))
        jobs[ranks].append((arguments(world, folder / f"{name} {written_by} {ranks}", *words), None))
    for ranks, cases in jobs.items():
        (folder / str(ranks)).mkdir()
        codes, errors = run_on_ranks(ranks, folder / str(ranks), cases)
        assert codes == [",".join("0" * ranks)] * len(cases), errors[-3000:]
    return folder


def words_of(name: str, folder: Path) -> list[str]:
    """Return the arguments of a case of `CASES`; what they name is written into the folder."""
    configs = small_configs(folder)
    if "first" in ALONE[CASES[name][0]]:
        configs["first"] = make_model_folder(folder / "first", seed=1)
    twin, more = CASES[name]
    return [str(configs.get(word, word)) for word in (*more, *ALONE[twin])]


def small_configs(folder: Path) -> dict[str, Path]:
    """DeepSpeed's configurations by name, as they fit a test."""
    configs = {}
    for path in (ROOT / "configs/deepspeed").glob("*.json"):
        config = json.loads(path.read_text())
        config["zero_force_ds_cpu_optimizer"] = False  # compiling DeepSpeed's own would take minutes
        for bucket in ("reduce_bucket_size", "allgather_bucket_size"):  # allocated whole: 4 GB a rank as they stand
            config["zero_optimization"][bucket] = 1_000_000
        configs[path.stem] = folder / path.name
        configs[path.stem].write_text(json.dumps(config))
    return configs


def run_on_ranks(
    num_ranks: int, folder: Path, cases: list[tuple[list[str], list[str] | None]]
) -> tuple[list[str], str]:
    """Run cases of `distributed_worker.py` in one process group; return their exit codes and what was said."""
    (folder / "cases.json").write_text(json.dumps(cases))
    launcher = [*TORCHRUN[:-1], str(num_ranks)]
    command = [*launcher, str(ROOT / "tests/distributed_worker.py"), str(folder / "cases.json")]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=900)
    return (folder / "cases.json.done").read_text().split(), result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_losses_and_the_folder_of_one_process(alone, together, case):
    twin = CASES[case][0]
    # one process casts to bfloat16 for each product, FSDP2 what it gathers
    compare_runs(alone / twin, together / case, tolerance=5e-3 if twin == "bf16" else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "written_by", "ranks"), MOVES)
def test_a_run_goes_on_with_another_number_of_ranks_as_if_it_had_never_stopped(
    alone, together, moved, case, written_by, ranks
):
    compare_runs(alone / CASES[case][0], moved / f"{case} {written_by} {ranks}", from_step=3)
    start = together / case if written_by == 2 else moved / f"{case} on 1"
    assert not list(start.glob("checkpoint-2/*universal*")), "the converted checkpoint takes the disk"


def compare_runs(one: Path, other: Path, from_step: int = 1, tolerance: float = 1e-5) -> None:
    """Fail unless losses and trained weights are equal up to rounding."""
    expected, found = ({s: loss for s, loss in losses(run).items() if s >= from_step} for run in (one, other))
    assert found.keys() == expected.keys()
    assert [found[step] for step in expected] == pytest.approx(list(expected.values()), rel=tolerance)
    weights, others = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert others[name].shape == weight.shape, name
        # Adam divides by the root of tiny gradients, so a few weights feel the rounding of a sum more than losses do
        torch.testing.assert_close(
            others[name],
            weight,
            rtol=1e-3,
            atol=max(2e-4, tolerance),
            msg=lambda text, name=name: f"{name} {text}",
        )


@pytest.mark.slow
def test_the_adapters_of_fsdp_are_whole(together):
    """The folder of adapters alone, merged into the start model, is the merged model."""
    from peft import PeftModel

    from internvl_mpo.families.registry import family_of_source

    folder = together / "fsdp, lora"
    base = json.loads((folder / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(family_of_source(base).load_model(base), folder / "adapter").merge_and_unload()
    for name, weight in load_file(folder / "model" / "model.safetensors").items():
        torch.testing.assert_close(model.state_dict()[name], weight)


@pytest.mark.slow
def test_a_pair_that_is_not_finite_on_one_rank_stops_both_with_its_name(world, tmp_path):
    zero = {name: ("--deepspeed", str(path)) for name, path in small_configs(tmp_path).items()}
    several = ("--max_tokens_per_pack", "650")  # the pack is not the last one of the step everywhere
    runs = {
        "ddp": ("loss", (*several, "--reward_shift", "inclusive")),
        "zero2": ("loss", zero["zero2"]),
        "zero3": ("loss", (*zero["zero3"], *several)),
        "zero2, gradient": ("gradient", zero["zero2"]),
    }
    pair_id = list(iter_pairs(world / "pairs.jsonl"))[7].pair.id
    # the poison must not meet the pass for the reference
    assert train(world, tmp_path / "alone", "--reference_cache", str(tmp_path / "cache")) == 0
    more = ("--reference_cache", str(tmp_path / "cache"))
    cases = [
        (arguments(world, tmp_path / name, *more, *words), [what, pair_id]) for name, (what, words) in runs.items()
    ]
    codes, errors = run_on_ranks(2, tmp_path, cases)
    assert codes == ["2,2"] * len(cases), errors[-3000:]
    for name, (what, _) in runs.items():
        sentences = re.findall(rf"error: the {what} is not finite [^\n]*?--dump {tmp_path / name}/\S+", errors)
        assert len(sentences) == 2, (name, errors[-3000:])
        assert sentences[0] == sentences[1]
        assert pair_id in sentences[0]
        dumps = {path: json.loads(path.read_text()) for path in (tmp_path / name).glob("not_finite_*.json")}
        assert all(str(path) in sentences[0] for path in dumps)
        assert len(dumps) == (1 if what == "loss" else 2)  # a gradient is the sum over the ranks
        assert any(pair_id in dump["pair_ids"] for dump in dumps.values())
        assert [dump["weights_not_finite"] for dump in dumps.values()] == [[]] * len(dumps)


@pytest.mark.slow
def test_a_rank_without_any_picture_was_among_the_steps(world):
    from internvl_mpo.steps import plan_steps

    rows = list(iter_pairs(world / "pairs.jsonl"))
    keys = [row.key for row in rows]
    steps = plan_steps(keys, [1] * len(rows), pairs_per_step=4, pairs_per_group=2, seed=42, epoch=0)
    with_picture = [[bool(rows[group[0]].pair.images) for group in step] for step in steps]
    assert [True, False] in [sorted(step, reverse=True) for step in with_picture]  # two groups, two ranks


@pytest.mark.slow
def test_ranks_may_change_without_deepspeed_and_not_with_it(world, alone, together, tmp_path, capfd):
    constant = ("--lr_scheduler_type", "constant")
    assert train(world, tmp_path / "whole", *constant) == 0
    # two ranks for two steps, then one process: two launches
    command = [*TORCHRUN, str(ROOT / "train_mpo.py")]
    half = arguments(world, tmp_path / "run", *constant, "--max_steps", "2")
    subprocess.run([*command, *half], env=ENVIRONMENT, capture_output=True, check=True, timeout=300)
    assert train(world, tmp_path / "run", *constant) == 0
    expected, found = losses(tmp_path / "whole"), losses(tmp_path / "run")
    assert [found[step] for step in expected] == pytest.approx(list(expected.values()), rel=1e-5)
    capfd.readouterr()
    # a checkpoint of two ranks under ZeRO-2, now without DeepSpeed
    words = (*ALONE["full"], "--resume", str(together / "zero2" / "checkpoint-2"))
    assert train(world, together / "zero2", *words) == 2
    assert "was made with ZeRO-2, now it is no DeepSpeed" in capfd.readouterr().err


def test_ranks_that_would_make_other_steps_are_refused(tmp_path):
    from internvl_mpo.errors import BadInputError
    from internvl_mpo.training.checkpoint import check_resumable, write_state

    state = {"fingerprint": {}, "engine": "ZeRO-3", "num_ranks": 8, "steps_per_epoch": 10}
    write_state(tmp_path, state)
    check_resumable(tmp_path, {**state, "num_ranks": 4})
    with pytest.raises(BadInputError, match="counts 10 steps an epoch, 4 ranks would make it 9"):
        check_resumable(tmp_path, {**state, "num_ranks": 4, "steps_per_epoch": 9})


def test_a_checkpoint_that_cannot_be_converted_is_left_alone_and_named(tmp_path, monkeypatch):
    from internvl_mpo.errors import BadInputError
    from internvl_mpo.training import reshard
    from internvl_mpo.training.checkpoint import write_state

    write_state(tmp_path, {"num_ranks": 2})
    (tmp_path / "latest").write_text("global_step4")
    (tmp_path / "global_step4").mkdir()

    def fail(command, **options):
        Path(command[-1]).mkdir()
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nOSError: [Errno 28] No space left on device\n")

    monkeypatch.setattr(subprocess, "run", fail)
    args = SimpleNamespace(world_size=1, process_index=0)
    engine = SimpleNamespace(optimizer=SimpleNamespace(optimizer=torch.optim.AdamW([torch.ones(1)])))
    said = r"could not be converted for 1 ranks, OSError: .* No space left on device; go on with 2 ranks"
    with pytest.raises(BadInputError, match=said):
        reshard.load_universal(engine, tmp_path, args, strict=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["global_step4", "latest", "mpo_state.json"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "start several with torchrun"),
        (("--fsdp_config", '{"version": 1}'), "version 1, which torch has given up"),
        (("--fsdp_config", "nowhere.json"), "cannot read fsdp_config 'nowhere.json'"),
        (("--reference_model", "another"), "reference_model does not work with fsdp"),
        (("--reference_pass", "before"), "with fsdp use ahead"),
        (("--reference_sync_steps", "2"), "reference_sync_steps does not work with fsdp"),
        ((*LORA, "--load_in_4bit", "true"), "load_in_4bit does not work with fsdp"),
        (("--deepspeed", "configs/deepspeed/zero2.json"), "leave one of them out"),
    ],
)
def test_what_does_not_go_with_fsdp_is_refused_by_name(world, tmp_path, monkeypatch, capsys, words, reason):
    monkeypatch.chdir(ROOT)
    assert train(world, tmp_path / "run", "--fsdp", "true", *words) == 2
    assert reason in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_fsdp_sums_gradients_in_float32_and_after_every_pack():
    from internvl_mpo.training.fsdp import check_fsdp

    for precision, narrow in (("bf16", torch.bfloat16), ("fp16", torch.float16), (None, None)):
        settings = SimpleNamespace(
            fsdp=True, deepspeed=None, fsdp_plugin_args={"fsdp_version": 2}, reference_pass="ahead", load_in_4bit=False,
            reference_sync_steps=0, reference_model=None, world_size=2, bf16=precision == "bf16",
            fp16=precision == "fp16", accelerator_config=SimpleNamespace(gradient_accumulation_kwargs={"num_steps": 3}),
        )  # fmt: skip
        check_fsdp(settings)
        policy = settings.fsdp_plugin_args.get("mixed_precision_policy")
        found = policy and (policy.param_dtype, policy.reduce_dtype, policy.output_dtype)
        assert found == (narrow and (narrow, torch.float32, None))
        accumulation = settings.accelerator_config.gradient_accumulation_kwargs
        assert accumulation == {"sync_each_batch": True, "num_steps": 3}


@pytest.mark.parametrize("offload", [True, False])
def test_gradients_that_fsdp_keeps_on_the_host_are_summed_by_gloo(monkeypatch, offload):
    from internvl_mpo.training.fsdp import prepare_fsdp

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    args = SimpleNamespace(fsdp_config={"fsdp_cpu_offload": offload}, ddp_backend=None, use_cpu=False)
    prepare_fsdp(args)
    assert args.ddp_backend == ("cuda:nccl,cpu:gloo" if offload else None)
    assert args.fsdp_config == {"cpu_offload": offload, "state_dict_type": "SHARDED_STATE_DICT"}


@pytest.mark.slow
@pytest.mark.parametrize(("way", "kills"), [("one", 2), ("two", 1), ("two_zero2", 1)])
def test_kill_9_and_the_same_command_give_the_same_losses(tmp_path, way, kills):
    rows = torture(way, kills, 16, random.Random(way), tiny_world(tmp_path), tmp_path / way)
    assert [row["same"] for row in rows] == [True] * kills, rows


def test_fsdp_of_accelerate_launch_alone_is_refused(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert train(world, tmp_path / "run") == 2
    assert "give --fsdp true as well" in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_local_rank_that_the_deepspeed_launcher_adds_is_taken(monkeypatch):
    from internvl_mpo.training.distributed import take_local_rank

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert take_local_rank(["--local_rank=3", "--beta", "0.1"]) == ["--beta", "0.1"]
    assert os.environ.pop("LOCAL_RANK") == "3"
    assert take_local_rank(["--beta", "0.1", "--local-rank", "1"]) == ["--beta", "0.1"]
    assert os.environ.pop("LOCAL_RANK") == "1"


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"])
def test_the_deepspeed_file_of_accelerate_launch_counts_or_is_refused(monkeypatch, name):
    from internvl_mpo.errors import BadInputError
    from internvl_mpo.training.distributed import take_launchers_deepspeed

    monkeypatch.chdir(ROOT)
    text = (ROOT / "configs/accelerate" / f"{name}.yaml").read_text()
    file = yaml.safe_load(text)["deepspeed_config"]["deepspeed_config_file"]
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", file)
    assert "--deepspeed none" in text or "zero1" in text  # the command in its header; the recipe itself says ZeRO-1
    other = f"configs/deepspeed/{'zero3' if name == 'zero1' else 'zero1'}.json"
    with pytest.raises(BadInputError, match=f"{file}, and setting 'deepspeed' is {other}; give --deepspeed none"):
        take_launchers_deepspeed(SimpleNamespace(deepspeed=other))
    for given in (None, file):
        settings = SimpleNamespace(deepspeed=given)
        take_launchers_deepspeed(settings)
        assert settings.deepspeed == file


def test_deepspeed_without_a_file_from_accelerate_launch_is_refused(monkeypatch):
    from internvl_mpo.errors import BadInputError
    from internvl_mpo.training.distributed import take_launchers_deepspeed

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    with pytest.raises(BadInputError, match="give it a deepspeed_config_file"):
        take_launchers_deepspeed(SimpleNamespace(deepspeed="configs/deepspeed/zero1.json"))


def test_a_stage_that_the_run_file_contradicts_stops_the_program(world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", "configs/deepspeed/zero2.json")
    assert train(world, tmp_path / "run", "--deepspeed", "configs/deepspeed/zero1.json") == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "configs/deepspeed/zero2.json" in message
    assert "configs/deepspeed/zero1.json" in message


@pytest.mark.slow
def test_accelerate_launch_trains_with_its_own_stage(world, alone, tmp_path):
    """The run file says ZeRO-1, `--deepspeed none` drops it, and the launcher's ZeRO-3 trains to the end."""
    config = json.loads((ROOT / "configs/deepspeed/zero3.json").read_text())
    config["zero_force_ds_cpu_optimizer"] = False
    (tmp_path / "zero3.json").write_text(json.dumps(config))
    (tmp_path / "run.yaml").write_text("deepspeed: configs/deepspeed/zero1.json\n")
    launcher = yaml.safe_load((ROOT / "configs/accelerate/zero3.yaml").read_text())
    launcher["deepspeed_config"]["deepspeed_config_file"] = str(tmp_path / "zero3.json")
    (tmp_path / "launcher.yaml").write_text(yaml.safe_dump({**launcher, "num_processes": 2}))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "launcher.yaml"),
               "--main_process_port", "0", str(ROOT / "train_mpo.py"), "--config", str(tmp_path / "run.yaml"),
               "--deepspeed", "none", *arguments(world, tmp_path / "run", *ALONE["full"])]  # fmt: skip
    result = subprocess.run(
        command, env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "ZeRO-3, 2 devices" in result.stdout
    assert json.loads((tmp_path / "run/checkpoint-4/mpo_state.json").read_text())["engine"] == "ZeRO-3"
    expected, found = losses(alone / "full"), losses(tmp_path / "run")
    assert [found[step] for step in expected] == pytest.approx(list(expected.values()), rel=1e-5)


def test_a_lock_that_a_killed_compiler_left_does_not_stop_the_next_run(tmp_path, monkeypatch):
    from internvl_mpo.training.distributed import release_stale_locks

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    for name in ("stale", "held"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
    with open(tmp_path / "held" / "lock"):
        assert release_stale_locks() == [tmp_path / "stale" / "lock"]
    assert (tmp_path / "held" / "lock").exists()
