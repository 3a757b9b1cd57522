"""A seeded random order of any number of rows, in no memory."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["Permutation"]

_ROUNDS = 6


class Permutation:
    """A pseudo-random permutation of range(size), computed where it is asked for.

    A Feistel network over the next even power of two, walked until it falls inside the range (Black and
    Rogaway 2002, "Ciphers with Arbitrary Finite Domains"); rounds mix as splitmix64 does. A shuffled list
    would take eight bytes a row, more than many rows have.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size = size
        self._half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half)) - 1)
        self._keys = np.random.SeedSequence(seed).generate_state(_ROUNDS, np.uint64)

    def __call__(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return where positions `start` up to `stop` of the order lie."""
        values = self._encrypt(np.arange(start, stop, dtype=np.uint64))
        while (outside := values >= self.size).any():
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        mixed: NDArray[np.uint64] = (left << self._half) | right
        return mixed


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the output function of splitmix64 (Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    values = values ^ (values >> np.uint64(31))
    return values
