#!/usr/bin/env bash
# The web, with a cache: SERPAPI_API_KEY=… bash scripts/retriever/web.sh [--provider google|brave] [flags of the server]
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
exec "${PYTHON:-python}" "$ROOT"/search_r1/search/serp_search_server.py --cache "${CACHE:-$ROOT/runs/web_cache.sqlite}" "$@"
