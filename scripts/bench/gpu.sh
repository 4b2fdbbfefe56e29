#!/usr/bin/env bash
# Runs the checks that need a GPU, on one card in ten minutes; `--help` lists the options (gpu_smoke.py).
#
#   bash scripts/bench/gpu.sh [--device cpu] [--only STAGE ...] [--peak-tflops 989]
#   bash scripts/bench/gpu.sh --python /usr/bin/python3    # or SMOKE_PYTHON=...: an existing environment
#
# Without --python the environment is made first (scripts/setup.sh), which needs a package index. With it nothing is
# installed. At the end the tests run: `pytest tests/gpu`.
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
