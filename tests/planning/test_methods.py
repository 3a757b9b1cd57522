"""Coefficients against the recursions and runs that they stand for, and the grammar that names them."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from swa_avg.errors import UsageError
from swa_avg.planning import methods
from swa_avg.planning.methods import METHODS, Method

VALUES = st.lists(st.floats(-100, 100), min_size=1, max_size=30)
STEPS = st.lists(st.integers(1, 10), min_size=1, max_size=20)
SIGMAS = st.floats(0.01, 0.28)
FRACTIONS = st.floats(0.01, 1.0)
SEEDS = st.integers(0, 2**32 - 1)
RATES = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: np.cos(np.pi * x / 2) ** 2,
    "1-sqrt": lambda x: 1 - x**0.5,
}


def _coefficients(text: str, count: int, times: list[float] | None = None) -> np.ndarray:
    return np.array(Method.parse(text).coefficients(count, times))


# --- uniform and EMA


@given(VALUES)
def test_uniform_is_the_mean(values: list[float]) -> None:
    assert np.dot(_coefficients("uniform", len(values)), values) == pytest.approx(np.mean(values), abs=1e-9)


@given(VALUES, st.floats(0, 0.999))
def test_ema_is_the_stepped_average(values: list[float], decay: float) -> None:
    stepped = values[0]
    for value in values[1:]:
        stepped = decay * stepped + (1 - decay) * value
    assert np.dot(_coefficients(f"ema:{decay}", len(values)), values) == pytest.approx(stepped, abs=1e-9)


# --- power-function averages


def _exponent(sigma_rel: float) -> float:
    """Return gamma, as a root of the cubic that the definition of sigma_rel makes (Karras et al. 2024)."""
    roots = np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2])
    return max(root.real for root in roots if abs(root.imag) < 1e-9)


@given(VALUES, SIGMAS)
@settings(max_examples=50)
def test_power_ema_is_the_stepped_average(values: list[float], sigma_rel: float) -> None:
    # Karras et al. 2024: x_avg(t) = beta x_avg(t_prev) + (1 - beta) x(t), beta = (t_prev / t)^(gamma + 1)
    times = np.arange(1.0, len(values) + 1)
    stepped = values[0]
    for before, time, value in zip(times, times[1:], values[1:], strict=False):
        beta = (before / time) ** (_exponent(sigma_rel) + 1)
        stepped = beta * stepped + (1 - beta) * value
    coefficients = _coefficients(f"power-ema:{sigma_rel}", len(values), times.tolist())
    assert np.dot(coefficients, values) == pytest.approx(stepped, abs=1e-6)


@given(STEPS, SIGMAS)
@settings(max_examples=50)
def test_power_ema_integrates_its_profile_over_what_each_checkpoint_stands_for(
    steps: list[int], sigma_rel: float
) -> None:
    times = np.cumsum(steps, dtype=float)
    nodes, weights = np.polynomial.legendre.leggauss(200)
    edges = np.array([0.0, *times]) / times[-1]
    areas = []
    for low, high in pairwise(edges):
        points = low + (high - low) * (nodes + 1) / 2
        areas.append(np.dot(weights, points ** _exponent(sigma_rel)) * (high - low) / 2)
    coefficients = _coefficients(f"power-ema:{sigma_rel}", len(times), times.tolist())
    np.testing.assert_allclose(coefficients, np.array(areas) / sum(areas), atol=1e-6)


def test_power_ema_has_the_width_that_was_asked_for() -> None:
    times = np.arange(1, 20001) / 20000
    for sigma_rel in (0.05, 0.1, 0.25):
        weights = _coefficients(f"power-ema:{sigma_rel}", 20000, times.tolist())
        mean = np.dot(weights, times)
        assert np.sqrt(np.dot(weights, (times - mean) ** 2)) == pytest.approx(sigma_rel, rel=1e-3)


@given(STEPS, FRACTIONS, SEEDS)
@settings(max_examples=50)
def test_half_life_is_an_ema_whose_half_life_grows_with_training(
    steps: list[int], fraction: float, seed: int
) -> None:
    """Many small steps; after each, the average keeps 1/2^(step / half-life), the half-life a fraction of t."""
    times = np.cumsum(steps, dtype=float)
    values = np.random.default_rng(seed).standard_normal(len(times))
    average = values[0]
    for (before, time), value in zip(pairwise(times), values[1:], strict=True):
        edges = np.linspace(before, time, 2001)
        for low, high in pairwise(edges):
            kept = 0.5 ** ((high - low) / (fraction * (low + high) / 2))
            average = kept * average + (1 - kept) * value
    coefficients = _coefficients(f"half-life:{fraction}", len(times), times.tolist())
    assert np.dot(coefficients, values) == pytest.approx(average, abs=1e-4)


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3, math.log(2), 1.0])
def test_half_of_the_weight_lies_after_the_half_life_that_training_ends_with(fraction: float) -> None:
    times = np.arange(1, 20001) / 20000
    coefficients = _coefficients(f"half-life:{fraction}", 20000, times.tolist())
    assert coefficients[times > np.exp(-fraction)].sum() == pytest.approx(0.5, abs=2e-3)


# --- decays of the learning rate


def _run(
    start: np.ndarray, gradient: object, intervals: list[int], rates: list[float], rate: float
) -> list[np.ndarray]:
    """Return the weights at the start and after each interval of SGD: `rates` is one factor per interval."""
    weights, checkpoints, step = start, [start], 0
    for count, factor in zip(intervals, rates, strict=True):
        for _ in range(count):
            weights = weights - rate * factor * gradient(weights, step)  # type: ignore[operator]
            step += 1
        checkpoints.append(weights)
    return checkpoints


@given(shape=st.sampled_from(sorted(RATES)), count=st.integers(1, 30), length=st.integers(1, 5), seed=SEEDS)
def test_decay_ends_where_the_decayed_run_ends_if_both_see_the_same_gradients(
    shape: str, count: int, length: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    start, gradients = rng.standard_normal(3), rng.standard_normal((count * length, 3))
    intervals = [length] * (count - 1)

    def gradient(weights: np.ndarray, step: int) -> np.ndarray:
        return gradients[step]

    constant = _run(start, gradient, intervals, [1.0] * (count - 1), 0.1)
    decayed = _run(start, gradient, intervals, [RATES[shape](i / count) for i in range(1, count)], 0.1)
    average = _coefficients(f"decay:{shape}", count) @ np.array(constant)
    np.testing.assert_allclose(average, decayed[-1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", sorted(RATES))
def test_decay_is_the_decayed_run_to_first_order_in_the_rate(shape: str) -> None:
    """On a quadratic with noisy gradients, the difference falls with the square of the rate."""
    rng = np.random.default_rng(1)
    noise, start = rng.standard_normal((40, 2)), rng.standard_normal(2)
    curvature, intervals = np.diag([1.0, 3.0]), [4] * 9

    def difference(rate: float) -> float:
        def gradient(weights: np.ndarray, step: int) -> np.ndarray:
            return curvature @ weights + noise[step]

        constant = _run(start, gradient, intervals, [1.0] * 9, rate)
        decayed = _run(start, gradient, intervals, [RATES[shape](i / 10) for i in range(1, 10)], rate)
        average = _coefficients(f"decay:{shape}", 10) @ np.array(constant)
        return float(np.linalg.norm(average - decayed[-1]))

    assert difference(1e-4) / difference(5e-5) == pytest.approx(4.0, rel=0.05)


@given(st.integers(1, 50))
def test_linear_decay_is_the_uniform_mean(count: int) -> None:
    np.testing.assert_allclose(_coefficients("decay:linear", count), 1 / count, rtol=1e-12)


# --- weights


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=20))
def test_weights_are_divided_by_their_sum(weights: list[int]) -> None:
    assume(sum(weights) != 0)
    expected = [float(Fraction(weight, sum(weights))) for weight in weights]
    assert Method.parse(weights).coefficients(len(weights)) == expected


@pytest.mark.parametrize(
    "weights", [[0.2, 0.3, 0.5], [0.1] * 10, [0.25, -0.5, 1.25], [0.7, 0.1, 0.2], [0.0, 0.0, 1.0]]
)
def test_weights_whose_sum_is_1_are_used_as_given(weights: list[float]) -> None:
    assert Method.parse(weights).coefficients(len(weights)) == weights


# --- all of them


@given(st.integers(1, 50), st.floats(0, 0.999), SIGMAS, FRACTIONS, SEEDS)
def test_coefficients_sum_to_one(
    count: int, decay: float, sigma_rel: float, fraction: float, seed: int
) -> None:
    weights = np.random.default_rng(seed).uniform(0.1, 1, count).tolist()
    texts = ["uniform", f"ema:{decay}", f"power-ema:{sigma_rel}", f"half-life:{fraction}"]
    tried = [*texts, *(f"decay:{shape}" for shape in RATES), weights]
    assert {Method.parse(method).name for method in tried} == set(METHODS)
    for method in tried:
        coefficients = Method.parse(method).coefficients(count, [float(t) for t in range(1, count + 1)])
        assert len(coefficients) == count
        assert sum(coefficients) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize(
    ("given_as", "text"),
    [
        ("uniform", "uniform"),
        ("ema:0.90", "ema:0.9"),
        ("ema:0", "ema:0"),
        ("power-ema:.1", "power-ema:0.1"),
        ("half-life:1e-1", "half-life:0.1"),
        ("half-life:1", "half-life:1"),
        ("decay:1-sqrt", "decay:1-sqrt"),
        ("weights:1, 2.0,-.5", "weights:1,2,-0.5"),
        ([1, 2.0, -0.5], "weights:1,2,-0.5"),
        ((0.1,), "weights:0.1"),
        (np.array([0.25, 0.75]), "weights:0.25,0.75"),
    ],
)
def test_a_method_has_one_text(given_as: object, text: str) -> None:
    method = Method.parse(given_as)  # type: ignore[arg-type]
    assert str(method) == text
    assert Method.parse(text) == method
    assert len({method, Method.parse(text)}) == 1


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=5), st.floats(0, 1, exclude_max=True))
def test_the_text_of_a_method_loses_no_bit(weights: list[float], decay: float) -> None:
    assert Method.parse(str(Method("ema", decay))).value == decay
    assume(abs(math.fsum(weights)) > 1e-6 * sum(map(abs, weights)))
    assert Method.parse(str(Method("weights", weights))).value == tuple(weights)


EXPECTED_WEIGHTS = (
    "weights:W,W,..., one finite number per checkpoint, whose sum is not 0, such as weights:1,2,2"
)
EXPECTED_EMA = "ema:DECAY, from 0 up to but not including 1, such as ema:0.9"
EXPECTED_SIGMA = "power-ema:SIGMA_REL, between 0 and 0.2887, such as power-ema:0.1"
EXPECTED_FRACTION = "half-life:FRACTION, above 0 and up to 1, such as half-life:0.1"
EXPECTED_SHAPE = "decay:linear or decay:cosine or decay:1-sqrt"


@pytest.mark.parametrize(
    ("method", "shown", "expected"),
    [
        *(("ema" + value, None, EXPECTED_EMA) for value in ("", ":", ":1", ":-0.1", ":nan", ":x", ":0.9:1")),
        *(("power-ema" + value, None, EXPECTED_SIGMA) for value in ("", ":0", ":0.3", ":inf", ":nan")),
        *(("half-life" + value, None, EXPECTED_FRACTION) for value in ("", ":0", ":1.01", ":nan", ":-1")),
        *(("decay" + value, None, EXPECTED_SHAPE) for value in ("", ":", ":sqrt", ":0.9", ":Linear")),
        *(("uniform" + value, None, "uniform, without a value") for value in (":", ":1")),
        ("weights", None, EXPECTED_WEIGHTS),
        ("weights:", None, EXPECTED_WEIGHTS),
        ("weights:1,,2", None, EXPECTED_WEIGHTS),
        ("weights:nan,1", None, EXPECTED_WEIGHTS),
        ("weights:inf,-inf", None, EXPECTED_WEIGHTS),
        ("weights:1e308,1e308", None, EXPECTED_WEIGHTS),
        ("weights:1,-1", None, EXPECTED_WEIGHTS),
        ("weights:0,0", None, EXPECTED_WEIGHTS),
        ("weights:0.1,0.2,-0.3", None, EXPECTED_WEIGHTS),  # which floating point does not add up to 0
        ([], "weights:", EXPECTED_WEIGHTS),
        ([1.0, -1.0], "weights:1,-1", EXPECTED_WEIGHTS),
        ([10**400, 1], f"weights:{10**400},1", EXPECTED_WEIGHTS),
        ([[1.0], [2.0]], "weights:1,2", EXPECTED_WEIGHTS),
        (0.9, "weights:0.9", EXPECTED_WEIGHTS),
        (None, "weights", EXPECTED_WEIGHTS),
        ("emma", None, methods.spellings()),
        ("", None, methods.spellings()),
        ("EMA:0.9", None, methods.spellings()),
        (":0.9", None, methods.spellings()),
    ],
)
def test_what_is_no_method_is_refused(method: object, shown: str | None, expected: str) -> None:
    with pytest.raises(UsageError) as refused:
        Method.parse(method)  # type: ignore[arg-type]
    assert str(refused.value) == f"method {(shown or method)!r}: expected {expected}"


@pytest.mark.parametrize("text", ["power-ema:0.1", "half-life:0.1"])
@pytest.mark.parametrize("times", [None, [0.0, 2.0], [2.0, 2.0], [2.0, 1.0], [math.nan, 1.0]])
def test_positions_that_do_not_ascend_are_refused(text: str, times: list[float] | None) -> None:
    problem = f"^method '{text}': expected each checkpoint at an epoch of its own, from 1 on$"
    with pytest.raises(UsageError, match=problem):
        Method.parse(text).coefficients(2, times)


def test_weights_are_one_per_checkpoint() -> None:
    problem = "^method 'weights:1,1': expected 3 numbers, one per checkpoint, found 2$"
    with pytest.raises(UsageError, match=problem):
        Method.parse([1, 1]).coefficients(3)
