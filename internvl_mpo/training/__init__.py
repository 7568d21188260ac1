"""What `train_mpo.py` is made of.

settings, arguments, first_look   what a run is told, and what is refused before anything is loaded
preflight, table_parts, pair_table   pairs read, checked and measured once, in a table that all ranks map
pairs, lengths            the pairs of a run: chosen, shown, planned
data                      steps of pairs become packs
loading, policy, distributed, fsdp   the model that is trained, on one device or many
identity                  what reference log-probs depend on
reference_plan, reference_pass, reference_cache, live_reference   log-probs of the reference
trainer, feeding, callbacks, meters, run_log   the loop on transformers' Trainer
watch, not_finite, held_out  what is looked at while it runs
checkpoint, reshard, finished   where a killed run goes on, with other ranks too, and when it is over
signals, stopping         how it stops between two steps
throughput, speed, fake_pass   what a step costs, and how it is made cheaper
"""
