#!/usr/bin/env bash
# What only a GPU can tell, on one card in ten minutes; `--help` lists what can be chosen (gpu_smoke.py).
#
#   bash scripts/bench/gpu.sh [--device cpu] [--only STAGE ...] [--peak-tflops 989]
#   bash scripts/bench/gpu.sh --python /usr/bin/python3    # or SMOKE_PYTHON=...: an environment that is there already
#
# Without --python the environment is made first (scripts/setup.sh), which needs a package index; with it nothing is
# installed. Afterwards the tests: `pytest tests/gpu`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
ARGUMENTS=()
while (($#)); do
  case "$1" in
    --python) SMOKE_PYTHON="${2:?--python needs the path of an interpreter}"; shift 2 ;;
    *) ARGUMENTS+=("$1"); shift ;;
  esac
done
if [[ -n "${SMOKE_PYTHON:-}" ]]; then
  PYTHON="$SMOKE_PYTHON"
else
  SETUP_EXTRA=dev source scripts/setup.sh
fi
exec "$PYTHON" scripts/bench/gpu_smoke.py --python "$PYTHON" ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
