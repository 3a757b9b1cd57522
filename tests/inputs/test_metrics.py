"""Which values of a metric are better."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from swa_avg.inputs.metrics import badness


@given(st.floats(), st.floats(), st.sampled_from(["min", "max"]))
def test_badness_falls_as_a_metric_gets_better(one: float, other: float, mode: str) -> None:
    if math.isnan(one):
        assert badness(one, mode) == math.inf
    elif not math.isnan(other):
        better = one < other if mode == "min" else one > other
        assert (badness(one, mode) < badness(other, mode)) == better


@pytest.mark.parametrize(("mode", "worst"), [("min", math.inf), ("max", -math.inf)])
def test_nan_is_as_bad_as_can_be(mode: str, worst: float) -> None:
    assert badness(math.nan, mode) == badness(worst, mode) == math.inf
