"""What all layers saw over all batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swa_avg.batchnorm.moments import Moments

__all__ = ["Tally"]


@dataclass
class Tally:
    """What all layers saw, in the two halves that even and odd batches make."""

    channels: Sequence[int]
    """Of each layer."""
    batches: int = 0
    _halves: tuple[dict[bytes, Moments], dict[bytes, Moments]] = field(default_factory=lambda: ({}, {}))
    """Side by side for all calls of one forward pass, by which layers were called: that can differ between
    passes."""

    def add(self, integers: NDArray[Any], floats: NDArray[Any]) -> None:
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
