#!/bin/sh
# The frontier of SmolLM2-135M-Instruct (docs/evaluation.md), in pieces that each take less than ten minutes.
#
#   benchmarks/smollm2_frontier.sh MODEL OUT [PART...]
#
#   data        the examples, prompts as long in training as in the test, without what the dense model cannot do
#   ours        dense, all sparse, static layers and heads, counterfactual routers per layer and per head; streaming
#   published   the soft and the straight-through objective beside them, in the same table
#   pools       routers per head with pools of 32 rows, which tell a question from prose, straight through and at even odds
#   block       the same in FA-XA, where more can be sparse
#   modes       the same as ours (without static heads) in each of the papers' other modes: FA-TA, FA-XA, XA-SSA
#   table       the tables, with lines that say where they come from
#
# All parts in this order, or those that are named. MODEL is a folder that "python -m benchmarks frontier weights MODEL"
# has made; what is installed gives the text (docs/evaluation.md, "Text"). What is stopped after MINUTES (default: 9)
# goes on with the same command, from the last checkpoint of each training and the last result of each scoring; it ends
# with status 75 while something is left to do. JOBS processes share the work (default: 14, which an H200 can hold;
# start MPS first; 4 for published, pools and block).
# SEEDS (default: 0 1 2). TINY=1: a few short examples and steps, to try the script itself, also on a CPU.
set -eu
model=$1 out=$2
shift 2
[ $# -gt 0 ] || set -- data ours published pools block modes table
end=$(($(date +%s) + 60 * ${MINUTES:-9}))
export PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
python=${PYTHON:-python}
tasks="single multikey multivalue multiquery prose code"
unseen="frequentwords twohop"
codes="single multikey multivalue multiquery twohop"
long=7500 short=3500 least=2000 train=480 test=100 pool="" seeds=${SEEDS:-0 1 2} steps=300 batch=8
jobs=${JOBS:-14} backward_jobs=${JOBS:-4} # a backward pass through the backbone wants memory
pattern="--sink 64 --window 512" sparsities="0.5 0.65 0.8 0.9" calibration=360 device=${DEVICE:-cuda}
# A budget for all, and one that multikey and single, which lose most, must keep to by themselves.
modes="fa-ta fa-xa xa-ssa"
budgets="0.015nats 0.015nats,single=0.015nats,multikey=0.015nats"
further="0.03nats"
if [ -n "${TINY:-}" ]; then
  tasks="single code" unseen="" codes="single" long=700 short=600 least=500 train=8 test=2 pool="--pool-size 64"
  seeds=0 steps=2 batch=2 jobs=1 backward_jobs=1 pattern="--sink 16 --window 192" sparsities=0.5 calibration=2 device=cpu
  budgets="0.015nats,single=0.015nats" further=0.06nats
fi
mkdir -p "$out"

left() { echo $((end - $(date +%s))); }
piece() { # command...: for as long as there is time; ends the script where that is not enough
  [ "$(left)" -gt 10 ] || exit 75
  status=0
  timeout "$(left)" "$@" || status=$?
  [ $status -ne 124 ] || exit 75
  [ $status -eq 0 ] || exit $status
}
make_data() { # file, options...
  file=$1
  shift
  [ -e "$out/$file" ] || {
    piece "$python" -m flux_ext make-data --model "$model" --output "$out/new-$file" "$@"
    mv "$out/new-$file" "$out/$file"
  }
}
frontier() { # folder, options...
  folder=$1
  shift
  # shellcheck disable=SC2086
  piece "$python" -m benchmarks frontier --model "$model" --data "$out/train.jsonl" \
    --test "$out/test-0.jsonl" "$out/test-1.jsonl" --output "$out/$folder" --granularity layer head --seeds $seeds \
    --budgets $budgets --calibrate $further --calibration-count $calibration --static-sparsity $sparsities \
    --teacher-forced $codes --steps $steps --batch-size $batch --save-steps 25 --eval-batch-size 24 \
    --jobs $jobs --device $device $pattern $pool "$@"
}
small_pools() { # folder, options...
  folder=$1
  shift
  frontier "$folder" --granularity head --static none --objective straight_through even_odds --pool-size 32 --jobs "$backward_jobs" "$@"
}

for part in "$@"; do
  case $part in
    # shellcheck disable=SC2086
    data)
      make_data train.jsonl --split train --tasks $tasks --length $long --min-length $least --count $train
      make_data test-0.jsonl --tasks $tasks $unseen --length $long --min-length $least --count $test --seed 0
      make_data test-1.jsonl --tasks $tasks $unseen --length $short --min-length $least --count $test --seed 1
      ;;
    ours) frontier streaming --static layer head --objective counterfactual ;;
    published) frontier streaming --static layer head --objective counterfactual soft straight_through --jobs $backward_jobs ;;
    pools) small_pools pool32 ;;
    block) small_pools fa-xa-pool32 --preset fa-xa ;;
    modes) for mode in $modes; do frontier "$mode" --preset "$mode" --static layer --objective counterfactual; done ;;
    table)
      commit=${FLUX_COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
      gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 || true)
      versions=$("$python" -c "import torch, transformers as t; print(f'torch {torch.__version__}, transformers {t.__version__}')")
      for folder in streaming pool32 fa-xa-pool32 $modes; do
        [ -e "$out/$folder/frontier.csv" ] || continue
        "$python" -m benchmarks frontier table "$out/$folder/frontier.csv" --header "device: ${gpu:-CPU}; $versions; commit $commit" \
          --header "model: $(basename "$model"); command: ${TINY:+TINY=1 }benchmarks/smollm2_frontier.sh MODEL OUT; seeds $seeds" \
          --output "$out/smollm2-$folder-frontier.csv"
      done
      ;;
    *)
      echo "no part $part: data, ours, published, pools, block, modes or table" >&2
      exit 2
      ;;
  esac
done
