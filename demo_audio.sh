#!/usr/bin/env bash
# The whole pipeline on the speech in samples/speech; `make demo-audio` runs this file.
set -euo pipefail
cd "$(dirname "$0")"
config=configs/speech.yaml

echo "Tokenmill on the speech in samples/speech (4.7 minutes to train on, 0.9 held out), on this machine's CPU:"
echo "  train an FSP codec > freeze it > tokenize to Parquet > verify > evaluate > decode"
echo "This takes a few minutes on two idle cores, most of it for training. All results go to runs/speech."
echo "Interrupted? Run it again: it continues. To start over, delete runs/speech first."
step() { echo; echo "\$ tokenmill $*"; tokenmill "$@"; }

step train    "$config"
step codebook "$config"
step tokenize "$config"
step status   "$config"
step verify   "$config" --deep
step evaluate "$config" 'data.shards=samples/speech/heldout/*.tar'
step decode   "$config"

echo
echo "Look at runs/speech/reports/index.html: it links all pages of this run, such as held-out clips to compare with their"
echo "reconstructions from tokens (1.66 kbit/s). Wav files decoded from the Parquet rows are in runs/speech/decoded."
