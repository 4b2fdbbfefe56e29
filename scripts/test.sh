#!/usr/bin/env bash
# Everything needed to pass the tests, then the tests: `bash scripts/test.sh [pytest arguments]`
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SETUP_EXTRA=dev source scripts/setup.sh
export WANDB_MODE=offline HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1
exec "$PYTHON" -m pytest "$@"
