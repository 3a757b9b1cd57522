# Sourced by the other scripts: virtual environments, and surroundings that neither hide a fault nor cause one.
#
#   clear_environment                          unset all variables but those that programs and pip need
#   make_venv FOLDER install REQUIREMENT...    make or reuse a virtual environment; $PYTHON is its interpreter
#   make_venv FOLDER install_lowest EXTRA...   with the package, and the lowest versions that pyproject.toml admits
#   use_empty_home                             afterwards, since pip is configured in the home: no keras.json, no
#                                              matplotlibrc, no credentials

clear_environment() {
  local name
  for name in $(compgen -e); do
    case $name in
      HOME | PATH | PWD | TMPDIR) ;;
      PIP_* | UV_* | XDG_CONFIG_HOME | XDG_CONFIG_DIRS | XDG_CACHE_HOME) ;; # pip, and uv, which --lowest takes
      *_proxy | *_PROXY | SSL_CERT_* | *_CA_BUNDLE) ;;
      SYSTEMROOT | SystemRoot | SYSTEMDRIVE | WINDIR | COMSPEC | PATHEXT | TEMP | TMP) ;; # Windows
      USERPROFILE | APPDATA | LOCALAPPDATA | PROGRAMDATA | ProgramData) ;;
      SHELLOPTS | BASHOPTS) export -n "$name" ;; # bash does not let them be unset
      *) unset -v "$name" ;;
    esac
  done
}

make_venv() {
  local folder=$1 python stamp
  shift
  if ! find_interpreter "$folder" || ! "$PYTHON" -c 'import pip' 2>/dev/null; then
    python=$(find_python)
    rm -rf "$folder"
    "$python" -m venv "$folder"
    find_interpreter "$folder"
  fi
  # The commands in a folder that was moved name the old place.
  stamp="$PWD $("$PYTHON" --version) $* $(cat pyproject.toml)"
  if [ "$(cat "$folder/.installed" 2>/dev/null)" != "$stamp" ]; then
    "$@"
    printf '%s' "$stamp" >"$folder/.installed"
  fi
}

install() {
  "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@"
}

install_lowest() {
  local pins
  install uv
  pins=$("$PYTHON" scripts/lowest.py resolve "$@")
  install -e . $pins
}

use_empty_home() {
  unset -v XDG_CONFIG_HOME XDG_CONFIG_DIRS XDG_CACHE_HOME
  export HOME=${PYTHON%/*/*}/home
  export USERPROFILE=$HOME # Windows
  mkdir -p "$HOME"
}

find_interpreter() {
  PYTHON=$PWD/$1/bin/python
  if [ -d "$1/Scripts" ]; then # Windows
    PYTHON=$PWD/$1/Scripts/python
  fi
  [ -x "$PYTHON" ]
}

# Print the name of a Python that can make virtual environments; Debian's needs a package for that.
find_python() {
  local candidate incomplete=
  for candidate in python3 python3.13 python3.12 python3.11 python3.10 python; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      if "$candidate" -c 'import ensurepip, venv; ensurepip.version()' 2>/dev/null; then
        echo "$candidate"
        return
      fi
      incomplete=${incomplete:-$candidate}
    fi
  done
  if [ -z "$incomplete" ]; then
    echo "no Python from 3.10 to 3.13 was found" >&2
  else
    echo "$incomplete cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2
  fi
  return 1
}
