#!/usr/bin/env bash
# Builds the site of the documentation into build/docs, or shows it while you write: `bash scripts/docs.sh [serve [flag ...]]`
# A broken link, a missing anchor or a page that the navigation lacks is an error.
#
# What builds it is in an environment of its own, made at the first call (extra `docs`, neither torch nor vLLM):
#   DOCS_VENV  its folder (default: .venv-docs)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
DOCS_VENV="${DOCS_VENV:-.venv-docs}"
PINS=scripts/constraints-docs.txt
INPUTS="$(cat pyproject.toml "$PINS" | sha256sum)"
fail() { echo "docs: $1" >&2; exit 1; }

[[ $# == 0 || "$1" == serve ]] || fail "'$1': nothing, to build the site, or serve, to look at it while you write"
if [[ "$(cat "$DOCS_VENV/.stamp" 2>/dev/null)" != "$INPUTS" ]]; then
  echo "docs: installing into $DOCS_VENV (once, half a minute)"
  found=""
  for name in python3.12 python3.11 python3.13 python3 python; do
    if "$name" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
      found="$name"
      break
    fi
  done
  [[ -n "$found" ]] || fail "Python 3.11, 3.12 or 3.13 with venv and ensurepip is needed"
  "$found" -m venv "$DOCS_VENV"
  "$DOCS_VENV/bin/python" -m pip install --quiet --disable-pip-version-check -c "$PINS" -e '.[docs]' \
    || fail "the packages could not be installed"
  echo "$INPUTS" > "$DOCS_VENV/.stamp"
fi

export NO_MKDOCS_2_WARNING=1  # what it warns of is in docs/architecture.md
PYTHON="$DOCS_VENV/bin/python"
"$PYTHON" scripts/docs/stage.py build/docs_pages
if [[ "${1:-}" == serve ]]; then
  while sleep 1; do "$PYTHON" scripts/docs/stage.py build/docs_pages; done &
  trap "kill $!" EXIT
  "$DOCS_VENV/bin/mkdocs" serve --livereload --config-file scripts/docs/mkdocs.yml "${@:2}"
  exit
fi
"$DOCS_VENV/bin/mkdocs" build --strict --quiet --config-file scripts/docs/mkdocs.yml
echo "docs: build/docs/index.html, to be opened from the disk or put on any server"
