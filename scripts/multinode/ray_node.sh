#!/usr/bin/env bash
# Joins this machine to a Ray cluster, until Ctrl-C or SIGTERM ends it:
#   bash scripts/multinode/ray_node.sh head [options of ray start]         the first machine; listens on port 6379
#   bash scripts/multinode/ray_node.sh HOST:6379 [options of ray start]    every other machine
# RAY_AUTH_MODE is token (default: the head makes ~/.ray/auth_token, which must be the same on all machines) or disabled.
set -euo pipefail
HEAD="${1:?head, or the address of the head: HOST:6379}"
shift
cd "$(dirname "${BASH_SOURCE[0]}")/../.."  # the processes of a run start here: its relative paths mean the same everywhere
source scripts/setup.sh
export RAY_AUTH_MODE="${RAY_AUTH_MODE:-token}" RAY_USAGE_STATS_ENABLED="${RAY_USAGE_STATS_ENABLED:-0}"
export RAY_worker_niceness="${RAY_worker_niceness:-0}"  # at Ray's 15 any other busy process starves the run
RAY=("$PYTHON" -m ray.scripts.scripts)
[[ "$HEAD" == head ]] || exec "${RAY[@]}" start --address "$HEAD" --block "$@"
[[ "$RAY_AUTH_MODE" != token ]] || "${RAY[@]}" get-auth-token --generate >/dev/null
exec "${RAY[@]}" start --head --block "$@"
