"""Rows of arrays, in memory or at their places in a file, some at a time."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from swa_avg.errors import SystemRefusalError, UnreadableError
from swa_avg.files.region import Region
from swa_avg.files.sources import LocalSource

__all__ = ["FileRows", "MemoryRows", "RowWriter", "Rows", "describe", "disk_full_named"]


class Rows(Protocol):
    """An array of which some rows at a time are held in memory."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def take(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Return these rows, in this order."""


@dataclass(frozen=True)
class MemoryRows:
    """An array that the caller holds."""

    values: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.values.dtype

    def take(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        return self.values[indices]


@dataclass(frozen=True)
class FileRows:
    """An array in C order somewhere in a file."""

    region: Region
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def take(self, indices: NDArray[np.int64]) -> NDArray[Any]:
        """Read in the order of the file, neighbours together, and return in the order asked for."""
        order = np.argsort(indices, kind="stable")
        ascending = indices[order]
        values = np.empty((len(indices), *self.shape[1:]), self.dtype)
        nbytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        target = values.reshape(-1).view(np.uint8).data
        starts = np.flatnonzero(np.diff(ascending, prepend=ascending[:1] - 2) != 1)
        for start, stop in zip(starts, [*starts[1:], len(indices)], strict=True):
            place = self.offset + int(ascending[start]) * nbytes
            self.region.read_into(target[start * nbytes : stop * nbytes], place)
        result = np.empty_like(values)
        result[order] = values
        return result.astype(self.dtype.newbyteorder("="), copy=False)


class RowWriter:
    """Rows put one after the other into a temporary file without a name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None
        self._count = 0
        self._like: NDArray[Any] = np.empty(0)

    def write(self, values: NDArray[Any]) -> None:
        """Append rows.

        Raises:
            UnreadableError: they differ from the rows before in shape or type.
            SystemRefusalError: there is no room.
        """
        if self._file is None:
            self._like = values[:0]
        if (values.dtype, values.shape[1:]) != (self._like.dtype, self._like.shape[1:]):
            expected = describe(self._like.dtype, self._like.shape[1:])
            found = describe(values.dtype, values.shape[1:])
            raise UnreadableError(self._path, f"expected rows {expected}; found {found}")
        if values.dtype.hasobject:
            raise UnreadableError(self._path, f"expected numbers; found {values.dtype}")
        with disk_full_named(self._path):
            self._file = self._file or tempfile.TemporaryFile()  # noqa: SIM115
            self._file.write(np.ascontiguousarray(values).data)
        self._count += len(values)

    def rows(self) -> FileRows:
        """Return what was written."""
        assert self._file is not None
        with disk_full_named(self._path):
            self._file.flush()
        region = Region(LocalSource(self._path, self._file))
        return FileRows(region, 0, (self._count, *self._like.shape[1:]), self._like.dtype)

    def close(self) -> None:
        """Close the file, and with it free its room."""
        if self._file is not None:
            self._file.close()


@contextmanager
def disk_full_named(path: Path) -> Iterator[None]:
    """Turn the refusal to write a temporary file into an error that says what was unpacked, and where."""
    try:
        yield
    except OSError as error:
        problem = f"cannot unpack {path.name}: {error.strerror or error}"
        raise SystemRefusalError(error.errno, problem, tempfile.gettempdir()) from error


def describe(dtype: np.dtype[Any], shape: tuple[int, ...]) -> str:
    """Return an array's type and shape, such as float32[50000, 32, 32, 3]."""
    return f"{dtype}{list(shape)}"
