"""A refresh done again, and held against the statistics that an output has."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swa_avg.batchnorm.checkpoint import refresh_loaded
from swa_avg.batchnorm.loading import load_model
from swa_avg.batchnorm.observe import active_layers, layer_path
from swa_avg.batchnorm.places import find_places
from swa_avg.batchnorm.refresh import float64_of
from swa_avg.batchnorm.report import LEAST_EPSILON, RefreshReport
from swa_avg.batchnorm.request import Refresh
from swa_avg.formats import Checkpoint
from swa_avg.text import Progress

__all__ = ["Repetition", "repeat_refresh"]

_ROUNDING = 1e-3
"""Standard deviations. On the machine and with the versions that wrote them, statistics are derived to the
bit. Others round float32 otherwise, and tensor cores round the inputs of products to 10 bits."""


@dataclass(frozen=True)
class Repetition:
    """What a refresh gave when it was done again."""

    report: RefreshReport
    names: Set[str]
    """Tensors of the statistics that it derived."""
    off: Mapping[str, float]
    """Layer -> standard deviations by which the output's statistics are off, at the worst channel; of the
    layers that have other bits there."""

    @property
    def differing(self) -> dict[str, float]:
        """Of these, the layers that rounding does not explain, the worst first."""
        worst_first = sorted(self.off.items(), key=lambda item: -item[1])
        return {layer: off for layer, off in worst_first if off > _ROUNDING}


def repeat_refresh(
    draft: Checkpoint, output: Checkpoint, refresh: Refresh, progress: Progress | None = None
) -> Repetition:
    """Refresh the average `draft` again, and compare its statistics with those of `output`.

    Both have one layout. Errors are those of `refreshed_statistics`.
    """
    model = load_model(draft, refresh)
    places = find_places(model, draft)
    refreshed = refresh_loaded(model, draft, refresh, places, progress)
    names = {id(variable): name for variable, name in places.statistics}
    derived, stored = places.values(draft), places.arrays(output)
    off = {}
    for layer in active_layers(model):
        own = [(variable, stored[names[id(variable)]]) for variable in layer.non_trainable_variables]
        if any(found.tobytes() != derived[names[id(variable)]] for variable, found in own):
            off[layer_path(layer)] = max(_off(layer, variable, found) for variable, found in own)
    return Repetition(refreshed.report, derived.keys(), off)


def _off(layer: Any, variable: Any, found: NDArray[Any]) -> float:
    """Return how far a stored statistic is from that of a layer, in standard deviations at the worst channel.

    Of a variance, its root is compared.
    """
    epsilon = max(layer.epsilon, LEAST_EPSILON)
    scale = np.sqrt(float64_of(layer.moving_variance) + epsilon)
    expected, values = float64_of(variable), found.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):  # a forged value may be any
        if variable is layer.moving_variance:
            expected, values = scale, np.sqrt(values + epsilon)
        worst = float(np.max(np.abs(values - expected) / scale))
    return math.inf if math.isnan(worst) else worst
