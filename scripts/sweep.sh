#!/usr/bin/env bash
# Runs a list of overrides, each with its seeds, one after the other: bash scripts/sweep.sh SWEEP.yaml [--help]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
exec "$PYTHON" scripts/bench/sweep.py "$@"
