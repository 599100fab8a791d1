#!/bin/sh
# Convert a model, prove every file, publish the reports; the job's verdict is the exit code.
#
#   MODEL=./my-model OUT=release TYPES="Q8_0 Q4_K_M" sh examples/ci/release.sh
#
# MODEL      a Hugging Face folder (or any other source)
# OUT        where artifacts and reports go
# TYPES      llama-quantize's names
# TEXT       evaluation text, one that was not used for calibration (default: a built-in excerpt)
# BASELINES  folder with NAME.json of the last release: a figure that became worse fails the job
# WINDOWS    windows of 512 tokens to compare
# LCONVERT   how to call lconvert
#
# Exit codes: 0 all gates passed, 1 a gate failed, 2 usage or input, 3 a required runtime is missing.
set -u
MODEL=${MODEL:?the model to release}
OUT=${OUT:-release}
TYPES=${TYPES:-Q8_0 Q4_K_M}
TEXT=${TEXT:-}
BASELINES=${BASELINES:-}
WINDOWS=${WINDOWS:-8}
LCONVERT=${LCONVERT:-lconvert}

mkdir -p "$OUT/reports" || exit 2
verdict=0
reports=
for type in $TYPES; do
  name=$(basename "$MODEL")-$type
  $LCONVERT hf-to-gguf "$MODEL" --type "$type" -o "$OUT/$name.gguf" --force --no-validate || exit $?
  set -- "$MODEL" "$OUT/$name.gguf" --require llamacpp --windows "$WINDOWS" --report "$OUT/reports/$name.json"
  if [ -n "$TEXT" ]; then set -- "$@" --text "$TEXT"; fi
  if [ -n "$BASELINES" ] && [ -f "$BASELINES/$name.json" ]; then set -- "$@" --baseline "$BASELINES/$name.json"; fi
  code=0
  $LCONVERT validate "$@" || code=$?
  # No report was written for wrong usage or input: there is nothing to publish, and nothing was proven.
  if [ "$code" -eq 2 ]; then exit 2; fi
  # 1 (a gate failed) says more than 3 (something was not proven).
  if [ "$code" -eq 1 ] || { [ "$code" -ne 0 ] && [ "$verdict" -eq 0 ]; }; then verdict=$code; fi
  reports="$reports $OUT/reports/$name.json"
done

# shellcheck disable=SC2086 # names made above, without blanks
$LCONVERT report $reports -o "$OUT/reports/report.html" --junit "$OUT/reports/junit.xml" \
  --markdown "$OUT/reports/summary.md" --card "$OUT" || exit $?
exit "$verdict"
