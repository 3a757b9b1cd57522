"""Who may import whom (DESIGN: layering)."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import makers

HEAVY = "{'keras', 'tensorflow', 'tf_keras', 'jax', 'torch'}"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def _loaded(run_python: Run, code: str, modules: str, *arguments: object) -> str:
    report = f"import sys\n{code}\nprint('LOADED', sorted(({modules}) & set(sys.modules)))"
    ended = run_python(report, *arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.rpartition("LOADED")[2].strip()


def test_importing_the_package_loads_nothing_heavy(run_python: Run) -> None:
    assert _loaded(run_python, "import swa_avg", HEAVY[:-1] + ", 'h5py', 'numpy'}") == "[]"


def test_averaging_loads_neither_keras_nor_tensorflow(run_python: Run, tmp_path: Path) -> None:
    for number in (1, 2):
        makers.write_archive(tmp_path / f"ckpt_{number}.keras", makers.weights(number))
    code = (
        "from swa_avg import cli\n"
        "try:\n    cli.main()\nexcept SystemExit as ended:\n    assert ended.code == 0, ended.code"
    )
    modules = HEAVY[:-1] + ", 'h5py', 'rich', 'fsspec', 's3fs'}"  # libhdf5 has no part in averaging archives
    assert _loaded(run_python, code, modules, tmp_path / "ckpt_*.keras", "-o", tmp_path / "swa.keras") == "[]"
    assert (tmp_path / "swa.keras").exists()
    assert _loaded(run_python, code, HEAVY, "verify", tmp_path / "swa.keras") == "[]"


@pytest.mark.parametrize("command", [[], ["inspect"], ["sweep"], ["verify"]])
def test_help_loads_no_numpy_h5py_or_rich(command: list[str], run_python: Run) -> None:
    code = "from swa_avg import cli\ntry:\n    cli.main()\nexcept SystemExit:\n    pass"
    modules = "{'numpy', 'h5py', 'rich', 'matplotlib', 'fsspec', 's3fs'}"
    assert _loaded(run_python, code, modules, *command, "--help") == "[]"


def test_only_the_pictures_need_matplotlib() -> None:
    package = Path(__file__).parents[1] / "swa_avg"
    users = {path.name for path in package.rglob("*.py") if "\nimport matplotlib" in path.read_text()}
    assert users == {"pictures.py"}


@pytest.mark.parametrize(
    "module",
    [
        "plan",
        "methods",
        "policy",
        "schedules",
        "batchnorm.moments",
        "index",
        "geometry",
        "candidates",
        "metrics",
        "words",
        "pages.html",
    ],
)
def test_the_pure_modules_import_no_io(module: str) -> None:
    package = Path(__file__).parents[1] / "swa_avg"
    seen: set[Path] = set()
    pending = [package / (module.replace(".", "/") + ".py")]
    while pending:
        path = pending.pop()
        if path in seen or not path.exists():
            continue
        seen.add(path)
        for line in path.read_text().splitlines():
            if line.startswith(("import ", "from ")):  # what a function imports is its own affair
                top = line.split()[1].split(".")
                assert top[0] not in ("h5py", "click", "keras", "tensorflow", "jax"), f"{path}: {line}"
                if top[0] == "swa_avg" and len(top) > 1:
                    pending.append(package.joinpath(*top[1:]).with_suffix(".py"))
    assert seen


def test_formats_stay_below_the_plan() -> None:
    package = Path(__file__).parents[1] / "swa_avg"
    for path in (package / "formats").glob("*.py"):
        for above in ("plan", "combine", "run", "cli", "policy", "publish"):
            assert f"swa_avg.{above}" not in path.read_text(), path


def test_a_public_name_stays_what_it_is_once_the_modules_are_loaded(run_python: Run) -> None:
    """A module of the same name in the package would take its place."""
    code = (
        "import importlib, swa_avg\n"
        "homes = {name: getattr(swa_avg, name) for name in swa_avg.__all__}\n"
        "assert {name: getattr(swa_avg, name) for name in homes} == homes\n"
        "print(sorted(name for name, value in homes.items() if isinstance(value, type(swa_avg))))"
    )
    ended = run_python(code)
    assert (ended.returncode, ended.stdout) == (0, "[]\n"), ended.stderr


def test_only_files_tells_a_url_from_a_path() -> None:
    package = Path(__file__).parents[1] / "swa_avg"
    for path in package.rglob("*.py"):
        if path.parent.name != "files":
            for name in ("RemotePath", "RemoteSource", "import fsspec"):
                assert name not in path.read_text(), path


def test_files_stay_below_all_other_rooms() -> None:
    package = Path(__file__).parents[1] / "swa_avg"
    for path in (package / "files").glob("*.py"):
        rooms = set(re.findall(r"(?:from|import) swa_avg\.(\w+)", path.read_text()))
        assert rooms <= {"files", "errors", "text", "interrupts"}, path
