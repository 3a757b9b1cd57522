"""What the README says of the command line is what the command line says of itself."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from conftest import Ended
from swa_avg.inspection.advice import HELPED, LEVEL

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


@pytest.fixture(scope="module")
def evidence() -> ModuleType:
    """The script that makes the README's section from what was recorded."""
    spec = importlib.util.spec_from_file_location("evidence_tables", ROOT / "scripts" / "evidence_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("command", ["", " inspect", " sweep", " verify"])
def test_the_help_text_is_current(
    command: str, swa_avg: Callable[..., Ended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    block = re.search(f"<!-- help{command} -->\n```\n(.*?)```\n<!-- /help{command} -->", README, re.DOTALL)
    assert block is not None
    assert block.group(1) == swa_avg(*command.split(), "--help").out


def test_every_guarantee_names_the_tests_that_hold_it() -> None:
    section = README.split("## Guarantees\n")[1].split("\nExit codes")[0]
    guarantees = re.split(r"\n\d\. ", section)[1:]
    assert len(guarantees) >= 6
    for guarantee in guarantees:
        assert re.search(r"`tests/[\w/]+\.py`", guarantee), guarantee


def test_every_test_file_that_holds_a_guarantee_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)`", README)
    assert named
    for name in named:
        assert (Path(__file__).parents[1] / name).exists(), name


def test_the_set_up_commands_are_the_scripts() -> None:
    assert "\nbash scripts/demo.sh\nbash scripts/test.sh\n" in README


def test_the_evidence_is_what_the_recorded_runs_give(evidence: ModuleType) -> None:
    section = README.split("<!-- evidence -->\n")[1].split("<!-- /evidence -->")[0]
    assert section == evidence.section(evidence.load()) + "\n"
    for picture in re.findall(r"\((scripts/images/[^)]*)\)", section):
        assert (ROOT / picture).exists()


def test_the_figures_that_inspect_cites_are_those_of_the_recorded_runs(evidence: ModuleType) -> None:
    windows = evidence.windows(evidence.load())
    level = [window for window in windows if window["pace"] >= LEVEL]
    shrinking = [window for window in windows if window["pace"] < LEVEL]
    assert (evidence.helped(level), evidence.helped(shrinking)) == HELPED


@pytest.mark.parametrize(
    ("workload", "seeds"), [("images", 10), ("text", 5), ("tabular", 10), ("digits", 10)]
)
def test_every_seed_of_a_workload_was_run_beside_its_rival(
    evidence: ModuleType, workload: str, seeds: int
) -> None:
    runs = [evidence.key(record) for record in evidence.load()]
    assert len(runs) == len(set(runs))
    assert {run for run in runs if run[0] == workload} >= {
        (workload, schedule, seed) for schedule in ("constant", "cosine") for seed in range(seeds)
    }


def test_an_interval_of_paired_differences_is_students(evidence: ModuleType) -> None:
    drug = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]  # hours of sleep gained: Student 1908
    mean, half = evidence.interval(np.array(drug))
    assert mean == pytest.approx(0.75)
    assert (mean - half, mean + half) == pytest.approx((-0.53, 2.03), abs=0.01)
