"""What an inspection found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from swa_avg.errors import Finding, escape
from swa_avg.files.location import Location
from swa_avg.inputs.listing import Listing
from swa_avg.inspection.geometry import Geometry
from swa_avg.inspection.movement import Movement
from swa_avg.text import counted, finite_or_none

__all__ = ["Contents", "Inspection"]


@dataclass(frozen=True)
class Contents:
    """What is inside one checkpoint."""

    path: Location
    kind: str
    """Its format."""
    writer: str | None
    """What wrote it, where it says so."""
    size: int
    """Bytes of its HDF5 files."""
    tensors: int
    """Model weights; optimizer state and metrics are not counted."""
    parameters: int
    """Values in them."""
    dtypes: Mapping[str, int]
    """Their types -> values of that type."""
    weight_bytes: int
    """Bytes of the model's weights."""
    optimizer_bytes: int
    """Bytes of the optimizer's state."""
    batchnorm_layers: tuple[str, ...]
    """Their names, as well as the checkpoint tells them."""
    is_average: bool
    """Whether swa-avg wrote it."""
    epoch: int | None
    """By the index beside it, else by its name."""
    learning_rate: float | None
    """By the index or the log."""
    metrics: Mapping[str, float]
    """By the index, the log or its name; may hold NaN and infinities."""

    @property
    def optimizer_share(self) -> float:
        """Share of the bytes that the optimizer's state takes."""
        return self.optimizer_bytes / self.size if self.size else 0.0


@dataclass(frozen=True, repr=False)
class Inspection:
    """What `inspect_checkpoints` found; its text is one line."""

    checkpoints: tuple[Contents, ...]
    """In training order."""
    listing: Listing
    """What is known of each without opening it."""
    method: str
    """The average that coefficients and geometry are of, such as `ema:0.9`."""
    coefficients: tuple[float, ...]
    """One a checkpoint: those of the method."""
    treatments: Mapping[str, tuple[str, ...]]
    """`averaged`, `compared`, `copied` -> names of the newest checkpoint's tensors; empty where they do not
    fit."""
    findings: tuple[Finding, ...]
    """Everything that keeps them from being averaged."""
    measured: tuple[int, ...] = ()
    """Which checkpoints the geometry is of: those whose values are all finite."""
    geometry: Geometry | None = None
    """None of a single checkpoint, of those that do not fit, or of numbers whose squares overflow.

    Its mean is the method's, the coefficients of `measured` scaled to sum 1."""
    constants: tuple[str, ...] = ()
    """Tensors that hold NaN or infinity, and are the same in all checkpoints."""
    movement: Movement | None = None
    """How those of one run follow each other."""
    other_weights: str | None = None
    """What to know of an optimizer that keeps an average of its own."""

    @property
    def outliers(self) -> tuple[Contents, ...]:
        """Checkpoints that lie in another basin than the group of the others."""
        found = self.geometry.outliers if self.geometry is not None else ()
        return tuple(self.checkpoints[self.measured[row]] for row in found)

    @property
    def groups(self) -> tuple[tuple[Contents, ...], ...]:
        """The checkpoints by basin, the largest group first."""
        groups = self.geometry.groups if self.geometry is not None else ()
        return tuple(tuple(self.checkpoints[self.measured[row]] for row in group) for group in groups)

    def __str__(self) -> str:
        if self.findings:
            return f"cannot be averaged: {counted(len(self.findings), 'finding')}"
        if len(self.checkpoints) == 1:
            return f"one checkpoint, {self.checkpoints[0].path}"
        names = ("averaged", "compared", "copied")
        averaged, compared, copied = (len(self.treatments[name]) for name in names)
        return f"they fit together; tensors averaged: {averaged}, copied: {compared + copied}"

    def __repr__(self) -> str:
        count = counted(len(self.checkpoints), "checkpoint")
        return f"<Inspection of {count}: {escape(self)}>"

    def as_json(self) -> dict[str, Any]:
        """Return all of it as JSON's types; numbers that are not finite become null."""
        result: dict[str, Any] = {
            "method": self.method,
            "fit": not self.findings,
            "findings": [finding._asdict() for finding in self.findings],
            "checkpoints": [
                {**asdict(contents), "optimizer_share": contents.optimizer_share, "coefficient": coefficient}
                for contents, coefficient in zip(self.checkpoints, self.coefficients, strict=True)
            ],
            "tensors": self.treatments,
            "movement": None if self.movement is None else self.movement.as_json(),
            "other_weights": self.other_weights,
            "geometry": None,
        }
        if self.listing.ranking is not None:
            result["best"] = self.listing.ranking.as_json(self.listing.files)
        if self.geometry is not None:
            result["geometry"] = {
                "checkpoints": self.measured,
                **asdict(self.geometry),
                "outliers": [str(contents.path) for contents in self.outliers],
            }
        plain: dict[str, Any] = _plain(result)
        return plain


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return finite_or_none(value)
    return value if isinstance(value, str | int | None) else str(value)  # a location
