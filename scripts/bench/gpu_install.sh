#!/usr/bin/env bash
# Makes the real environment for GPUs on a machine without one: installs it, runs `pip check`, imports every GPU-only
# module, checks every keyword that the code uses. Takes 10 minutes and 11 GB; run it on every change of the pins.
#
#   bash scripts/bench/gpu_install.sh [--keep FOLDER]
#
# --keep FOLDER leaves the environment there; else it is removed. SETUP_VENV and SETUP_DEVICE are set here.
set -euo pipefail
[[ "${1:-}" != --help && "${1:-}" != -h ]] || { sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0; }
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
SCRATCH="$(mktemp -d)"
trap 'rm -rf "$SCRATCH"' EXIT
VENV="$SCRATCH/venv"
if [[ "${1:-}" == --keep ]]; then VENV="$(realpath -m "${2:?a folder}")"; fi

stub_of_the_driver() {  # stub_of_the_driver FOLDER: a libcuda.so.1 with every symbol that vLLM's compiled modules ask for
  local site="$1/lib" source="$SCRATCH/cuda.c"
  find "$site" -path '*/vllm/*' -name '*.so' -exec nm -D --undefined-only {} + 2>/dev/null \
    | awk '$1 == "U" && $2 ~ /^cu[A-Z][A-Za-z0-9_]*$/ {print $2}' | sort -u \
    | sed 's/.*/int &() { return 100; }/' > "$source"  # 100: CUDA_ERROR_NO_DEVICE
  cc -shared -fPIC -w -Wl,-soname,libcuda.so.1 -o "$SCRATCH/libcuda.so.1" "$source"
}

begin=$SECONDS
(unset VIRTUAL_ENV CONDA_PREFIX; SETUP_DEVICE=gpu SETUP_VENV="$VENV" bash scripts/setup.sh dense-gpu hub lucene web)
echo "installed in $((SECONDS - begin)) s, $(du -sm "$VENV" | cut -f1) MB"
"$VENV/bin/python" -m pip check
stub_of_the_driver "$VENV"
LD_LIBRARY_PATH="$SCRATCH${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" PYTHONPATH="$PWD" HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 \
  VLLM_LOGGING_LEVEL=ERROR "$VENV/bin/python" scripts/bench/gpu_install_checks.py
echo "pins: $(sha256sum scripts/constraints-gpu.txt | cut -c 1-16)"
