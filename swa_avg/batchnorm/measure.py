"""Measure what the BatchNorm layers of a live model see of data, here and on other machines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from swa_avg.batchnorm.moments import LayerMoments
from swa_avg.batchnorm.observe import layer_path
from swa_avg.batchnorm.runner import Measured, running
from swa_avg.data.batches import ArrayData, Data, as_array
from swa_avg.errors import Finding, MismatchError
from swa_avg.interrupts import interrupts
from swa_avg.text import Progress

__all__ = ["Workers", "measure_layers"]

_MOST_BATCHES = 8  # a call


class Workers(Protocol):
    """Other processes that run batches of the same data through the same model."""

    @property
    def at_once(self) -> int:
        """Calls that are kept under way."""

    def measure(self, runs: Iterable[range]) -> Iterator[Measured]:
        """Yield what is measured of each batch, in order; the batches of a run travel together."""


def measure_layers(
    model: Any,
    layers: Sequence[Any],
    data: Data,
    progress: Progress | None = None,
    workers: Workers | None = None,
) -> LayerMoments:
    """Run the model over the data, and return what its layers saw.

    With `workers`, only the first batch runs here; all of them do where batches cannot be drawn by number, or
    where the model hands state from batch to batch.

    Raises:
        UnreadableError: the data are unreadable, do not fit the model, or hold NaN.
        MismatchError: a layer's input is not finite.
    """
    results = _Results(layers, data, progress)
    pending: tuple[Any, Any, int] | None = None
    with running(model, layers, data) as runner:
        for number, (batch, rows) in enumerate(data):
            integers, floats = runner.run(number, batch)
            if pending is not None:  # it is fetched and merged while the next one runs
                results.add(*pending)
            pending = integers, floats, rows
            if workers is not None and isinstance(data, ArrayData) and not runner.carries_state:
                break
        if pending is not None:
            results.add(*pending)
        if workers is not None:
            if isinstance(data, ArrayData) and not runner.carries_state:
                for measured in _gathered(workers, range(1, data.batches)):
                    data.count(measured.rows, measured.digests)
                    results.add(measured.integers, measured.floats, measured.rows)
                data.check_source()
            else:
                why = "the data come as batches"
                if runner.carries_state:
                    why = "the model hands state from batch to batch"
                data.notes.append(f"refreshed on this machine alone, since {why}")
    return results.moments


@dataclass
class _Results:
    """What batches come to, one after the other."""

    layers: Sequence[Any]
    data: Data
    progress: Progress | None

    def __post_init__(self) -> None:
        self.moments = LayerMoments([int(layer.moving_mean.shape[0]) for layer in self.layers])

    def add(self, integers: Any, floats: Any, rows: int) -> None:
        """Check and merge one batch's: the integers and floats of an `Outcome`."""
        interrupts.check()
        integers, floats = as_array(integers), as_array(floats)
        self._check_finite(integers, floats)
        self.moments.add(integers, floats)
        if self.progress is not None:
            self.progress(self.data.total, rows)

    def _check_finite(self, integers: NDArray[Any], floats: NDArray[Any]) -> None:
        counts, places = integers
        not_finite = sorted(set(places[(counts > 0) & ~np.isfinite(floats).all(axis=0)].tolist()))
        if not_finite:
            problem = (
                f"the layer's input is not finite in batch {self.moments.batches + 1}: the weights overflow, "
                "or are not finite themselves"
            )
            source = Path(self.data.source)
            raise MismatchError(
                [Finding(source, layer_path(self.layers[index]), problem) for index in not_finite]
            )


def _gathered(workers: Workers, batches: range) -> Iterator[Measured]:
    """Return what workers measure, in the order of the batches."""
    a_call = max(1, min(_MOST_BATCHES, len(batches) // (2 * workers.at_once)))
    return workers.measure(batches[start : start + a_call] for start in range(0, len(batches), a_call))
