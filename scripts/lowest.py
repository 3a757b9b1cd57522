"""The lowest versions that pyproject.toml admits, resolved by uv, which is set up as pip is.

python scripts/lowest.py resolve EXTRA...   print what to install; what is needed besides is the newest
python scripts/lowest.py check              print pip's list of them; fail where one is not the lowest
"""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import requires

WHEELS_EXIST = sys.version_info < (3, 12)
"""Newer Pythons are newer than some of the lowest versions."""

VARIABLES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "constraint": "UV_CONSTRAINT",
    "cert": "SSL_CERT_FILE",
}
"""Options of pip, and the variables that are read by uv, which does not read pip's configuration."""


def _pip(*arguments: str) -> list[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def resolve(extras: list[str]) -> int:
    environment = dict(os.environ)
    settings = "\n".join(_pip("config", "list"))
    # Environment variables come last in pip's list, and count most.
    for section, option, value in re.findall(r"^(.*)\.([\w-]+)=(.*)$", settings, re.MULTILINE):
        if option in VARIABLES and section in ("global", "install", ":env:"):
            separator = "," if option == "find-links" else " "
            environment[VARIABLES[option]] = separator.join(ast.literal_eval(value).split())
    command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", "--python", sys.executable]
    command += [word for extra in extras for word in ("--extra", extra)]
    command += ["--resolution", "lowest-direct", "--only-binary", ":all:"]
    command += ["--index-strategy", "unsafe-best-match"]  # of all indexes, as pip takes them
    command += ["--quiet", "--no-header", "--no-annotate"]
    return subprocess.run(command, env=environment, check=False).returncode


def check() -> int:
    from packaging.utils import canonicalize_name
    from packaging.version import Version

    named = "\n".join(requires("swa-avg") or [])
    bounds = dict(re.findall(r"^([\w.-]+)(?:\[[\w,]+\])?>=([\w.]+)", named, re.MULTILINE))
    failures = dict.fromkeys(bounds, "is not installed")
    for line in _pip("list"):
        name, version = line.split()[:2]
        name = canonicalize_name(name)
        if name in bounds:
            print(line)
            failures[name] = f"is installed as {version}" if Version(version) != Version(bounds[name]) else ""
    failures = {name: failure for name, failure in failures.items() if failure}
    for name, failure in failures.items():
        print(f"{name}: pyproject.toml admits {bounds[name]}, but it {failure}", file=sys.stderr)
    return int(bool(failures) and WHEELS_EXIST)


if __name__ == "__main__":
    sys.exit(resolve(sys.argv[2:]) if sys.argv[1] == "resolve" else check())
