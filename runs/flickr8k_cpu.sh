#!/usr/bin/env bash
# The bootstrap loop on real photos: runs/flickr8k_cpu.sh DATA OUT
# DATA holds photos/ and web-text/ (see runs/flickr8k_data.py). A run that was stopped goes on.
set -euo pipefail
if [[ $# -ne 2 ]]; then
  echo "usage: runs/flickr8k_cpu.sh DATA OUT" >&2
  exit 2
fi
here="$(dirname "${BASH_SOURCE[0]}")"
python="${PYTHON:-python}"
sets="$2/data"
if [[ ! -d "$sets" ]]; then
  rm -rf "$sets.unfinished"
  "$python" "$here/flickr8k_data.py" "$1" "$sets.unfinished"
  mv "$sets.unfinished" "$sets"
fi
"$python" -m openblip bootstrap "$here/../recipes/flickr8k_cpu.yaml" \
  --web "$sets/web" --human "$sets/human" --test "$sets/test" --out "$2/loop"
