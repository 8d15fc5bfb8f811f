#!/usr/bin/env bash
# The whole pipeline on the photos in samples/. Each line is a command that a user would type; `make demo` runs this file.
set -euo pipefail
cd "$(dirname "$0")"
config=configs/demo.yaml

echo "Tokenmill on the photos in samples/ (491 tiles to train on, 108 held out), on this machine's CPU:"
echo "  train a VP-VAE (no codebook) > make its codebook > tokenize to Parquet > verify > evaluate > decode"
echo "This takes a few minutes on two idle cores, most of it for training. All results go to runs/demo."
echo "Interrupted? Run it again: it continues. To start over, delete runs/demo first."
step() { echo; echo "\$ tokenmill $*"; tokenmill "$@"; }

step train    "$config"
step codebook "$config"
step tokenize "$config"
step status   "$config"
step verify   "$config" --deep
step evaluate "$config" 'data.shards=samples/heldout/*.tar'
step decode   "$config"

echo
echo "Look at runs/demo/reports/index.html: it links all pages of this run, such as"
echo "  held-out photos beside their reconstructions from tokens (10 bits for 64 pixels), with quality and codebook usage,"
echo "  and the training with its curves and reconstructions. Images decoded from the Parquet rows are in runs/demo/decoded."
