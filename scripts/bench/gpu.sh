#!/usr/bin/env bash
# All that only a GPU can tell: its tests, then speed and memory, on one card. Prints, and writes runs/gpu_bench.txt.
#
#   bash scripts/bench/gpu.sh [PEAK_TFLOPS]
#
# PEAK_TFLOPS is the card's dense bfloat16 peak, of which the MFU is a share (default: 989, a Hopper card). A part that
# fails is named and the others still run; the exit status is then 1. Written for 80 GB of GPU memory; the speed of 3B,
# for which the bare loop and the actor each keep 37 GB, needs 120 GB and is left out on a smaller card.
set -uo pipefail
[[ "${1:-}" != --help && "${1:-}" != -h ]] || { sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 0; }
PEAK_TFLOPS="${1:-989}"
[[ "$PEAK_TFLOPS" =~ ^[0-9]+([.][0-9]+)?$ ]] || { echo "gpu.sh: PEAK_TFLOPS is a number, not $PEAK_TFLOPS" >&2; exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
SETUP_EXTRA=dev source scripts/setup.sh
set +e
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
  || { echo "error: scripts/bench/gpu.sh needs a CUDA device, and torch sees none" >&2; exit 1; }
export WANDB_MODE=offline HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0

FAILED=()
part() {  # part TITLE COMMAND...
  local title="$1" status
  shift
  printf '\n== %s\n' "$title"
  "$@"
  status=$?
  [[ $status == 0 ]] || { FAILED+=("$title"); echo "FAILED with status $status: $title"; }
}
machine() {
  date -u +%FT%TZ
  git rev-parse --short HEAD
  nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
  "$PYTHON" - <<'PY'
from importlib.metadata import PackageNotFoundError, version
for name in ("torch", "transformers", "vllm", "flash-attn"):
    try:
        print(name, version(name))
    except PackageNotFoundError:
        print(name, "is not installed")
PY
}
update() {  # update SHAPE ROWS BUDGET
  part "the actor's update, $1" "$PYTHON" scripts/bench/update.py \
    --shape "$1" --rows "$2" --budget "$3" --peak-tflops "$PEAK_TFLOPS"
}
all() {
  part "machine" machine
  part "tests" "$PYTHON" -m pytest -q tests/gpu
  part "memory of log-probs" "$PYTHON" scripts/bench/logprob_memory.py --tokens 8192
  update 0.5B 128 16384
  update 1.5B 64 4096
  local gib
  gib="$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_properties(0).total_memory // 2**30)')"
  if ((gib >= 112)); then update 3B 64 4096; else printf '\n== the actor'"'"'s update, 3B: left out, %s GiB\n' "$gib"; fi
  part "memory, estimated and measured" "$PYTHON" scripts/bench/estimate.py
  part "trainer and engine on one GPU, 0.5B" "$PYTHON" scripts/bench/colocated.py
  if ((${#FAILED[@]})); then
    printf '\n%s failed:\n' "${#FAILED[@]}"
    printf '  %s\n' "${FAILED[@]}"
    return 1
  fi
  printf '\nall parts ran\n'
}
mkdir -p runs
all 2>&1 | tee runs/gpu_bench.txt
