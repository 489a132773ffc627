#!/bin/sh
# The whole way of a real model: read, convert, verify, measure, recover, measure again, publish, generate.
#
#     examples/real_model.sh MODEL WORK [REPO]
#
# MODEL is a folder, a GGUF file or a Hub repository. WORK is a folder for the results. REPO is a Hub repository to
# push to; without it nothing is uploaded. The budgets fit two CPU cores and a model of 135M parameters in 40 minutes.
# On a GPU, leave out the options after the first line of each command: the defaults are better.
set -eu
MODEL=$1 WORK=$2 REPO=${3:-}
mkdir -p "$WORK"
HERE=$(cd "$(dirname "$0")" && pwd)
cd "$WORK"
step() { printf '\n== %s (%s s)\n' "$1" "$(($(date +%s) - START))"; }
START=$(date +%s)

step 'What is it, and what can it become?'
headwise inspect "$MODEL"

step 'The parent as a folder of stock transformers'
headwise convert "$MODEL" parent --dtype bfloat16 --force

step 'Convert: half the KV cache'
headwise convert parent converted --to mla --cache 50% --force \
    --calibrate mixture --calibration-tokens 8192 --refit off

step 'Verify again, from the files alone'
headwise verify converted --against parent

step 'What did it cost?'
headwise eval converted --baseline parent --report converted-eval --force \
    --limit 16

step 'Recover quality with a short training'
headwise uptrain converted recovered --teacher parent --force \
    --recipe distill --tokens 32k --text mixture --heldout mixture \
    --set data.length=512 --set data.heldout_blocks=16 \
    --set train.batch_tokens=2048 --set train.micro_batch_tokens=512

step 'What is left of the cost?'
headwise eval recovered --baseline parent --report recovered-eval --force \
    --limit 16
headwise card recovered recovered-eval

if [ -n "$REPO" ]; then
    step 'Publish'
    headwise push recovered "$REPO" --dry-run
    headwise push recovered "$REPO"
fi

step 'Text before and after'
python "$HERE/generate.py" 'What is the capital of France?' parent converted recovered
step 'Done'
