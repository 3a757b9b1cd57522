# Sourced by the other scripts: make or reuse a virtual environment, and install the package into it.
#
#   make_venv FOLDER REQUIREMENT...   afterwards $PYTHON is the environment's interpreter

find_python() {
  local candidate
  for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "no Python from 3.10 to 3.13 was found" >&2
  return 1
}

make_venv() {
  local folder=$1 stamp
  shift
  if [ ! -x "$folder/bin/python" ]; then
    "$(find_python)" -m venv "$folder"
  fi
  PYTHON=$PWD/$folder/bin/python
  stamp="$(cat pyproject.toml) $*"
  if [ "$(cat "$folder/.installed" 2>/dev/null)" != "$stamp" ]; then
    "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@"
    printf '%s' "$stamp" >"$folder/.installed"
  fi
}
