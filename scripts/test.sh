#!/usr/bin/env bash
# Installs everything that the tests need, then runs them: `bash scripts/test.sh [pytest arguments]`
# Left out, unless asked for by `-m slow`, are those that take minutes and whose parts have tests of
# their own. On a machine with a GPU those of tests/gpu run, and all that start no engine on the CPU;
# the others say why they are left out.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
SETUP_EXTRA=dev source scripts/setup.sh
# the tests' own servers; the program needs no such help
export no_proxy="localhost,127.0.0.1${no_proxy:+,$no_proxy}"
export WANDB_MODE=offline HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export RAY_USAGE_STATS_ENABLED=0 OMP_NUM_THREADS=1
WORKERS=2  # whole runs spend half of their time waiting; on a GPU they would share its memory
[[ "$DEVICE" == cpu ]] || WORKERS=0
# files in the order of tests/conftest.py, the longest first, and not by their number of tests
exec "$PYTHON" -m pytest -n "$WORKERS" --dist loadfile --no-loadscope-reorder "$@"
