"""Expected values, from NumPy and h5py alone."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import h5py
import numpy as np


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Return every dataset of a checkpoint as h5py reads it; `|V2` stays two opaque bytes."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            sources = [io.BytesIO(archive.read("model.weights.h5"))]
    elif path.is_dir():
        sources = [path / "model.weights.h5"]
    elif path.suffix == ".json":
        sources = sorted(path.parent.glob(path.name.removesuffix(".weights.json") + "_[0-9]*.weights.h5"))
    else:
        sources = [path]
    arrays: dict[str, np.ndarray] = {}
    for source in sources:
        with h5py.File(source, "r") as file:
            file.visititems(
                lambda name, item: (
                    arrays.__setitem__(name, item[()]) if isinstance(item, h5py.Dataset) else None
                )
            )
    return {name: np.asarray(value) for name, value in arrays.items()}


def mean(values: list[np.ndarray]) -> np.ndarray:
    """Return the float64 mean of arrays of one dtype (`|V2` is bfloat16), rounded once to that dtype."""
    total = np.zeros(values[0].shape)
    for value in values:
        total = total + widen(value)
    average = total / len(values)
    if values[0].dtype == np.dtype("V2"):
        return nearest_bfloat16(average).view("V2").reshape(values[0].shape)
    return average.astype(values[0].dtype)


def widen(value: np.ndarray) -> np.ndarray:
    """Return an array as float64; `|V2` holds bfloat16."""
    if value.dtype == np.dtype("V2"):
        bits = np.ascontiguousarray(value).view(np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).astype(np.float64).reshape(value.shape)
    return value.astype(np.float64)


def nearest_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return the bits of the bfloat16 nearest to each float64, the even one of two equally near.

    By looking at the neighbours on both sides and measuring, which is exact in float64.
    """
    values = np.asarray(values, np.float64).reshape(-1)
    with np.errstate(over="ignore"):
        start = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.int64)
    magnitude, sign = start & 0x7FFF, start & 0x8000
    candidates = np.stack([np.clip(magnitude + step, 0, 0x7F80) for step in (-1, 0, 1, 2)])
    widened = ((candidates | sign) << 16).astype(np.uint32).view(np.float32).astype(np.float64)
    # Infinity takes the place of the next power of two, as IEEE 754 has it.
    widened = np.where(np.isinf(widened), np.copysign(2.0**128, widened), widened)
    distance = np.abs(widened - values)
    best = distance == distance.min(axis=0)
    even = best & (candidates % 2 == 0)
    choice = np.where(even.any(axis=0), even.argmax(axis=0), best.argmax(axis=0))
    return (np.take_along_axis(candidates, choice[None], 0)[0] | sign).astype(np.uint16)
