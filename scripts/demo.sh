#!/usr/bin/env bash
# Train on real data, average the checkpoints, compare: the main job, from nothing.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/_venv.sh
clear_environment
export TF_CPP_MIN_LOG_LEVEL=3 CUDA_VISIBLE_DEVICES=

make_venv .venv install -e ".[test]"
use_empty_home
work=$("$PYTHON" -c 'import tempfile; print(tempfile.mkdtemp())')
trap 'rm -rf "$work"' EXIT
quietly() { "$@" 2>"$work/log" || { cat "$work/log" >&2; exit 1; }; } # TensorFlow greets on standard error

quietly "$PYTHON" scripts/demo.py train "$work"
cd "$work"
PATH=${PYTHON%/*}:$PATH
for command in \
  'swa-avg ckpt_*.keras -o plain.keras' \
  'swa-avg ckpt_*.keras -o swa.keras --bn-refresh train.npz' \
  'swa-avg verify swa.keras' \
  'swa-avg inspect ckpt_*.keras --report report.html' \
  'swa-avg sweep ckpt_*.keras --val val.npz --bn-refresh train.npz -o best.keras'; do
  echo "\$ $command"
  eval "$command" 2>&1
  echo
done
cd - >/dev/null
quietly "$PYTHON" scripts/demo.py compare "$work"
cp "$work/report.html" demo.html
echo
echo "The report of the checkpoints, with pictures: demo.html"
