#!/usr/bin/env bash
# Does averaging help, and when? See evidence.py; its options are passed on.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/_venv.sh
clear_environment
export TF_CPP_MIN_LOG_LEVEL=3 CUDA_VISIBLE_DEVICES= KERAS_BACKEND=tensorflow

make_venv .venv-evidence install -e ".[plot,tensorflow]" scikit-learn mlxtend
use_empty_home
"$PYTHON" scripts/evidence.py "$@"
