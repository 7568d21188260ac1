#!/usr/bin/env bash
# The whole life of a model, in small: data -> Hub -> load_dataset -> train -> evaluate -> Hub -> from_pretrained -> demo.
#
#   bash runs/whole_life.sh [FOLDER]              against a Hub on the loopback interface; two minutes on two CPU cores
#   OWNER=me bash runs/whole_life.sh [FOLDER]     against the real Hub, into private repositories of that owner
#
# What a stranger does runs in a virtual environment that cannot import this repository, with an empty cache.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-outputs/whole_life}
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)}
mkdir -p "$out"
[ -z "$(ls -A "$out")" ] || { echo "error: $out is not empty; give another folder" >&2; exit 2; }
out=$(cd "$out" && pwd)

say() { printf '\n== %s\n' "$*"; }

# --- where the Hub is -------------------------------------------------------------------------------------------------
private=()
if [ -n "${OWNER:-}" ]; then
  private=(--private)
else
  OWNER=ada
  "$python" tests/hub/loopback.py --address_file "$out/address" &
  trap 'kill %1 2>/dev/null' EXIT
  while [ ! -s "$out/address" ]; do sleep 0.1; done
  HF_ENDPOINT=$(cat "$out/address")
  export HF_ENDPOINT HF_TOKEN=hf_loopbackwriter HF_HUB_DISABLE_XET=1
  export HF_HOME="$out/cache"
fi

# --- who the stranger is ----------------------------------------------------------------------------------------------
# The packages of this environment, but neither the repository nor an editable installation of it.
"$python" -m venv --without-pip "$out/stranger"
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$("$out/stranger/bin/python" -c \
  'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
as_stranger() {  # code on the standard input
  (cd "$out/stranger" && HF_HOME="$out/stranger/cache" PYTHONPATH='' ./bin/python -)
}
as_stranger <<'CODE'
import importlib.util
assert importlib.util.find_spec("transformers")
assert not importlib.util.find_spec("internvl_mpo") and not importlib.util.find_spec("modeling_internvl_mpo")
CODE

# --- data -------------------------------------------------------------------------------------------------------------
say "data: preference pairs about handwritten digits, as MMPR publishes them, then as Parquet"
"$python" -m internvl_mpo.mini mmpr --output "$out/raw" --num_pictures 12
"$python" dataset_scripts/convert_mmpr.py "$out/raw" --output "$out/parquet" --name "$OWNER/MMPR-mini"
say "data: to the Hub"
"$python" -m internvl_mpo.publish dataset "$out/parquet" --output "$out/hub/MMPR-mini" --push "$OWNER/MMPR-mini" \
  "${private[@]}"
say "data: a stranger loads it"
as_stranger <<CODE
from datasets import load_dataset
pairs = load_dataset("$OWNER/MMPR-mini", split="train")
first = next(iter(load_dataset("$OWNER/MMPR-mini", split="train", streaming=True)))
assert first["id"] == pairs[0]["id"]
print(len(pairs), "pairs; the first:", first["question"], "|", first["chosen"][0]["content"])
CODE

# --- start model ------------------------------------------------------------------------------------------------------
say "start model: from scratch, only to have one"
"$python" -m internvl_mpo.mini world --output "$out/world" --num_annotated 400 --num_drills 100 --num_questions 10 \
  --num_open 2 --num_test 20
"$python" -m internvl_mpo.mini start --world "$out/world" --output "$out/start" --steps "${START_STEPS:-60}" \
  --vision_steps "${START_STEPS:-60}"
"$python" -m internvl_mpo.publish model "$out/start" --output "$out/hub/start-mini" --license mit \
  --push "$OWNER/start-mini" "${private[@]}"

# --- train and evaluate -----------------------------------------------------------------------------------------------
say "train: model and pairs come from the Hub"
"$python" train_mpo.py --model "$OWNER/start-mini" --data "hub:$OWNER/MMPR-mini" --output_dir "$out/run" --use_cpu \
  --max_steps 8 --pairs_per_step 8 --max_length 512 --max_tiles 3 --learning_rate 3e-5 --held_out_share 0.1 \
  --save_steps 8 --report_to none
say "evaluate"
"$python" evaluate_mpo.py --model "$out/run/model" --benchmarks mini --data "$out/world" --mode direct,cot \
  --max_new_tokens 32 --output "$out/evaluation"

# --- publish and use --------------------------------------------------------------------------------------------------
say "model: to the Hub, with curves and scores"
"$python" -m internvl_mpo.publish model "$out/run/model" --output "$out/hub/start-mini-MPO" --run "$out/run" \
  --evaluation "$out/evaluation" --base_model "$OWNER/start-mini" --datasets "$OWNER/MMPR-mini" --license mit \
  --push "$OWNER/start-mini-MPO" "${private[@]}"
say "model: a stranger asks it about a picture of the data set"
as_stranger <<CODE
from datasets import load_dataset
from transformers import AutoModel, AutoProcessor

name = "$OWNER/start-mini-MPO"
model = AutoModel.from_pretrained(name, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
picture = next(row["images"][0] for row in load_dataset("$OWNER/MMPR-mini", split="train") if row["images"])
messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Describe it."}]}]
inputs = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
ids = model.generate(**inputs, max_new_tokens=24, min_new_tokens=4)[0, inputs["input_ids"].shape[1]:]
assert len(ids) >= 4
print("answer:", processor.decode(ids, skip_special_tokens=True))
CODE

say "demo: built, started in an environment of its own, asked with both models from the Hub, pushed"
"$python" -m internvl_mpo.publish space --output "$out/hub/demo" --base "$OWNER/start-mini" \
  --mpo "$OWNER/start-mini-MPO" --environment borrowed --ask --push "$OWNER/demo" "${private[@]}"

say "done: $OWNER/MMPR-mini, $OWNER/start-mini-MPO and the Space $OWNER/demo"
