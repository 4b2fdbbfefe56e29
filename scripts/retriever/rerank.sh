#!/usr/bin/env bash
# A cross-encoder over BM25: CORPUS=… INDEX=… bash scripts/retriever/rerank.sh [flags of the server, another engine among them]
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -P -m search_r1.cli serve --retriever_name bm25 \
  --reranker "${RERANKER:-cross-encoder/ms-marco-MiniLM-L12-v2}" --rerank_depth 20 \
  --index_path "${INDEX:-$ROOT/indexes/bm25}" --corpus_path "${CORPUS:?the corpus, a JSONL file}" "$@"
