#!/usr/bin/env bash
# BM25 on the CPU, no Java: CORPUS=corpus.jsonl INDEX=indexes/bm25 bash scripts/retriever/bm25.sh [flags of the server]
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -P -m search_r1.cli serve --retriever_name bm25 \
  --index_path "${INDEX:-$ROOT/indexes/bm25}" --corpus_path "${CORPUS:?the corpus, a JSONL file}" "$@"
