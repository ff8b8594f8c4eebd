#!/usr/bin/env bash
# Compress, verify and evaluate a model; exit with an error unless the result is good enough to publish.
# usage: make_checkpoint.sh MODEL OUT TEXT MAX_KL [options of `swquant compress`]
set -euo pipefail
model=$1 out=$2 text=$3 max_kl=$4
shift 4
swquant compress "$model" "$out" "$@"
swquant verify "$out"
swquant eval "$out" --text "$text" --against "$model" --window "${WINDOW:-2048}" --limit "${WINDOWS:-4}" --max-kl "$max_kl"
