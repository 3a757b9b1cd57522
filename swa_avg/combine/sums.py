"""The arithmetic of averaging one block: float64 sums, rounded once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from swa_avg.combine.blocks import Block
from swa_avg.errors import Finding, MismatchError, Named
from swa_avg.formats.base import Tensor
from swa_avg.formats.values import values_of, widen
from swa_avg.planning.policy import FLOATS

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = [
    "InvalidValuesError",
    "Pieces",
    "Row",
    "Sums",
    "all_finite",
    "factors_of",
    "round_to_bfloat16",
]

Row = tuple[tuple[float, ...], float]
"""What each input is multiplied by, and what the sum is divided by."""


def factors_of(coefficients: Sequence[float]) -> Row:
    """Return the factors and the divisor of a row of coefficients.

    Where all coefficients that are not zero are 1/n, the factors are 1 and the divisor is n: a plain sum, in
    which nothing is rounded before the division.
    """
    used = [coefficient for coefficient in coefficients if coefficient]
    if used == [1.0 / len(used)] * len(used):
        return tuple(float(coefficient != 0) for coefficient in coefficients), float(len(used))
    return tuple(coefficients), 1.0


class InvalidValuesError(Exception):
    """A block holds NaN, infinity, or integers that differ; a second look at all files finds where.

    NaN and infinity are copied where the tensor that holds them is the same in all inputs, such as a mask.
    """


class Pieces:
    """Views of the values of a block's pieces, in a buffer that holds one input's bytes of the block."""

    def __init__(self, block: Block, raw: NDArray[np.uint8]) -> None:
        self.values: list[NDArray[Any]] = []
        self.integers: list[NDArray[np.uint8]] = []
        for piece in block.pieces:
            view = raw[piece.start - block.start : piece.stop - block.start]
            if piece.average:
                dtype = piece.tensor.dtype
                self.values.append(view.view(np.uint16 if dtype == "bfloat16" else dtype))
            else:
                self.integers.append(view)


class Sums:
    """The float64 sums of one block, one row for each average."""

    def __init__(
        self,
        block: Block,
        rows: Sequence[Row],
        sums: NDArray[np.float64],
        is_same: Callable[[Tensor], bool],
    ) -> None:
        self.block = block
        self.is_same = is_same
        """Tells whether a tensor has the same bytes in all inputs."""
        self.constants: set[str] = set()
        """Tensors of which it was found to, since they hold values that are not finite."""
        self.rows = rows
        self.sums = sums
        self.averaged = [piece for piece in block.pieces if piece.average]
        self.integers: list[bytes] | None = None
        sizes = [(piece.stop - piece.start) // FLOATS[piece.tensor.dtype] for piece in self.averaged]
        stops = list(accumulate(sizes))
        spans = [slice(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]
        self.parts = [[row[span] for span in spans] for row in sums]
        """For each row, the sums of each piece."""
        self.begun = [False] * len(rows)

    def add(self, number: int, pieces: Pieces) -> None:
        """Add the values of input `number`."""
        integers = [view.tobytes() for view in pieces.integers]
        if self.integers is None:
            self.integers = integers
        elif integers != self.integers:
            raise InvalidValuesError
        values = [
            widen(view) if piece.tensor.dtype == "bfloat16" else view
            for piece, view in zip(self.averaged, pieces.values, strict=True)
        ]
        for row, (factors, _) in enumerate(self.rows):
            if factors[number]:
                self._add(row, factors[number], values)
        if not any(factors[number] for factors, _ in self.rows):  # else the sums show it
            self._check(values)

    def _check(self, values: Sequence[NDArray[Any]]) -> bool:
        """Tell whether values of the pieces are finite; raise InvalidValuesError where they must be."""
        odd = [
            piece.tensor for piece, v in zip(self.averaged, values, strict=True) if not np.isfinite(v).all()
        ]
        for tensor in odd:
            if tensor.name not in self.constants and not self.is_same(tensor):
                raise InvalidValuesError
            self.constants.add(tensor.name)
        return not odd

    def _add(self, row: int, factor: float, values: Sequence[NDArray[Any]]) -> None:
        for sums, value in zip(self.parts[row], values, strict=True):
            if factor != 1.0:
                value = np.multiply(value, factor, dtype=np.float64)  # noqa: PLW2901
            if self.begun[row]:
                np.add(sums, value, out=sums)
            else:
                sums[:] = value
        self.begun[row] = True

    def finish(self, averages: NDArray[np.uint8], path: Named) -> None:
        """Round the averages once to their stored type, and write them into their places.

        The first row holds the template's bytes, which stay in every row where a sum is not finite.

        Raises:
            InvalidValuesError: a sum is not finite, and its tensor not the same in all inputs.
            MismatchError: an average with a negative coefficient exceeds the range of its type.
        """
        for row, (factors, divisor) in enumerate(self.rows):
            if divisor != 1.0:
                np.divide(self.sums[row], divisor, out=self.sums[row])
            finite = bool(np.isfinite(self.sums[row]).all()) or self._check(self.parts[row])
            for piece, sums in zip(self.averaged, self.parts[row], strict=True):
                dtype = piece.tensor.dtype
                span = slice(piece.start - self.block.start, piece.stop - self.block.start)
                target = averages[row, span]
                template = None if finite or np.isfinite(sums).all() else averages[0, span].copy()
                if dtype == "bfloat16":
                    target.view(np.uint16)[:] = round_to_bfloat16(sums)
                else:
                    target.view(dtype)[:] = sums
                if template is not None:
                    _keep(target, template, ~np.isfinite(sums), dtype)
                elif min(factors) < 0 and not all_finite(target, dtype):  # else it lies between the inputs
                    problem = f"the average does not fit into {dtype}"
                    raise MismatchError([Finding(path, piece.tensor.name, problem)])


def _keep(
    target: NDArray[np.uint8], template: NDArray[np.uint8], constant: NDArray[np.bool_], dtype: str
) -> None:
    """Copy constants from the template; raise InvalidValuesError if one is finite: its sum is too large."""
    if np.isfinite(values_of(template, dtype)[constant]).any():
        raise InvalidValuesError
    shape = len(constant), -1
    target.reshape(shape)[constant] = template.reshape(shape)[constant]


def round_to_bfloat16(values: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Round float64 to bfloat16 once, ties to even, and return the bits.

    The step through float32 rounds to odd (Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded
    sums: proved algorithms using rounding to odd"), since rounding to nearest twice is wrong next to ties.
    """
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float32)
    bits = nearest.view(np.uint32)
    bits -= np.abs(nearest) > np.abs(values)  # towards zero
    bits |= bits.view(np.float32) != values
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def all_finite(data: NDArray[np.uint8], dtype: str) -> bool:
    """Tell whether bytes that hold values of a floating-point type hold no NaN and no infinity."""
    return bool(np.isfinite(values_of(data, dtype)).all())
