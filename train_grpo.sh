#!/usr/bin/env bash
# GRPO from nothing to a trained search agent: `bash train_grpo.sh [experiment=...] [key=value ...]`
# Without arguments: the closed world on this machine. `--help` says what may follow.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/setup.sh"
exec "$PYTHON" -P -m search_r1.cli train --config-name grpo "$@"
