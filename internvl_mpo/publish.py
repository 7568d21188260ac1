"""Builds the exact folders that go to the Hub; pushing one is the last step.

python -m internvl_mpo.publish model OpenGVLab-InternVL2-2B/ --output outputs/InternVL2-2B
"""

import json
import shutil
from pathlib import Path
from typing import Any

import modeling_internvl_mpo

CODE_FOLDER = Path(modeling_internvl_mpo.__file__).parent
AUTO_MAP = {
    "AutoConfig": "configuration_internvl_mpo.InternVLChatConfig",
    "AutoModel": "modeling_internvl_mpo.InternVLChatModel",
    "AutoModelForCausalLM": "modeling_internvl_mpo.InternVLChatModel",
    "AutoModelForImageTextToText": "modeling_internvl_mpo.InternVLChatModel",
    "AutoModelForMultimodalLM": "modeling_internvl_mpo.InternVLChatModel",
    "AutoProcessor": "processing_internvl_mpo.InternVLProcessor",
    "AutoImageProcessor": "image_processing_internvl_mpo.InternVLImageProcessor",
}


def write_model_folder(model: Any, processor: Any, output_dir: str | Path) -> Path:
    """Save a model so that the folder works by itself with `trust_remote_code=True`.

    Writes safetensors weights under the official keys, config.json with its `auto_map`, the flat code files,
    tokenizer, processor, chat template and generation_config.json.

    Args:
        model: an `InternVLChatModel`; adapters must have been merged.
        processor: its `InternVLProcessor`.
        output_dir: made if absent.

    Returns:
        The folder.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if model.config.image_token_id is None:
        model.config.image_token_id = processor.image_token_id
    model.save_pretrained(output_dir)
    write_companions(output_dir, processor)
    return output_dir


def write_companions(output_dir: Path, processor: Any) -> None:
    """Write everything but the weights beside config.json: code, `auto_map`, tokenizer and processor files."""
    processor.save_pretrained(output_dir)
    for source in sorted(CODE_FOLDER.glob("*.py")):
        if source.name != "__init__.py":  # registers with the Auto classes, which remote code must not do
            shutil.copyfile(source, output_dir / source.name)
    _update_json(output_dir / "config.json", {"architectures": ["InternVLChatModel"], "auto_map": AUTO_MAP})
    # Readers differ in which of the two files they open, so both say everything.
    image_settings = processor.image_processor.to_dict()
    image_settings["auto_map"] = {name: AUTO_MAP[name] for name in ("AutoImageProcessor", "AutoProcessor")}
    _update_json(output_dir / "preprocessor_config.json", image_settings)
    auto_map = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
    _update_json(output_dir / "processor_config.json", {"auto_map": auto_map, "image_processor": image_settings})


def _update_json(path: Path, values: dict[str, Any]) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    content.update(values)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
