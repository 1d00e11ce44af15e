#!/bin/sh
# Everything that needs a GPU.
#
#   benchmarks/device_check.sh [OUT] [quick | full | PART...]
#
#   tests      GoogleTest and pytest on the GPU            4 min
#   memcheck   compute-sanitizer on a sample of the tests  20 s
#   key        benchmarks: the cases that decide           2 min
#   bench      benchmarks: every case                      5 min
#   models     whole models, the most important first      9 min
#   sanitize   racecheck and others, kernel by kernel      2 min   (sanitize.sh)
#   profile    hardware counters, gaps in a decode step    3 min   (profile.sh)
#   compare    two builds: LIBRARIES="FOLDER FOLDER"       3 min
#   quick      tests memcheck key; full: tests memcheck bench sanitize profile models
#
# Run from the root of a checkout (or of a copy of flux_ext/, python_tests/, benchmarks/) that holds built libraries.
# OUT (default: results) gets the tables and logs.tgz, after every part: what is stopped loses only what is not done.
# MINUTES (a whole number, default 60): nothing runs beyond it. CUDA_TEST: the GoogleTest binary (default:
# build/dev/cuda_test). FLUX_COMMIT: what the tables name as the commit where there is no git. PROCESSES (default 8): of
# pytest, which share the GPU; each wants a core or two.
# TINY=1: small cases, to try the script itself; they run on a CPU too.
set -u
out=${1:-results}
[ $# -gt 0 ] && shift
minutes=${MINUTES:-60}
export CUDA_TEST="${CUDA_TEST:-build/dev/cuda_test}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export TINY="${TINY:-}"
begin=$(date +%s)
logs=$(mktemp -d)
mkdir -p "$out"
failed=0

left() { echo $((minutes * 60 - $(date +%s) + begin)); }
left_minutes() { # at most $1 minutes, and half a minute less than there are
  awk -v left="$(left)" -v most="$1" 'BEGIN { m = left / 60 - 0.5; print m < 0 ? 0 : m < most ? m : most }'
}
step() { # name, lines shown, most seconds, command...
  name=$1 lines=$2 limit=$3
  shift 3
  [ "$(left)" -lt "$limit" ] && limit=$(left)
  [ "$limit" -lt 5 ] && { echo "== $name: no time left"; failed=1; return; }
  started=$(date +%s)
  timeout "$limit" "$@" >"$logs/$name.log" 2>&1
  code=$?
  echo "== $name: $([ $code = 0 ] && echo ok || echo "FAILED ($code)"), $(($(date +%s) - started)) s"
  [ $code = 0 ] || failed=1
  tail -n "$lines" "$logs/$name.log" | cut -c1-150
  tar -czf "$out/logs.tgz" -C "$logs" .
}

run_tests() {
  step gpu 1 20 nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader
  if [ -x "$CUDA_TEST" ]; then step cuda_test 2 60 "$CUDA_TEST" --gtest_brief=1; else echo "no $CUDA_TEST: skipped"; fi
  step pytest 6 420 env OMP_NUM_THREADS=2 python3 -m pytest --numprocesses "${PROCESSES:-8}" --tb=short \
    -p no:cacheprovider python_tests/test_cuda*.py python_tests/test_attention.py python_tests/test_append.py \
    python_tests/test_block_sparse.py python_tests/test_serving_steps.py -k "cuda or gpu"
}
run_memcheck() { # each dimension, tile shape and layout once
  command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer: skipped"; return; }
  sample='test_decisions or test_misaligned or (test_attend and (q1_1_1 or q9_9_9 or q200_63_129) and bfloat16)'
  sample="$sample or (twin and cuda and 3steps) or wrong_values"
  step memcheck 3 120 compute-sanitizer --tool memcheck --kernel-name kernel_substring=flux --error-exitcode 1 \
    python3 -m pytest -x -p no:cacheprovider python_tests/test_cuda.py python_tests/test_cuda_router.py python_tests/test_append.py \
    -k "$sample"
}
run_key() {
  step key 30 240 python3 -m benchmarks cuda ${TINY:+--tiny} --out "$out" --minutes "$(left_minutes 3)" \
    --groups decode,decode-streaming,decode-mixed,router,dense,streaming,mixed-heads,selection
}
run_bench() { step bench 30 480 python3 -m benchmarks cuda ${TINY:+--tiny} --out "$out" --minutes "$(left_minutes 7)"; }
run_models() { step models 24 600 python3 -m benchmarks end_to_end ${TINY:+--runs tiny:128x1 tiny:64x4} --output "$out" --minutes "$(left_minutes 30)"; }
run_sanitize() {
  step sanitize 50 240 benchmarks/sanitize.sh "$logs/sanitize"
}
run_profile() { step profile 70 420 benchmarks/profile.sh "$out"; }
run_compare() {
  set -- # LIBRARIES is a list
  for folder in ${LIBRARIES:?two folders}; do set -- "$@" --library "$folder"; done
  step compare 60 420 python3 -m benchmarks cuda ${TINY:+--tiny} "$@" --out "$out" --minutes "$(left_minutes 5)" \
    --groups "${GROUPS_COMPARED:-decode,decode-streaming,decode-mixed,router,dense,streaming,mixed-heads}"
}

parts=
for name in "${@:-full}"; do
  case $name in
  quick) parts="$parts tests memcheck key" ;;
  full) parts="$parts tests memcheck bench sanitize profile models" ;;
  *) parts="$parts $name" ;;
  esac
done
for part in $parts; do
  case $part in
  tests | memcheck | key | bench | models | sanitize | profile | compare) "run_$part" ;;
  *) echo "no part $part"; failed=1 ;;
  esac
done
found=$(ls "$out"/cuda.csv "$out"/end_to_end-cuda.csv 2>/dev/null)
case " $parts " in *" models "*) # with the models' figures, all criteria
  [ -n "$found" ] && step criteria 40 60 python3 -m benchmarks cuda --summary $found --out "$out" ;;
esac
rm -rf "$logs"
exit $failed
