"""What stands on every card, in Markdown; `{name}` is the repository, `{base}` that of the base model."""

TRANSFORMERS = """\
```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{name}", dtype="auto", device_map="auto", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
content = [{{"type": "image", "path": "picture.png"}}, {{"type": "text", "text": "What is this?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, model.dtype)
answer = model.generate(**inputs, max_new_tokens=512)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
```

With a LoRA adapter trained on it: `model = peft.PeftModel.from_pretrained(model, "owner/adapter")`."""

ADAPTER = """\
```python
from peft import PeftModel
from transformers import AutoProcessor
from transformers.dynamic_module_utils import get_class_from_dynamic_module

model_class = get_class_from_dynamic_module("modeling_internvl_mpo.InternVLChatModel", "{name}")
base = model_class.from_pretrained("{base}", dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(base, "{name}")
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
content = [{{"type": "image", "path": "picture.png"}}, {{"type": "text", "text": "What is this?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(base.device, base.dtype)
answer = model.generate(**inputs, max_new_tokens=512)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
```

`model.disable_adapter()` gives the base model's answers; `model.merge_and_unload()` makes one model of the two. The
code beside the adapter runs on current transformers (5.17 and newer); of the base model only the weights are read, not
its code, which in the official InternVL2 repositories is for an older transformers."""

VLLM = """\
vLLM, SGLang and LMDeploy know this layout (`InternVLChatModel`); not run for this checkpoint:

```bash
vllm serve {name} --trust-remote-code --chat-template-content-format openai --limit-mm-per-prompt '{{"image": 4}}'
```

`openai` keeps pictures where they stand between texts; the limit is the most pictures of a prompt. vLLM cuts each
picture into up to `max_dynamic_patch` tiles, while training and evaluation here shared them among the pictures of a
prompt: for the same tiles give several pictures `"mm_processor_kwargs": {{"max_dynamic_patch": N}}` in the request."""

VLLM_ADAPTER = """\
vLLM (not run for this checkpoint):

```bash
vllm serve {base} --trust-remote-code --enable-lora --lora-modules mpo={name} \\
    --chat-template-content-format openai --limit-mm-per-prompt '{{"image": 4}}'
```"""

SMALLER = """\
Smaller: 4-bit weights of the language model with bitsandbytes (the vision tower and the projector stay as they are), or
fp8 in vLLM with `--quantization fp8`. Neither was measured for quality here.

```python
from transformers import AutoModel, BitsAndBytesConfig

four_bit = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype="bfloat16",
    llm_int8_skip_modules=["vision_model", "mlp1", "output", "lm_head"],
)
model = AutoModel.from_pretrained("{name}", quantization_config=four_bit, trust_remote_code=True)
```"""

FAMILY_ASK = """\
content = [{"type": "image", "path": "picture.png"}, {"type": "text", "text": "What is this?"}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, model.dtype)
answer = model.generate(**inputs, max_new_tokens=512)[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))"""

FAMILY = """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}", dtype="auto", device_map="auto")
processor = AutoProcessor.from_pretrained("{name}")
{ask}
```

With a LoRA adapter trained on it: `model = peft.PeftModel.from_pretrained(model, "owner/adapter")`. Servers that
know the family (vLLM, SGLang) take the folder as it is; not run for this checkpoint."""

FAMILY_ADAPTER = """\
```python
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained("{base}", dtype="auto", device_map="auto")
model = PeftModel.from_pretrained(base, "{name}")
processor = AutoProcessor.from_pretrained("{base}")
{ask}
```

`model.disable_adapter()` gives the base model's answers; `model.merge_and_unload()` makes one model of the two."""

FAMILY_PACKAGES = """\
`AutoProcessor` also loads the part for videos: `pip install {packages}`."""

FAMILY_SMALLER = """\
Smaller: 4-bit weights of the language model with bitsandbytes (the vision tower and the projector stay as they are).
Not measured for quality here.

```python
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

four_bit = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_compute_dtype="bfloat16",
    llm_int8_skip_modules=[{wide}],
)
model = AutoModelForImageTextToText.from_pretrained("{name}", quantization_config=four_bit)
```"""

CITATION = """\
```bibtex
@article{wang2024mpo,
  title={Enhancing the Reasoning Ability of Multimodal Large Language Models via Mixed Preference Optimization},
  author={Wang, Weiyun and Chen, Zhe and Wang, Wenhai and Cao, Yue and Liu, Yangzhou and Gao, Zhangwei and Zhu, Jinguo
    and Zhu, Xizhou and Lu, Lewei and Qiao, Yu and Dai, Jifeng},
  journal={arXiv preprint arXiv:2411.10442},
  year={2024}
}
```"""
