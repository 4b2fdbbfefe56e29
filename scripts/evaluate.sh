#!/usr/bin/env bash
# Evaluates a Hugging Face model or an exported checkpoint: bash scripts/evaluate.sh MODEL [experiment=...] [key=value ...]
# Writes trajectories, summary.json and table.md to the run folder; an interrupted evaluation goes on where it was.
set -euo pipefail
MODEL="${1:?the model: a folder, or a name of the Hugging Face hub}"
shift
[[ ! -e "$MODEL" ]] || MODEL="$(realpath "$MODEL")"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
exec "$PYTHON" -m search_r1.launch --evaluate --config-name grpo "actor_rollout_ref.model.path=$MODEL" \
  "trainer.experiment_name=evaluate-$(basename "$MODEL")" "$@"
