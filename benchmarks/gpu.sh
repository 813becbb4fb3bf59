#!/usr/bin/env bash
# Everything that needs a GPU, in less than ten minutes: builds the kernels, runs the tests and the benchmarks, and
# measures what exact arithmetic costs. Writes into the folder that OUT names; summary.txt says what passed.
# Needs a Python with torch (built for CUDA), triton, ninja, pytest, hypothesis, matplotlib; and nvcc. Installs nothing.
set -uo pipefail
cd "$(dirname "$0")/.."
: "${OUT:?names the folder for the results}"
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
failed=0

# stage NAME SECONDS COMMAND...: its output goes to NAME.log
stage() {
  local name=$1 seconds=$2 begin=$SECONDS verdict=passed
  shift 2
  timeout "$seconds" "$@" >"$OUT/$name.log" 2>&1 || { verdict="FAILED with $?"; failed=1; }
  printf '%-12s %s, %s s\n' "$name" "$verdict" $((SECONDS - begin)) | tee -a "$OUT/summary.txt"
}

build() { DRACOPT_BUILD=force "$PYTHON" setup.py -q build_ext --inplace && "$PYTHON" -m dracopt_ext; }

available() { "$PYTHON" -c 'import sys, dracopt_ext; sys.exit(dracopt_ext.backends()["native:cuda"])'; }

# In one process a single wrong access lets all later tests fail.
tests() {
  local workers=()
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n 4); fi
  "$PYTHON" -m pytest -v -W default -p no:cacheprovider --continue-on-collection-errors --tb=short --maxfail=40 \
    -o faulthandler_timeout=60 "${workers[@]}" -m gpu --deselect tests/test_benchmarks.py::test_gpu_suite
}

# Without torch's cache every tensor is an allocation of its own, so that an access beyond it is seen.
checked() {
  local tool status=0
  if ! compute-sanitizer "$PYTHON" -c 'import torch; torch.ones(1).cuda()' >/dev/null 2>&1; then
    echo "skipped: compute-sanitizer does not work on this machine"
    return
  fi
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --report-api-errors no --error-exitcode 9 \
      "$PYTHON" -m pytest -q -W default -p no:cacheprovider -m gpu tests/test_gpu.py \
      -k "cuda and (steps_of_different or complex or (misaligned and float32-float32)) and not AdamW" || status=$?
  done
  return $status
}

# The same kernels with contracted multiply-adds, which do not give the CPU's bits; against the stream of the same run.
contracted() {
  local copy
  copy=$(mktemp -d) && cp -r setup.py pyproject.toml README.md LICENSE csrc dracopt_ext triton_kernels benchmarks "$copy" && cd "$copy" &&
    NVCC_APPEND_FLAGS=--fmad=true build && "$PYTHON" -m benchmarks --suite gpu --case 1B --peers --out "$copy/results"
  local status=$?
  rm -rf "$copy"
  return $status
}

export -f build tests contracted checked
export PYTHON
: >"$OUT/summary.txt"
stage build 90 bash -c build
available || exit
stage tests 220 bash -c tests
# Triton compiles in the first steps, which are measured, too.
stage benchmarks 150 env TRITON_CACHE_DIR="$(mktemp -d)" "$PYTHON" -m benchmarks --suite gpu --out "$OUT"
stage contracted 60 bash -c contracted
stage sanitizer 70 bash -c checked
exit $failed
