#!/bin/sh
# Build a TensorRT engine without a GPU, from a graph whose numbers ONNX Runtime has shown to be the model's.
#
#   MODEL=./my-model OUT=engines SMS=80,86,89 sh examples/ci/build_engines.sh
#
# MODEL     a Hugging Face folder (or any other source)
# OUT       where engine, manifest and report go
# SMS       compute capabilities to build for
# PRESET    what quantizes a plain model: a flag of hf-to-vllm without its dashes, or nothing
# TEXT      text for calibration, where the preset needs one
# PROFILE   further options of build-engine, such as "--batch 1:1:4 --sequence 1:1:512 --past 0:256:1024"
# LCONVERT  how to call lconvert, PYTHON the interpreter beside it
#
# Exit codes: 0 built and gated, 1 the gate failed, 2 usage, input or a rule of TensorRT's, 3 a package is missing.
set -eu
MODEL=${MODEL:?the model to build}
OUT=${OUT:-engines}
SMS=${SMS:-80,86,89}
PRESET=${PRESET:-}
TEXT=${TEXT:-}
PROFILE=${PROFILE:-}
LCONVERT=${LCONVERT:-lconvert}
PYTHON=${PYTHON:-python}
HERE=$(dirname "$0")

mkdir -p "$OUT"
if [ -f "$OUT/model.plan.manifest.json" ]; then
  echo "cached: $OUT/model.plan"
  exit 0
fi
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
source=$MODEL
if [ -n "$PRESET" ]; then
  # One quantized folder is the source of both graphs, so that both have the same integers.
  set -- "$MODEL" "--$PRESET" -o "$scratch/quantized" --no-validate --no-card
  if [ -n "$TEXT" ]; then set -- "$@" --calibration "$TEXT"; fi
  $LCONVERT hf-to-vllm "$@"
  source=$scratch/quantized
fi
$LCONVERT plan "$source" --to trt --sm "$SMS" --json > "$OUT/plan.json"
$PYTHON "$HERE/engine_gate.py" "$source" --report "$OUT/parity.json"
# shellcheck disable=SC2086 # options, split on blanks
$LCONVERT build-engine "$source" -o "$OUT/model.plan" --sm "$SMS" --json $PROFILE > "$OUT/build.json"
echo "built $OUT/model.plan for SM $SMS; it was not run"
