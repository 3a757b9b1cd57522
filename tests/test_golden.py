"""Outputs, records and results are what they were: see `golden_cases.py`, which also says when they may change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import golden_cases
from conftest import Ended

Cli = Callable[..., Ended]
RESULTS = json.loads(golden_cases.RESULTS.read_text())


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    golden_cases.lay_out(folder)
    return folder


@pytest.fixture
def version(swa_avg: Cli) -> str:
    return swa_avg("--version").out.split()[-1]


@pytest.mark.parametrize("name", golden_cases.CASES)
def test_a_case_gives_what_it_gave(
    name: str, inputs: Path, version: str, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs)
    case = golden_cases.CASES[name]
    found = golden_cases.run(case, swa_avg, version)
    assert golden_cases.differences(RESULTS[case.same_as or name], golden_cases.plain(found)) == []
