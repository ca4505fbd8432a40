#!/usr/bin/env bash
# A model of two images from nothing, in minutes on a CPU: runs/nlvr_cpu.sh DATA OUT
# DATA holds nlvr/ (see runs/nlvr_data.py). A run that was stopped goes on.
set -euo pipefail
if [[ $# -ne 2 ]]; then
  echo "usage: runs/nlvr_cpu.sh DATA OUT" >&2
  exit 2
fi
here="$(dirname "${BASH_SOURCE[0]}")"
python="${PYTHON:-python}"
pairs="$2/data"
if [[ ! -d "$pairs" ]]; then
  rm -rf "$pairs.unfinished"
  "$python" "$here/nlvr_data.py" "$1" "$pairs.unfinished"
  mv "$pairs.unfinished" "$pairs"
fi
if [[ ! -d "$2/model" ]]; then
  "$python" -m openblip finetune nlvr "$here/../recipes/nlvr_cpu.yaml" \
    --set "data=[$pairs/train.jsonl]" --out "$2/model"
fi
"$python" -m openblip evaluate nlvr "$2/model" "$pairs/train.jsonl"
"$python" -m openblip evaluate nlvr "$2/model" "$pairs/test.jsonl" \
  --predictions "$2/predictions.csv"
