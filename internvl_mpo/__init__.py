"""The method of Mixed Preference Optimization: rows, answers, pairs, packs, log-probs, the objective and its trainer.

Plain modules without import-time work: `records`, `answers` and `pairing` need nothing but Python; `packing`, `logps`
and `objective` need torch; `training` needs transformers. Import what you use, for example
`from internvl_mpo.objective import mpo_loss`.
"""

__version__ = "0.2.0"
