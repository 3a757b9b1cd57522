"""The house: which rooms there are, who may import whom, and how large anything may grow.

Everything is taken from the syntax of the package, imports inside functions and for annotations included.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import makers

PACKAGE = Path(__file__).parents[1] / "swa_avg"
ROOMS = [
    "__main__",
    "cli",
    "callbacks",
    "schedules",
    "averaging",
    "sweeping",
    "inspection",
    "verification",
    "batchnorm",
    "combine",
    "data",
    "planning",
    "inputs",
    "formats",
    "pages",
    "files",
    "errors",
    "text",
    "interrupts",
]
"""From top to bottom: a room imports only from rooms below it."""
HEAVY = "{'keras', 'tensorflow', 'tf_keras', 'jax', 'torch'}"
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def _name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {_name(path): ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
LINES = {_name(path): len(path.read_text("utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}


def _imported(module: str) -> Iterator[str]:
    """Yield the modules that a module names in its imports, wherever they stand in it."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            source = str(node.module)
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield inner if inner in TREES else source


EDGES = {module: {name for name in _imported(module) if name in TREES} - {module} for module in TREES}


def _room(module: str) -> str | None:
    """Return the room of a module; the package's own face has none."""
    return module.split(".")[1] if "." in module else None


def _functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield f"{module}.{node.name}", node


def test_there_are_few_rooms_and_each_has_its_place_in_the_order() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert len(modules) <= 8
    assert len(packages) <= 13
    assert (modules | packages) - {"__init__"} == set(ROOMS)


def test_a_room_imports_only_from_rooms_below_it() -> None:
    upward = [
        f"{module} imports {other}"
        for module, others in EDGES.items()
        for other in others
        if (room := _room(module)) is not None
        and (theirs := _room(other)) not in (room, None)
        and ROOMS.index(str(theirs)) < ROOMS.index(room)
    ]
    assert not upward


def test_no_modules_and_no_packages_import_each_other_in_a_circle() -> None:
    packages: dict[str, set[str]] = {}
    for module, others in EDGES.items():
        packages.setdefault(str(_room(module)), set()).update(
            str(_room(other)) for other in others if _room(other) != _room(module)
        )
    for graph in (EDGES, packages):
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as circle:
            pytest.fail(" -> ".join(circle.args[1]))


def test_modules_and_functions_stay_of_a_size_that_one_reads() -> None:
    assert len([module for module, lines in LINES.items() if lines > 400]) <= 2
    long, wide = [], []
    for name, function in _functions():
        documented = ast.get_docstring(function) is not None
        first = function.body[1:][:1] if documented else function.body[:1]
        body = function.end_lineno - first[0].lineno + 1 if first and function.end_lineno else 0
        signature = function.body[0].lineno - function.lineno
        arguments = function.args
        count = len([*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs])
        if body + signature > 70:
            long.append(name)
        if count - (arguments.args[:1] != [] and arguments.args[0].arg in ("self", "cls")) > 9:
            wide.append(name)
    assert len(long) <= 3, long
    assert len(wide) <= 8, wide


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        (["planning", "schedules"], {"h5py", "click"}),
        (
            ["combine.sums", "combine.kernel", "combine.blocks", "combine.combiner"],
            {"h5py", "click", "keras"},
        ),
        (["data"], {"keras"}),
        ([room for room in ROOMS if room != "cli"], {"click", "rich", "click_default_group"}),
        ([room for room in ROOMS if room != "pages"], {"matplotlib"}),
    ],
)
def test_a_wall_keeps_a_library_out(modules: list[str], forbidden: set[str]) -> None:
    broken = [
        f"{module} imports {name}"
        for module in TREES
        if any(f"{module}.".startswith(f"swa_avg.{inside}.") for inside in modules)
        for name in _imported(module)
        if name.partition(".")[0] in forbidden
    ]
    assert not broken


def test_only_files_tells_a_url_from_a_path() -> None:
    names = re.compile(r"\b(RemotePath|RemoteSource|fsspec)\b")
    users = {_room(_name(path)) for path in PACKAGE.rglob("*.py") if names.search(path.read_text("utf-8"))}
    assert users == {"files"}


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
    # libhdf5 has no part in averaging archives, nor a live model without a refresh
    modules = HEAVY[:-1] + ", 'h5py', 'rich', 'fsspec', 's3fs', 'swa_avg.batchnorm', 'swa_avg.data'}"
    assert _loaded(run_python, code, modules, tmp_path / "ckpt_*.keras", "-o", tmp_path / "swa.keras") == "[]"
    assert (tmp_path / "swa.keras").exists()
    assert _loaded(run_python, code, HEAVY, "verify", tmp_path / "swa.keras") == "[]"


@pytest.mark.parametrize("command", [[], ["inspect"], ["sweep"], ["verify"]])
def test_help_loads_no_numpy_h5py_or_rich(command: list[str], run_python: Run) -> None:
    code = "from swa_avg import cli\ntry:\n    cli.main()\nexcept SystemExit:\n    pass"
    modules = "{'numpy', 'h5py', 'rich', 'matplotlib', 'fsspec', 's3fs'}"
    assert _loaded(run_python, code, modules, *command, "--help") == "[]"


def test_no_module_bears_the_name_of_a_public_function(run_python: Run) -> None:
    """It would take that name's place in the package, once it is loaded."""
    import swa_avg

    assert not {module.rpartition(".")[2] for module in TREES} & set(swa_avg.__all__)
    code = (
        "import swa_avg\n"
        "homes = {name: getattr(swa_avg, name) for name in swa_avg.__all__}\n"
        "assert {name: getattr(swa_avg, name) for name in homes} == homes\n"
        "print(sorted(name for name, value in homes.items() if isinstance(value, type(swa_avg))))"
    )
    ended = run_python(code)
    assert (ended.returncode, ended.stdout) == (0, "[]\n"), ended.stderr
