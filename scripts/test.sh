#!/usr/bin/env bash
# Lint, types and tests, in .venv, made where it is missing.
#
#   bash scripts/test.sh          everything but fuzzing
#   bash scripts/test.sh --core   what needs no Keras, with the core dependencies alone, in .venv-core;
#                                 with slices of fuzzing and fault injection
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/_venv.sh
export TF_CPP_MIN_LOG_LEVEL=3 CUDA_VISIBLE_DEVICES=

if [ "${1-}" = --core ]; then
  make_venv .venv-core -e . "pytest>=8.0" "hypothesis>=6.100"
  "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(any(map(u.find_spec, ["keras", "tensorflow", "jax", "ml_dtypes"])))' ||
    { echo "the core environment has more than the core" >&2; exit 1; }
  # Fault injection needs strace; without it, those tests are skipped.
  if ! command -v strace >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    { apt-get -qq update && apt-get -qq install --yes strace; } >/dev/null 2>&1 || true
  fi
  "$PYTHON" -m pytest -m "not keras" -r s
  exit
fi

make_venv .venv -e ".[tensorflow,test]"
# The report's page is opened in a browser; without one, those tests are skipped.
if ! command -v chromium >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
  { apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium; } >/dev/null 2>&1 || true
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest -m "not fuzz"
