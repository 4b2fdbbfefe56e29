#!/usr/bin/env bash
# Makes every row of the paper's table for a list of models: trains where the method does, evaluates, prints the table.
#
#   bash scripts/nq_hotpotqa/table.sh MODEL [MODEL ...] [key=value ...]
#
# METHODS="direct rag ..." selects methods. What is finished is not repeated, so that the same command continues after an
# interruption. The retrieval server must run (docs/retriever.md). DRY_RUN=1 only prints the commands.
# PPO is slow: see `trainer.n_gpus_per_node` and the other keys of configs/experiment/nq_hotpotqa.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
[[ $# -gt 0 && "$1" != --help ]] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 1; }
PYTHON=python
[[ -n "${DRY_RUN:-}" ]] || source "$ROOT/scripts/setup.sh"
METHODS="${METHODS:-direct cot ircot search_o1 react rag search sft r1 rejection search_r1_ppo search_r1_grpo}"
MODELS=() OVERRIDES=() RESULTS=()
for argument in "$@"; do
  if [[ "$argument" == *=* ]]; then OVERRIDES+=("$argument"); else MODELS+=("$argument"); fi
done
run() {
  printf '+'
  printf ' %q' "$@"
  echo
  [[ -n "${DRY_RUN:-}" ]] || "$@"
}
for model in "${MODELS[@]}"; do
  for method in $METHODS; do
    folder="$ROOT/runs/table/$(basename "$model")/$method"
    evaluated="$model"
    config=grpo
    [[ "$method" != search_r1_ppo ]] || config=ppo
    case "$method" in sft | r1 | rejection | search_r1_*)
      evaluated="$folder/hf"
      [[ -e "$folder/hf/config.json" ]] || run "$PYTHON" -P -m search_r1.cli train --config-name "$config" \
        "experiment=baseline/$method" "actor_rollout_ref.model.path=$model" \
        "trainer.default_local_dir=$folder" "${OVERRIDES[@]}"
      ;;
    esac
    run "$PYTHON" -P -m search_r1.cli evaluate "$evaluated" "experiment=baseline/$method" \
      "trainer.default_local_dir=$folder/evaluation" "${OVERRIDES[@]}"
    RESULTS+=("$(basename "$model"), $method=$folder/evaluation")
  done
done
run "$PYTHON" -P -m search_r1.evaluation.table "${RESULTS[@]}" --out "$ROOT/runs/table"
