#!/bin/sh
# compute-sanitizer on one launch of each kernel, every one in a process of its own: whose fault is an error?
#
#   benchmarks/sanitize.sh [OUT] [RUN...]      RUN: TOOL:LAUNCH:FILTER, default: all below
#
# Prints one line per run that is not clean, and the clean ones by name. Logs and sanitize.txt go to OUT (default:
# results). LAUNCH is a name of `python -m benchmarks launch`, or a test of the GoogleTest binary CUDA_TEST (no torch in
# that process); FILTER is a part of the mangled names of the kernels that are looked at. JOBS runs go at a time, each for at most LIMIT seconds.
set -u
if [ "$1" = --one ]; then
  out=$2 tool=${3%%:*} rest=${3#*:}
  launch=${rest%%:*} filter=${rest#*:}
  log=$out/sanitize-$(echo "$3" | tr ':/*' '---').log
  set -- compute-sanitizer --tool "$tool" --error-exitcode 9
  # initcheck has to see who wrote the inputs.
  [ "$tool" = initcheck ] || set -- "$@" --kernel-name "kernel_substring=$filter"
  case $launch in
  blocking,*) set -- "$@" --force-blocking-launches ;;
  eager,*) export CUDA_MODULE_LOADING=EAGER ;;
  esac
  name=$launch launch=${launch#*,}
  case $tool in initcheck) export PYTORCH_NO_CUDA_MEMORY_CACHING=1 ;; esac
  case $launch in
  Plan.*) set -- "$@" "$CUDA_TEST" "--gtest_filter=$launch" ;;
  *) set -- "$@" python3 -m benchmarks launch "$launch" ;;
  esac
  timeout "${LIMIT:-90}" "$@" >"$log" 2>&1
  code=$?
  said=$(grep -aE 'Internal Sanitizer|SUMMARY|No kernel' "$log" | sed 's/^=* *//' | sort -u | tr '\n' ';' | cut -c1-90)
  case $code in 0) verdict=ok ;; 9) verdict=FOUND ;; 124) verdict=TIMEOUT ;; *) verdict="EXIT $code" ;; esac
  printf '%-8s %-11s %-22s %-16s %s\n' "$verdict" "$tool" "$name" "$filter" "$said"
  exit 0
fi

out=${1:-results}
[ $# -gt 0 ] && shift
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" CUDA_TEST="${CUDA_TEST:-build/dev/cuda_test}"
if [ $# -eq 0 ]; then
  # The tool alone; then each kernel; then each kernel with nothing else looked at; then other ways of launching.
  set -- racecheck:torch:softmax racecheck:Plan.Decode:plan \
    racecheck:plan:flux racecheck:decode:flux racecheck:decode-paged:flux racecheck:sm80-prefill:flux \
    racecheck:sm80-prefill-split:flux racecheck:sm90-prefill:flux racecheck:sm90-prefill-d64:flux \
    racecheck:sm90-prefill-d64-wide:flux racecheck:sm90-prefill-long:flux racecheck:sm90-prefill-d256:flux \
    racecheck:sm90-prefill-split:flux racecheck:sm90-block-lists:flux racecheck:router-layer:flux \
    racecheck:backward:flux racecheck:backward-d64:flux racecheck:backward-d256:flux \
    racecheck:backward-block-lists:flux \
    racecheck:mixture:flux racecheck:mixture-d64:flux racecheck:mixture-d256:flux racecheck:mixture-long:flux \
    racecheck:mixture-block-lists:flux racecheck:mixture-backward:flux racecheck:mixture-backward-d64:flux \
    racecheck:mixture-backward-d256:flux racecheck:mixture-backward-block-lists:flux \
    racecheck:router-head:flux \
    racecheck:plan:plan_kernel racecheck:plan:attend_kernel racecheck:decode:attend_kernel \
    racecheck:decode:combine racecheck:sm80-prefill:attend_kernel racecheck:sm90-prefill:attend_kernel \
    racecheck:blocking,decode:flux racecheck:eager,decode:flux racecheck:eager,plan:plan_kernel
  for tool in synccheck memcheck initcheck; do
    for launch in plan decode sm80-prefill sm90-prefill sm90-prefill-split router-layer backward backward-d256 \
      mixture mixture-d256 mixture-backward mixture-backward-d256; do
      set -- "$@" "$tool:$launch:flux"
    done
  done
  # On a whole model's step racecheck fails by itself, and initcheck does not see what TMA writes.
  set -- "$@" synccheck:model-step:flux memcheck:model-step:flux
fi
command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer"; exit 1; }
[ -x "$CUDA_TEST" ] || echo "no $CUDA_TEST: its run will fail"
printf '%s\n' "$@" | xargs -P "${JOBS:-6}" -I{} sh "$0" --one "$out" {} | sort >"$out/sanitize.txt"
grep -v '^ok ' "$out/sanitize.txt" && found=1
awk '$1 == "ok" { clean[$2] = clean[$2] " " $3 (($4 == "flux") ? "" : "(" $4 ")") }
     END { for (tool in clean) print "clean", tool ":" clean[tool] }' "$out/sanitize.txt" | fold -s -w 140
exit ${found:-0}
