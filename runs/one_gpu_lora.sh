#!/usr/bin/env bash
# LoRA on one GPU; the second line is 4 bits for smaller ones. Settings at the end win over the run file.
#   bash runs/one_gpu_lora.sh --data MMPR/meta.json
#   CONFIG=configs/internvl2_8b_qlora.yaml bash runs/one_gpu_lora.sh --data MMPR/meta.json
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CONFIG=${CONFIG:-configs/internvl2_8b_lora.yaml}
PYTHON=${PYTHON:-python}

exec "$PYTHON" train_mpo.py --config "$CONFIG" "$@"
