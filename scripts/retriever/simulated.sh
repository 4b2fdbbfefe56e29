#!/usr/bin/env bash
# A language model writes the passages: MODEL=… URL=http://HOST:8001/v1 bash scripts/retriever/simulated.sh [flags of the server]
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -P -m search_r1.cli serve --retriever_name simulated \
  --simulated_model "${MODEL:?the model, as its server names it}" \
  --simulated_url "${URL:?the address of its server, http://HOST:PORT/v1}" "$@"
