#!/usr/bin/env bash
# The whole road on the photos in samples/. Each line is a command that a user would type; `make demo` runs this file.
set -euo pipefail
cd "$(dirname "$0")"
config=configs/demo.yaml
rm -rf runs/demo

echo "Tokenmill on the photos in samples/ (491 tiles to train on, 108 held out), on this machine's CPU:"
echo "  train a VP-VAE (no codebook) > make its codebook > tokenize to Parquet > prove it > evaluate > decode"
echo "Some minutes on two idle cores; training is most of it. Everything goes to runs/demo."
step() { echo; echo "\$ tokenmill $*"; tokenmill "$@"; }

step train    "$config"
step codebook "$config"
step tokenize "$config"
step status   "$config"
step verify   "$config" --deep
step evaluate "$config" 'data.shards=samples/heldout/*.tar'
step decode   "$config"

echo
echo "Look at:"
echo "  runs/demo/reports/evaluate-vp_vae-K1024.png    held-out photos; right of each, what its tokens (10 bits for 64 pixels) decode to"
echo "  runs/demo/reports/evaluate-vp_vae-K1024.html   the same with quality and codebook usage"
echo "  runs/demo/reports/train.html                   training curves, and photos as they were rebuilt on the way"
echo "  runs/demo/decoded/                             pictures made from the Parquet rows alone"
