#!/usr/bin/env bash
# VQA from nothing on DAQUAR: runs/daquar_cpu.sh DATA OUT
# DATA holds daquar-train-*.tar and daquar-val-*.tar. A run that was stopped goes on. The accuracy
# and that of the most frequent answer to each type of question are printed at the end.
set -euo pipefail
if [[ $# -ne 2 ]]; then
  echo "usage: runs/daquar_cpu.sh DATA OUT" >&2
  exit 2
fi
here="$(dirname "${BASH_SOURCE[0]}")"
python="${PYTHON:-python}"
sets="$2/data"
if [[ ! -d "$sets" ]]; then
  rm -rf "$sets.unfinished"
  mkdir -p "$2"
  "$python" "$here/daquar_data.py" "$1" "$sets.unfinished"
  mv "$sets.unfinished" "$sets"
fi
if [[ ! -d "$2/model" ]]; then
  "$python" -m openblip finetune vqa "$here/../recipes/vqa_cpu.yaml" \
    --set "data=[$sets/train.tar]" --out "$2/model"
fi
"$python" -m openblip evaluate vqa "$2/model" "$sets/val.tar" --answers "$sets/answers.txt" \
  --shortlist 32
echo "most frequent answer to each type of question: $(cat "$sets/baseline.json")"
