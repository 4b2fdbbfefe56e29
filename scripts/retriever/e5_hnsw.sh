#!/usr/bin/env bash
# Approximate E5 search without a GPU: CORPUS=wiki-18.jsonl INDEX=e5_HNSW64.index bash scripts/retriever/e5_hnsw.sh [flags]
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -P -m search_r1.cli serve --retriever_name e5 --device cpu --batch_wait_ms 2 \
  --retriever_model "${MODEL:-intfloat/e5-base-v2}" \
  --index_path "${INDEX:?the FAISS index}" --corpus_path "${CORPUS:?the corpus, a JSONL file}" "$@"
