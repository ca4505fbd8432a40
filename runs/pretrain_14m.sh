#!/usr/bin/env bash
# Pre-training on several machines, from img2dataset's shards to a checkpoint. On every machine:
#   NUM_NODES=4 HEAD=node0:29500 runs/pretrain_14m.sh WEB HUMAN VOCABULARY OUT [--set key=value ...]
# WEB and HUMAN are data sets that all machines can read, VOCABULARY is BERT's vocab.txt, OUT a folder
# that all can write. One machine alone needs neither NUM_NODES nor HEAD. RECIPE names another recipe.
# A run that was stopped goes on by the same command, also on another number of machines.
set -euo pipefail
if [[ $# -lt 4 ]]; then
  echo "usage: runs/pretrain_14m.sh WEB HUMAN VOCABULARY OUT [--set key=value ...]" >&2
  exit 2
fi
web="$1" human="$2" vocabulary="$3" out="$4"
shift 4
recipe="${RECIPE:-$(dirname "${BASH_SOURCE[0]}")/../recipes/pretrain.yaml}"
python="${PYTHON:-python}"
devices="${NUM_DEVICES:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
where=(--standalone)
if [[ "${NUM_NODES:-1}" -gt 1 ]]; then
  where=(--nnodes "$NUM_NODES" --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id openblip)
fi
exec "$python" -m torch.distributed.run "${where[@]}" --nproc-per-node "$devices" --max-restarts 3 \
  -m openblip pretrain "$recipe" --out "$out" \
  --set "data=[$web, $human]" --set "vocabulary=$vocabulary" "$@"
