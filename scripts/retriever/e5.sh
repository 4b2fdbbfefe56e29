#!/usr/bin/env bash
# Exact E5 search on the GPUs: CORPUS=wiki-18.jsonl INDEX=e5_Flat.index bash scripts/retriever/e5.sh [flags of the server]
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python}" -P -m search_r1.cli serve --retriever_name e5 \
  --retriever_model "${MODEL:-intfloat/e5-base-v2}" --faiss_gpu --use_fp16 --batch_wait_ms 2 \
  --index_path "${INDEX:?the FAISS index}" --corpus_path "${CORPUS:?the corpus, a JSONL file}" "$@"
