"""Outputs, records and results are what they were; `golden_cases.py` says when they may change."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import golden_cases
from conftest import Ended

Cli = Callable[..., Ended]
RESULTS = json.loads(golden_cases.RESULTS.read_text())
OLD = golden_cases.old_outputs()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    golden_cases.lay_out(folder)
    return folder


@pytest.fixture
def version(swa_avg: Cli) -> str:
    return swa_avg("--version").out.split()[-1]


@pytest.mark.parametrize(
    "name",
    [
        *golden_cases.CASES,
        *(
            pytest.param(
                name,
                marks=[pytest.mark.keras, *map(pytest.mark.filterwarnings, golden_cases.KERAS_WARNINGS)],
            )
            for name in golden_cases.KERAS_CASES
        ),
    ],
)
def test_a_case_gives_what_it_gave(
    name: str, inputs: Path, version: str, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs)
    if name in golden_cases.KERAS_CASES:
        pytest.importorskip("keras")
    case = golden_cases.ALL_CASES[name]
    found = golden_cases.run(case, swa_avg, version)
    assert golden_cases.differences(RESULTS[case.same_as or name], golden_cases.plain(found)) == []


@pytest.mark.parametrize("name", OLD)
def test_an_output_of_version_0_1_0_verifies(
    name: str, inputs: Path, swa_avg: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(inputs)
    case = golden_cases.ALL_CASES[name]
    output = golden_cases.unpack_output(name)
    try:
        ended = swa_avg("verify", output, "--inputs", case.folder, "--json", "-q")
        assert ended.code == 0, ended.err
        found = json.loads(ended.out)
        if case.arguments[0] != "sweep":
            assert found.pop("method").partition(":")[0] == case.method.partition(":")[0]
        assert golden_cases.digest(found) == RESULTS[name]["verify"]["printed"]
    finally:
        shutil.rmtree(output.parent)
