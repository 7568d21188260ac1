"""Model folders: official weights get this project's code, a fast tokenizer, a processor and a chat template."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from internvl_mpo.errors import BadInputError

CODE_FOLDER = Path(__file__).parents[2] / "modeling_internvl_mpo"
AUTO_MAP = {
    "AutoConfig": "configuration_internvl_mpo.InternVLChatConfig",
    "AutoModel": "modeling_internvl_mpo.InternVLChatModel",
    "AutoModelForCausalLM": "modeling_internvl_mpo.InternVLChatModel",
    "AutoModelForImageTextToText": "modeling_internvl_mpo.InternVLChatModel",
    "AutoModelForMultimodalLM": "modeling_internvl_mpo.InternVLChatModel",
    "AutoProcessor": "processing_internvl_mpo.InternVLChatProcessor",
    "AutoImageProcessor": "image_processing_internvl_mpo.InternVLImageProcessor",
}


def write_model_folder(model: Any, processor: Any, output_dir: str | Path) -> Path:
    """Save a model so that the folder works by itself with `trust_remote_code=True`.

    Writes safetensors weights under the official keys, config.json with its `auto_map`, the flat code files,
    tokenizer, processor, chat template, generation_config.json and a model card.

    Args:
        model: an `InternVLChatModel`; adapters must have been merged.
        processor: its `InternVLChatProcessor`.
        output_dir: made if absent.

    Returns:
        The folder.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    model.config.image_token_id = processor.image_token_id
    model.save_pretrained(output_dir)
    write_companions(output_dir, processor, model.generation_config)
    return output_dir


def build_model_folder(source: str | Path, output_dir: str | Path) -> Path:
    """Put code, tokenizer and processor beside the weights of an InternVL folder in the official layout.

    Weights are checked against the configuration by their headers, then linked (copied where the file system cannot);
    `.bin` files are read with `weights_only=True` and become safetensors.

    Args:
        source: folder with config.json, weights and tokenizer files.
        output_dir: made if absent.

    Returns:
        The folder that was built.

    Raises:
        BadInputError: not an InternVL folder, a missing shard, or weights that do not fit the configuration.
    """
    from transformers import GenerationConfig

    from modeling_internvl_mpo import InternVLChatConfig, InternVLChatProcessor

    source, output_dir = Path(source), Path(output_dir)
    if source.resolve() == output_dir.resolve():
        raise BadInputError(f"output is the source folder {source}; give another folder")
    raw = read_json(source / "config.json")
    if raw.get("model_type") != "internvl_chat":
        raise BadInputError(
            f"{source / 'config.json'} has model_type {raw.get('model_type')!r}; expected an InternVL chat model "
            "('internvl_chat'); folders in the -hf layout go through internvl_mpo.convert first"
        )
    try:
        config = InternVLChatConfig(**raw)
        processor = InternVLChatProcessor.from_pretrained(source)
    except (ValueError, OSError, KeyError) as error:
        raise BadInputError(f"{source}: {str(error).splitlines()[0]}") from error
    config.image_token_id = processor.image_token_id
    shards = weight_files(source)
    output_dir.mkdir(parents=True, exist_ok=True)
    if shards[0].suffix == ".bin":
        shards = _convert_bins(shards, output_dir)
    else:
        shards = [_link(path, output_dir) for path in shards]
        if (source / "model.safetensors.index.json").exists():
            shutil.copyfile(source / "model.safetensors.index.json", output_dir / "model.safetensors.index.json")
    _check_weights(config, shards)
    config.save_pretrained(output_dir)
    generation_config = GenerationConfig()
    if (source / "generation_config.json").exists():
        generation_config = GenerationConfig.from_pretrained(source)
    write_companions(output_dir, processor, generation_config)
    for name in ("README.md", "LICENSE"):
        if (source / name).exists():
            shutil.copyfile(source / name, output_dir / name)
    return output_dir


def write_companions(output_dir: Path, processor: Any, generation_config: Any) -> None:
    """Write everything but weights: code, `auto_map`, tokenizer, processor, generation settings, card."""
    processor.save_pretrained(output_dir)
    for path in sorted(CODE_FOLDER.glob("*.py")):
        if path.name != "__init__.py":  # registers with the Auto classes, which remote code must not do
            shutil.copyfile(path, output_dir / path.name)
    _update_json(output_dir / "config.json", {"architectures": ["InternVLChatModel"], "auto_map": AUTO_MAP})
    # Readers differ in which of the two files they open, so both say everything.
    image_settings = processor.image_processor.to_dict()
    image_settings["auto_map"] = {name: AUTO_MAP[name] for name in ("AutoImageProcessor", "AutoProcessor")}
    _update_json(output_dir / "preprocessor_config.json", image_settings)
    auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
    _update_json(output_dir / "processor_config.json", {"auto_map": auto_map, "image_processor": image_settings})
    # Base models end a text with another token than chats end a turn with.
    known = generation_config.eos_token_id
    ends = [processor.end_of_turn_id, *(known if isinstance(known, list) else [known])]
    generation_config.eos_token_id = sorted({end for end in ends if end is not None})
    if generation_config.pad_token_id is None:
        generation_config.pad_token_id = processor.tokenizer.pad_token_id
    generation_config.save_pretrained(output_dir)
    card = output_dir / "README.md"
    if not card.exists():
        card.write_text(_CARD.format(name=output_dir.name), encoding="utf-8")


_CARD = """\
---
pipeline_tag: image-text-to-text
library_name: transformers
tags: [custom_code, internvl, mpo]
---
# {name}

An InternVL chat model with the code of MPO for InternVL, which runs on current transformers.

```python
from transformers import AutoModel, AutoProcessor

folder = "{name}"  # or owner/name on the Hub
model = AutoModel.from_pretrained(folder, dtype="auto", trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
content = [{{"type": "image", "path": "picture.png"}}, {{"type": "text", "text": "What is this?"}}]
messages = [{{"role": "user", "content": content}}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
answer = model.generate(**inputs, max_new_tokens=256)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
```
"""


def weight_files(source: Path) -> list[Path]:
    """Return the shards of a folder: safetensors if there are any, else `.bin`."""
    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if (source / index).exists():
            names = sorted(set(read_json(source / index)["weight_map"].values()))
            missing = [name for name in names if not (source / name).exists()]
            if missing:
                raise BadInputError(f"{source / index} names {missing[0]}, which is not there; download it again")
            return [source / name for name in names]
        if (source / single).exists():
            return [source / single]
    raise BadInputError(f"{source} has no weights; expected model.safetensors or its index, or pytorch_model.bin")


def _link(path: Path, output_dir: Path) -> Path:
    """Hard-link a file, or copy it to another file system."""
    target = output_dir / path.name
    target.unlink(missing_ok=True)
    try:
        os.link(path.resolve(), target)
    except OSError:
        shutil.copyfile(path, target)
    return target


def _convert_bins(shards: list[Path], output_dir: Path) -> list[Path]:
    import torch
    from safetensors.torch import save_file

    written, weight_map, total = [], {}, 0
    for number, path in enumerate(shards, start=1):
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises its own kinds for damage and for forbidden content
            raise BadInputError(f"{path} is not a plain file of tensors ({type(error).__name__})") from error
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # A tensor that is a view of another would be refused; safetensors stores each by itself.
        tensors = {key: value.clone().contiguous() for key, value in tensors.items()}
        save_file(tensors, output_dir / name, metadata={"format": "pt"})
        written.append(output_dir / name)
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(value.numel() * value.element_size() for value in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _update_json(output_dir / "model.safetensors.index.json", index)
    return written


def _check_weights(config: Any, shards: list[Path]) -> None:
    """Compare names and shapes in the shards' headers with those of the network."""
    import torch
    from safetensors import SafetensorError, safe_open

    from modeling_internvl_mpo import InternVLChatModel

    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in InternVLChatModel(config).state_dict().items()}
    for path in shards:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - the file is not a mapping
                    shape, wanted = tuple(file.get_slice(name).get_shape()), expected.pop(name, None)
                    if wanted is None:
                        raise BadInputError(f"{path} has a tensor {name} that the network of config.json does not have")
                    if shape != wanted:
                        raise BadInputError(f"{path}: {name} has shape {shape}, config.json asks for {wanted}")
        except SafetensorError as error:
            raise BadInputError(f"{path} is damaged ({error}); download it again") from error
    if expected:
        raise BadInputError(f"the weights of {shards[0].parent} lack {next(iter(expected))}, {len(expected)} in all")


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInputError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise BadInputError(f"{path} is not valid JSON ({error})") from error
    return content


def _update_json(path: Path, values: dict[str, Any]) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content.update(values)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
