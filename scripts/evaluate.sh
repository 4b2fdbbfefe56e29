#!/usr/bin/env bash
# Evaluates a model: bash scripts/evaluate.sh MODEL [experiment=...] [method=...] [key=value ...]; --help says more.
set -euo pipefail
MODEL="${1:?the model: a folder, a checkpoint, a name of the Hugging Face hub, or --help}"
shift
case "$MODEL" in
  */best | */latest | */global_step_*) MODEL="$(realpath -m "$MODEL")" ;;  # names in a run folder, not all of them of folders
  *) [[ ! -e "$MODEL" ]] || MODEL="$(realpath "$MODEL")" ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/setup.sh
exec "$PYTHON" -m search_r1.evaluate "$MODEL" "$@"
