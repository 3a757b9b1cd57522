"""Re-estimate the BatchNorm statistics of a Keras model for the weights that it has now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swa_avg.batchnorm.backends import random_state_kept, value_of
from swa_avg.batchnorm.loading import check_model
from swa_avg.batchnorm.measure import Workers, measure_layers
from swa_avg.batchnorm.moments import ESTIMATORS, LayerMoments, Statistics
from swa_avg.batchnorm.observe import active_layers, batchnorm_layers, layer_path
from swa_avg.batchnorm.report import LayerReport, RefreshReport, drift_between, standard_error
from swa_avg.batchnorm.request import Refresh
from swa_avg.batchnorm.signature import spec_of
from swa_avg.data.batches import Data, as_array
from swa_avg.data.sources import open_data
from swa_avg.data.spec import ARGUMENTS, Purpose
from swa_avg.errors import Finding, MismatchError, UsageError, warn
from swa_avg.interrupts import interrupts_held
from swa_avg.text import Progress

__all__ = ["check_data", "float64_of", "refresh_batchnorm", "refresh_model"]


def refresh_batchnorm(
    model: Any,
    data: Any,
    *,
    estimator: str = "pooled",
    batch_size: int | None = None,
    samples: int | None = None,
    seed: int = 0,
    inputs: Sequence[str] | Mapping[str, str] = (),
    preprocess: Callable[[Any], Any] | None = None,
    progress: Progress | None = None,
) -> RefreshReport:
    """Re-estimate the statistics of every BatchNorm layer of a built Keras model, in place.

    The whole model runs in training mode, as in `fit`: BatchNorm layers normalize with the statistics of the
    batch, and dropout drops. Each layer's input is measured by two float32 passes a batch, and batches are
    merged in float64. Nothing else of the model changes; on any exception, Ctrl-C included, nothing at all
    does. Source: PreciseBN, Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm" (arXiv:2105.07576),
    section 3; Izmailov et al. 2018 (arXiv:1803.05407), section 3.2.

    Args:
        model: Built, on any backend. Layers with `trainable=False` keep their statistics.
        data: What `open_data` takes: a file, a folder, `MODULE:FUNCTION`, arrays or batches. Labels are
            ignored.
        estimator: `pooled`, mean and variance of all data as one population; `batch-mean`, means of the
            batches' statistics weighted by size, as the code of the SWA paper computes them.
        batch_size: Rows a batch, where the data do not come in batches; 128 by default.
        samples: Rows to use; all by default.
        seed: Of the order of the rows, and of the model's random layers: the same seed gives the same
            statistics.
        inputs: `KEY` or `KEY=INPUT`, where the data's names do not say which array goes where; or a mapping.
        preprocess: Applied to each batch, as the model is to take it.
        progress: Told how many rows have been used.

    Returns:
        What was done. What looks wrong with the data is given as a `SwaAvgWarning`.

    Raises:
        UsageError: the request, or the model, cannot be worked with.
        UnreadableError: the data are unreadable, do not fit the model, or hold NaN.
        MismatchError: statistics came out that are not finite: the weights are not, or overflow.

    Example:
        >>> refresh_batchnorm(model, x_train)
        <RefreshReport: refreshed 4 BatchNorm layers on 50000 samples in 391 batches (pooled); means ...>
    """
    refresh = Refresh(data, inputs, batch_size, samples, estimator, seed, preprocess)
    report = refresh_model(model, refresh, progress=progress)
    warn(report.warnings)
    return report


def refresh_model(
    model: Any,
    refresh: Refresh,
    *,
    purpose: Purpose = ARGUMENTS,
    progress: Progress | None = None,
    workers: Workers | None = None,
) -> RefreshReport:
    """Refresh as `refresh_batchnorm` does, with other machines' help; `purpose` names the options, if any."""
    if refresh.estimator not in ESTIMATORS:
        raise UsageError(f"the estimator is {' or '.join(ESTIMATORS)}, not {refresh.estimator}")
    check_model(model)
    if not getattr(model, "built", False):
        raise UsageError("the model is not built: call it on one batch, or load its weights first")
    active = active_layers(model)
    with random_state_kept(), open_data(refresh.data, spec_of(model, refresh, purpose)) as batches:
        moments = LayerMoments([])
        if active:
            moments = measure_layers(model, active, batches, progress, workers)
        new = {index: ESTIMATORS[refresh.estimator](moments.of(index)) for index in moments.order()}
        report = _report(model, active, batches, moments, new, refresh.estimator)
        _assign(active, new, batches.source)
    return report


def check_data(model: Any, refresh: Refresh) -> None:
    """Raise what a refresh would about its data, as far as a look at them tells.

    Of arrays, all rows are looked at; of batches, the first, unless looking would use it up.
    """
    check_model(model)
    with random_state_kept(), open_data(refresh.data, spec_of(model, refresh, ARGUMENTS)) as batches:
        if active_layers(model):
            batches.check()


def _report(
    model: Any,
    active: Sequence[Any],
    data: Data,
    moments: LayerMoments,
    new: Mapping[int, Statistics],
    estimator: str,
) -> RefreshReport:
    layers = batchnorm_layers(model)
    reached = [_refreshed(active[index], index, moments, new[index], estimator) for index in new]
    done = {id(active[index]) for index in new}
    rest = [
        LayerReport(layer.name, layer_path(layer), "untouched" if layer.trainable else "kept")
        for layer in layers
        if id(layer) not in done
    ]
    notes = list(data.notes)
    if not layers:
        notes.append("the model has no BatchNorm layer; nothing was changed")
    elif not new:
        notes.append("no BatchNorm layer runs in training mode; nothing was changed")
    return RefreshReport(
        layers=(*reached, *rest),
        estimator=estimator,
        samples=data.samples,
        batches=moments.batches,
        batch_size=data.batch_size,
        seed=data.spec.seed,
        source=data.source,
        used=data.used,
        ignored=data.ignored,
        digest=data.digest,
        inputs=max(1, len(data.spec.names)),
        notes=tuple(notes),
    )


def _refreshed(layer: Any, index: int, moments: LayerMoments, new: Statistics, estimator: str) -> LayerReport:
    old = Statistics(float64_of(layer.moving_mean), float64_of(layer.moving_variance))
    halves = [moments.of(index, [half]) for half in (0, 1)]
    error = None
    if all(half.count.all() for half in halves):
        first, second = (ESTIMATORS[estimator](half) for half in halves)
        error = standard_error(first, second, new, layer.epsilon)
    return LayerReport(
        layer.name,
        layer_path(layer),
        "refreshed",
        channels=len(new.mean),
        calls=moments.calls(index),
        count=int(moments.of(index).count.min()),
        drift=drift_between(old, new, layer.epsilon),
        error=error,
    )


def float64_of(variable: Any) -> NDArray[np.float64]:
    """Return a variable's value in float64."""
    return as_array(value_of(variable)).astype(np.float64)


def _assign(layers: Sequence[Any], new: Mapping[int, Statistics], source: str) -> None:
    """Assign all statistics, or on any exception none."""
    with _all_or_nothing([variable for index in new for variable in layers[index].non_trainable_variables]):
        findings = []
        for index, statistics in new.items():
            layer = layers[index]
            for variable, value in _values(layer, statistics):
                variable.assign(value)
                if not np.isfinite(float64_of(variable)).all():
                    problem = f"does not fit into {variable.dtype}"
                    findings.append(Finding(Path(source), f"{layer_path(layer)}/{variable.name}", problem))
        if findings:
            raise MismatchError(findings)


def _values(layer: Any, new: Statistics) -> Iterator[tuple[Any, NDArray[np.float64]]]:
    """Yield each statistic that the layer stores and its new value."""
    deviation = np.sqrt(new.variance + layer.epsilon)  # as batch renormalization stores it
    yield layer.moving_mean, new.mean
    yield layer.moving_variance, new.variance
    if getattr(layer, "renorm", False):
        yield layer.moving_stddev, deviation
        yield layer.renorm_mean, new.mean
        yield layer.renorm_stddev, deviation


@contextmanager
def _all_or_nothing(variables: Sequence[Any]) -> Iterator[None]:
    before = [(variable, np.array(as_array(value_of(variable)))) for variable in variables]
    with interrupts_held() as deliver:
        try:
            yield
            deliver()
        except BaseException:
            for variable, value in before:
                variable.assign(value)
            raise
