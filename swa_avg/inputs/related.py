"""Related or not: whether checkpoints are of one run, or at least of one start, as their kernels tell.

Networks from different random initializations have kernels (tensors of two or more dimensions; gains, biases
and statistics have means of their own, which all networks share) that are orthogonal but for chance, before
training and after it, while those of one run stay similar (Fort et al. 2019, arXiv:1912.02757, section 3). As
a rule there is no low-loss path between the former that is straight (Frankle et al. 2020, arXiv:1912.05671),
and their average is no better than chance.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from swa_avg.errors import Finding, MismatchError
from swa_avg.files.location import Location, any_remote
from swa_avg.files.remote import CONNECTIONS
from swa_avg.formats import Checkpoint, Tensor
from swa_avg.formats.values import values_of
from swa_avg.text import first_few, listed_text, short_names

__all__ = [
    "Relation",
    "check_related",
    "groups_of",
    "kernels_among",
    "similarities",
    "similarity_threshold",
    "unrelated_text",
]

_RELATED = 0.3
_ZERO = 1e-6  # of the largest norm
_NOISE = 3.0
_MOST_NOISE = 0.6
_SAMPLE = 4 * 2**20  # bytes, of all inputs together
_MOST = 2**17  # bytes, of one input
_LEAST = 2**12
_WINDOWS = 16
_FEWEST = 1000  # values, from which chance and the size of steps are small enough to judge by
_FEW = 5  # groups that are listed


# --- what related means


def similarities(inner: NDArray[Any]) -> NDArray[Any]:
    """Return the cosine of the angle between each pair of rows: 1 for equal ones, about 0 for unrelated ones.

    `inner`: their inner products, float[rows, rows]. Where nothing can be told, since a row is zero (but for
    rounding) or its square overflows, it is 1.
    """
    norms = np.sqrt(np.maximum(np.diagonal(inner), 0.0))
    result = np.ones_like(inner)
    some = norms > _ZERO * norms.max(initial=0.0)
    known = np.isfinite(inner) & some & some[:, None]
    np.divide(inner, norms[:, None] * norms, out=result, where=known)
    return result


def similarity_threshold(values: int) -> float:
    """Return the similarity from which two rows of this many kernel values count as related.

    It is 0.3. In small networks of nine kinds (dense, convolutional, recurrent, attention), trained with six
    optimizers, the ends of the first epoch and of the last one of a run had 0.45 or more, at rates that more
    than double the norm, and networks of different seeds 0.23 or less. The rule asks neither how far nor how
    evenly a run moves, so that decaying and cyclic learning rates raise no alarm. In less than a hundred
    dimensions chance gives similarities above 0.3 (its standard deviation is 1/√dimensions), and the
    threshold is 3/√dimensions, up to 0.6.
    """
    return max(_RELATED, min(_MOST_NOISE, _NOISE / math.sqrt(max(1, values))))


def groups_of(related: NDArray[np.bool_]) -> tuple[tuple[int, ...], ...]:
    """Return the rows that are related, directly or through others, from what each pair is.

    The largest group is first, of equals the one with the earliest row.
    """
    unseen = np.ones(len(related), np.bool_)
    groups = []
    for start in range(len(related)):
        if not unseen[start]:
            continue
        group = np.zeros(len(related), np.bool_)
        reached = np.arange(len(related)) == start
        while reached.any():
            group |= reached
            reached = related[reached].any(axis=0) & ~group
        unseen &= ~group
        groups.append(tuple(int(row) for row in np.flatnonzero(group)))
    return tuple(sorted(groups, key=lambda group: (-len(group), group)))


def kernels_among(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return those of two or more dimensions."""
    return [tensor for tensor in tensors if len(tensor.shape) > 1]


# --- the check before an average


@dataclass(frozen=True)
class Relation:
    """What a sample of their kernels says of checkpoints."""

    paths: tuple[Location, ...]
    similarities: NDArray[np.float32]
    """float32[checkpoints, checkpoints]."""
    squared: NDArray[np.float32]
    """Squared distances of the samples, float32[checkpoints, checkpoints]."""
    threshold: float
    """Similarity from which two are related."""
    groups: tuple[tuple[int, ...], ...]
    """Checkpoints that are related, directly or through others; empty where there is too little to tell."""

    @property
    def related(self) -> bool | None:
        """Whether all belong together; None where there is too little to tell."""
        return len(self.groups) == 1 if self.groups else None

    @property
    def least(self) -> float:
        """The least similarity of a checkpoint to the one that is most similar to it."""
        others = self.similarities.copy()
        np.fill_diagonal(others, -np.inf)
        return float(others.max(axis=1).min())

    @property
    def problem(self) -> str | None:
        """Why the mean of all is meaningless, if it is."""
        if len(self.groups) < 2:
            return None
        names = short_names(self.paths)
        return unrelated_text([[names[row] for row in group] for group in self.groups])

    def as_json(self) -> dict[str, Any]:
        """Return all of it as JSON's types."""
        return {
            "related": self.related,
            "least_similarity": round(self.least, 4) if self.groups else None,
            "threshold": self.threshold,
            "groups": [[str(self.paths[row]) for row in group] for group in self.groups],
        }


def unrelated_text(groups: Sequence[Sequence[str]]) -> str:
    """Return what to say of groups of checkpoints, by name, that are not related to each other."""
    each = first_few([listed_text(group) for group in groups], _FEW, "; ")
    return (
        f"{len(groups)} groups of checkpoints that are unrelated to each other, as if of {len(groups)} runs; "
        f"their mean is meaningless: {each}"
    )


def check_related(checkpoints: Sequence[Checkpoint], averaged: Sequence[Tensor], *, allow: bool) -> Relation:
    """Compare a sample of the kernels that are averaged, a few megabytes of all inputs together.

    Args:
        checkpoints: Those that count in the average.
        averaged: Which of their tensors are averaged.
        allow: Let them be unrelated.

    Raises:
        MismatchError: they are not related.
        UnreadableError, SystemRefusalError: as for `Region.ranges`.
    """
    relation = _relation(checkpoints, averaged)
    if relation.problem is not None and not allow:
        first = relation.paths[relation.groups[-1][0]]
        problem = (
            f"{relation.problem}; average each group by itself, or ensemble their predictions, as with folds "
            "and seeds; allow_unrelated averages all the same"
        )
        raise MismatchError([Finding(first, "kernels", problem)])
    return relation


def _relation(checkpoints: Sequence[Checkpoint], averaged: Sequence[Tensor]) -> Relation:
    paths = tuple(checkpoint.path for checkpoint in checkpoints)
    parts = list(_parts(kernels_among(averaged), len(checkpoints)))
    count = sum(part.values for part in parts)
    threshold = similarity_threshold(count)
    if count < _FEWEST or len(checkpoints) < 2:
        alike = np.ones((len(paths),) * 2, np.float32)
        return Relation(paths, alike, np.zeros_like(alike), threshold, ())
    with ThreadPoolExecutor(CONNECTIONS if any_remote(paths) else 1) as executor:
        rows = np.stack(list(executor.map(lambda checkpoint: _sample(checkpoint, parts), checkpoints)))
    with np.errstate(over="ignore", invalid="ignore"):
        if not np.isfinite(rows.sum()):  # reported, or copied, when they are averaged
            rows[:, ~np.isfinite(rows).all(axis=0)] = 0.0
        found = similarities(rows @ rows.T)
        rows -= rows.mean(axis=0)  # of neighbours' inner products, differences would keep few digits
        inner = rows @ rows.T
        squares = np.diagonal(inner)
        squared = np.maximum(squares[:, None] + squares - 2.0 * inner, 0.0)
    return Relation(paths, found, squared, threshold, groups_of(found >= threshold))


class _Part(NamedTuple):
    """A part of one kernel that belongs to the sample, in bytes from the tensor's start."""

    tensor: Tensor
    start: int
    stop: int

    @property
    def values(self) -> int:
        return (self.stop - self.start) * math.prod(self.tensor.shape) // self.tensor.nbytes


def _parts(kernels: Sequence[Tensor], count: int) -> Iterator[_Part]:
    """Yield what is read of each of `count` inputs: all, or windows of one size at equal distances."""
    total = sum(kernel.nbytes for kernel in kernels)
    size = max(_LEAST, min(_MOST, _SAMPLE // count))
    windows = [(0, total)]
    if total > size:
        width = size // _WINDOWS
        starts = ((total - width) * number // (_WINDOWS - 1) for number in range(_WINDOWS))
        windows = [(start, start + width) for start in starts]
    position = 0
    for kernel in kernels:
        for start, stop in windows:
            first = max(start - position, 0) // 8 * 8  # whole values of any type
            last = min((stop - position) // 8 * 8, kernel.nbytes) if stop < total else kernel.nbytes
            if first < last:
                yield _Part(kernel, first, last)
        position += kernel.nbytes


def _sample(checkpoint: Checkpoint, parts: Sequence[_Part]) -> NDArray[np.float32]:
    """Return the values of the parts, as one checkpoint has them."""
    values: list[NDArray[Any]] = []
    for index, run in groupby(parts, key=lambda part: checkpoint.tensors[part.tensor.name].shard):
        own = [(checkpoint.tensors[tensor.name], start, stop) for tensor, start, stop in run]
        ranges = [(tensor.offset + start, tensor.offset + stop) for tensor, start, stop in own]
        found = checkpoint.shards[index].ranges(ranges)
        values += [
            values_of(np.frombuffer(data, np.uint8), tensor.dtype)
            for (tensor, _, _), data in zip(own, found, strict=True)
        ]
    with np.errstate(over="ignore"):
        return np.concatenate(values, dtype=np.float32, casting="same_kind")
