#!/usr/bin/env bash
# Lint, types and tests, in .venv, made where it is missing.
#
#   bash scripts/test.sh            everything but fuzzing
#   bash scripts/test.sh --core     what needs no Keras, with the core dependencies alone, in .venv-core;
#                                   with slices of fuzzing and fault injection
#   bash scripts/test.sh --lowest   the tests with the lowest versions that pyproject.toml admits, in .venv-lowest
#
# What is missing on this machine (a browser, strace) skips tests; the summary at the end names them.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/_venv.sh
clear_environment
export TF_CPP_MIN_LOG_LEVEL=3 CUDA_VISIBLE_DEVICES=
run_tests() { "$PYTHON" -m pytest -r s --numprocesses auto --maxprocesses 4 --dist loadfile "$@"; }

case ${1-} in
  "")
    make_venv .venv install -e ".[test]"
    use_empty_home
    "$PYTHON" -m ruff check .
    "$PYTHON" -m ruff format --check .
    "$PYTHON" -m mypy
    run_tests -m "not fuzz"
    ;;
  --core)
    make_venv .venv-core install -e ".[test-core]"
    use_empty_home
    "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(any(map(u.find_spec, ["keras", "tensorflow", "jax", "ml_dtypes"])))' ||
      { echo "the core environment has more than the core" >&2; exit 1; }
    # What strangers' files do to the same versions, the run without an option tries.
    run_tests -m "not keras" --ignore-glob="*/hostile/test_hostile_*"
    ;;
  --lowest)
    make_venv .venv-lowest install_lowest test
    use_empty_home
    "$PYTHON" scripts/lowest.py check
    # Old versions warn of the newer ones that they depend on. JAX and Keras 2 are there for the tests alone.
    run_tests -m "not fuzz" -k "not jax and not tf_keras and not related_trainings" -W ignore::DeprecationWarning
    ;;
  *)
    sed -n '4,7s/^# *//p' "$0" >&2
    exit 2
    ;;
esac
