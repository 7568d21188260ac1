#!/usr/bin/env bash
# Several machines without a scheduler: DeepSpeed logs in to each by ssh (keys, no password) and starts its ranks.
# Repository, environment, start model, data and output_dir lie under the same path on all of them.
#   HOSTFILE=configs/hostfile.example bash runs/many_nodes_hostfile.sh --data MMPR/meta.json
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

HOSTFILE=${HOSTFILE:?give HOSTFILE=..., see configs/hostfile.example}
CONFIG=${CONFIG:-configs/internvl2_76b.yaml}
PYTHON=${PYTHON:-python}
PORT=${PORT:-29500}

# pdsh -k ends with the first node that fails, instead of when the last of the others has waited out its collectives.
exec "$PYTHON" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --master_port "$PORT" --launcher_args=-k \
  train_mpo.py --config "$CONFIG" "$@"
