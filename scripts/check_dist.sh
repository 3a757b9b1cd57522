#!/usr/bin/env bash
# Build the distributions, check what is in them, and use the wheel in an environment that has nothing else.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/_venv.sh
clear_environment

make_venv .venv-dist install build twine
work=$("$PYTHON" -c 'import tempfile; print(tempfile.mkdtemp())')
trap 'rm -rf "$work"' EXIT
"$PYTHON" -m build --outdir "$work" . >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
"$PYTHON" -m twine check --strict "$work"/*.whl "$work"/*.tar.gz
"$PYTHON" scripts/check_dist.py "$work"
cp tests/corpus/keras-3.3.3-tf/cnn_bn/ck[12].keras "$work"

"$PYTHON" -m venv "$work/venv"
cd "$work"
find_interpreter venv
install ./*.whl
"$PYTHON" -m pip --disable-pip-version-check check
PATH=${PYTHON%/*}:$PATH
swa-avg --help | head -1
swa-avg ck1.keras ck2.keras -o swa.keras
swa-avg verify swa.keras
echo "the distributions are complete, and the wheel works"
