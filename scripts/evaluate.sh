#!/usr/bin/env bash
# Evaluates a model: bash scripts/evaluate.sh MODEL [experiment=...] [method=...] [key=value ...]; --help says more.
set -euo pipefail
MODEL="${1:?the model: a folder, a checkpoint, a name of the Hugging Face hub, or --help}"
shift
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
exec "$PYTHON" -P -m search_r1.cli evaluate "$MODEL" "$@"
