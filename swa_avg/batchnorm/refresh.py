"""Re-estimate the BatchNorm statistics of a Keras model for the weights that it has now."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from swa_avg.batchnorm.backends import Step, compiled, leaked, random_state_kept, seed_torch, value_of
from swa_avg.batchnorm.moments import ESTIMATORS, Statistics
from swa_avg.batchnorm.observe import SEED_STATE, Outcome, batchnorm_layers, make_step
from swa_avg.batchnorm.report import LayerReport, RefreshReport, drift_between, standard_error
from swa_avg.batchnorm.tally import Tally
from swa_avg.data.batches import ArrayData, Data, RowDigests, as_array
from swa_avg.data.sources import open_data
from swa_avg.data.spec import ARGUMENTS, Purpose, Shape, Spec
from swa_avg.errors import Finding, MismatchError, UnreadableError, UsageError, first_line
from swa_avg.interrupts import interrupts, interrupts_held
from swa_avg.text import Progress

__all__ = ["arranger", "check_data", "inputs_of", "refresh_batchnorm"]

if TYPE_CHECKING:
    from swa_avg.batchnorm.elsewhere import Elsewhere

_TOGETHER = 8  # batches that travel together at most


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
    elsewhere: Elsewhere | None = None,
    purpose: Purpose = ARGUMENTS,
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
        elsewhere: Other machines to run batches on. The first runs here, and all of them where they cannot be
            drawn by number, or where the model hands state from batch to batch.
        purpose: Whose names for these arguments the messages use: options, or none.

    Raises:
        UsageError: the request, or the model, cannot be worked with.
        UnreadableError: the data are unreadable, do not fit the model, or hold NaN.
        MismatchError: statistics came out that are not finite: the weights are not, or overflow.
    """
    if estimator not in ESTIMATORS:
        raise UsageError(f"the estimator is {' or '.join(ESTIMATORS)}, not {estimator}")
    if not getattr(model, "built", False):
        raise UsageError("the model is not built: call it on one batch, or load its weights first")
    spec = spec_of(
        model,
        inputs=inputs,
        batch_size=batch_size,
        samples=samples,
        seed=seed,
        preprocess=preprocess,
        purpose=purpose,
    )
    layers, active = batchnorm_layers(model), active_layers(model)
    with random_state_kept(), open_data(data, spec) as batches:
        tally = Tally([int(layer.moving_mean.shape[0]) for layer in active])
        if active:
            _run(model, active, batches, tally, progress, elsewhere)
        new = {index: ESTIMATORS[estimator](tally.of(index)) for index in tally.order()}
        report = _report(model, layers, active, batches, tally, new, estimator)
        _assign(active, new, batches.source)
    return report


def check_data(model: Any, data: Any, *, batch_size: int | None, samples: int | None) -> None:
    """Raise what `refresh_batchnorm` would about these data, as far as a look at them tells.

    Of arrays, all rows are looked at; of batches, the first, unless looking would use it up.
    """
    spec = spec_of(model, inputs=(), batch_size=batch_size, samples=samples, purpose=ARGUMENTS)
    with random_state_kept(), open_data(data, spec) as batches:
        if active_layers(model):
            batches.check()


def active_layers(model: Any) -> list[Any]:
    """Return the BatchNorm layers that are refreshed."""
    return [layer for layer in batchnorm_layers(model) if layer.trainable]


def spec_of(model: Any, *, inputs: Sequence[str] | Mapping[str, str], **wanted: Any) -> Spec:
    """Return what is wanted from the data, and what the model expects of them."""
    names, shapes = inputs_of(model)
    bind = [f"{key}={name}" for key, name in inputs.items()] if isinstance(inputs, Mapping) else inputs
    return Spec(bind=bind, input_names=names, input_shapes=shapes, **wanted)


def inputs_of(model: Any) -> tuple[list[str], list[Shape | None]]:
    """Return names and shapes of the model's inputs; of a subclassed model, none are known."""
    try:
        structure = model._inputs_struct if hasattr(model, "_inputs_struct") else model.inputs
        structure = structure if structure is not None else []
    except (AttributeError, ValueError):
        structure = []
    if isinstance(structure, Mapping):
        return list(structure), [tuple(tensor.shape) for tensor in structure.values()]
    tensors = list(structure) if isinstance(structure, list | tuple) else [structure]
    return [tensor.name for tensor in tensors], [tuple(tensor.shape) for tensor in tensors]


def arranger(structure: Any) -> Callable[[Any], Any]:
    """Return what turns arrays by name into the structure that a model's call takes, or its loss."""
    if isinstance(structure, Mapping):
        names = list(structure)
        return lambda batch: batch if isinstance(batch, Mapping) else {names[0]: batch}
    if isinstance(structure, list | tuple):
        names = [tensor.name for tensor in structure]
        return lambda batch: [batch[name] for name in names] if isinstance(batch, Mapping) else [batch]
    return lambda batch: batch


def _run(
    model: Any,
    layers: Sequence[Any],
    data: Data,
    tally: Tally,
    progress: Progress | None,
    elsewhere: Elsewhere | None,
) -> None:
    """Run the model over the data; a batch's moments are fetched and merged while the next one runs."""
    pending: tuple[Any, Any, int] | None = None
    with running(model, layers, data) as runner:
        for number, (batch, rows) in enumerate(data):
            integers, floats = runner.run(number, batch)
            _take(pending, layers, data, tally, progress)
            pending = integers, floats, rows
            if elsewhere is not None and isinstance(data, ArrayData) and not runner.carries_state:
                break
        _take(pending, layers, data, tally, progress)
        if elsewhere is None:
            return
        if isinstance(data, ArrayData) and not runner.carries_state:
            for measured in _gathered(elsewhere, range(1, data.batches)):
                data.count(measured.rows, measured.digests)
                _take((measured.integers, measured.floats, measured.rows), layers, data, tally, progress)
            data.check_source()
        else:
            why = "the data come as batches"
            if runner.carries_state:
                why = "the model hands state from batch to batch"
            data.notes.append(f"refreshed on this machine alone, since {why}")


@dataclass(frozen=True)
class Measured:
    """What the layers saw of one batch that was run elsewhere."""

    integers: NDArray[Any]
    floats: NDArray[Any]
    """As in `Outcome`."""
    rows: int
    digests: RowDigests


def _gathered(elsewhere: Elsewhere, batches: range) -> Iterator[Measured]:
    """Return what is measured elsewhere, in the order of the batches; several at a time travel together."""
    together = max(1, min(_TOGETHER, len(batches) // (2 * elsewhere.processes.at_once)))
    return elsewhere.measure(batches[start : start + together] for start in range(0, len(batches), together))


@contextmanager
def running(model: Any, layers: Sequence[Any], data: Data) -> Iterator[Runner]:
    """Yield what runs a model over batches, compiled."""
    step = make_step(model, layers)
    with compiled(step, model, eager=bool(getattr(model, "run_eagerly", False))) as fast:
        yield Runner(model, data, step, fast)


class Runner:
    """Runs a model over batches and hands its state from one to the next."""

    def __init__(self, model: Any, data: Data, step: Step, fast: Step) -> None:
        self._variables = model.variables
        self._values = [value_of(variable) for variable in self._variables]
        self._arrange = arranger(getattr(model, "_inputs_struct", None))
        self._data = data
        self._step, self._fast = step, fast
        self._begun = False
        self.carries_state = False
        """Whether state other than random generators' went from a batch to the next: its order matters."""

    def run(self, number: int, batch: Any) -> tuple[Any, Any]:
        """Return what the layers saw of a batch, as the integers and floats of an `Outcome`."""
        inputs = self._arrange(batch)
        values = _seeded(self._values, self._variables, self._data.spec.seed, number)
        if self._begun:
            outcome = self._fast(values, inputs)
        else:
            self._fast, outcome = _first(self._fast, self._step, values, inputs, self._data)
            self._begun = True
        integers, floats, carried = outcome
        self._values = [old if new is None else new for old, new in zip(values, carried, strict=True)]
        self.carries_state = getattr(self._fast, "assigns", False) or any(
            new is not None and variable.name != SEED_STATE
            for variable, new in zip(self._variables, carried, strict=True)
        )
        return integers, floats

    def measure(self, number: int, data: ArrayData) -> Measured:
        """Run one batch, and return what travels."""
        batch, rows, digests = data.batch(number)
        integers, floats = self.run(number, batch)
        return Measured(as_array(integers), as_array(floats), rows, digests)


def _first(run: Step, step: Step, values: list[Any], inputs: Any, data: Data) -> tuple[Step, Outcome]:
    """Run the first batch, on which it shows whether the model can be compiled and takes the data."""
    try:
        return run, run(values, inputs)
    except Exception as error:
        if leaked(error):
            data.notes.append(
                "a BatchNorm layer is called inside a loop of the graph, so the model runs uncompiled, slowly"
            )
            return step, step(values, inputs)
        if isinstance(error, ValueError | TypeError) and not data.spec.names:
            problem = f"the model does not take this data ({first_line(error)})"
            raise UnreadableError(data.source, problem) from error
        raise


def _take(
    pending: tuple[Any, Any, int] | None,
    layers: Sequence[Any],
    data: Data,
    tally: Tally,
    progress: Progress | None,
) -> None:
    interrupts.check()
    if pending is not None:
        integers, floats = as_array(pending[0]), as_array(pending[1])
        _check_finite(integers, floats, layers, tally, data)
        tally.add(integers, floats)
        if progress is not None:
            progress(data.total, pending[2])


def _check_finite(
    integers: NDArray[Any], floats: NDArray[Any], layers: Sequence[Any], tally: Tally, data: Data
) -> None:
    counts, places = integers
    bad = sorted(set(places[(counts > 0) & ~np.isfinite(floats).all(axis=0)].tolist()))
    if bad:
        problem = (
            f"the layer's input is not finite in batch {tally.batches + 1}: the weights overflow, or are "
            "not finite themselves"
        )
        raise MismatchError([Finding(Path(data.source), _path(layers[index]), problem) for index in bad])


def _seeded(values: Sequence[Any], variables: Sequence[Any], seed: int, batch: int) -> list[Any]:
    """Return the values of a model's variables with its random generators set for a batch.

    Files do not store the state of generators, so that a loaded model would drop other units in each
    process; and what is dropped in a batch must not depend on who ran the batches before it. For batch b,
    counted from 0, the k-th generator gets the first word of NumPy's SeedSequence([seed, k, b]), without its
    top bit, and counter 0; torch's own generators get that of the number after the last k.
    """
    from keras import ops

    def word(k: int) -> int:
        return int(np.random.SeedSequence([seed, k, batch]).generate_state(1)[0]) & 0x7FFFFFFF

    values = list(values)
    generators = [number for number, variable in enumerate(variables) if variable.name == SEED_STATE]
    for k, number in enumerate(generators):
        state = np.array([word(k), 0])
        values[number] = ops.cast(ops.convert_to_tensor(state), variables[number].dtype)
    seed_torch(word(len(generators)))
    return values


def _report(
    model: Any,
    layers: Sequence[Any],
    active: Sequence[Any],
    data: Data,
    tally: Tally,
    new: Mapping[int, Statistics],
    estimator: str,
) -> RefreshReport:
    reached = [_refreshed(active[index], index, tally, new[index], estimator) for index in new]
    done = {id(active[index]) for index in new}
    rest = [
        LayerReport(layer.name, _path(layer), "untouched" if layer.trainable else "kept")
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
        batches=tally.batches,
        batch_size=data.batch_size,
        seed=data.spec.seed,
        source=data.source,
        used=data.used,
        ignored=data.ignored,
        digest=data.digest,
        inputs=max(1, len(data.spec.names)),
        notes=tuple(notes),
    )


def _refreshed(layer: Any, index: int, tally: Tally, new: Statistics, estimator: str) -> LayerReport:
    old = Statistics(_array(layer.moving_mean), _array(layer.moving_variance))
    halves = [tally.of(index, [half]) for half in (0, 1)]
    error = None
    if all(half.count.all() for half in halves):
        first, second = (ESTIMATORS[estimator](half) for half in halves)
        error = standard_error(first, second, new, layer.epsilon)
    return LayerReport(
        layer.name,
        _path(layer),
        "refreshed",
        channels=len(new.mean),
        calls=tally.calls(index),
        count=int(tally.of(index).count.min()),
        drift=drift_between(old, new, layer.epsilon),
        error=error,
    )


def _path(layer: Any) -> str:
    return str(getattr(layer, "path", None) or layer.name)


def _array(variable: Any) -> NDArray[np.float64]:
    return as_array(value_of(variable)).astype(np.float64)


def _assign(layers: Sequence[Any], new: Mapping[int, Statistics], source: str) -> None:
    """Assign all statistics, or on any exception none."""
    with _all_or_nothing([variable for index in new for variable in layers[index].non_trainable_variables]):
        findings = []
        for index, statistics in new.items():
            layer = layers[index]
            for variable, value in _values(layer, statistics):
                variable.assign(value)
                if not np.isfinite(_array(variable)).all():
                    problem = f"does not fit into {variable.dtype}"
                    findings.append(Finding(Path(source), f"{_path(layer)}/{variable.name}", problem))
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
