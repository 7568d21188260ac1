"""What is trained and what is saved: freezing, LoRA and QLoRA, adapter folders, moving reference, guards.

pytest tests/test_policy.py
"""

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train_mpo import losses, train, world  # noqa: F401 - world is a fixture
from tiny import tiny_model
from tiny_world import WIDE_ENOUGH_FOR_4_BITS, make_model_folder, make_training_pairs

from internvl_mpo.errors import BadInputError
from internvl_mpo.publish.proof import clean_environment
from internvl_mpo.training import policy
from internvl_mpo.training.live_reference import MovingReference
from internvl_mpo.training.policy import (
    add_adapters,
    check_saved_weights,
    freeze,
    load_model,
    trainable_table,
    whole_weights,
)
from modeling_internvl_mpo.modeling_intern_vit import InternVisionEncoderLayer

NO_REPOSITORY = """
import sys
class NoRepository:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_internvl_mpo", "internvl_mpo"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoRepository())
"""
LORA = ("--lora_rank", "2", "--max_steps", "2")


def moved_parts(before, after) -> set[str]:
    assert before.keys() == after.keys()
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["internlm2", "phi3"])
def test_noise_a_checkpoint_was_trained_with_is_not_read_as_a_preference(tmp_path, backbone):
    noisy_vision, noisy_text = {"drop_path_rate": 0.9, "dropout": 0.5}, {"attention_dropout": 0.5, "resid_pdrop": 0.5}
    model = tiny_model(backbone, vision_config=noisy_vision, llm_config=noisy_text)
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), torch.float32).train()
    inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "pixel_values": torch.randn(1, 3, 28, 28)}
    inputs["input_ids"][0, 1] = loaded.config.image_token_id
    assert torch.equal(loaded(**inputs).logits, loaded(**inputs).logits)
    assert not torch.equal(model.train()(**inputs).logits, model(**inputs).logits)


# --- freezing ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_part_can_be_frozen_and_the_table_says_so(world, tmp_path, capsys):
    more = ("--freeze_vision", "true", "--freeze_projector", "true", "--max_steps", "2")
    assert train(world, tmp_path / "run", *more) == 0
    before, after = (load_file(f / "model.safetensors") for f in (world / "start", tmp_path / "run" / "model"))
    assert moved_parts(before, after) == {"language_model"}
    table = {line.split("  ")[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.endswith("%")}
    assert table["vision tower"][-2:] == ["0", "0.00%"]
    assert table["language model"][-1] == "100.00%"
    assert table["all"][1] == f"{sum(weight.numel() for weight in before.values()):,}"


def test_first_language_layers_can_be_frozen():
    model = tiny_model()
    freeze(model, num_language_layers=1)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any((".layers.0." in name and "language" in name) or "embed_tokens" in name for name in trained)
    assert any(name.startswith("language_model.model.layers.1.") for name in trained)
    with pytest.raises(BadInputError, match="freeze_language_layers is 3, but the language model has 2 layers"):
        freeze(model, num_language_layers=3)


def test_nothing_left_to_train_is_refused(world, tmp_path, capsys):
    more = [word for part in ("vision", "projector", "language") for word in (f"--freeze_{part}", "true")]
    assert train(world, tmp_path / "run", *more) == 2
    assert "every part of the model is frozen" in capsys.readouterr().err


# --- LoRA -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("on", "parts"), [("vision", {"vision_model"}), ("both", {"vision_model", "language_model"})])
def test_lora_goes_where_it_is_told(on, parts):
    model = add_adapters(tiny_model(), rank=2, on=on, base="owner/name")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name.split(".")[2] for name in trained} == parts
    assert all(".lora_" in name for name in trained)
    assert not any(".lm_head." in name or ".output." in name for name in trained)


@pytest.mark.parametrize("backbone", ["internlm2", "llama", "phi3", "qwen2"])
def test_merged_weights_answer_like_the_adapters(backbone):
    base = tiny_model(backbone)
    start = {name: weight.clone() for name, weight in base.state_dict().items()}
    ids = torch.randint(5, 200, (1, 9), generator=torch.Generator().manual_seed(0))
    model = add_adapters(base, rank=2, on="both", base="owner/name").eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.3)
        expected = model(input_ids=ids).logits
    weights = whole_weights(model)
    plain = tiny_model(backbone)
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("lm_head" in name or "output" in name for name in missing)  # a tied head is saved once
    torch.testing.assert_close(plain.eval()(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert moved_parts({k: start[k] for k in weights}, weights) == {"vision_model", "language_model"}


@pytest.mark.parametrize("more", [("--lora_rank", "2"), ("--freeze_vision", "true", "--freeze_projector", "true")])
def test_recomputation_runs_a_frozen_tower_once_and_never_backwards(world, tmp_path, monkeypatch, more):
    asks_for_gradient: list[bool] = []
    plain = InternVisionEncoderLayer.forward

    def forward(layer, hidden_states):
        if layer.training:  # the reference is not
            asks_for_gradient.append(hidden_states.requires_grad)
        return plain(layer, hidden_states)

    monkeypatch.setattr(InternVisionEncoderLayer, "forward", forward)
    recompute = ("--max_steps", "1", "--save_strategy", "no", "--gradient_checkpointing", "true")
    assert train(world, tmp_path / "run", *recompute, *more) == 0
    assert asks_for_gradient
    assert not any(asks_for_gradient)


@pytest.mark.slow
def test_recomputation_leaves_the_losses_of_adapters_on_both_towers_as_they_are(world, tmp_path):
    more = ("--lora_rank", "2", "--lora_on", "both", "--lr_scheduler_type", "constant", "--save_strategy", "no")
    assert train(world, tmp_path / "kept", *more) == 0
    assert train(world, tmp_path / "recomputed", *more, "--gradient_checkpointing", "true") == 0
    assert losses(tmp_path / "recomputed") == losses(tmp_path / "kept")


@pytest.mark.slow
def test_a_reference_of_disabled_adapters_gives_the_losses_of_the_cache(world, tmp_path):
    assert train(world, tmp_path / "cache", "--lora_rank", "2", "--lora_on", "both") == 0
    assert train(world, tmp_path / "off", "--lora_rank", "2", "--lora_on", "both", "--reference", "adapter_off") == 0
    expected, found = losses(tmp_path / "cache"), losses(tmp_path / "off")
    assert [found[step] for step in expected] == pytest.approx(list(expected.values()), rel=1e-6)
    assert not (tmp_path / "off" / "reference").exists()


@pytest.mark.slow
def test_a_lora_run_goes_on_to_the_bit(world, tmp_path):
    more = ("--lora_rank", "2", "--lora_on", "both", "--lr_scheduler_type", "constant", "--lora_dropout", "0.1")
    assert train(world, tmp_path / "whole", *more) == 0
    assert train(world, tmp_path / "run", *more, "--max_steps", "2") == 0
    assert train(world, tmp_path / "run", *more) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.slow
def test_an_adapter_folder_loads_through_auto_model_and_peft_and_answers_alike(world, tmp_path):
    more = (*LORA, "--lora_on", "both", "--save_adapter", "true", "--model", "start", "--learning_rate", "0.05")
    command = [sys.executable, f"{__file__.rsplit('/', 2)[0]}/train_mpo.py"]
    settings = ["--data", "pairs.jsonl", "--output_dir", "run", "--pairs_per_step", "4", "--use_cpu", "true", *more]
    done = subprocess.run([*command, *settings], cwd=world, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    adapter = world / "run" / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "start"  # as it was given: no absolute path, no module name
    assert "transformers_modules" not in json.dumps(config)
    assert (adapter / "adapter_model.safetensors").is_file()
    assert (adapter / "processor_config.json").is_file()
    code = (
        "import torch, modeling_internvl_mpo\n"
        "from transformers import AutoModel, AutoProcessor\n"
        "from peft import PeftModel\n"
        "ids = torch.arange(5, 15)[None]\n"
        "load = lambda folder: AutoModel.from_pretrained(folder, trust_remote_code=True).eval()\n"
        "merged, start, auto = load('run/model'), load('start'), load('run/adapter')\n"
        "peft = PeftModel.from_pretrained(load('start'), 'run/adapter').eval()\n"
        "AutoProcessor.from_pretrained('run/adapter', trust_remote_code=True)\n"
        "logits = [model(input_ids=ids).logits for model in (merged, peft, auto, start)]\n"
        "for other in logits[1:3]:\n"
        "    torch.testing.assert_close(logits[0], other, rtol=1e-4, atol=1e-4)\n"
        "assert not torch.allclose(logits[0], logits[3], atol=1e-2)\n"
    )
    root = __file__.rsplit("/", 2)[0]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=world, env={"PYTHONPATH": root, "PATH": ""}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_card_of_an_adapter_loads_it_from_two_folders_in_a_clean_process(world, tmp_path):
    """The base has the official layout and no code of its own; nothing but the two folders is there."""
    assert train(world, tmp_path / "run", *LORA, "--save_adapter", "true", "--learning_rate", "0.05") == 0
    (tmp_path / "there").mkdir()
    (tmp_path / "run" / "adapter").rename(tmp_path / "there" / "adapter")
    base = shutil.copytree(world / "start", tmp_path / "there" / "base", ignore=shutil.ignore_patterns("*.py"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "auto_map"}))
    shutil.copy(world / "1.png", tmp_path / "there" / "picture.png")

    card = (tmp_path / "there" / "adapter" / "README.md").read_text()
    assert "More Information Needed" not in card
    assert "base_model:" not in card, "a folder of this machine is no model of the Hub"
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    code = code.replace(f'"{world / "start"}"', '"base"').replace("max_new_tokens=512", "max_new_tokens=3")
    ids = torch.arange(5, 15)[None]
    code += f"\nimport torch\nprint(model(input_ids=torch.tensor({ids.tolist()})).logits[0, -1, :5].tolist())"
    done = subprocess.run(
        [sys.executable, "-I", "-c", NO_REPOSITORY + code],
        cwd=tmp_path / "there",
        env=clean_environment(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    expected = load_model(str(tmp_path / "run" / "model"), torch.float32)(input_ids=ids).logits[0, -1, :5]
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout.splitlines()[-1])), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--save_adapter", "true"], "save_adapter needs adapters; set lora_rank above 0"),
        (["--load_in_4bit", "true"], "load_in_4bit needs adapters"),
        (["--reference", "adapter_off"], "reference adapter_off needs adapters"),
        ([*LORA, "--save_merged", "false"], "nothing would be saved"),
        ([*LORA, "--reference", "adapter_off", "--reference_sync_steps", "2"], "cannot move"),
        (["--reference_sync_steps", "2", "--preference", "none", "--quality", "none"], "does not use"),
        (["--reference_sync_steps", "2", "--reference_mixup_alpha", "0"], "above 0 up to 1"),
        (["--deepspeed", "absent.json"], "DeepSpeed file 'absent.json' does not exist"),
        (["--resume", "absent"], "checkpoint 'absent' does not exist"),
    ],
)
def test_settings_that_cannot_work_together_are_refused(world, tmp_path, capsys, more, words):
    assert train(world, tmp_path / "run", *more) == 2
    assert words in capsys.readouterr().err


# --- QLoRA ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_qlora_trains_on_a_4_bit_language_model_and_saves_what_it_trained(tmp_path, capsys):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModel

    wide = tmp_path / "world"
    make_model_folder(wide / "start", **WIDE_ENOUGH_FOR_4_BITS)
    make_training_pairs(wide)
    assert train(wide, tmp_path / "run", *LORA, "--load_in_4bit", "true", "--save_adapter", "true") == 0
    assert len(losses(tmp_path / "run")) == 2
    log = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert abs(log["rewards/chosen"]) < 1e-3  # the cached reference is the 4-bit model, not the wide one
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert "quantization_config" not in config
    before = load_file(wide / "start" / "model.safetensors")
    after = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert moved_parts(before, after) == {"language_model"}
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    assert after[name].shape == before[name].shape
    assert 0.005 < ((after[name] - before[name]).norm() / before[name].norm()) < 0.3  # rounding to 4 bits, and LoRA
    AutoModel.from_pretrained(tmp_path / "run" / "model", trust_remote_code=True)


# --- TR-DPO -----------------------------------------------------------------------------------------------------------


def test_a_moving_reference_is_the_mix_written_out_by_hand():
    model = tiny_model()
    model.vision_model.requires_grad_(False)
    reference = MovingReference(model, alpha=0.25)
    assert not reference.weights, "memory is taken when training starts"
    reference.start()
    assert not any(name.startswith("vision") for name in reference.weights), "frozen weights are shared"
    start = copy.deepcopy(model.state_dict())
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    policy = start[name]
    by_hand = start[name].clone()
    for turn in range(2):
        with torch.no_grad():
            model.get_parameter(name).add_(0.1 * (turn + 1))
        policy = model.get_parameter(name).detach().clone()
        reference.move()
        by_hand = 0.25 * policy + 0.75 * by_hand
    torch.testing.assert_close(reference.weights[name], by_hand)
    torch.testing.assert_close(model.get_parameter(name).detach(), policy, rtol=0, atol=0)


@pytest.mark.slow
def test_tr_dpo_scores_with_the_moved_reference_and_goes_on_to_the_bit(world, tmp_path):
    more = ("--reference_sync_steps", "2", "--reference_mixup_alpha", "1", "--lr_scheduler_type", "constant")
    assert train(world, tmp_path / "whole", *more, "--max_steps", "6") == 0
    rows = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    rewards = {row["step"]: row["rewards/chosen"] for row in rows if "rewards/chosen" in row}
    assert abs(rewards[2]) > 1e-2
    for step in (3, 5):  # the policy was copied just before: the two models are one again
        assert abs(rewards[step]) < 1e-4
    assert train(world, tmp_path / "run", *more, "--max_steps", "3", "--save_steps", "3") == 0
    assert train(world, tmp_path / "run", *more, "--max_steps", "6") == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


# --- variants ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("preference", ["dpo", "ipo", "cdpo", "robust_dpo", "rso", "sppo", "aot", "orpo", "none"])
def test_every_preference_trains_two_steps_with_and_without_the_other_terms(world, tmp_path, preference, capsys):
    smoothing = ("--label_smoothing", "0.1") if preference in ("cdpo", "robust_dpo") else ()
    cache = ("--reference_cache", str(world / "variants"), "--max_steps", "2", "--preference", preference, *smoothing)
    generation = "sft" if preference == "none" else "none"
    for number, more in enumerate([(), ("--quality", "none", "--generation", generation)]):
        output = tmp_path / f"run{number}"
        assert train(world, output, *cache, *more) == 0
        assert all(loss == loss for loss in losses(output).values())
        before, after = (load_file(f / "model.safetensors") for f in (world / "start", output / "model"))
        assert moved_parts(before, after) == {"vision_model", "mlp1", "language_model"}


def test_aot_says_that_it_sorts_within_a_pack(world, tmp_path, capsys):
    more = ("--preference", "aot", "--max_tokens_per_pack", "650", "--max_steps", "1")
    assert train(world, tmp_path / "run", *more) == 0
    assert "aot compares the pairs of one pack" in capsys.readouterr().out


# --- what a checkpoint belongs to -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--model", "other"], "another start model"),
        (["--model", "template"], "another chat template"),
        (["--beta", "0.2"], "another beta (0.1, now 0.2)"),
        (["--reward_shift", "ema"], "another reward_shift"),
        (["--preference", "rso"], "another preference (dpo, now rso)"),
        (["--max_tiles", "3"], "another max_tiles"),
        (["--seed", "7"], "another seed"),
        (["--freeze_vision", "true"], "another freeze_vision"),
        # the states of optimizer and schedule bring the old values back, so that a new one would be without effect
        (["--learning_rate", "1e-4"], "another learning_rate (0.001, now 0.0001)"),
        (["--weight_decay", "0.1"], "another weight_decay"),
        (["--lr_scheduler_type", "constant"], "another lr_scheduler_type (cosine, now constant)"),
        (["--optim", "adamw_torch"], "another optim (adamw_torch_fused, now adamw_torch)"),
        (["--adam_beta2", "0.95"], "another adam_beta2"),
        (["--max_grad_norm", "2"], "another max_grad_norm"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused_by_name(world, tmp_path_factory, capsys, more, words):
    output = world / "refused"
    if not output.exists():
        assert train(world, output, "--max_steps", "2") == 0
    if more[0] == "--model":
        from tiny_world import make_model_folder

        folder = make_model_folder(world / more[1])
        if more[1] == "other":
            weights = load_file(folder / "model.safetensors")
            save_file({k: v + 1e-3 for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
        else:
            (folder / "chat_template.jinja").write_text((folder / "chat_template.jinja").read_text() + "\n{# x #}")
        more = ["--model", str(folder)]
    assert train(world, output, *more) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
def test_starting_anew_over_checkpoints_is_refused_and_a_named_one_is_taken(world, tmp_path, capsys):
    output = tmp_path / "run"
    assert train(world, output, "--save_total_limit", "5", "--save_steps", "1") == 0
    expected = losses(output)
    assert train(world, output, "--resume", "never") == 2
    assert "holds checkpoint-4 of an earlier run" in capsys.readouterr().err
    assert train(world, output, "--resume", str(output / "checkpoint-2"), "--save_steps", "1") == 0
    assert "going on from" in capsys.readouterr().out
    assert losses(output) == expected
    assert sorted(f.name for f in output.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]  # the limit is 2


# --- guards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda w: w.zero_(), "w is all zero"),
        (lambda w: w.fill_(float("nan")), "w is not finite"),
        (lambda w: w.resize_(0), "w has shape"),
        (lambda w: None, "was written without v"),
    ],
)
def test_a_folder_of_useless_weights_is_refused(tmp_path, spoil, words):
    weights = {"w": torch.ones(2, 3), "v": torch.ones(2)}
    written = {"w": torch.ones(2, 3)}
    spoil(written["w"])
    save_file(written, tmp_path / "model.safetensors")
    with pytest.raises(BadInputError, match=words):
        check_saved_weights(tmp_path, weights)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="mapped memory is read from Linux's /proc")
def test_the_check_of_what_was_saved_does_not_map_the_whole_file(tmp_path, monkeypatch):
    weights = {f"w{number}": torch.ones(2**20) for number in range(16)}  # 4 MiB each
    save_file(weights, tmp_path / "model.safetensors")
    mapped: list[int] = []

    def largest(tensor):
        found = plain(tensor)
        mapped.append(int(re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]))
        return found

    plain = policy._largest
    monkeypatch.setattr(policy, "_largest", largest)
    check_saved_weights(tmp_path, weights)
    assert max(mapped) - mapped[0] < 16 * 1024


def test_the_table_counts_what_is_trained():
    model = tiny_model()
    freeze(model, language=True)
    last = trainable_table(model).splitlines()[-1].split()
    language = sum(p.numel() for p in model.language_model.parameters())
    everything = sum(p.numel() for p in model.parameters())
    assert last[1:3] == [f"{everything:,}", f"{everything - language:,}"]
