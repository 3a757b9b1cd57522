"""Mergeable moments: (count, mean, M2) in float64, and the two estimators that are read from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["ESTIMATORS", "Moments", "Statistics"]

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Statistics:
    """What a BatchNorm layer stores: one mean and one variance a channel, float64."""

    mean: Vector
    variance: Vector


@dataclass(frozen=True)
class Moments:
    """Count, mean and squared deviations of a set of values, channel by channel (float64, one shape)."""

    count: Vector
    """Number of values; channels can differ where a mask says so."""
    mean: Vector
    m2: Vector
    """Sum of squared deviations from `mean`."""
    within: Vector
    """Sum over the batches of the squared deviations from the batch's own mean: `m2` without the term between
    batches."""

    @classmethod
    def empty(cls, channels: int) -> Moments:
        """Return the moments of no values, the neutral element of `merge`."""
        return cls(np.zeros(channels), np.zeros(channels), np.zeros(channels), np.zeros(channels))

    @classmethod
    def of_batch(cls, count: ArrayLike, mean: ArrayLike, variance: ArrayLike) -> Moments:
        """Return one batch's moments from its statistics.

        `variance` is biased, divided by n, as Keras computes it: M2 = n·variance. `count` is one number, or
        one a channel; a channel that saw nothing counts nothing, whatever its mean says.
        """
        means = np.asarray(mean, np.float64)
        counts = np.broadcast_to(np.asarray(count, np.float64), means.shape)
        seen = counts > 0
        m2 = np.where(seen, counts * np.asarray(variance, np.float64), 0.0)
        return cls(counts.copy(), np.where(seen, means, 0.0), m2, m2)

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets together, exact but for float64 rounding.

        Source: Chan, Golub and LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample
        Variances", equation 2.1.
        """
        count = self.count + other.count
        share = other.count / np.maximum(count, 1.0)
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * share,
            self.m2 + other.m2 + delta * delta * self.count * share,
            self.within + other.within,
        )

    def part(self, start: int, stop: int) -> Moments:
        """Return the moments of the channels from `start` up to `stop`."""
        return Moments(
            self.count[start:stop], self.mean[start:stop], self.m2[start:stop], self.within[start:stop]
        )

    def pooled(self) -> Statistics:
        """Return mean and variance of all values as one population, the term between batches included.

        Source: PreciseBN, Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm" (arXiv:2105.07576), section
        3.
        """
        return Statistics(self.mean, self.m2 / np.maximum(self.count, 1.0))

    def batch_mean(self) -> Statistics:
        """Return the means of the batches' statistics, each weighted by its size.

        The code of Izmailov et al. 2018 (`bn_update` in timgaripov/swa) does this. The mean is the
        population's; the variance lacks the term between batches, the more of it the smaller the batches are.
        """
        return Statistics(self.mean, self.within / np.maximum(self.count, 1.0))


ESTIMATORS: dict[str, Callable[[Moments], Statistics]] = {
    "pooled": Moments.pooled,
    "batch-mean": Moments.batch_mean,
}
