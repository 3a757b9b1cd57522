"""A slice of scripts/faults.py."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _load() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "faults.py"
    specification = importlib.util.spec_from_file_location("faults", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["faults"] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> object:
    faults = _load()
    if reason := faults.why_not():
        pytest.skip(reason)
    bench = faults.Bench(tmp_path_factory.mktemp("faults"))
    bench.prepare(faults.SETTINGS)
    return bench


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", ["SIGKILL", "SIGTERM", "SIGINT", "errors of reading", "errors of writing"])
def test_a_system_that_fails_leaves_all_or_nothing(kind: str, bench: object) -> None:
    faults = sys.modules["faults"]
    possible = faults.kinds(bench)[kind]
    assert len(possible) > 100
    outcomes, wrong = faults.inject(bench, faults.chosen(possible, 24, 2026), os.cpu_count() or 1)
    assert not wrong, "\n".join(wrong)
    assert sum(outcomes.values()) == 24


@pytest.mark.fuzz
def test_the_file_is_synchronized_before_it_is_named_and_its_folder_after(bench: object) -> None:
    """As the system sees it."""
    import re
    import subprocess

    faults = sys.modules["faults"]
    for setting in faults.SETTINGS:
        folder = bench.folder(setting, "order")  # type: ignore[attr-defined]
        command = ["strace", "-f", "-y", "-qq", "-e", "trace=fsync,link,linkat,rename"]
        ended = subprocess.run(
            [*command, *bench.command(setting)],  # type: ignore[attr-defined]
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
        calls = re.findall(r"(fsync)\(\d+<([^>]*)>|(link|linkat|rename)\(", ended.stderr)
        steps = [
            "named" if not sync else "folder" if Path(path) == folder else "file" for sync, path, _ in calls
        ]
        files = 3 if setting.suffix == ".weights.json" else 1
        assert steps == ["file"] * files + ["named"] * files + ["folder"]
