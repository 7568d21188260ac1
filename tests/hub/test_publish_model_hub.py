"""A model goes to the Hub and comes back working, in all variants; a folder that fails its own check stays here."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from loopback import LoopbackHub
from PIL import Image
from published import make_adapter, make_evaluation, make_run, run_as_stranger
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny import tiny_model, tiny_processor
from tiny_world import WIDE_ENOUGH_FOR_4_BITS

import internvl_mpo.publish.model as publishing
from internvl_mpo.engines.revision import model_revision
from internvl_mpo.errors import BadInputError
from internvl_mpo.publish import write_model_folder
from internvl_mpo.publish.__main__ import main
from internvl_mpo.publish.proof import compare
from modeling_internvl_mpo import InternVLChatModel

NAME = "digits/InternVL2-tiny-MPO"
UNPROVED = ("--skip_proof",)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as the training program leaves it."""
    model = tiny_model("qwen2", **WIDE_ENOUGH_FOR_4_BITS)
    folder = write_model_folder(model, tiny_processor(model.config), tmp_path_factory.mktemp("run") / "model")
    (folder / "training_settings.yaml").write_text("output_dir: /home/zebediah/runs\n")
    return folder


def build(source: Path, output: Path, *options: str) -> Path:
    assert main(["model", str(source), "--output", str(output), *options]) == 0
    return output


def python_blocks(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


@pytest.mark.slow
def test_what_the_card_says_works_for_a_stranger(
    hub: LoopbackHub, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, evaluation = make_run(tmp_path / "run"), make_evaluation(tmp_path / "eval", model_revision(str(trained)))
    options = ["--run", str(run), "--evaluation", str(evaluation), "--base_model", "OpenGVLab/InternVL2-1B"]
    options += ["--license", "mit", "--max-shard-size", "100KB", "--push", NAME]
    folder = build(trained, tmp_path / "built", *options)
    files = hub.repository("models", NAME).paths()
    assert {"README.md", "config.json", "training_curves.png", ".eval_results/m3cot.yaml", "tokenizer.json"} <= files
    assert len([name for name in files if name.endswith(".safetensors")]) > 1

    first, four_bit = python_blocks((folder / "README.md").read_text())
    Image.new("RGB", (60, 30), "red").save(tmp_path / "picture.png")
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    shutil.copy(tmp_path / "picture.png", stranger)
    code = first + "\nimport json\nprint(json.dumps(model(input_ids=inputs['input_ids'], "
    code += "pixel_values=inputs['pixel_values']).logits[0, -1, :5].tolist()))\n"
    code += "print(json.dumps(inputs['input_ids'][0].tolist()))\n"
    code += four_bit + "\nprint(type(model.language_model.model.layers[0].mlp.up_proj).__name__)"
    code += "\nprint(type(model.mlp1[1]).__name__, len(model.generate(**inputs, max_new_tokens=3)))"
    done = run_as_stranger(hub, code, stranger)
    assert done.returncode == 0, done.stderr[-2000:]
    *_, logits, ids, quantized, kept = done.stdout.strip().splitlines()
    assert quantized == "Linear4bit"
    assert kept == "Linear 1"
    processor = tiny_processor()
    picture = processor.image_processor(Image.open(tmp_path / "picture.png"), return_tensors="pt")["pixel_values"]
    expected = InternVLChatModel.from_pretrained(trained)(torch.tensor([json.loads(ids)]), picture).logits[0, -1, :5]
    torch.testing.assert_close(torch.tensor(json.loads(logits)), expected, atol=1e-5, rtol=0)

    monkeypatch.setattr(publishing, "prove_model", lambda *_, **__: "proved above")
    assert main(["model", str(trained), "--output", str(tmp_path / "built"), *options]) == 0
    assert len(hub.repository("models", NAME).refs["main"]) == 2  # built again, byte for byte the same


@pytest.mark.slow
def test_an_adapter_alone_and_merged(hub: LoopbackHub, trained: Path, tmp_path: Path) -> None:
    adapter = make_adapter(trained, tmp_path / "adapter")
    assert str(trained) in (adapter / "adapter_config.json").read_text()
    main(["model", str(trained), "--output", str(tmp_path / "base"), "--push", "digits/base"])
    alone = build(adapter, tmp_path / "alone", "--base_model", "digits/base", "--push", "digits/adapter")
    names = {path.name for path in alone.iterdir()}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "modeling_internvl_mpo.py"} <= names
    assert "config.json" not in names  # transformers would take the folder for a model
    merged = build(adapter, tmp_path / "merged", "--variant", "merged", "--base_model", "digits/base")
    assert (merged / "model.safetensors").exists()
    assert ModelCard.load(merged / "README.md").data.base_model_relation == "finetune"
    assert ModelCard.load(alone / "README.md").data.to_dict()["base_model_relation"] == "adapter"

    (block,) = python_blocks((alone / "README.md").read_text())
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    Image.new("RGB", (60, 30), "red").save(stranger / "picture.png")
    code = (
        block
        + """
import torch
ids = torch.arange(5).unsqueeze(0)
print(model(input_ids=ids).logits[0, -1, :5].tolist())
from transformers import AutoModel
again = AutoModel.from_pretrained("digits/adapter", trust_remote_code=True)  # base and adapter in one call
print(again(input_ids=ids).logits[0, -1, :5].tolist())
"""
    )
    done = run_as_stranger(hub, code, stranger)
    assert done.returncode == 0, done.stderr[-2000:]
    ids = torch.arange(5).unsqueeze(0)
    expected = InternVLChatModel.from_pretrained(merged)(ids).logits[0, -1, :5]
    for line in done.stdout.strip().splitlines()[-2:]:
        torch.testing.assert_close(torch.tensor(json.loads(line)), expected, atol=1e-4, rtol=0)
    assert not torch.allclose(expected, InternVLChatModel.from_pretrained(trained)(ids).logits[0, -1, :5])


@pytest.mark.slow
def test_a_folder_that_fails_its_own_check_is_not_pushed(
    hub: LoopbackHub, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = publishing.build_model_folder

    def needs_the_repository(source: Path, folder: Path, **options) -> Path:
        code = original(source, folder, **options) / "modeling_internvl_mpo.py"
        code.write_text("from internvl_mpo.errors import BadInputError\n" + code.read_text())
        return folder

    monkeypatch.setattr(publishing, "build_model_folder", needs_the_repository)
    with pytest.raises(BadInputError, match="does not load in a clean process") as caught:
        main(["model", str(trained), "--output", str(tmp_path / "built"), "--push", NAME])
    assert "internvl_mpo is not part of the published folder" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "built").exists()
    assert not hub.repositories


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.tensor([[1, 3]])}, "reads a prompt differently"),
        ({"logits": torch.full((1, 2, 3), 4.01)}, "computes logits that differ"),
        ({"logits": torch.full((1, 2, 3), float("nan"))}, "computes logits that differ"),
        ({"generated": torch.tensor([])}, "generates nothing"),
    ],
)
def test_what_the_clean_process_says_must_be_what_the_source_says(change: dict, message: str) -> None:
    same = {"input_ids": torch.tensor([[1, 2]]), "logits": torch.full((1, 2, 3), 4.0), "generated": torch.tensor([5])}
    assert "logits within 0.0e+00" in compare(same, same, Path("built"), Path("source"))
    with pytest.raises(BadInputError, match=message):
        compare({**same, **change}, same, Path("built"), Path("source"))


def test_card_tells_training_scores_and_limits(trained: Path, tmp_path: Path) -> None:
    run, evaluation = make_run(tmp_path / "run"), make_evaluation(tmp_path / "eval", model_revision(str(trained)))
    options = ["--run", str(run), "--evaluation", str(evaluation), "--datasets", "OpenGVLab/MMPR"]
    folder = build(trained, tmp_path / "built", *options, "--base_model", "OpenGVLab/InternVL2-1B", *UNPROVED)
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "image-text-to-text"
    assert card.data.base_model == "OpenGVLab/InternVL2-1B"
    assert card.data.datasets == ["OpenGVLab/MMPR"]
    scores = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert scores["Mini world accuracy (cot)"] == 71.5
    assert "| Mini world | direct | accuracy | 46.0 (40.0 to 52.0) | 300 | ours | none |" in card.content
    assert "M3CoT is in-domain" in card.content
    assert "![Curves of the training run](training_curves.png)" in card.content
    assert "(in 80.0 % of the held-out pairs)" in card.content
    told = yaml.safe_load((folder / "training_settings.yaml").read_text())
    assert told["learning_rate"] == 5e-6
    assert "quality_weight" not in told  # the term is not there
    assert Image.open(folder / "training_curves.png").size[0] > 1000
    entries = yaml.safe_load((folder / ".eval_results/m3cot.yaml").read_text())
    assert entries[0]["value"] == 79.2


def test_scores_of_another_model_are_refused(trained: Path, tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path / "eval", "0123456789abcdef")
    with pytest.raises(BadInputError, match=r"holds scores of .* evaluate this model"):
        build(trained, tmp_path / "built", "--evaluation", str(evaluation), *UNPROVED)
    served = make_evaluation(tmp_path / "served", None)
    build(trained, tmp_path / "built", "--evaluation", str(served), *UNPROVED)


def test_somebody_elses_card_is_kept_and_its_licence_inherited(trained: Path, tmp_path: Path) -> None:
    source = tmp_path / "official"
    shutil.copytree(trained, source)
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en, zh]\n---\n# Theirs\n")
    (source / "LICENSE").write_text("Apache\n")
    folder = build(source, tmp_path / "built", *UNPROVED)
    assert (folder / "ORIGINAL_README.md").read_text().endswith("# Theirs\n")
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.to_dict()["language"]) == ("apache-2.0", ["en", "zh"])
    assert (folder / "LICENSE").exists()


def test_weights_are_cut_and_cast(trained: Path, tmp_path: Path) -> None:
    folder = build(trained, tmp_path / "built", "--max_shard_size", "50KB", "--dtype", "bfloat16", *UNPROVED)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 60_000 for path in shards)
    loaded, original = InternVLChatModel.from_pretrained(folder, dtype="auto"), load_file(trained / "model.safetensors")
    assert loaded.dtype is torch.bfloat16
    state = loaded.state_dict()
    assert state.keys() == original.keys()
    assert all(torch.equal(state[name], tensor.bfloat16()) for name, tensor in original.items())
    with pytest.raises(BadInputError, match="max_shard_size is 'big'"):
        build(trained, tmp_path / "built", "--max_shard_size", "big")


def test_dry_run_lists_and_sends_nothing(
    hub: LoopbackHub, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    build(trained, tmp_path / "built", "--push", NAME, "--dry-run", *UNPROVED)
    out = capsys.readouterr().out
    assert f"{NAME} does not exist yet" in out
    assert re.search(r"new +[\d.]+ kB  model.safetensors", out)
    assert {method for method, *_ in hub.requests} == {"GET"}
    assert not hub.repositories


@pytest.mark.slow
def test_no_private_word_leaves_this_computer(trained: Path, tmp_path: Path) -> None:
    """Built by a user with a telling name, in a folder with a telling path."""
    run, evaluation = make_run(tmp_path / "zebediah/run"), make_evaluation(tmp_path / "zebediah/eval", None)
    source = tmp_path / "zebediah/model"
    shutil.copytree(trained, source)
    adapter = make_adapter(source, tmp_path / "zebediah/adapter")
    environment = {"USER": "zebediah", "LOGNAME": "zebediah", "HF_TOKEN": "hf_verysecretverysecret", "PATH": "/usr/bin"}
    full = [source, "--output", tmp_path / "built", "--run", run, "--evaluation", evaluation, *UNPROVED]
    alone = [adapter, "--output", tmp_path / "alone", "--base_model", "ada/base", "--run", run, *UNPROVED]
    code = "import json, sys; from internvl_mpo.publish.__main__ import main\n"
    code += "print([main(words) for words in json.loads(sys.argv[1])])"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([["model", *map(str, words)] for words in (full, alone)])],
        env={**environment, "HOME": str(tmp_path / "zebediah")},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.stdout.endswith("[0, 0]\n"), done.stderr[-2000:]
    assert "verysecret" not in done.stdout + done.stderr
    for path in (*(tmp_path / "built").rglob("*"), *(tmp_path / "alone").rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            for word in (b"zebediah", b"hf_", str(tmp_path).encode(), b"/home/"):
                assert word not in content or path.suffix == ".py", (path, word)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("notes.md", "token hf_abcdefghijklmnopqrstuvwx", "looks like a secret key"),
        ("notes.txt", "see /mnt/petrelfs/share_data/x", "absolute path '/mnt/petrelfs'"),
        ("config2.json", '{"key": "AKIAABCDEFGHIJKLMNOP"}', "looks like a secret key"),
        ("readme.md", r"in C:\Users\zeb", "absolute path"),
    ],
)
def test_private_content_is_found(tmp_path: Path, name: str, content: str, message: str) -> None:
    from internvl_mpo.publish.hygiene import check_nothing_private

    (tmp_path / "fine.md").write_text("https://huggingface.co/data/home and ../data/home and and/or/data/x\n")
    check_nothing_private(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(BadInputError, match=message) as caught:
        check_nothing_private(tmp_path)
    assert "abcdefghijklm" not in str(caught.value)


def test_what_lies_at_the_output_is_not_lost(trained: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("years of work")
    with pytest.raises(BadInputError, match="holds other things"):
        build(trained, taken, *UNPROVED)
    assert (taken / "thesis.tex").exists()
    another = tmp_path / "another model"
    shutil.copytree(trained, another)
    with pytest.raises(BadInputError, match="holds other things"):
        build(trained, another, *UNPROVED)
    with pytest.raises(BadInputError, match="lies around it"):
        build(trained, trained.parent, *UNPROVED)
    output = build(trained, tmp_path / "built", *UNPROVED)
    (output / "notes.md").write_text("added by hand")
    with pytest.raises(BadInputError, match=r"holds other things than were built there \(notes.md\)"):
        build(trained, output, *UNPROVED)
    (output / "notes.md").unlink()
    build(trained, output, *UNPROVED)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("Os { code: 28 }")])
def test_a_full_disk_leaves_what_was_there(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    output = build(trained, tmp_path / "built", *UNPROVED)

    def full(*_, **__) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(publishing, "write_card", full)
        with pytest.raises(BadInputError, match=r"No space left on device|the disk is full"):
            build(trained, output, *UNPROVED)
    assert (output / "README.md").exists()
    build(trained, output, *UNPROVED)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--push", NAME, *UNPROVED], "a model that was not proved is not pushed"),
        (["--private"], "--private needs a repository"),
        (["--push", NAME, "--create-pr", "--revision", "v1"], "a pull request goes to the main branch"),
        (["--base_model", "outputs/mini/start"], "is no Hub id"),
        (["--variant", "merged"], "leave --variant out"),
        (["--run", "nowhere"], "cannot read config file nowhere"),
        (["--evaluation", "nowhere"], "nowhere holds no scores.json"),
    ],
)
def test_impossible_requests_are_refused(trained: Path, tmp_path: Path, options: list[str], message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        build(trained, tmp_path / "built", *options)
    assert not (tmp_path / "built").exists()


def test_adapters_need_to_know_their_base(trained: Path, tmp_path: Path) -> None:
    adapter = make_adapter(trained, tmp_path / "adapter")
    with pytest.raises(BadInputError, match="give --base_model"):
        build(adapter, tmp_path / "built")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "gone/base"}))
    with pytest.raises(BadInputError, match="give its folder with --base"):
        build(adapter, tmp_path / "built", "--base_model", "gone/base")
