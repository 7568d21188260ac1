"""How each model family is encoded, embedded and cut into parts; docs/families.md says how to add one.

contract: what the trainer asks of a family. registry: the one door, config.json -> family.
internvl_chat: InternVL2, 2.5, 3 and 3.5 in the official layout.
"""
