"""Models of transformers' own families go to the Hub as their class reads them: no code, nothing else of the source.

pytest tests/hub/test_publish_family.py
"""

import json
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from loopback import WRITER, LoopbackHub
from PIL import Image
from published import make_run, run_as_stranger
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES, tiny_qwen3_vl

from internvl_mpo.errors import BadInputError
from internvl_mpo.families.registry import family_of_source
from internvl_mpo.publish.__main__ import main
from internvl_mpo.publish.clean_load import load_processor

BUILDERS = {**FAMILIES, "qwen3_vl_moe": lambda folder: tiny_qwen3_vl(folder, experts=True)}
IDS = torch.arange(40, 60)[None]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES["qwen2_5_vl"](tmp_path_factory.mktemp("qwen") / "model")


def build(source: Path, output: Path, *options: str) -> Path:
    assert main(["model", str(source), "--output", str(output), *options]) == 0
    return output


def logits(folder: Path) -> torch.Tensor:
    model = family_of_source(str(folder)).load_model(str(folder), dtype="auto").eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


def python_blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_folder_holds_what_its_class_reads_and_nothing_else(name: str, tmp_path: Path) -> None:
    source = BUILDERS[name](tmp_path / "model")
    for stray in ("training_settings.yaml", "optimizer.pt", "notes.txt", "modeling_strange.py"):
        (source / stray).write_text("output_dir: /home/zebediah/runs\n")
    config = json.loads((source / "config.json").read_text())
    strange = {"_name_or_path": "/home/zebediah/start", "auto_map": {"AutoModel": "modeling_strange.Model"}}
    (source / "config.json").write_text(json.dumps({**config, **strange}))
    folder = build(source, tmp_path / "built", "--skip_proof")
    names = {path.name for path in folder.iterdir()}
    assert names <= {path.name for path in source.iterdir()} | {"README.md"}
    assert not [stray for stray in names if stray.endswith((".py", ".yaml", ".pt", ".txt"))]
    assert json.loads((folder / "config.json").read_text()) == config
    assert (folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert torch.equal(logits(folder), logits(source))
    picture = Image.effect_noise((61, 29), 90).convert("RGB")
    strangers, ours = load_processor(str(folder), False), family_of_source(str(source)).load_processor(str(source))
    text = ours.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)
    found, expected = (one(text=[text], images=[[picture]], return_tensors="pt") for one in (strangers, ours))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    card = ModelCard.load(folder / "README.md")
    assert {config["model_type"], "mpo"} == set(card.data.tags)
    assert "trust_remote_code" not in card.content
    assert ("pip install torchvision" in card.content) == (name not in ("llava", "llava_next", "idefics3"))
    assert ("num2words" in card.content) == (name == "smolvlm")


def test_weights_are_cut_and_cast(qwen: Path, tmp_path: Path) -> None:
    folder = build(qwen, tmp_path / "built", "--max_shard_size", "50KB", "--dtype", "bfloat16", "--skip_proof")
    assert len(list(folder.glob("*.safetensors"))) > 2
    config = json.loads((folder / "config.json").read_text())
    assert {config["dtype"], config["text_config"]["dtype"], config["vision_config"]["dtype"]} == {"bfloat16"}
    model = family_of_source(str(folder)).load_model(str(folder), dtype="auto")
    original = family_of_source(str(qwen)).load_model(str(qwen)).state_dict()
    assert {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()} == {torch.bfloat16}
    assert all(torch.equal(tensor, original[key].to(tensor.dtype)) for key, tensor in model.state_dict().items())


def test_weights_that_do_not_fit_are_named(qwen: Path, tmp_path: Path) -> None:
    source = shutil.copytree(qwen, tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.weight"

    def publish(changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, source / "model.safetensors", metadata={"format": "pt"})
        build(source, tmp_path / "built", "--skip_proof")

    with pytest.raises(BadInputError, match=r"down_proj.weight has shape \(7, 7\), config.json asks for \(32, 64\)"):
        publish({**tensors, name: torch.zeros(7, 7)})
    with pytest.raises(BadInputError, match=r"lack .*layers.0.mlp.down_proj.weight, 1 in all"):
        publish({key: value for key, value in tensors.items() if key != name})
    with pytest.raises(BadInputError, match="has a tensor extra that the network"):
        publish({**tensors, "extra": torch.zeros(1)})
    (source / "model.safetensors").write_bytes(b"short")
    with pytest.raises(BadInputError, match="are damaged"):
        build(source, tmp_path / "built", "--skip_proof")
    (source / "tokenizer.json").unlink()
    with pytest.raises(BadInputError, match=str(source)):
        build(source, tmp_path / "built", "--skip_proof")
    assert not (tmp_path / "built").exists()


def test_a_model_of_no_family_is_refused_with_those_there_are(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "blip_2"}')
    with pytest.raises(
        BadInputError, match="model_type 'blip_2', expected one of 'internvl_chat', 'internvl', 'qwen2_vl'"
    ):
        build(tmp_path / "model", tmp_path / "built")


@pytest.mark.slow
def test_what_the_card_says_works_for_a_stranger(hub: LoopbackHub, tmp_path: Path) -> None:
    """A family whose processor needs nothing that is missing here."""
    source = FAMILIES["idefics3"](tmp_path / "model")
    run = make_run(tmp_path / "run")
    build(source, tmp_path / "built", "--run", str(run), "--base_model", "ada/base", "--push", "ada/tiny-mpo")
    assert "model.safetensors" in hub.repository("models", "ada/tiny-mpo").paths()
    card = ModelCard.load(tmp_path / "built" / "README.md")
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert "family `idefics3`, trained with Mixed Preference Optimization" in card.content
    first, _ = python_blocks(card.content)
    (tmp_path / "stranger").mkdir()
    Image.new("RGB", (60, 30), "red").save(tmp_path / "stranger" / "picture.png")
    code = first + f"\nimport torch, json\nids = torch.tensor({IDS.tolist()})\n"
    code += "print(type(model).__name__, json.dumps(model(input_ids=ids).logits[0, -1, :5].tolist()))\n"
    done = run_as_stranger(hub, code, tmp_path / "stranger")
    assert done.returncode == 0, done.stderr[-2000:]
    name, _, found = done.stdout.strip().splitlines()[-1].partition(" ")
    assert name == "Idefics3ForConditionalGeneration"
    torch.testing.assert_close(torch.tensor(json.loads(found)), logits(source)[0, -1, :5], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_an_adapter_alone_and_merged(hub: LoopbackHub, qwen: Path, tmp_path: Path, capsys) -> None:
    from peft import PeftModel

    adapter = make_adapter(qwen, tmp_path / "adapter")
    alone = build(adapter, tmp_path / "alone", "--base_model", "ada/base", "--push", "ada/adapter")
    assert {path.name for path in alone.iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors")
    }
    (block,) = python_blocks((alone / "README.md").read_text())
    assert 'AutoModelForImageTextToText.from_pretrained("ada/base"' in block
    merged = build(adapter, tmp_path / "merged", "--variant", "merged", "--skip_proof")
    assert capsys.readouterr().out.count("loaded in a clean process") == 1
    base = family_of_source(str(qwen)).load_model(str(qwen))
    with torch.no_grad():
        expected = PeftModel.from_pretrained(base, alone).eval()(input_ids=IDS).logits
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=0)
    assert not torch.allclose(logits(qwen), expected, atol=1e-2)


def make_adapter(base: Path, folder: Path) -> Path:
    """LoRA weights on the language model that are not zero, as training saves them."""
    from peft import LoraConfig, get_peft_model

    family = family_of_source(str(base))
    model = family.load_model(str(base))
    targets = family.lora_targets(model, "language model")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.2)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_space_shows_models_of_a_family(hub: LoopbackHub, qwen: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """The app is started from the folder that goes to the Hub, fetches both models there, and is asked a question."""
    monkeypatch.setattr("time.sleep", lambda seconds: threading.Event().wait(seconds))  # the app needs its time
    api = HfApi(endpoint=hub.url, token=WRITER)
    for name in ("ada/tiny-qwen", "ada/tiny-qwen-mpo"):
        api.create_repo(name)
        api.upload_folder(repo_id=name, folder_path=qwen)
    models = ["--base", "ada/tiny-qwen", "--mpo", "ada/tiny-qwen-mpo"]
    options = ["--output", str(tmp_path / "space"), "--environment", "borrowed", "--ask", "--timeout", "600"]
    assert main(["space", *models, *options]) == 0
    assert "both models answered" in capsys.readouterr().out
    card = (tmp_path / "space" / "README.md").read_text()
    assert "# tiny-qwen before and after MPO" in card
    assert (tmp_path / "space" / "internvl_mpo" / "families" / "qwen2_vl.py").is_file()
