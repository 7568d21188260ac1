"""How each model family is encoded, embedded and cut into parts; docs/families.md says how to add one.

contract: what the trainer asks of a family. registry: the one door, config.json -> family. native: what the families of
transformers share. One file a family: internvl_chat (official layout), internvl (-hf layout), qwen2_vl (and 2.5),
qwen3_vl (dense and experts), llava, llava_next, llava_onevision, idefics3 (and SmolVLM). shapes: models without
their weights, by the name of an official checkpoint or from a config.json.
"""
