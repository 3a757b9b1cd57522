"""A fixed slice of scripts/fuzz.py."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

import pytest

CASES = 3000


@pytest.mark.fuzz
@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="runs are isolated by Linux's pidfd")
def test_3000_damaged_checkpoints_end_well(tmp_path: Path) -> None:
    specification = importlib.util.spec_from_file_location(
        "fuzz", Path(__file__).parents[2] / "scripts" / "fuzz.py"
    )
    assert specification is not None
    assert specification.loader is not None
    fuzz = importlib.util.module_from_spec(specification)
    sys.modules["fuzz"] = fuzz
    specification.loader.exec_module(fuzz)
    table, wrong, _, _ = fuzz.fuzz(CASES, 2026, os.cpu_count() or 1, tmp_path)
    assert not wrong, "\n".join(wrong)
    assert sum(table.values()) == CASES
    for kind in {kind for kind, _ in table}:
        assert table[kind, "refused"], kind
        assert table[kind, "same"], kind
