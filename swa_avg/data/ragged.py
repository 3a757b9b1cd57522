"""Batches whose rows are of several lengths: TensorFlow's ragged tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["RaggedBatch", "is_ragged"]


def is_ragged(part: Any) -> bool:
    """Tell whether a part of a batch is a ragged tensor, or the value of one."""
    return hasattr(part, "flat_values") and hasattr(part, "nested_row_splits")


@dataclass(frozen=True)
class RaggedBatch:
    """A ragged tensor, with what is asked of the arrays in other batches."""

    tensor: Any

    @classmethod
    def of(cls, part: Any) -> RaggedBatch:
        """Wrap a tensor, or the value that a dataset's NumPy iterator makes of one."""
        import tensorflow as tf

        if not tf.is_tensor(part):
            part = tf.RaggedTensor.from_nested_row_splits(part.flat_values, part.nested_row_splits)
        return cls(part)

    @property
    def dtype(self) -> np.dtype[Any]:
        dtype: np.dtype[Any] = np.dtype(self.tensor.dtype.as_numpy_dtype)
        return dtype

    @property
    def shape(self) -> tuple[int | None, ...]:
        return (len(self), *self.tensor.shape[1:])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return int(self.tensor.nrows())

    def __getitem__(self, rows: slice) -> RaggedBatch:
        return RaggedBatch(self.tensor[rows])

    def __iter__(self) -> Iterator[Any]:
        """Yield the values of each row, as an array of one axis."""
        for row in self.tensor:
            yield np.asarray(getattr(row, "flat_values", row)).reshape(-1)

    def row_bytes(self) -> Iterator[bytes]:
        """Yield what tells each row from others."""
        for row in self.tensor.to_list():
            yield repr(row).encode()
