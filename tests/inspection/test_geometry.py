"""Distances, angles, planes and groups, held against plain float64 NumPy on whole arrays."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from swa_avg.inspection.geometry import Geometry, Measurement, geometry_of


def _measure(rows: np.ndarray, kernels: int | None = None, cuts: tuple[int, ...] = ()) -> Measurement:
    """Measure rows, the first `kernels` columns of which are kernels, in blocks that end at `cuts`."""
    kernels = rows.shape[1] if kernels is None else kernels
    measurement = Measurement(len(rows))
    for start, stop in itertools.pairwise([0, *sorted(cuts), rows.shape[1]]):
        measurement.add(
            np.ascontiguousarray(rows[:, start:stop]), int(np.clip(kernels - start, 0, stop - start))
        )
    return measurement


def _geometry(
    rows: np.ndarray, coefficients: np.ndarray | None = None, kernels: int | None = None
) -> Geometry:
    uniform = np.full(len(rows), 1.0 / len(rows))
    geometry = geometry_of(_measure(rows, kernels), uniform if coefficients is None else coefficients)
    assert geometry is not None
    return geometry


def _distances(rows: np.ndarray) -> np.ndarray:
    return np.array([[np.linalg.norm(one - other) for other in rows] for one in rows])


def _angle(one: np.ndarray, other: np.ndarray) -> float:
    return float(
        np.degrees(np.arccos(np.clip(one @ other / np.linalg.norm(one) / np.linalg.norm(other), -1, 1)))
    )


def _run(seed: int, count: int, size: int = 500, step: float = 0.1) -> np.ndarray:
    """Return a random walk from a random start."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal(size) + step * rng.standard_normal((count, size)).cumsum(axis=0)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(2, 7),
    size=st.integers(3, 60),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    kernels=st.integers(0, 60),
    offset=st.sampled_from([0.0, 1.0, 1e4]),
    spread=st.sampled_from([1e-4, 1.0]),
)
def test_every_number_is_numpys_whatever_the_blocks(
    seed: int, count: int, size: int, cuts: list[int], kernels: int, offset: float, spread: float
) -> None:
    rng = np.random.default_rng(seed)
    rows = offset * rng.standard_normal(size) + spread * rng.standard_normal((count, size))
    coefficients = rng.dirichlet(np.full(count, 10.0))
    kernels = min(kernels, size)
    geometry = geometry_of(_measure(rows, kernels, tuple(min(cut, size) for cut in cuts)), coefficients)
    assert geometry is not None
    mean = coefficients @ rows
    away = np.array([coefficients @ (row - rows) for row in rows])  # a mean far from 0 would be rounded
    np.testing.assert_allclose(geometry.distances, _distances(rows), rtol=1e-9)
    np.testing.assert_allclose(geometry.steps, np.linalg.norm(np.diff(rows, axis=0), axis=1), rtol=1e-9)
    np.testing.assert_allclose(geometry.norms, np.linalg.norm(rows, axis=1), rtol=1e-12)
    np.testing.assert_allclose(
        geometry.to_mean, np.linalg.norm(away, axis=1), rtol=1e-9, atol=1e-10 * _distances(rows).max()
    )
    np.testing.assert_allclose(geometry.mean_norm, np.linalg.norm(mean), rtol=1e-12)
    for i, j in itertools.permutations(range(count), 2):
        assert geometry.angles[i, j] == pytest.approx(_angle(away[i], away[j]), abs=1e-3)
        part = rows[:, :kernels]
        expected = np.cos(np.radians(_angle(part[i], part[j]))) if kernels else 1.0
        assert geometry.similarities[i, j] == pytest.approx(expected, abs=1e-12)
    for k in range(count - 2):
        expected = _angle(rows[k + 1] - rows[k], rows[k + 2] - rows[k + 1])
        assert geometry.turns[k] == pytest.approx(expected, abs=1e-3)
    assert geometry.turns.shape == (max(0, count - 2),)
    assert geometry.effective_count == pytest.approx(1 / sum(c * c for c in coefficients))


def test_neighbours_a_millionth_apart_keep_nine_digits_beside_one_far_away() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal(2000) + 1e-6 * rng.standard_normal((4, 2000))
    rows[0] = 100 * rng.standard_normal(2000)
    np.testing.assert_allclose(_geometry(rows).distances, _distances(rows), rtol=1e-9)


def test_equal_rows_are_zero_apart_and_at_their_mean() -> None:
    geometry = _geometry(np.repeat(np.random.default_rng(0).standard_normal((1, 50)), 5, axis=0))
    assert not geometry.distances.any()
    assert not geometry.to_mean.any()
    assert np.isnan(geometry.angles).all()
    assert np.isnan(geometry.turns).all()
    assert geometry.groups == ((0, 1, 2, 3, 4),)
    assert geometry.plane.explained == (0.0, 0.0)


def test_turns_are_zero_straight_on_and_180_back() -> None:
    start, step = np.random.default_rng(0).standard_normal((2, 30))
    turns = _geometry(np.array([start, start + step, start + 2 * step, start + step])).turns
    np.testing.assert_allclose(turns, [0.0, 180.0], atol=1e-5)


def test_the_plane_is_that_of_the_singular_value_decomposition() -> None:
    rows = _run(3, 12)
    coefficients = np.random.default_rng(4).dirichlet(np.ones(12))
    plane = _geometry(rows, coefficients).plane
    centred = rows - rows.mean(axis=0)
    left, values, right = np.linalg.svd(centred, full_matrices=False)
    expected = left[:, :2] * values[:2]
    for axis in (0, 1):
        sign = np.sign(plane.points[:, axis] @ expected[:, axis])
        np.testing.assert_allclose(plane.points[:, axis], sign * expected[:, axis], atol=1e-9)
        average = (coefficients @ rows - rows.mean(axis=0)) @ right[axis]
        assert plane.average[axis] == pytest.approx(sign * average, abs=1e-9)
    np.testing.assert_allclose(plane.explained, values[:2] ** 2 / (values**2).sum(), rtol=1e-9)
    assert plane.points[-1, 0] > plane.points[0, 0]


@pytest.mark.parametrize("count", [3, 10, 100, 1000])
@pytest.mark.parametrize("where", [0, 1, -1])
def test_a_row_from_another_start_is_the_only_outlier(count: int, where: int) -> None:
    rows = _run(1, count, size=300, step=0.02)
    assert _geometry(rows).outliers == ()
    rows[where] = _run(2, 1, size=300)[0]
    geometry = _geometry(rows)
    assert geometry.outliers == (where % count,)
    assert len(geometry.groups[0]) == count - 1


@pytest.mark.parametrize(
    "steps",
    [
        0.3 * 0.8 ** np.arange(40),
        np.tile([0.3, 0.2, 0.1, 0.01], 10),
        np.concatenate([[1.0], np.full(39, 0.001)]),
        np.concatenate([np.full(39, 0.001), [1.0]]),
    ],
    ids=["decaying", "cyclic", "an early jump", "a late jump"],
)
def test_uneven_steps_raise_no_alarm(steps: np.ndarray) -> None:
    rng = np.random.default_rng(5)
    rows = rng.standard_normal(500) + (steps[:, None] * rng.standard_normal((40, 500))).cumsum(axis=0)
    geometry = _geometry(rows)
    assert geometry.outliers == ()
    assert geometry.groups == (tuple(range(40)),)


def test_an_early_row_is_related_through_those_between() -> None:
    rows = _run(6, 200, step=0.5)
    geometry = _geometry(rows)
    assert geometry.similarities[0, -1] < geometry.threshold
    assert geometry.outliers == ()


def test_gains_that_all_networks_share_do_not_make_them_related() -> None:
    rows = np.concatenate([_run(7, 4), np.ones((4, 5000))], axis=1)
    rows[2, :500] = _run(8, 1)[0]
    assert _geometry(rows, kernels=500).outliers == (2,)
    assert _geometry(rows).outliers == ()


def test_a_row_of_another_scale_is_related_and_a_zero_one_too() -> None:
    rows = _run(9, 6)
    rows[3] *= 100.0
    rows[4] = 0.0
    assert _geometry(rows).groups == (tuple(range(6)),)


def test_two_runs_are_two_groups_and_no_outliers() -> None:
    rows = np.concatenate([_run(1, 3), _run(2, 5)])
    geometry = _geometry(rows)
    assert geometry.groups == ((3, 4, 5, 6, 7), (0, 1, 2))
    assert geometry.outliers == ()


def test_strangers_only_are_no_outliers_of_each_other() -> None:
    geometry = _geometry(np.concatenate([_run(seed, 1) for seed in range(4)]))
    assert geometry.groups == ((0,), (1,), (2,), (3,))
    assert geometry.outliers == ()


@pytest.mark.parametrize(("kernels", "threshold"), [(9, 0.6), (36, 0.5), (100, 0.3), (10**6, 0.3)])
def test_the_threshold_allows_for_chance_in_few_dimensions(kernels: int, threshold: float) -> None:
    measurement = Measurement(2)
    measurement.kernel_columns = kernels
    geometry = geometry_of(measurement, np.array([0.5, 0.5]))
    assert geometry is not None
    assert geometry.threshold == pytest.approx(threshold)


def test_squares_that_do_not_fit_into_float64_have_no_geometry() -> None:
    rows = np.random.default_rng(0).standard_normal((3, 10))
    rows[1] *= 1e200
    assert geometry_of(_measure(rows), np.full(3, 1 / 3)) is None


def test_a_part_of_the_rows_is_measured_as_if_alone() -> None:
    rows = _run(3, 6)
    part = _measure(rows, 200).of([1, 2, 5])
    alone = _measure(rows[[1, 2, 5]], 200)
    np.testing.assert_allclose(part.squared, alone.squared, rtol=1e-12)
    np.testing.assert_allclose(part.squared_norms, alone.squared_norms, rtol=1e-12)
    np.testing.assert_allclose(part.kernels, alone.kernels, rtol=1e-12)
    assert part.kernel_columns == alone.kernel_columns
