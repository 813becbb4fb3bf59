#!/usr/bin/env bash
# Tests and measures on one GPU. Each part has a time limit and writes its results at once; the table comes last.
#
#   OUT=results benchmarks/gpu.sh smoke   3 minutes: are the kernels right, and which shape of the kernel is the fastest?
#   OUT=results benchmarks/gpu.sh full    6 minutes: all tests, all benchmarks, the profiler, the sanitizer
#
# The script needs Python with torch (built for CUDA), triton, pytest and hypothesis. It uses pytest-xdist, matplotlib,
# ncu and compute-sanitizer if they are there. It installs nothing. It uses the build in the tree if there is one, and
# otherwise builds for this card. LIMIT=600 gives every part 600 seconds, for slow machines.
# Exit status: 1 if a part failed, 2 if one could not run, and summary.txt says why.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} WORKERS=${WORKERS:-14}
PROGRAMS=${PROGRAMS:-build/kernels}  # benchmarks/kernels/build.py puts them there
status=0

usage() {
  echo "usage: OUT=folder benchmarks/gpu.sh smoke|full${1:+: $1}" >&2
  exit 2
}

# part NAME SECONDS LOG COMMAND...: a command that exits with 2 could not run, and its last line says why.
part() {
  local name=$1 seconds=${LIMIT:-$2} log=$OUT/$3 begin=$SECONDS verdict code=0
  shift 3
  echo "$name: at most $seconds s"
  echo "==== $name" >>"$log"
  timeout -k 5 "$seconds" bash -c '"$@"' bash "$@" >>"$log" 2>&1 || code=$?
  case $code in
    0) verdict=passed ;;
    2) verdict="cannot run: $(tail -n 1 "$log")" ;;
    124 | 137) verdict="FAILED: not done after $seconds s" ;;
    *) verdict="FAILED with $code: $(tail -n 1 "$log")" ;;
  esac
  if [ $code = 2 ]; then [ $status = 0 ] && status=2; elif [ $code != 0 ]; then status=1; fi
  printf '%-12s %s, %s s\n' "$name" "$verdict" $((SECONDS - begin)) >>"$OUT/summary.txt"
}

# A build in the tree is used as it is, even without a GPU. Each part then says that it needs a GPU.
build() {
  local capability
  if "$PYTHON" -c 'import sys; from dracopt_ext import _C; sys.exit(not _C.cuda_architectures())' 2>/dev/null; then
    echo "uses the build that lies in the tree"
  else
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>&1) || { echo "no GPU: $capability"; return 2; }
    DRACOPT_CUDA_ARCHITECTURES=$(echo "$capability" | head -n 1 | tr -d .) DRACOPT_BUILD=force \
      "$PYTHON" setup.py -q build_ext --inplace || return
  fi
  nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,temperature.gpu --format=csv,noheader
  "$PYTHON" -m dracopt_ext
}

programs() {
  [ -x "$PROGRAMS/sweep" ] && [ -x "$PROGRAMS/check" ] && return
  command -v nvcc >/dev/null || { echo "nvcc was not found"; return 2; }
  "$PYTHON" benchmarks/kernels/build.py --out "$PROGRAMS"
}

check() { has check && "$PROGRAMS/check"; }

has() { [ -x "$PROGRAMS/$1" ] || { echo "there is no $PROGRAMS/$1"; return 2; }; }

# Says why the CUDA kernels cannot run.
available() {
  "$PYTHON" - <<'END'
import sys

try:
    import dracopt_ext

    reason = dracopt_ext.backends()["native:cuda"]
except ImportError as error:
    reason = str(error)
if reason is not None:
    print(reason)
    sys.exit(2)
END
}

# In one process a single wrong access would fail all later tests. Several processes that each use all cores would wait
# for each other.
tests() {
  local workers=() code=0
  available || return
  if "$PYTHON" -c 'import xdist' 2>/dev/null; then workers=(-n "$WORKERS" --dist worksteal); fi
  OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -W default -p no:cacheprovider --continue-on-collection-errors --tb=short --maxfail=60 \
    -o faulthandler_timeout=60 "${workers[@]}" --durations=10 -m gpu "$@" || code=$?
  [ $code != 2 ] || code=1  # pytest's 2 is a run that ended early, not one that could not begin
  return $code
}

benchmarks() { available && "$PYTHON" -m benchmarks --suite gpu "gpu tail" --out "$OUT" "$@"; }

needs() { command -v "$1" >/dev/null || { echo "$1 is not on the path"; return 2; }; }

# The profiler says where a kernel's time goes, for each mix of dtypes, in CUDA and in Triton. The problems are small,
# because every pass of ncu restores the memory.
profile() {
  needs ncu && has sweep || return
  watch "$PROGRAMS/sweep" --only project --tensors 40 --rounds 1 && watch "$PYTHON" -c "$WITH_TRITON"
}

watch() {
  ncu --clock-control none --csv --page details --kernel-name regex:step \
    --section SpeedOfLight --section WarpStateStats --section SchedulerStats --section Occupancy \
    --section LaunchStats --section InstructionStats --section MemoryWorkloadAnalysis \
    "$@" | tee /dev/stderr | sed -n '/^"ID"/,$p' >>"$OUT/profile.csv"
  return "${PIPESTATUS[0]}"
}

WITH_TRITON='
import torch, dracopt_ext
for dtype, state in ((torch.float32, None), (torch.bfloat16, torch.float32), (torch.bfloat16, None)):
    params = [torch.nn.Parameter(torch.randn(4096, 208, device="cuda", dtype=dtype)) for _ in range(40)]
    optimizer = dracopt_ext.AdamW(params, state_dtype=state, backend="triton")
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
'

sanitize() {
  local tool
  needs compute-sanitizer && has check || return
  for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 9 "$PROGRAMS/check" kernels || return
  done
}

sweep() {
  has sweep && "$PROGRAMS/sweep" "$@" >"$OUT/sweep.csv"
}

smoke() {
  part build 90 log.txt build
  part programs 180 log.txt programs
  part check 20 log.txt check
  part capture 40 log.txt tests -k first_step_of_a_process_is_captured
  part sweep 40 log.txt sweep
  part tests 80 tests.log tests -k "cuda and not triton"
  part benchmarks 70 benchmarks.log benchmarks --rounds 40 --peers \
    --case "AdamW, 1B in 300" "states and split" "1000 of 1024" "465" "step and zero"
}

full() {
  part build 90 log.txt build
  part programs 180 log.txt programs
  part check 20 log.txt check
  part sweep 20 log.txt sweep
  part sanitizer 60 log.txt sanitize
  part tests 140 tests.log tests
  part any_torch 40 tests.log tests -p tests.by_any_torch -k "cuda and (graph_replays or streams or never_waits)"
  part benchmarks 160 benchmarks.log benchmarks --rounds 40
  part profile 60 log.txt profile
}

[ $# = 1 ] || usage "one stage"
[ -n "${OUT:-}" ] || usage "OUT names the folder for the results"
case $1 in smoke | full) ;; *) usage "there is no stage '$1'" ;; esac
mkdir -p "$OUT" && OUT=$(cd "$OUT" && pwd) || usage "$OUT cannot be made"
rm -f "$OUT"/{summary.txt,log.txt,tests.log,benchmarks.log,gpu.csv,sweep.csv,profile.csv}
export OUT PYTHON WORKERS PROGRAMS WITH_TRITON
export -f available build programs check has tests benchmarks needs profile watch sanitize sweep
"$1"
echo
cat "$OUT/summary.txt"
if [ -e "$OUT/gpu.csv" ]; then "$PYTHON" -m benchmarks --show "$OUT/gpu.csv"; fi
exit $status
