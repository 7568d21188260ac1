"""Loads a model folder as a stranger does and answers one question; run by `proof` in a process of its own.

    python -I clean_load.py FOLDER BASE PICTURE QUESTION DEVICE RESULT

BASE is the base model's folder if FOLDER holds an adapter, else "-". RESULT becomes a safetensors file with the ids of
the prompt, its logits and the ids that were generated. This file imports nothing of this project, nor may others.
An InternVL chat folder brings its code and is loaded with `trust_remote_code`, any other as a class of transformers.
"""

import importlib.abc
import json
import sys
from pathlib import Path


class NoRepository(importlib.abc.MetaPathFinder):
    """An editable installation would otherwise lend the process our packages."""

    def find_spec(self, name, path=None, target=None):
        """Refuse our packages by name."""
        if name.split(".")[0] in ("internvl_mpo", "modeling_internvl_mpo"):
            raise ModuleNotFoundError(f"{name} is not part of the published folder")


def load_processor(folder: str, trust: bool):
    """Return the processor of a folder, without its part for videos where a package for that is missing here."""
    from transformers import AutoConfig, AutoProcessor, Idefics3Processor
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

    try:
        return AutoProcessor.from_pretrained(folder, trust_remote_code=trust)
    except (ImportError, ValueError):  # families differ in how they say it
        wanted = None if trust else PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(folder)), None)
        if wanted is None or "video_processor" not in wanted.get_attributes():
            raise
    parts = [name for name in wanted.get_attributes() if name != "video_processor"]
    own = Idefics3Processor if wanted.__name__ == "SmolVLMProcessor" else wanted  # the same prompts and pixels
    kind = type(wanted.__name__, (own,), {"get_attributes": classmethod(lambda cls: parts)})
    return kind.from_pretrained(folder)


def load(folder: str, base: str):
    """Return model and processor: of a model folder by the Auto classes, of an adapter as its card says it."""
    from transformers import AutoModel, AutoModelForImageTextToText, AutoTokenizer
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    where = folder if base == "-" else base
    is_chat = json.loads(Path(where, "config.json").read_text(encoding="utf-8"))["model_type"] == "internvl_chat"
    if base != "-" and is_chat:  # by the code beside the adapter, whatever the base holds
        where, model_class = folder, get_class_from_dynamic_module("modeling_internvl_mpo.InternVLChatModel", folder)
        model = model_class.from_pretrained(base, dtype="auto")
    else:
        auto_class = AutoModel if is_chat else AutoModelForImageTextToText
        model = auto_class.from_pretrained(where, dtype="auto", trust_remote_code=is_chat)
    if base != "-":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    processor = load_processor(where, is_chat)
    assert len(AutoTokenizer.from_pretrained(where, trust_remote_code=is_chat)) == len(processor.tokenizer)
    return model, processor


def main(folder: str, base: str, picture: str, question: str, device: str, result: str) -> None:
    """Load, look, answer, save."""
    sys.meta_path.insert(0, NoRepository())
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model, processor = load(folder, base)
    model = model.to(device).eval()
    content = [{"type": "image", "path": picture}, {"type": "text", "text": question}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(device, model.dtype)
    with torch.inference_mode():
        logits = model(**inputs).logits
        generated = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    answer = {"input_ids": inputs["input_ids"], "logits": logits, "generated": generated}
    save_file({name: tensor.cpu().contiguous() for name, tensor in answer.items()}, result)


if __name__ == "__main__":
    main(*sys.argv[1:])
