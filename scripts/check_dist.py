"""Check that a wheel holds the package and nothing else, and a source distribution what builds it."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path


def main() -> int:
    folder = Path(sys.argv[1])
    (wheel,), (source,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout
    tracked = set(listed.splitlines())
    package = {name for name in tracked if name.startswith("swa_avg/")}
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name for name in archive.namelist() if ".dist-info/" not in name}
    with tarfile.open(source) as archive:
        in_source = {name.partition("/")[2] for name in archive.getnames()}
    failures = [f"{wheel.name}: {name} is missing" for name in sorted(package - in_wheel)]
    failures += [f"{wheel.name}: {name} does not belong there" for name in sorted(in_wheel - package)]
    needed = package | {"LICENSE", "README.md", "pyproject.toml", "setup.cfg"}
    failures += [f"{source.name}: {name} is missing" for name in sorted(needed - in_source)]
    print(*failures, sep="\n", end="\n" if failures else "", file=sys.stderr)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
