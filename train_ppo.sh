#!/usr/bin/env bash
# PPO from nothing to a trained search agent: `bash train_ppo.sh [experiment=...] [key=value ...]`
# Without arguments: the closed world on this machine. `--help` lists every key.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/setup.sh
exec "$PYTHON" -m search_r1.launch --config-name ppo "$@"
