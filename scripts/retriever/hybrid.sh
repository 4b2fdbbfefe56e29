#!/usr/bin/env bash
# BM25 and E5 fused: CORPUS=… BM25_INDEX=… E5_INDEX=… bash scripts/retriever/hybrid.sh [flags of the server]
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -P -m search_r1.cli serve --retriever_name hybrid --hybrid_of bm25 e5 \
  --index_path "${BM25_INDEX:?the BM25 index}" "${E5_INDEX:?the FAISS index}" \
  --retriever_model "${MODEL:-intfloat/e5-base-v2}" --corpus_path "${CORPUS:?the corpus, a JSONL file}" "$@"
