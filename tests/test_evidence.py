"""What the READMEs and `inspect` say of evidence is what the recorded runs give."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from swa_avg.inspection.movement import HELPED, LEVEL

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def evidence() -> ModuleType:
    """The script that makes tables and sentences from what was recorded."""
    spec = importlib.util.spec_from_file_location("evidence_tables", ROOT / "scripts" / "evidence_tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "part"), [("README.md", "summary"), ("scripts/README.md", "details")])
def test_what_is_said_is_what_the_recorded_runs_give(evidence: ModuleType, name: str, part: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    section = text.split("<!-- evidence -->\n")[1].split("<!-- /evidence -->")[0]
    assert section == getattr(evidence, part)(evidence.load()) + "\n"
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
