#!/usr/bin/env bash
# Installs everything that the tests need, then runs them: `bash scripts/test.sh [pytest arguments]`
# Tests marked `slow` take minutes, and their parts have tests of their own; they run only with `-m slow`.
# On a machine with a GPU the tests in tests/gpu run, and those that start an engine on the CPU are
# skipped with a reason.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SETUP_EXTRA=dev source scripts/setup.sh
# for the servers that the tests start; the program itself does not need this
export no_proxy="localhost,127.0.0.1${no_proxy:+,$no_proxy}"
export WANDB_MODE=offline HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1
WORKERS=3  # whole runs spend half of their time waiting; on a GPU they would share its memory
[[ "$DEVICE" == cpu ]] || WORKERS=0
# files in the order of tests/conftest.py, the longest first, and not by their number of tests
exec "$PYTHON" -m pytest -n "$WORKERS" --dist loadfile --no-loadscope-reorder "$@"
