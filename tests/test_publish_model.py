"""The folder is the product: built, checked, loaded in a process that knows nothing of this repository."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import tiny_model, tiny_processor
from tiny_world import make_model_folder
from transformers import GenerationConfig, InternVLForConditionalGeneration

from internvl_mpo.convert import Shapes, convert, to_official
from internvl_mpo.convert import main as convert_main
from internvl_mpo.errors import BadInputError
from internvl_mpo.publish import AUTO_MAP, build_model_folder, write_adapter_card, write_model_folder
from internvl_mpo.publish.__main__ import main
from modeling_internvl_mpo import InternVLChatConfig, InternVLChatModel
from modeling_internvl_mpo.configuration_internvl_mpo import STALE_KEYS

ORACLE = Path(__file__).parent.parent / "../shared/oracle/model"


@pytest.fixture
def official(tmp_path: Path) -> Callable[..., Path]:
    """A folder as the vendor publishes it: config, weights, tokenizer; no processor, foreign auto_map."""

    def make(backbone: str = "qwen2") -> Path:
        folder = tmp_path / f"official-{backbone}"
        model = tiny_model(backbone)
        model.save_pretrained(folder)
        tiny_processor(model.config).tokenizer.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        config.pop("image_token_id")
        config["auto_map"] = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}
        config["llm_config"] |= {"max_length": 20, "attn_implementation": "flash_attention_2"}
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


# One process looks at all folders, since starting costs more than looking; what it finds is left beside each of them.
CLEAN_PROCESS = """
import sys
import traceback
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers import pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor

class NoRepository:
    # An editable install would otherwise lend the process our package.
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_internvl_mpo", "internvl_mpo"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoRepository())
trust = {"trust_remote_code": True}

def look(folder, picture, expected):
    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModel):
        model = auto_class.from_pretrained(folder, **trust)
    processor = AutoProcessor.from_pretrained(folder, **trust)
    assert AutoImageProcessor.from_pretrained(folder, **trust).size["height"] == 28
    assert len(AutoTokenizer.from_pretrained(folder, **trust)) == len(processor.tokenizer)
    content = [{"type": "image", "path": picture}, {"type": "text", "text": "What?"}]
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(model(**inputs).logits, torch.load(expected)), "logits"
    pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    (answer,) = pipe(text=messages, max_new_tokens=4, do_sample=False, return_full_text=False)
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1]:]
    assert answer["generated_text"] == processor.decode(ids, skip_special_tokens=True), "pipeline"
    try:
        pipe(picture, text="What?")
        raise AssertionError("a picture was dropped")
    except ValueError as error:
        assert "write <image> where each image goes, or give chat messages" in str(error), error
    model.save_pretrained(folder + "-again")
    processor.save_pretrained(folder + "-again")
    again = AutoModel.from_pretrained(folder + "-again", **trust)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits), "saved again"
    AutoProcessor.from_pretrained(folder + "-again", **trust)

for case in map(Path, sys.argv[1:]):
    try:
        look(str(case / "folder"), str(case / "a.png"), str(case / "logits.pt"))
        found = "fine"
    except Exception:
        found = traceback.format_exc()
    (case / "found.txt").write_text(found)
"""
BACKBONES = ("internlm2", "llama", "phi3", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def clean_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a process without this repository finds in the folder of each backbone: "fine", or a traceback."""
    root = tmp_path_factory.mktemp("clean")
    for backbone in BACKBONES:
        model = tiny_model(backbone)
        processor = tiny_processor(model.config)
        write_model_folder(model, processor, root / backbone / "folder")
        Image.new("RGB", (90, 30), "red").save(root / backbone / "a.png")
        content = [{"type": "image", "path": str(root / backbone / "a.png")}, {"type": "text", "text": "What?"}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        torch.save(model(**inputs).logits.detach(), root / backbone / "logits.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    result = subprocess.run(
        [sys.executable, "-P", "-c", CLEAN_PROCESS, *(str(root / backbone) for backbone in BACKBONES)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return {backbone: (root / backbone / "found.txt").read_text() for backbone in BACKBONES}


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
def test_folder_works_in_a_clean_process(backbone: str, clean_process: dict[str, str]) -> None:
    assert clean_process[backbone] == "fine"


def test_serving_engines_find_what_they_read(tmp_path: Path) -> None:
    """Keys, types and tensor names that vLLM, SGLang and LMDeploy read from an InternVL folder."""
    model = tiny_model("internlm2")
    folder = write_model_folder(model, tiny_processor(model.config), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["InternVLChatModel"]
    assert config["model_type"] == "internvl_chat"
    assert config["auto_map"] == AUTO_MAP
    kinds = {
        **{"force_image_size": int, "downsample_ratio": float, "ps_version": str, "select_layer": int},
        **{"template": str, "min_dynamic_patch": int, "max_dynamic_patch": int, "dynamic_image_size": bool},
        **{"use_thumbnail": bool, "llm_config": dict, "vision_config": dict},
    }
    vision = {
        **{"image_size": int, "patch_size": int, "hidden_size": int, "num_hidden_layers": int, "qkv_bias": bool},
        **{"num_attention_heads": int, "intermediate_size": int, "norm_type": str, "qk_normalization": bool},
        **{"layer_norm_eps": float, "initializer_factor": float},
    }
    language = {
        **{"vocab_size": int, "hidden_size": int, "num_hidden_layers": int, "num_attention_heads": int, "bias": bool},
        **{"num_key_value_heads": int, "intermediate_size": int, "rms_norm_eps": float, "rope_theta": float},
        **{"max_position_embeddings": int, "hidden_act": str, "tie_word_embeddings": bool},
    }
    for found, wanted in ((config, kinds), (config["vision_config"], vision), (config["llm_config"], language)):
        assert {name: type(found[name]) for name in wanted} == wanted
    assert config["llm_config"]["architectures"] == ["InternLM2ForCausalLM"]
    names = set(load_file(folder / "model.safetensors"))
    for name in (
        *("vision_model.embeddings.class_embedding", "vision_model.encoder.layers.1.attn.qkv.weight"),
        *("vision_model.encoder.layers.0.ls1", "vision_model.encoder.layers.0.norm2.bias"),
        *("mlp1.0.weight", "mlp1.3.bias", "language_model.model.tok_embeddings.weight", "language_model.output.weight"),
        "language_model.model.layers.1.attention.wqkv.weight",
        "language_model.model.layers.0.feed_forward.w2.weight",
    ):
        assert name in names
    tokens = {entry["content"] for entry in json.loads((folder / "tokenizer.json").read_text())["added_tokens"]}
    assert {"<img>", "</img>", "<IMG_CONTEXT>"} <= tokens
    code = {path.name for path in folder.glob("*.py")}
    assert "__init__.py" not in code
    assert {value.partition(".")[0] + ".py" for value in AUTO_MAP.values()} <= code


def test_answers_stop_at_the_end_of_the_turn(tmp_path: Path) -> None:
    model = tiny_model("internlm2")
    processor = tiny_processor(model.config)
    folder = write_model_folder(model, processor, tmp_path)
    assert processor.end_of_turn_id in json.loads((folder / "generation_config.json").read_text())["eos_token_id"]


@pytest.mark.parametrize("backbone", ["internlm2", "qwen2"])
def test_official_folder_becomes_ours_without_touching_the_weights(
    official: Callable[..., Path], backbone: str, tmp_path: Path
) -> None:
    source, output = official(backbone), tmp_path / "built"
    assert main(["model", str(source), "--output", str(output), "--skip_proof"]) == 0
    assert (output / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    config = json.loads((output / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert "max_length" not in config["llm_config"]
    ids = torch.arange(5).unsqueeze(0)
    expected = InternVLChatModel.from_pretrained(source)(ids).logits
    assert torch.equal(InternVLChatModel.from_pretrained(output)(ids).logits, expected)
    assert InternVLChatConfig.from_pretrained(output).image_token_id == 265


def test_shards_and_old_bin_files(official: Callable[..., Path], tmp_path: Path) -> None:
    source = official()
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    halves = [dict(list(tensors.items())[start::2]) for start in (0, 1)]
    weight_map = {}
    for number, half in enumerate(halves, start=1):
        name = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save(half, source / name)
        weight_map |= dict.fromkeys(half, name)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    output = build_model_folder(source, tmp_path / "built")
    assert not list(output.glob("*.bin"))
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors)
    again = build_model_folder(output, tmp_path / "again")
    loaded = InternVLChatModel.from_pretrained(again).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    (output / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadInputError, match=r"names model-00002-of-00002.safetensors, which is not there"):
        build_model_folder(output, tmp_path / "third")


def test_a_bin_file_with_code_in_it_is_never_run(official: Callable[..., Path], tmp_path: Path) -> None:
    source = official()
    (source / "model.safetensors").unlink()

    class Harmful:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"x": Harmful()}, source / "pytorch_model.bin")
    with pytest.raises(BadInputError, match="not a plain file of tensors"):
        build_model_folder(source, tmp_path / "built")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("base", ["owner/base", "./base", "/models/base"])
def test_the_card_of_a_trained_adapter_says_where_its_base_is(tmp_path: Path, base: str) -> None:
    write_adapter_card(tmp_path, name="adapter", model_type="internvl_chat", base=base)
    card = (tmp_path / "README.md").read_text()
    assert f'from_pretrained("{base}", dtype="auto"' in card
    assert ("base_model: owner/base" in card, "https://huggingface.co/owner/base" in card) == (
        base == "owner/base",
    ) * 2


def test_a_language_model_that_ties_its_embeddings_stores_them_once(tmp_path: Path) -> None:
    """As SmolLM2 does; no official InternVL does, so nothing else here would notice."""
    source = make_model_folder(tmp_path / "source", llm_config={"tie_word_embeddings": True})
    assert "language_model.lm_head.weight" not in load_file(source / "model.safetensors")
    built = build_model_folder(source, tmp_path / "built")
    ids = torch.arange(5, 15)[None]
    before, after = (InternVLChatModel.from_pretrained(folder)(input_ids=ids).logits for folder in (source, built))
    assert torch.equal(before, after)
    tensors = load_file(source / "model.safetensors")
    name = "language_model.model.embed_tokens.weight"
    save_file({key: tensors[key] for key in tensors if key != name}, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInputError, match=f"lack {name}, 1 in all"):
        build_model_folder(source, tmp_path / "again")


def test_weights_that_do_not_fit_are_named(official: Callable[..., Path], tmp_path: Path) -> None:
    source = official()
    tensors = load_file(source / "model.safetensors")
    name = "mlp1.1.weight"

    def build(changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, source / "model.safetensors", metadata={"format": "pt"})
        build_model_folder(source, tmp_path / "built")

    with pytest.raises(BadInputError, match=rf"{name} has shape \(32, 3\), config.json asks for \(32, 128\)"):
        build({**tensors, name: torch.zeros(32, 3)})
    with pytest.raises(BadInputError, match=rf"lack {name}, 1 in all"):
        build({key: value for key, value in tensors.items() if key != name})
    with pytest.raises(BadInputError, match="a tensor extra"):
        build({**tensors, "extra": torch.zeros(1)})
    (source / "model.safetensors").write_bytes(b"short")
    with pytest.raises(BadInputError, match="is damaged"):
        build_model_folder(source, tmp_path / "built")


def test_other_models_and_missing_parts_are_refused(official: Callable[..., Path], tmp_path: Path) -> None:
    source = official()
    with pytest.raises(BadInputError, match="give another folder"):
        build_model_folder(source, source)
    with pytest.raises(BadInputError, match="cannot read"):
        build_model_folder(tmp_path / "nowhere", tmp_path / "built")
    (source / "model.safetensors").unlink()
    with pytest.raises(BadInputError, match="has no weights"):
        build_model_folder(source, tmp_path / "built")
    (source / "config.json").write_text('{"model_type": "blip_2"}')
    with pytest.raises(BadInputError, match="'blip_2'"):
        build_model_folder(source, tmp_path / "built")
    with pytest.raises(BadInputError, match="'poem' cannot be published"):
        main(["poem", str(source), "--output", str(tmp_path / "built")])


@pytest.mark.parametrize("backbone", ["internlm2", "qwen2", "qwen3", "llama"])
def test_native_layout_and_back(backbone: str, tmp_path: Path) -> None:
    vision = {"norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False} if backbone == "llama" else {}
    rope = {"rope_scaling": {"type": "dynamic", "factor": 2.0}} if backbone == "internlm2" else {}
    model = tiny_model(backbone, vision_config=vision, llm_config=rope, system_message="Be brief.")
    folder = write_model_folder(model, tiny_processor(model.config), tmp_path / "ours")
    convert(folder, tmp_path / "native")
    native, info = InternVLForConditionalGeneration.from_pretrained(tmp_path / "native", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    ids = torch.tensor([[1, 2, 265, 265, 3]])
    tiles = torch.rand(2, 3, 28, 28)
    expected = model(ids, tiles).logits
    torch.testing.assert_close(native(input_ids=ids, pixel_values=tiles).logits, expected, atol=1e-5, rtol=0)
    back = convert(tmp_path / "native", tmp_path / "back")
    assert torch.equal(InternVLChatModel.from_pretrained(back)(ids, tiles).logits, expected)
    for name in ("config.json", "processor_config.json", "chat_template.jinja"):
        assert (back / name).read_text() == (folder / name).read_text()
    native.save_pretrained(tmp_path / "resaved")
    saved, converted = (load_file(tmp_path / name / "model.safetensors") for name in ("resaved", "native"))
    assert saved.keys() == converted.keys()


def test_the_native_folder_says_how_pictures_are_cut_and_where_answers_end(tmp_path: Path) -> None:
    model = tiny_model(
        "qwen2", dynamic_image_size=False, min_dynamic_patch=2, max_dynamic_patch=5, system_message="Hi."
    )
    processor = tiny_processor(model.config)
    convert(write_model_folder(model, processor, tmp_path / "ours"), tmp_path / "native")

    def read(name: str) -> dict:
        return json.loads((tmp_path / "native" / name).read_text())

    with safe_open(tmp_path / "native/model.safetensors", "pt") as weights:
        assert weights.metadata() == {"format": "pt"}
    images, side = read("preprocessor_config.json"), model.config.force_image_size
    assert images == {
        **{"image_processor_type": "GotOcr2ImageProcessor", "crop_to_patches": False, "resample": 3},
        **{"min_patches": 2, "max_patches": 5, "size": {"height": side, "width": side}},
        **{"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    }
    num_tokens = model.config.num_image_token
    names = {"processor_class": "InternVLProcessor", "image_seq_length": num_tokens, "image_processor": images}
    assert read("processor_config.json") == names
    assert read("tokenizer_config.json")["extra_special_tokens"] == {
        **{"start_image_token": "<img>", "end_image_token": "</img>"},
        **{"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"},
    }
    ends = {key: read("generation_config.json")[key] for key in ("eos_token_id", "pad_token_id")}
    assert ends == {"eos_token_id": processor.end_of_turn_id, "pad_token_id": processor.tokenizer.pad_token_id}
    template = (tmp_path / "native/chat_template.jinja").read_text()
    assert "<IMG_CONTEXT>" in template and '"<image>"' not in template and "Hi." in template
    config = read("config.json")
    assert (config["architectures"], config["image_seq_length"]) == (["InternVLForConditionalGeneration"], num_tokens)
    kept = config["internvl_chat"]
    assert kept.pop("llm_architecture") == "Qwen2ForCausalLM"
    assert kept == {key: getattr(model.config, key) for key in kept} and len(kept) == 8


def test_the_modules_that_transformers_5_names_are_those_that_its_files_name() -> None:
    names = {
        "model.language_model.embed_tokens.weight": "language_model.model.embed_tokens.weight",
        "lm_head.weight": "language_model.lm_head.weight",
        "model.vision_tower.embeddings.cls_token": "vision_model.embeddings.class_embedding",
        "model.multi_modal_projector.linear_1.bias": "mlp1.1.bias",
    }
    assert list(to_official(dict.fromkeys(names, torch.zeros(1)), Shapes(False, 2, 2))) == list(names.values())


def test_a_native_folder_of_another_origin(tmp_path: Path) -> None:
    """The vendor's own native folders say nothing about templates and tiles; they are those of InternVL3."""
    model = tiny_model("qwen2")
    folder = write_model_folder(model, tiny_processor(model.config), tmp_path / "ours")
    convert(folder, tmp_path / "native")
    config = json.loads((tmp_path / "native/config.json").read_text())
    del config["internvl_chat"]
    (tmp_path / "native/config.json").write_text(json.dumps(config))
    back = InternVLChatModel.from_pretrained(convert(tmp_path / "native", tmp_path / "back"))
    assert back.template == "internvl2_5"
    assert (back.config.max_dynamic_patch, back.config.use_thumbnail) == (12, True)
    ids = torch.arange(5).unsqueeze(0)
    assert torch.equal(back(ids).logits, model(ids).logits)


def test_a_native_folder_that_ties_its_output_to_its_embeddings_gets_a_matrix_of_its_own(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    convert(write_model_folder(model, tiny_processor(model.config), tmp_path / "ours"), tmp_path / "native")
    weights = load_file(tmp_path / "native/model.safetensors")
    (head,) = [name for name in weights if name.endswith("lm_head.weight")]
    kept = weights.pop(head)
    save_file(weights, tmp_path / "native/model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "native/config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (tmp_path / "native/config.json").write_text(json.dumps(config))
    saved = load_file(convert(tmp_path / "native", tmp_path / "back") / "model.safetensors")
    embeddings = saved["language_model.model.embed_tokens.weight"]
    assert torch.equal(saved["language_model.lm_head.weight"], embeddings)
    assert not torch.equal(embeddings, kept)
    weights[head] = kept  # where one is stored it counts
    save_file(weights, tmp_path / "native/model.safetensors", metadata={"format": "pt"})
    saved = load_file(convert(tmp_path / "native", tmp_path / "again") / "model.safetensors")
    assert torch.equal(saved["language_model.lm_head.weight"], kept)


@pytest.mark.slow
def test_the_converter_is_a_program(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    words = [sys.executable, "-m", "internvl_mpo.convert", str(tmp_path), "--output", str(tmp_path / "out")]
    result = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "has model_type 'bert'; expected 'internvl_chat' or 'internvl'" in result.stderr


def test_what_the_native_layout_cannot_say_is_refused(tmp_path: Path) -> None:
    model = tiny_model("phi3")
    folder = write_model_folder(model, tiny_processor(model.config), tmp_path / "ours")
    with pytest.raises(BadInputError, match="Phi3"):
        convert(folder, tmp_path / "native")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(BadInputError, match="'bert'"):
        convert(str(tmp_path / "other"), str(tmp_path / "native"))
    with pytest.raises(BadInputError, match="'bert'"):
        convert_main([str(tmp_path / "other"), "--output", str(tmp_path / "native")])


@pytest.mark.skipif(not ORACLE.is_dir(), reason="official configuration files are not here")
@pytest.mark.parametrize("name", ["internlm2", "qwen2"])
def test_official_schema_goes_out_as_it_came_in(name: str) -> None:
    """Every key of the vendor's file that describes the model keeps its value."""
    official = json.loads((ORACLE / name / "config.json").read_text())
    ours = InternVLChatConfig(**official).to_dict()
    for part in (None, "llm_config", "vision_config"):
        theirs, written = (config if part is None else config[part] for config in (official, ours))
        for key in theirs.keys() & written.keys() - {"llm_config", "vision_config", "transformers_version", "auto_map"}:
            # The window never binds: use_sliding_window is false, and transformers then forgets the number.
            assert written[key] == theirs[key] or key == "sliding_window", key
        left_out = theirs.keys() - written.keys() - GenerationConfig().to_dict().keys()
        assert left_out <= STALE_KEYS | {"architectures", "torch_dtype"}, part
