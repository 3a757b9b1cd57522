"""What a refresh did: drift, whether the estimate has settled, and what looks wrong."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from swa_avg.batchnorm.moments import Statistics
from swa_avg.errors import escape
from swa_avg.text import counted

__all__ = [
    "LEAST_EPSILON",
    "TOLERANCE",
    "Drift",
    "LayerReport",
    "RefreshReport",
    "drift_between",
    "standard_error",
]

TOLERANCE = 0.05
"""Standard error, in standard deviations of the layer's input, below which an estimate counts as settled."""
_SUSPICIOUS_SHIFT = 4.0
_SUSPICIOUS_RATIO = 16.0
LEAST_EPSILON = 1e-30
"""A layer may have epsilon 0, and a channel may be constant."""

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Drift:
    """How far a layer's statistics moved, over its channels."""

    mean_shift: float
    """Root mean square of the means' changes, in old standard deviations."""
    mean_shift_worst: float
    """The largest of any channel."""
    variance_ratio: float
    """New variance by old, geometric mean."""
    variance_ratio_least: float
    variance_ratio_most: float

    @property
    def score(self) -> float:
        """How bad it is, for ranking: the worse of the mean's and the variance's change."""
        return max(self.mean_shift, abs(math.log(self.variance_ratio)))


@dataclass(frozen=True)
class LayerReport:
    """One BatchNorm layer."""

    name: str
    path: str
    """Names from the model down to the layer."""
    status: Literal["refreshed", "kept", "untouched"]
    """`kept`: `trainable=False`, so it runs on its stored statistics; `untouched`: the forward pass never
    reached it in training mode."""
    channels: int = 0
    calls: int = 0
    """How often one forward pass uses it."""
    count: int = 0
    """Values behind each channel's statistics: rows times positions; the fewest of any channel."""
    drift: Drift | None = None
    error: float | None = None
    """Standard error of the estimate in standard deviations, from the difference between halves of the data;
    None where there was a single batch."""


@dataclass(frozen=True, repr=False)
class RefreshReport:
    """What `refresh_batchnorm` did; its text is one line."""

    layers: tuple[LayerReport, ...]
    """In the order in which the forward pass reaches them; those that it does not reach are last."""
    estimator: str
    samples: int
    """Rows that were used."""
    batches: int
    batch_size: int | None
    """None where the data came in batches of their own."""
    seed: int
    source: str
    used: Mapping[str, str] = field(default_factory=dict)
    """Array of the data, with type and shape -> input of the model."""
    ignored: tuple[str, ...] = ()
    """Arrays of the data that were left alone."""
    digest: str = ""
    """BLAKE2b-256 of the rows in the order of their use, as they were stored."""
    inputs: int = 1
    """Inputs that the model has."""
    notes: tuple[str, ...] = ()
    """Warnings about the data and the way the model was run."""

    @property
    def refreshed(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.status == "refreshed")

    @property
    def kept(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.status == "kept")

    @property
    def untouched(self) -> tuple[LayerReport, ...]:
        return tuple(layer for layer in self.layers if layer.status == "untouched")

    @property
    def worst(self) -> tuple[LayerReport, ...]:
        """The refreshed layers, those that moved most first."""
        return tuple(sorted(self.refreshed, key=lambda layer: -layer.drift.score if layer.drift else 0.0))

    @property
    def settled(self) -> bool | None:
        """Whether more data would not change much; None where a single batch cannot tell."""
        errors = [layer.error for layer in self.refreshed]
        known = [error for error in errors if error is not None]
        return None if len(known) < len(errors) or not known else max(known) <= TOLERANCE

    @property
    def suggested_samples(self) -> int | None:
        """Rows that would do where these do not: the error falls with the root of their number."""
        if self.settled is not False:
            return None
        worst = max(layer.error or 0.0 for layer in self.refreshed)
        needed = self.samples * (worst / TOLERANCE) ** 2
        unit = 10.0 ** max(0, math.floor(math.log10(needed)) - 1)
        return int(math.ceil(needed / unit) * unit)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user should look at."""
        return (*self.notes, *self._preprocessing(), *self._unsettled())

    def _preprocessing(self) -> tuple[str, ...]:
        # Only the first layers see the data's scale: what lies behind a BatchNorm has been normalized.
        for layer in self.refreshed[: self.inputs]:
            drift = layer.drift
            if drift and (
                drift.mean_shift > _SUSPICIOUS_SHIFT
                or not 1 / _SUSPICIOUS_RATIO <= drift.variance_ratio <= _SUSPICIOUS_RATIO
            ):
                return (
                    "the data look preprocessed differently from training: at the first BatchNorm layer "
                    f"({layer.name}) the mean moved by {drift.mean_shift:.3g} standard deviations and the "
                    f"variance changed by a factor of {drift.variance_ratio:.3g}; preprocess the data as in "
                    "training (after a few hundred steps of training alone, moving statistics lie so far "
                    "behind by themselves)",
                )
        return ()

    def _unsettled(self) -> tuple[str, ...]:
        if self.settled is not False:
            return ()
        layer = max(self.refreshed, key=lambda layer: layer.error or 0.0)
        return (
            f"the statistics have not settled: by the difference between halves of the data they are "
            f"{layer.error:.2g} standard deviations off at {layer.name}, above {TOLERANCE}; about "
            f"{self.suggested_samples} samples would do",
        )

    def lines(self, *, verbose: bool = False, most: int = 5) -> list[str]:
        """Return the report as text: the layers that moved most, then a summary, then warnings."""
        lines = [f"BatchNorm: used {key} for {name}" for key, name in self.used.items()]
        if self.ignored:
            lines.append(f"BatchNorm: ignored {', '.join(self.ignored)}")
        shown = self.worst if verbose else self.worst[:most]
        if shown:
            lines.append(f"{'mean moved':>12} {'variance':>10}  BatchNorm layer")
        for layer in shown:
            drift = layer.drift
            assert drift is not None
            lines.append(f"{drift.mean_shift:>8.3g} std {drift.variance_ratio:>9.3g}x  {layer.name}")
        if len(self.worst) > len(shown):
            lines.append(f"{'':>23}  and {len(self.worst) - len(shown)} that moved less")
        for title, others in (
            ("kept (trainable=False)", self.kept),
            ("untouched (never reached in training mode)", self.untouched),
        ):
            if others:
                lines.append(f"{title}: {', '.join(layer.name for layer in others)}")
        lines.append(str(self))
        return lines

    def __str__(self) -> str:
        layers = counted(len(self.refreshed), "BatchNorm layer")
        batches = "1 batch" if self.batches == 1 else f"{self.batches} batches"
        samples = counted(self.samples, "sample")
        return f"refreshed {layers} on {samples} in {batches} ({self.estimator}){self._summary()}"

    def __repr__(self) -> str:
        return f"<RefreshReport: {escape(self)}>"

    def _summary(self) -> str:
        if not self.worst:
            return ""
        score = max(layer.drift.mean_shift for layer in self.worst if layer.drift)
        settled = {True: "settled", False: "not settled", None: "one batch cannot tell whether settled"}
        return f"; means moved by up to {score:.3g} std; {settled[self.settled]}"

    def record(self) -> dict[str, Any]:
        """Return what an output says of its refresh: enough to do it again."""
        return {
            "estimator": self.estimator,
            "source": self.source,
            "arrays": dict(self.used),
            "digest": self.digest,
            "samples": self.samples,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "refreshed": [layer.path for layer in self.refreshed],
            "kept": [layer.path for layer in self.kept],
            "untouched": [layer.path for layer in self.untouched],
        }

    def as_json(self) -> dict[str, Any]:
        """Return everything as what JSON can hold, and no clock time."""
        return {
            **asdict(self),
            "settled": self.settled,
            "suggested_samples": self.suggested_samples,
            "warnings": list(self.warnings),
        }


def drift_between(old: Statistics, new: Statistics, epsilon: float) -> Drift:
    """Measure the change; `epsilon` is the layer's own, which it adds to every variance."""
    epsilon = max(epsilon, LEAST_EPSILON)
    shifts = np.abs(new.mean - old.mean) / np.sqrt(old.variance + epsilon)
    ratios = (new.variance + epsilon) / (old.variance + epsilon)
    return Drift(
        _rms(shifts),
        float(shifts.max()),
        float(np.exp(np.log(ratios).mean())),
        float(ratios.min()),
        float(ratios.max()),
    )


def standard_error(first: Statistics, second: Statistics, whole: Statistics, epsilon: float) -> float:
    """Estimate how far `whole` is off, in standard deviations, from two halves of its data.

    Half the difference of independent halves has the standard error of the whole. Of mean and standard
    deviation, the worse one; the root mean square over the channels.
    """
    epsilon = max(epsilon, LEAST_EPSILON)
    scale = np.sqrt(whole.variance + epsilon)
    means = (first.mean - second.mean) / scale
    deviations = (np.sqrt(first.variance + epsilon) - np.sqrt(second.variance + epsilon)) / scale
    return max(_rms(means), _rms(deviations)) / 2


def _rms(values: Vector) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
