"""Bytes of tensors as values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["values_of", "widen"]


def values_of(data: NDArray[np.uint8], dtype: str) -> NDArray[Any]:
    """Return the values of a floating-point type that bytes hold; bfloat16 as float32."""
    return widen(data.view(np.uint16)) if dtype == "bfloat16" else data.view(dtype)


def widen(view: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return bfloat16 values as float32: the same bits, followed by sixteen zeros."""
    return (view.astype(np.uint32) << 16).view(np.float32)
