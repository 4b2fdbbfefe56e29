#!/usr/bin/env bash
# An existing Lucene index: CORPUS=wiki-18.jsonl INDEX=wiki-18/bm25 bash scripts/retriever/lucene.sh [flags of the server]
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -P -m search_r1.cli serve --retriever_name lucene \
  --index_path "${INDEX:?the folder of the Lucene index}" ${CORPUS:+--corpus_path "$CORPUS"} "$@"
