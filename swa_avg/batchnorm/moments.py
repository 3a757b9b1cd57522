"""Mergeable moments: (count, mean, M2) in float64, and the two estimators that are read from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["ESTIMATORS", "LayerMoments", "Moments", "Statistics"]

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


@dataclass
class LayerMoments:
    """What every layer saw over all batches, in the two halves that even and odd batches make."""

    channels: Sequence[int]
    """Of each layer."""
    batches: int = 0
    _halves: tuple[dict[bytes, Moments], dict[bytes, Moments]] = field(default_factory=lambda: ({}, {}))
    """Side by side for all calls of one forward pass, by which layers were called: that can differ between
    passes."""

    def add(self, integers: NDArray[Any], floats: NDArray[Any]) -> None:
        """Merge one batch: counts and layers, then means and biased variances, all calls side by side."""
        counts, layers = integers
        moments = Moments.of_batch(counts, *floats)
        half = self._halves[self.batches % 2]
        key = layers.astype(np.int32).tobytes()
        half[key] = half[key].merge(moments) if key in half else moments
        self.batches += 1

    def order(self) -> list[int]:
        """Return the layers that were reached, in the order of the forward pass."""
        places = [np.frombuffer(key, np.int32) for half in self._halves for key in half]
        reached = dict.fromkeys(np.concatenate([*places, np.zeros(0, np.int32)]).tolist())
        return [index for index in reached if self.of(index).count.any()]

    def calls(self, index: int) -> int:
        """Return how often one forward pass calls a layer."""
        return max(
            len(list(_segments(key, index, self.channels[index]))) for half in self._halves for key in half
        )

    def of(self, index: int, halves: Sequence[int] = (0, 1)) -> Moments:
        """Return what a layer saw in all its calls."""
        channels = self.channels[index]
        parts = [
            moments.part(start, start + channels)
            for half in halves
            for key, moments in self._halves[half].items()
            for start in _segments(key, index, channels)
        ]
        return reduce(Moments.merge, parts, Moments.empty(channels))


def _segments(key: bytes, index: int, channels: int) -> Iterator[int]:
    """Yield where the calls of a layer start."""
    places = np.flatnonzero(np.frombuffer(key, np.int32) == index)
    yield from (int(start) for start in places[::channels])
