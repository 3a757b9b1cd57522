"""A slice of scripts/faults.py."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from isolated import Isolated

import makers

SEED = 2026
CASES = 40
WORKERS = min(2, os.cpu_count() or 1)


@pytest.fixture(scope="module")
def faults() -> Any:
    path = Path(__file__).parents[2] / "scripts" / "faults.py"
    specification = importlib.util.spec_from_file_location("faults", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["faults"] = module
    specification.loader.exec_module(module)
    if reason := module.why_not():
        pytest.skip(reason)
    return module


@pytest.fixture(scope="module")
def bench(faults: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with faults.Bench(tmp_path_factory.mktemp("faults"), WORKERS) as bench:
        yield bench


def _check(faults: Any, tries: Mapping[str, Callable[[], str]], workers: int = WORKERS) -> None:
    outcomes, wrong = faults.try_all(tries, workers)
    assert not wrong, "\n".join(wrong)
    assert sum(outcomes.values()) == len(tries) >= CASES
    assert outcomes["old or none"]


@pytest.mark.fuzz
@pytest.mark.parametrize(
    "kind", ["SIGKILL", "SIGTERM", "SIGINT", "errors of reading", "files that end early", "errors of writing"]
)
def test_a_system_that_fails_leaves_all_or_nothing(kind: str, faults: Any, bench: Any) -> None:
    possible = faults.kinds(bench)[kind]
    assert 2 * len(possible) >= CASES  # where there are fewer, some are tried twice
    _check(faults, faults.injections(bench, faults.chosen(possible, CASES, SEED)))


@pytest.mark.fuzz
def test_signals_at_any_moment_leave_all_or_nothing(faults: Any, bench: Any) -> None:
    """Every other run gets a second one while it cleans up after the first."""
    _check(faults, faults.moments(bench, CASES, SEED))


@pytest.mark.fuzz
def test_files_that_may_not_grow_leave_all_or_nothing(faults: Any, bench: Any) -> None:
    _check(faults, faults.limits(bench, CASES // 5))


@pytest.mark.fuzz
def test_a_full_disk_leaves_all_or_nothing(faults: Any, bench: Any, tmp_path: Path) -> None:
    with faults.small_disk(tmp_path) as disk:
        if disk is None:
            pytest.skip("a tmpfs cannot be mounted here")
        _check(faults, faults.disks(bench, disk, CASES // 5), 1)


@pytest.mark.fuzz
def test_the_file_is_synchronized_before_it_is_named_and_its_folder_after(
    faults: Any, bench: Any, tmp_path: Path
) -> None:
    """As the system sees it."""
    log = tmp_path / "trace"
    for setting in faults.SETTINGS:
        with bench.folder(setting) as folder:
            ended, _ = bench.run(
                setting, folder, strace=["-y", "-o", str(log), "-e", "trace=fsync,link,linkat,rename"]
            )
        assert ended.code == 0
        calls = re.findall(r"(fsync)\(\d+<([^>]*)>|(link|linkat|rename)\(", log.read_text())
        steps = [
            "named" if not sync else "folder" if Path(path) == folder else "file" for sync, path, _ in calls
        ]
        files = 3 if setting.suffix == ".weights.json" else 1
        assert steps == ["file"] * files + ["named"] * files + ["folder"]


POINTING: dict[str, Callable[[h5py.File], object]] = {
    "link": lambda file: file.__setitem__("layers/link", h5py.ExternalLink("target.h5", "/")),
    "storage": lambda file: file.create_dataset(
        "layers/odd/vars/0", (7, 5), "f4", external=[("target.h5", 0, 140)]
    ),
    "view": lambda file: file.create_virtual_dataset("layers/odd/vars/0", _view()),
}


def _view() -> h5py.VirtualLayout:
    layout = h5py.VirtualLayout((7, 5), "f4")
    layout[:] = h5py.VirtualSource("target.h5", "x", (7, 5))
    return layout


@pytest.mark.fuzz
@pytest.mark.parametrize("libver", ["earliest", "latest"])
@pytest.mark.parametrize("name", POINTING)
def test_what_a_file_points_at_is_not_opened(name: str, libver: str, faults: Any, tmp_path: Path) -> None:
    """As the system sees it."""
    with h5py.File(tmp_path / "target.h5", "w") as file:
        file["x"] = np.ones((7, 5), np.float32)
    makers.write_store(tmp_path / "a_1.weights.h5", makers.weights(), libver=libver)
    with h5py.File(tmp_path / "a_1.weights.h5", "r+", libver=libver) as file:
        POINTING[name](file)
    log = tmp_path / "trace"
    with Isolated() as server:
        strace = ["-y", "-o", str(log), "-e", "trace=open,openat,openat2"]
        ended = server.run(["a_1.weights.h5", "-o", "swa.weights.h5"], tmp_path, strace=strace)
    assert ended.code == 3
    assert "a_1.weights.h5" in log.read_text()
    assert "target.h5" not in log.read_text()
