#!/bin/sh
# Everything that needs a GPU, in one go: tests, memory and race checks, benchmarks.
#
#   benchmarks/device_check.sh [OUT] [full|quick]
#
# Run from the root of a checkout (or of a copy of flux_ext/, python_tests/, benchmarks/) that holds built libraries.
# CUDA_TEST names the GoogleTest binary (default: build/dev/cuda_test). Logs and tables go to OUT (default: results).
OUT=${1:-results}
SIZE=${2:-full}
CUDA_TEST=${CUDA_TEST:-build/dev/cuda_test}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
mkdir -p "$OUT"
failed=0
step() { # name, command...
  name=$1
  shift
  echo "== $name"
  "$@" >"$OUT/$name.log" 2>&1 || { failed=1; echo "FAILED: $name"; }
  tail -n "${LINES_SHOWN:-15}" "$OUT/$name.log"
}

step gpu nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv
if [ -x "$CUDA_TEST" ]; then step cuda_test "$CUDA_TEST" --gtest_brief=1; else echo "no $CUDA_TEST: skipped"; fi
step pytest python3 -m pytest -q --tb=short -p no:cacheprovider python_tests/test_cuda.py \
  python_tests/test_cuda_models.py python_tests/test_attention.py python_tests/test_append.py -k "cuda or gpu"
# Kernels that overlap (programmatic dependent launch) are beyond racecheck, so launches block under the sanitizers.
# A sample of every kernel: each dimension, tile shape and layout.
sample='test_route_many or (test_attend and (q1_1_1 or q9_9_9 or q200_63_129) and bfloat16)'
sample="$sample or (twin and cuda and 3steps) or wrong_values"
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    step $tool compute-sanitizer --tool $tool --force-blocking-launches --kernel-name kernel_substring=flux --error-exitcode 1 python3 -m pytest -q -x -p no:cacheprovider \
      python_tests/test_cuda.py python_tests/test_append.py -k "$sample"
  done
else
  echo "no compute-sanitizer: skipped"
fi
LINES_SHOWN=80
if [ "$SIZE" = quick ]; then
  step benchmark python3 -m benchmarks.cuda --out "$OUT" --quick
else
  step benchmark python3 -m benchmarks.cuda --out "$OUT"
fi
exit $failed
