"""The memory estimate against the same pass with real numbers, and against what the process really takes.

pytest tests/test_memory_estimate.py
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tiny import tiny_config, tiny_model

from internvl_mpo import memory_estimate as module
from internvl_mpo.errors import run_program
from internvl_mpo.families.shapes import SHAPES, read_shape
from internvl_mpo.logps import attach_scoring
from internvl_mpo.memory_estimate import _ways_out, advise, estimate_memory, setup_of_run
from internvl_mpo.training.fake_pass import Setup, fake_pack, peak_of_a_pass
from internvl_mpo.training.policy import add_adapters
from modeling_internvl_mpo import InternVLChatModel

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "dtype": "float32",
    "attention": "segments",
    "max_tokens_per_pack": 1000,
    "gradient_checkpointing": False,
    "num_tiles": 3,
}
WIDE = {"hidden_size": 128, "num_hidden_layers": 3, "intermediate_size": 256}


@pytest.mark.parametrize("backbone", ["internlm2", "llama", "phi3", "qwen2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_fake_tensors_take_what_real_ones_take(backbone, checkpointing):
    config = tiny_config(backbone, llm_config=WIDE)
    setup = Setup(**{**SMALL, "gradient_checkpointing": checkpointing})
    expected = estimate_memory(config, setup)
    model = tiny_model(backbone, llm_config=WIDE)
    attach_scoring(model, attention="segments")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert sum(p.numel() for p in model.parameters()) == expected.num_weights == expected.num_trained
    real = peak_of_a_pass(model.train(), fake_pack(config, setup), setup)
    assert real == pytest.approx(expected.activations, rel=0.05)


@pytest.mark.slow
def test_checkpointing_adapters_and_frozen_parts_take_less():
    config = tiny_config("llama", llm_config={**WIDE, "num_hidden_layers": 8})
    plain = estimate_memory(config, Setup(**SMALL))
    both = estimate_memory(config, Setup(**{**SMALL, "gradient_checkpointing": True}))
    language = estimate_memory(config, Setup(**SMALL, checkpoint_language=True))
    assert both.activations <= language.activations < plain.activations
    assert both.activations < plain.activations / 2
    frozen = estimate_memory(config, Setup(**SMALL, freeze_language_layers=8))
    assert frozen.num_trained < plain.num_trained / 2
    assert frozen.gradients == 4 * frozen.num_trained
    adapters = estimate_memory(config, Setup(**SMALL, lora_rank=2))
    wrapped = add_adapters(tiny_model("llama", llm_config={**WIDE, "num_hidden_layers": 8}), rank=2, base="none")
    assert adapters.num_trained == sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert adapters.optimizer == 8 * adapters.num_trained


@pytest.mark.parametrize(
    ("setup", "weights", "gradients", "optimizer"),
    [
        # bytes a weight: bfloat16 is 2, Adam under DeepSpeed 12 (float32 copy and two states)
        (Setup(), 2, 2, 4),
        (Setup(dtype="float32"), 4, 4, 8),
        (Setup(num_gpus=8), 2, 4, 4),
        (Setup(num_gpus=8, zero=1), 2, 2, 12 / 8),
        (Setup(num_gpus=8, zero=2), 2, 2 / 8, 12 / 8),
        (Setup(num_gpus=8, zero=3), 2 / 8, 2 / 8, 12 / 8),
        (Setup(num_gpus=8, zero=3, offload_optimizer=True, offload_weights=True), 0, 2 / 8, 0),
        (Setup(optim="paged_adamw_8bit"), 2, 2, 2),
        (Setup(optim="sgd"), 2, 2, 0),
        (Setup(reference_sync_steps=4), 4, 2, 4),
    ],
)
def test_every_stage_holds_its_share(setup, weights, gradients, optimizer, monkeypatch):
    monkeypatch.setattr(module, "BUCKET", 0)
    monkeypatch.setattr(module, "LIVE_WEIGHTS", 0)
    config = tiny_config("qwen2")
    found = estimate_memory(config, replace(setup, max_tokens_per_pack=200, num_tiles=1))
    count = found.num_weights
    # ZeRO-3 also holds the largest tensor whole
    gathered = 2 * max(p.numel() for p in tiny_model("qwen2").parameters()) if setup.zero == 3 else 0
    assert found.weights == pytest.approx(weights * count + gathered)
    assert found.gradients == pytest.approx(gradients * count)
    assert found.optimizer == pytest.approx(optimizer * count)
    if setup.offload_optimizer:
        assert found.host == pytest.approx((2 + 12 + 4) / 8 * count)


def test_fsdp_holds_its_share_of_everything_and_whole_what_is_used_now_and_next():
    setup = Setup(fsdp=True, num_gpus=8, dtype="float32", autocast="bfloat16", max_tokens_per_pack=200, num_tiles=1)
    config, model = tiny_config("qwen2"), tiny_model("qwen2")
    found, plain = estimate_memory(config, setup), estimate_memory(config, Setup(max_tokens_per_pack=200, num_tiles=1))
    layers = [*model.vision_model.encoder.layers, *model.language_model.model.layers, model.get_input_embeddings()]
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    count = found.num_weights
    whole = count - sum(sizes) + 2 * max(sizes)  # the head and the projector are kept from forward to backward
    assert found.weights == pytest.approx(2 * whole + 4 * count / 8)
    assert found.gradients == pytest.approx(2 * 2 * max(sizes) + 4 * count / 8)
    assert found.optimizer == pytest.approx(8 * count / 8)
    assert found.activations == plain.activations  # bfloat16, as gathered
    assert found.host == 4 * count  # read whole by each rank
    offloaded = estimate_memory(config, replace(setup, offload_weights=True, offload_optimizer=True))
    assert offloaded.total - offloaded.activations - offloaded.reserve == pytest.approx(2 * whole + 4 * max(sizes))
    kept = estimate_memory(config, replace(setup, keep_gathered=True))
    assert kept.weights == pytest.approx(2 * count + 4 * count / 8)
    many = estimate_memory(config, replace(setup, num_gpus=2, start_copy=True, attention="segments"))
    assert many.weights == pytest.approx(2 * whole + 2 * 4 * count / 2)  # on a CPU the start's share, too


def test_a_run_file_with_fsdp_is_understood(tmp_path):
    (tmp_path / "fsdp.json").write_text(json.dumps({"fsdp_cpu_offload": True, "reshard_after_forward": "false"}))
    run = {"bf16": True, "fsdp": True, "fsdp_config": str(tmp_path / "fsdp.json"), "lora_rank": 4}
    setup = Setup(**setup_of_run(run))
    assert (setup.fsdp, setup.autocast, setup.dtype, setup.zero) == (True, "bfloat16", "float32", 0)
    assert (setup.offload_weights, setup.offload_optimizer, setup.keep_gathered) == (True, True, True)


def test_the_start_weights_that_the_host_keeps_are_counted_where_a_run_keeps_them():
    config = tiny_config("qwen2")
    small = {"max_tokens_per_pack": 200, "num_tiles": 1}

    def found(run: dict, **changes):
        return estimate_memory(config, Setup(**{**setup_of_run({"dtype": "bfloat16", **run}), **small, **changes}))

    kept = found({})
    assert kept.host == 2 * kept.num_trained
    on_a_cpu = [found(run, attention="segments").total for run in ({}, {"reference_pass": "before"})]
    assert on_a_cpu[0] - on_a_cpu[1] == 2 * kept.num_trained
    for run in ({"reference_pass": "before"}, {"lora_rank": 2}, {"preference": "none", "quality": "none"},
                {"preference": "simpo", "quality": "none"}):  # fmt: skip
        assert found(run).host == 0, run


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("checkpointing", [False])
def test_the_process_takes_what_was_expected(checkpointing):
    """Real training steps in a process of their own; the memory of the idle process is taken off."""
    code = """
import re, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
import torch
from tiny import tiny_config
from dataclasses import replace
from internvl_mpo import memory_estimate as module
from internvl_mpo.logps import attach_scoring
from internvl_mpo.training.fake_pass import fake_pack, peak_of_a_pass
from modeling_internvl_mpo import InternVLChatModel
shape = dict(hidden_size=512, num_hidden_layers=4, intermediate_size=1536, vocab_size=8000)
setup = module.Setup(dtype="float32", attention="segments", max_tokens_per_pack=3000, num_tiles=20)
setup = replace(setup, gradient_checkpointing={checkpointing}, start_copy=False)
warm = torch.nn.Linear(64, 64); warm(torch.ones(2, 64)).sum().backward(); torch.optim.AdamW(warm.parameters()).step()
config = tiny_config("internlm2", llm_config=shape)
if sys.argv[1] == "estimate":
    print(module.estimate_memory(config, setup).total - module.RESERVE["segments"])
    sys.exit()
def peak():  # not ru_maxrss: a child inherits that from the process that started it, which here is a large one
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
idle = peak()
model = InternVLChatModel(config).train()
attach_scoring(model, attention="segments")
if {checkpointing}:
    model.gradient_checkpointing_enable({{"use_reentrant": False}})
optimizer = torch.optim.AdamW(model.parameters(), fused=True)
for step in range(1):
    peak_of_a_pass(model, fake_pack(config, setup), setup)
    optimizer.step()
print(peak() - idle)
""".format(tests=str(ROOT / "tests"), root=str(ROOT), checkpointing=checkpointing)

    def run(what: str) -> float:
        result = subprocess.run([sys.executable, "-c", code, what], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr[-2000:]
        return float(result.stdout.split()[-1])

    expected, found = run("estimate"), run("measure")
    print(f"expected {expected / 2**20:.0f} MiB, found {found / 2**20:.0f} MiB")
    assert 0.8 * found < expected < 1.25 * found


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SHAPES)
def test_every_official_size_is_known_by_size_and_by_name(size):
    assert read_shape(size).to_dict() == read_shape(f"OpenGVLab/InternVL2-{size.upper()}").to_dict()
    assert read_shape(size).num_image_token == 256
    with torch.device("meta"):
        count = sum(p.numel() for p in InternVLChatModel(read_shape(size)).parameters())
    published = {"1b": 0.94, "2b": 2.21, "4b": 4.15, "8b": 8.08, "26b": 25.5, "40b": 40.1, "76b": 76.3}
    assert count / 1e9 == pytest.approx(published[size], rel=0.005)


def test_a_run_file_is_understood(tmp_path):
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": zero}))
    run = {"bf16": True, "dtype": "bfloat16", "deepspeed": str(tmp_path / "zero.json")}
    setup = Setup(**setup_of_run(run))
    assert (setup.zero, setup.offload_optimizer, setup.offload_weights, setup.dtype) == (3, True, True, "bfloat16")
    assert not setup.gradient_checkpointing  # the default of TrainingArguments
    assert Setup(**setup_of_run({"bf16": True})).autocast == "bfloat16"


@pytest.mark.slow
def test_the_advice_is_tried_before_it_is_given():
    config = tiny_config("llama", llm_config=dict(WIDE, num_hidden_layers=8))
    setup = Setup(**{**SMALL, "num_gpus": 8})
    needed = estimate_memory(config, setup).total
    assert advise(config, setup, int(needed) + 1) is None
    sentence = advise(config, setup, int(needed) - 1, longest_pair=1000)
    assert "gradient_checkpointing true it would need" in sentence
    assert "zero" not in sentence
    assert "take a smaller model" in advise(config, setup, 10)


def test_the_advice_for_fsdp_stays_with_fsdp():
    ways = list(_ways_out(Setup(**{**SMALL, "num_gpus": 4, "fsdp": True}), longest_pair=1000))
    assert all(way.fsdp != way.load_in_4bit and not way.zero for _, way in ways)
    assert not any("deepspeed" in words for words, _ in ways)
    assert [words for words, way in ways if way.offload_weights] == [
        'gradient_checkpointing true, fsdp_config {"cpu_offload": true}'
    ]
    assert ways[-1][1].num_gpus == 512


@pytest.mark.parametrize("zero", [0, 2])
def test_the_advice_is_no_combination_that_the_program_refuses(zero):
    setup = Setup(**{**SMALL, "num_gpus": 8, "zero": zero, "reference_sync_steps": 5})
    ways = list(_ways_out(setup, longest_pair=1000))
    assert any(way.zero == 3 for _, way in ways)
    for words, way in ways:
        assert ("reference_sync_steps 0" in words) == (way.reference_sync_steps == 0)
        assert not (way.zero == 3 and (way.reference_sync_steps or way.load_in_4bit))
        assert ("load_in_4bit" in words and zero > 0) == ("deepspeed none" in words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--zero", "1"], "give --model"),
        (["--model", "9b"], "none of 1b, 2b"),
        (["--model", "1b", "--zero", "4"], "zero 4"),
        (["--model", "1b", "--fsdp", "true"], "give --num_gpus 2 or more"),
        (["--model", "1b", "--max_tokens_per_pack", "many"], "expected a whole number"),
        (["--model", "{other}"], "expected one of 'internvl_chat'"),
    ],
)
def test_bad_questions_get_one_sentence(arguments, words, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "blip"}')
    arguments = [word.replace("{other}", str(tmp_path)) for word in arguments]
    assert run_program(module.main, arguments) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_says_whether_it_fits(tmp_path, capsys):
    tiny_config("qwen2").save_pretrained(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"model": str(tmp_path), "max_tokens_per_pack": 500}))
    assert run_program(module.main, ["--run", str(tmp_path / "run.yaml"), "--device_gib", "4"]) == 0
    shown = capsys.readouterr().out
    assert "packs of 500 tokens" in shown
    assert shown.endswith(" of a device's 4.0 GiB\n")
    assert "this fits: " in shown
    assert run_program(module.main, ["--model", str(tmp_path / "config.json"), "--device_gib", "1"]) == 1
    shown = capsys.readouterr().out
    assert "take a smaller model" in shown
    assert "this fits" not in shown
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "internvl_chat"
