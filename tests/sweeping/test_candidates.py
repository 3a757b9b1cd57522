"""Coefficients against the recursions that they stand for, and the greedy soup against brute force."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from swa_avg.errors import UsageError
from swa_avg.sweeping import candidates

COUNTS = st.integers(1, 30)
LENGTHS = "last:K, from last:1 to last:3"
ANY = (
    "last:K, best:K, uniform, ema:DECAY, power-ema:SIGMA_REL, half-life:FRACTION, decay:linear|cosine|1-sqrt, "
    "weights:W,W,... or greedy"
)


def _checkpoints(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, 4))


@given(count=COUNTS, decay=st.floats(0, 0.999))
def test_ema_is_what_stepping_gives(count, decay):
    checkpoints = _checkpoints(count)
    average = checkpoints[0]
    for checkpoint in checkpoints[1:]:
        average = decay * average + (1 - decay) * checkpoint
    candidate = candidates.parse(f"ema:{decay!r}", count, None)
    np.testing.assert_allclose(candidate.coefficients @ checkpoints, average, rtol=1e-9, atol=1e-12)


@given(
    steps=st.lists(st.integers(1, 10), min_size=1, max_size=20),
    sigma=st.sampled_from([0.03, 0.05, 0.1, 0.2, 0.28]),
)
def test_power_ema_is_what_stepping_gives(steps, sigma):
    """Karras et al. 2024, section 3.1: after each step of training, beta = (1 - 1/t)^(gamma + 1).

    A checkpoint stands for the steps since the one before it; gamma is a root of the cubic that their definition
    of sigma_rel makes.
    """
    times = np.cumsum(steps).tolist()
    roots = np.roots([1, 7, 16 - sigma**-2, 12 - sigma**-2])
    gamma = max(root.real for root in roots if abs(root.imag) < 1e-9)
    checkpoints = _checkpoints(len(times))
    average = np.zeros(4)
    for step in range(1, times[-1] + 1):
        beta = (1 - 1 / step) ** (gamma + 1)
        current = checkpoints[next(k for k, time in enumerate(times) if step <= time)]
        average = beta * average + (1 - beta) * current
    candidate = candidates.parse(f"power-ema:{sigma}", len(times), times)
    np.testing.assert_allclose(candidate.coefficients @ checkpoints, average, rtol=1e-6, atol=1e-9)


@given(count=COUNTS, data=st.data())
def test_last_is_the_mean_of_the_last(count, data):
    length = data.draw(st.integers(1, count))
    checkpoints = _checkpoints(count)
    candidate = candidates.parse(f"last:{length:02d}", count, None)
    assert candidate.name == f"last:{length}"
    np.testing.assert_allclose(candidate.coefficients @ checkpoints, checkpoints[-length:].mean(axis=0))
    assert candidate.used == tuple(range(count - length, count))


def test_the_best_are_the_first_of_the_ranked():
    candidate = candidates.parse("best:2", 4, None, [3, 1, 0])
    assert (candidate.name, candidate.coefficients) == ("best:2", (0.0, 0.5, 0.0, 0.5))
    for text in ("best:4", "best:0", "best"):
        with pytest.raises(UsageError, match=f"^candidate '{text}': expected best:K, from best:1 to best:3$"):
            candidates.parse(text, 4, None, [3, 1, 0])


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("ema:.50", "ema:0.5", [0.25, 0.25, 0.5]),
        ("weights:1,2,1", "weights:1,2,1", [0.25, 0.5, 0.25]),
        ("half-life:1", "half-life:1", np.diff([0, *np.array([0.25, 0.5, 1]) ** np.log(2)])),
        ("decay:1-sqrt", "decay:1-sqrt", np.diff(np.sqrt([0, 1 / 3, 2 / 3, 1]))),
    ],
)
def test_every_method_is_a_candidate(text, name, expected):
    candidate = candidates.parse(text, 3, [1, 2, 4])
    assert candidate.name == name
    np.testing.assert_allclose(candidate.coefficients, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("count", "times", "expected"),
    [
        (3, [1, 1, 2], ["last:2", "uniform", "greedy"]),
        (3, [0, 1, 2], ["last:2", "uniform", "greedy"]),
        (2, None, ["uniform", "greedy"]),
        (3, None, ["last:2", "uniform", "greedy"]),
        (12, None, ["last:2", "last:4", "last:8", "uniform", "greedy"]),
        (16, None, ["last:2", "last:4", "last:8", "uniform", "greedy"]),
        (2, [1, 2], ["uniform", "power-ema:0.05", "power-ema:0.1", "power-ema:0.2", "greedy"]),
    ],
)
def test_what_is_tried_when_nothing_is_said(count, times, expected):
    assert candidates.default_candidates(count, times) == expected
    for text in expected:
        assert (candidates.parse(text, count, times) is None) == (text == "greedy")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(
            (text, LENGTHS)
            for text in ("last", "last:", "last:0", "last:4", "last:1.5", "last:" + "9" * 5000)
        ),
        *((text, ANY) for text in ("", "mean", "greedy:2", "Last:2", "lastly")),
    ],
)
def test_what_is_no_candidate_is_refused(text, expected):
    with pytest.raises(UsageError) as refused:
        candidates.parse(text, 3, None)
    assert str(refused.value) == f"candidate {text!r}: expected {expected}"


@pytest.mark.parametrize(
    "text", ["ema:1", "ema:x", "power-ema:0.3", "power-ema:0.1", "weights:1,2", "uniform:3"]
)
def test_what_is_wrong_with_a_method_is_said_as_everywhere(text):
    with pytest.raises(UsageError, match=f"^method '{text}': expected "):
        candidates.parse(text, 3, None)


# --- the greedy soup ----------------------------------------------------------------------------------------------


def _wortsman(badness: dict[tuple[int, ...], float], count: int) -> tuple[int, ...]:
    """Recipe 1 of the paper, word by word, on a table of every subset's badness."""
    ingredients: list[int] = []
    ranked = sorted(range(count - 1, -1, -1), key=lambda number: badness[(number,)])
    for number in ranked:
        soup = tuple(sorted([*ingredients, number]))
        if not ingredients or badness[soup] <= badness[tuple(sorted(ingredients))]:
            ingredients.append(number)
    return tuple(sorted(ingredients))


@given(st.lists(st.integers(0, 8), min_size=63, max_size=63))
def test_the_soup_is_that_of_brute_force_over_all_subsets_of_six(values):
    subsets = [subset for size in range(1, 7) for subset in combinations(range(6), size)]
    table = dict(zip(subsets, map(float, values), strict=True))
    asked: list[tuple[int, ...]] = []

    def badness_of(accepted: tuple[int, ...]) -> float:
        asked.append(accepted)
        return table[accepted]

    assert candidates.greedy([table[(number,)] for number in range(6)], badness_of) == _wortsman(table, 6)
    assert len(asked) == 5


def test_the_mean_of_a_convex_loss_is_never_worse_than_its_best_part():
    rng = np.random.default_rng(0)
    for _ in range(20):
        checkpoints, best = rng.standard_normal((6, 3)), rng.standard_normal(3)

        def loss(accepted, checkpoints=checkpoints, best=best):
            return float(np.square(checkpoints[list(accepted)].mean(axis=0) - best).sum())

        alone = [loss((number,)) for number in range(6)]
        accepted = candidates.greedy(alone, loss)
        assert loss(accepted) <= min(alone)
        assert int(np.argmin(alone)) in accepted


def test_what_is_infinitely_bad_is_left_out():
    def badness_of(accepted):
        return math.inf if 1 in accepted else 0.0

    assert candidates.greedy([1.0, math.inf, 2.0], badness_of) == (0, 2)
    assert candidates.greedy([math.inf, math.inf], lambda accepted: math.inf) == (1,)


def test_of_equals_the_newer_is_tried_first():
    asked = []
    candidates.greedy([1.0, 1.0, 0.5, 1.0], lambda accepted: asked.append(accepted) or 2.0)
    assert asked == [(2, 3), (1, 2), (0, 2)]


def test_a_soup_has_the_coefficients_of_a_plain_mean():
    soup = candidates.mean_of((0, 2, 3), 5)
    assert soup.coefficients == (1 / 3, 0.0, 1 / 3, 1 / 3, 0.0)
    assert soup.used == (0, 2, 3)
    assert soup.is_average
    assert not candidates.mean_of((4,), 5).is_average
