"""Coefficients against the recursions that they stand for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swa_avg.errors import UsageError
from swa_avg.planning import methods

VALUES = st.lists(st.floats(-100, 100), min_size=1, max_size=30)


@given(VALUES)
def test_uniform_is_the_mean(values: list[float]) -> None:
    assert np.dot(methods.uniform(len(values)), values) == pytest.approx(np.mean(values), abs=1e-9)


@given(VALUES, st.floats(0, 0.999))
def test_ema_is_the_stepped_average(values: list[float], decay: float) -> None:
    stepped = values[0]
    for value in values[1:]:
        stepped = decay * stepped + (1 - decay) * value
    assert np.dot(methods.ema(len(values), decay), values) == pytest.approx(stepped, abs=1e-9)


@given(VALUES, st.floats(0.01, 0.28))
@settings(max_examples=50)
def test_power_ema_is_the_stepped_average(values: list[float], sigma_rel: float) -> None:
    # Karras et al. 2024: x_avg(t) = beta x_avg(t_prev) + (1 - beta) x(t), beta = (t_prev / t)^(gamma + 1)
    exponent = next(
        root.real
        for root in np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
        if abs(root.imag) < 1e-9 and root.real >= -1e-9
    )
    times = np.arange(1.0, len(values) + 1)
    stepped = values[0]
    for before, time, value in zip(times, times[1:], values[1:], strict=False):
        beta = (before / time) ** (exponent + 1)
        stepped = beta * stepped + (1 - beta) * value
    assert np.dot(methods.power_ema(times.tolist(), sigma_rel), values) == pytest.approx(stepped, abs=1e-6)


def test_power_ema_has_the_width_that_was_asked_for() -> None:
    times = np.arange(1, 20001) / 20000
    for sigma_rel in (0.05, 0.1, 0.25):
        weights = np.array(methods.power_ema(times.tolist(), sigma_rel))
        mean = np.dot(weights, times)
        assert np.sqrt(np.dot(weights, (times - mean) ** 2)) == pytest.approx(sigma_rel, rel=1e-3)


@given(st.integers(1, 50), st.floats(0, 0.999), st.floats(0.01, 0.28))
def test_coefficients_sum_to_one(count: int, decay: float, sigma_rel: float) -> None:
    times = [float(time) for time in range(1, count + 1)]
    for coefficients in (
        methods.uniform(count),
        methods.ema(count, decay),
        methods.power_ema(times, sigma_rel),
    ):
        assert len(coefficients) == count
        assert sum(coefficients) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(
    "call",
    [
        lambda: methods.ema(3, 1.0),
        lambda: methods.ema(3, -0.1),
        lambda: methods.ema(3, float("nan")),
        lambda: methods.power_ema([1.0, 2.0], 0.3),
        lambda: methods.power_ema([1.0, 2.0], 0.0),
        lambda: methods.power_ema([0.0, 2.0], 0.1),
        lambda: methods.power_ema([2.0, 2.0], 0.1),
        lambda: methods.given(2, [0.5]),
        lambda: methods.given(2, [0.5, 0.6]),
        lambda: methods.given(2, [float("inf"), 0.5]),
    ],
)
def test_what_has_no_meaning_is_refused(call: object) -> None:
    with pytest.raises(UsageError):
        call()  # type: ignore[operator]
