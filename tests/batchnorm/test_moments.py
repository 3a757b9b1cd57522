"""Laws of mergeable moments, against plain float64 NumPy."""

from __future__ import annotations

from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from swa_avg.batchnorm.moments import ESTIMATORS, Moments

CHANNELS = 3
VALUES = arrays(
    np.float64, st.tuples(st.integers(1, 40), st.just(CHANNELS)), elements=st.floats(-1e3, 1e3, width=32)
)


def of_values(values: np.ndarray) -> Moments:
    """Return the two-pass moments of `values`, shape (n, channels), as one batch."""
    data = values.astype(np.float64)
    if not len(data):
        return Moments.empty(data.shape[1])
    return Moments.of_batch(len(data), data.mean(axis=0), data.var(axis=0))


def merge_all(parts: list[Moments]) -> Moments:
    return reduce(Moments.merge, parts)


def assert_same(found: Moments, expected: Moments, scale: float) -> None:
    np.testing.assert_array_equal(found.count, expected.count)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=0, atol=1e-12 * scale)
    np.testing.assert_allclose(found.m2, expected.m2, rtol=0, atol=1e-10 * scale**2)
    np.testing.assert_allclose(found.within, expected.within, rtol=0, atol=1e-10 * scale**2)


@given(values=VALUES, cut=st.floats(0, 1))
def test_merging_two_halves_equals_the_whole(values, cut):
    position = int(cut * len(values))
    merged = of_values(values[:position]).merge(of_values(values[position:])).pooled()
    np.testing.assert_allclose(merged.mean, values.mean(axis=0), rtol=0, atol=1e-10)
    np.testing.assert_allclose(merged.variance, values.var(axis=0), rtol=1e-10, atol=1e-9)


@given(parts=st.lists(VALUES, min_size=2, max_size=6), seed=st.integers(0, 1000))
def test_the_order_of_merging_does_not_matter(parts, seed):
    moments = [of_values(part) for part in parts]
    shuffled = [moments[index] for index in np.random.default_rng(seed).permutation(len(moments))]
    assert_same(merge_all(shuffled), merge_all(moments), 1e3)


@given(first=VALUES, second=VALUES, third=VALUES)
def test_merging_is_associative(first, second, third):
    a, b, c = map(of_values, (first, second, third))
    assert_same(a.merge(b).merge(c), a.merge(b.merge(c)), 1e3)


@given(values=VALUES)
def test_no_values_change_nothing(values):
    moments = of_values(values)
    for merged in (
        moments.merge(Moments.empty(CHANNELS)),
        of_values(values[:0]).merge(moments),
    ):
        assert_same(merged, moments, 1e3)


@given(value=st.floats(-1e6, 1e6), sizes=st.lists(st.integers(1, 50), min_size=1, max_size=8))
def test_equal_values_have_their_mean_and_no_variance(value, sizes):
    merged = merge_all([of_values(np.full((size, 1), value)) for size in sizes])
    assert merged.pooled().mean == pytest.approx(value, rel=1e-14)
    assert merged.pooled().variance == pytest.approx(0, abs=1e-18 * max(1.0, value * value))


def test_a_large_mean_costs_no_digits():
    values = np.random.default_rng(0).normal(1e6, 1.0, (10_000, 2))
    merged = merge_all([of_values(part) for part in np.array_split(values, 77)])
    np.testing.assert_allclose(merged.pooled().variance, values.var(axis=0), rtol=1e-9)


def test_the_float64_part_agrees_with_two_passes_to_13_digits():
    values = np.random.default_rng(1).normal(0.3, 2.0, (5_000, 16))
    for count in (2, 50, 1_000, 5_000):
        pooled = merge_all([of_values(part) for part in np.array_split(values, count)]).pooled()
        np.testing.assert_allclose(pooled.mean, values.mean(axis=0), rtol=1e-13)
        np.testing.assert_allclose(pooled.variance, values.var(axis=0), rtol=1e-13)


def test_pooled_has_the_term_between_batches_and_batch_mean_lacks_it():
    batches = [np.array([[0.0], [2.0]]), np.array([[10.0], [12.0], [14.0], [16.0]])]
    merged = merge_all([of_values(batch) for batch in batches])
    everything = np.concatenate(batches)
    assert merged.pooled().variance == pytest.approx(everything.var())
    assert merged.batch_mean().variance == pytest.approx((2 * 1.0 + 4 * 5.0) / 6)
    assert merged.batch_mean().mean == pytest.approx(everything.mean())


def test_a_channel_that_saw_nothing_counts_nothing():
    some = Moments.of_batch([4, 0], [1.0, np.nan], [2.0, np.nan])
    merged = some.merge(Moments.of_batch([4, 4], [1.0, 5.0], [2.0, 3.0]))
    np.testing.assert_array_equal(merged.pooled().mean, [1.0, 5.0])
    np.testing.assert_array_equal(merged.pooled().variance, [2.0, 3.0])


def test_parts_are_cut_out_by_channel():
    values = np.arange(12.0).reshape(4, 3)
    part = of_values(values).part(1, 3)
    np.testing.assert_array_equal(part.pooled().mean, values[:, 1:].mean(axis=0))


def test_the_estimators_are_the_two_that_the_command_line_offers():
    assert list(ESTIMATORS) == ["pooled", "batch-mean"]
