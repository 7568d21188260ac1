"""The method of Mixed Preference Optimization: rows, answers, pairs, packs, log-probs, the objective and its trainer.

Plain modules without import-time work: `records`, `answers` and `pairing` need nothing but Python; `packing` and
`objective` need torch; `logps`, `encoding` and `training` need transformers too. Import what you use, for example
`from internvl_mpo.objective import mpo_loss`.
"""

__version__ = "0.2.0"
