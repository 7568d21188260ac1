#!/usr/bin/env bash
# All weights on the GPUs of one machine. Settings at the end win over the run file.
#   bash runs/one_node.sh --data MMPR/meta.json
#   NUM_GPUS=4 LAUNCHER=deepspeed CONFIG=configs/internvl2_2b.yaml bash runs/one_node.sh --data MMPR/meta.json
# The same command again goes on from the last whole checkpoint; exit code 75 says that a signal stopped it with one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CONFIG=${CONFIG:-configs/internvl2_8b.yaml}
NUM_GPUS=${NUM_GPUS:-8}
LAUNCHER=${LAUNCHER:-torchrun}
PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

case "$LAUNCHER" in
  torchrun) launch=("$PYTHON" -m internvl_mpo.launch --standalone --nproc_per_node "$NUM_GPUS") ;;
  deepspeed) launch=("$PYTHON" -m deepspeed.launcher.runner --num_gpus "$NUM_GPUS") ;;
  accelerate) launch=("$PYTHON" -m accelerate.commands.launch --multi_gpu --num_processes "$NUM_GPUS") ;;
  *) echo "LAUNCHER is '$LAUNCHER', expected torchrun, deepspeed or accelerate" >&2; exit 2 ;;
esac
exec "${launch[@]}" train_mpo.py --config "$CONFIG" "$@"
