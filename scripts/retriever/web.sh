#!/usr/bin/env bash
# The web, with a cache: SERPAPI_API_KEY=… bash scripts/retriever/web.sh [--provider google|brave] [flags of the server]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
exec "${PYTHON:-python}" search_r1/search/serp_search_server.py --cache "${CACHE:-runs/web_cache.sqlite}" "$@"
