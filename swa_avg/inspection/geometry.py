"""How far apart checkpoints lie, and in which directions: pure mathematics on rows of weights.

Everything follows from the squared distances: inner products about any weighted mean (classical scaling,
Torgerson 1952, Gower 1966), angles (the law of cosines), and the plane that shows most of a trajectory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from swa_avg.inputs.related import groups_of, similarities, similarity_threshold

__all__ = ["Geometry", "Measurement", "Plane", "geometry_of", "plane_of", "turns_of"]

Array = NDArray[np.float64]

_CANCELLATION = 1e-4  # share of two rows' squared norms below which their difference is taken by itself


class Measurement:
    """Sums over blocks of columns: squared distances, squared norms, inner products of kernels."""

    def __init__(self, count: int) -> None:
        """Start with `count` rows and no columns."""
        self.squared = np.zeros((count, count))
        """Squared distances between rows."""
        self.squared_norms = np.zeros(count)
        self.kernels = np.zeros((count, count))
        """Inner products of rows, over the columns that belong to kernels."""
        self.kernel_columns = 0

    def add(self, rows: Array, kernel_columns: int) -> None:
        """Add a block, float64[rows, columns], the first `kernel_columns` of which belong to kernels.

        The Gram matrix G is that of the rows less their mean, so that little cancels in
        d_ij² = G_ii + G_jj - 2 G_ij; for pairs much closer to each other than to the mean, where digits would
        be lost all the same, the squares of the differences are summed instead. Distances are then good to
        about 1e-12, relatively.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # what does not fit is found at the end
            self._add(rows, kernel_columns)

    def _add(self, rows: Array, kernel_columns: int) -> None:
        mean = rows.mean(axis=0)
        centred = rows - mean
        kernels, rest = centred[:, :kernel_columns], centred[:, kernel_columns:]
        inner = kernels @ kernels.T
        gram = inner + rest @ rest.T
        of_mean = mean[:kernel_columns]
        towards_mean = kernels @ of_mean
        self.kernels += inner + towards_mean[:, None] + towards_mean + of_mean @ of_mean
        radii = np.diagonal(gram)[:, None] + np.diagonal(gram)
        squared = radii - 2.0 * gram
        near = np.triu(squared <= _CANCELLATION * radii, 1)
        for first in np.flatnonzero(near.any(axis=1)):
            others = np.flatnonzero(near[first])
            differences = rows[others] - rows[first]
            squared[first, others] = squared[others, first] = np.einsum("ij,ij->i", differences, differences)
        np.fill_diagonal(squared, 0.0)
        self.squared += squared
        self.squared_norms += np.einsum("ij,ij->i", rows, rows)
        self.kernel_columns += kernel_columns

    def of(self, positions: Sequence[int]) -> Measurement:
        """Return the measurement of these rows alone."""
        chosen = Measurement(len(positions))
        square = np.ix_(positions, positions)
        chosen.squared, chosen.kernels = self.squared[square], self.kernels[square]
        chosen.squared_norms = self.squared_norms[list(positions)]
        chosen.kernel_columns = self.kernel_columns
        return chosen


@dataclass(frozen=True)
class Plane:
    """The rows in the plane of their two main directions."""

    points: Array
    """float64[rows, 2], in the unit of the weights, about the rows' plain mean."""
    average: Array
    """float64[2]: where the weighted mean falls."""
    explained: tuple[float, float]
    """Share of the rows' scatter about their mean along each direction."""


@dataclass(frozen=True)
class Geometry:
    """What `geometry_of` makes of a measurement; lengths are Euclidean, in the unit of the weights."""

    distances: Array
    """float64[rows, rows]."""
    norms: Array
    steps: Array
    """float64[rows - 1]: from each row to the next."""
    turns: Array
    """float64[rows - 2], degrees: between each step and the next; 0 goes straight on, 180 back. NaN without a
    step."""
    to_mean: Array
    """Distance of each row from the weighted mean."""
    mean_norm: float
    angles: Array
    """float64[rows, rows], degrees: between rows seen from the weighted mean; NaN where a row is the mean."""
    similarities: Array
    """float64[rows, rows]: of the kernels, as `similarities` defines it."""
    threshold: float
    """Similarity from which two rows count as related."""
    groups: tuple[tuple[int, ...], ...]
    """Rows that are related, directly or through others, the largest group first."""
    plane: Plane
    effective_count: float
    """1 / Σ c_i² (Kish 1965): how many equally weighted rows the weighted mean is worth."""

    @property
    def outliers(self) -> tuple[int, ...]:
        """Rows that are related to no other, where the others are a group: each lies in another basin."""
        if len(self.groups[0]) == 1:
            return ()
        return tuple(sorted(group[0] for group in self.groups if len(group) == 1))


def geometry_of(measured: Measurement, coefficients: Array) -> Geometry | None:
    """Return the geometry of two rows or more, None if their squares do not fit into float64.

    `coefficients`: float64[rows], sum 1: those of the weighted mean.

    Groups, and with them outliers: two rows are related if their kernels' similarity reaches
    `similarity_threshold`; groups are chains of related rows, so that an early checkpoint that lies far away
    is related to the rest through the checkpoints between.

    It cannot see a barrier between networks that share an initialization, nor a permutation of neurons, which
    makes equal functions unrelated (Ainsworth et al. 2022, arXiv:2209.04836): averaging is meaningless there
    too.
    """
    squared = measured.squared
    if not all(np.isfinite(a).all() for a in (squared, measured.squared_norms, measured.kernels)):
        return None
    to_mean = _squared_to_mean(squared, coefficients)
    radii = np.sqrt(to_mean)
    inner = (to_mean[:, None] + to_mean - squared) / 2.0
    alike = similarities(measured.kernels)
    threshold = similarity_threshold(measured.kernel_columns)
    spread = coefficients @ to_mean
    angles = _degrees(_ratio(inner, radii[:, None] * radii))
    np.fill_diagonal(angles, np.where(radii > 0.0, 0.0, np.nan))
    return Geometry(
        distances=np.sqrt(squared),
        norms=np.sqrt(measured.squared_norms),
        steps=np.sqrt(np.diagonal(squared, 1)),
        turns=turns_of(squared),
        to_mean=radii,
        mean_norm=math.sqrt(max(0.0, float(coefficients @ measured.squared_norms - spread))),
        angles=angles,
        similarities=alike,
        threshold=threshold,
        groups=groups_of(alike >= threshold),
        plane=plane_of(squared, coefficients),
        effective_count=float(1.0 / (coefficients @ coefficients)),
    )


def _squared_to_mean(squared: Array, coefficients: Array) -> Array:
    """Return |x_i - Σ c_k x_k|² = Σ_k c_k d_ik² - ½ Σ_kl c_k c_l d_kl², what rounding leaves of 0 being 0."""
    towards = squared @ coefficients
    result = towards - coefficients @ towards / 2.0
    return np.where(result > 1e-14 * squared.max(initial=0.0), result, 0.0)


def turns_of(squared: Array) -> Array:
    """Return the angle between each step and the next, degrees, from squared distances in training order."""
    steps = np.diagonal(squared, 1)
    inner = (np.diagonal(squared, 2) - steps[:-1] - steps[1:]) / 2.0
    return _degrees(_ratio(inner, np.sqrt(steps[:-1] * steps[1:])))


def plane_of(squared: Array, coefficients: Array) -> Plane:
    """Project on the two main directions: principal components, by the rows' inner products about their mean.

    They show a trajectory's shape, with the caution that a random walk in many dimensions gives smooth
    curves too (Antognini and Sohl-Dickstein 2018, arXiv:1806.08805). The first points from the first row to
    the last, the second is so turned that its largest coordinate is positive.
    """
    centred = squared - squared.mean(axis=0)
    inner = -(centred - centred.mean(axis=1, keepdims=True)) / 2.0
    values, vectors = np.linalg.eigh((inner + inner.T) / 2.0)
    values, vectors = np.maximum(values[::-1], 0.0), vectors[:, ::-1]
    points = vectors[:, :2] * np.sqrt(values[:2])
    if points[-1, 0] < points[0, 0]:
        points[:, 0] *= -1.0
    if points[np.abs(points[:, 1]).argmax(), 1] < 0.0:
        points[:, 1] *= -1.0
    explained = _ratio(values[:2], np.full(2, values.sum()), default=0.0)
    return Plane(points, coefficients @ points, (float(explained[0]), float(explained[1])))


def _ratio(numerator: Array, denominator: Array, *, default: float = np.nan) -> Array:
    result = np.full(np.broadcast_shapes(numerator.shape, denominator.shape), default)
    np.divide(numerator, denominator, out=result, where=denominator > 0.0)
    return result


def _degrees(cosines: Array) -> Array:
    return np.degrees(np.arccos(np.clip(cosines, -1.0, 1.0)))
