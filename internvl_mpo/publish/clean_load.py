"""Loads a model folder as a stranger does and answers one question; run by `proof` in a process of its own.

    python -I clean_load.py FOLDER BASE PICTURE QUESTION DEVICE RESULT

BASE is the base model's folder if FOLDER holds an adapter, else "-". RESULT becomes a safetensors file with the ids of
the prompt, its logits and the ids that were generated. This file imports nothing of this project, nor may others.
"""

import importlib.abc
import sys


class NoRepository(importlib.abc.MetaPathFinder):
    """An editable installation would otherwise lend the process our packages."""

    def find_spec(self, name, path=None, target=None):
        """Refuse our packages by name."""
        if name.split(".")[0] in ("internvl_mpo", "modeling_internvl_mpo"):
            raise ModuleNotFoundError(f"{name} is not part of the published folder")


def main(folder: str, base: str, picture: str, question: str, device: str, result: str) -> None:
    """Load, look, answer, save."""
    sys.meta_path.insert(0, NoRepository())
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModel, AutoProcessor, AutoTokenizer

    torch.manual_seed(0)
    main_folder = folder if base == "-" else base
    model = AutoModel.from_pretrained(main_folder, dtype="auto", trust_remote_code=True).to(device).eval()
    processor = AutoProcessor.from_pretrained(main_folder, trust_remote_code=True)
    assert len(AutoTokenizer.from_pretrained(main_folder, trust_remote_code=True)) == len(processor.tokenizer)
    if base != "-":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder).eval()
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
