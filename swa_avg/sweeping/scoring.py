"""Score checkpoints with one live Keras model, on validation data that are read in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from swa_avg.batchnorm import Loading, Refresh
from swa_avg.batchnorm.checkpoint import refresh_loaded
from swa_avg.batchnorm.complaints import keras_reason
from swa_avg.batchnorm.loading import load_model, load_weights
from swa_avg.batchnorm.places import Places, find_places
from swa_avg.batchnorm.processes import Origin, PerProcess, absolute
from swa_avg.batchnorm.signature import inputs_of
from swa_avg.batchnorm.statistics import RefreshedStatistics
from swa_avg.data.sources import open_data
from swa_avg.data.spec import VALIDATION, Spec
from swa_avg.data.user_functions import import_function
from swa_avg.errors import SwaAvgError, UnreadableError, UsageError
from swa_avg.formats import open_checkpoint
from swa_avg.inputs.metrics import direction, main_metric

__all__ = ["Evaluator", "Score", "Scorer", "Scoring", "Validation"]

Metric = Callable[[Any, Any], float]


@dataclass(frozen=True)
class Validation:
    """What checkpoints are scored on, and by what."""

    data: Any
    """What `refresh_batchnorm` takes, with targets: a `.npz` that holds x and y, arrays (x, y) or (x, y,
    sample weights), batches of these, ... Read again for each checkpoint that is scored."""
    inputs: Sequence[str] = ()
    """`KEY` or `KEY=INPUT`, where the data's names do not say which array goes where."""
    targets: Sequence[str] = ()
    """`KEY` or `KEY=OUTPUT`; by default y, y_val, y_test or labels, or the outputs' names."""
    batch_size: int | None = None
    """Rows a batch, where the data do not come in batches; 128 by default."""
    samples: int | None = None
    """Rows to use, the first ones; all by default."""
    preprocess: str | Callable[[Any], Any] | None = None
    """Applied to the inputs of each batch; a function or its `MODULE:FUNCTION`."""
    metric: str | Metric | None = None
    """f(targets, predictions) -> number, over all rows at once, or its `MODULE:FUNCTION`; by default, the
    metrics that the model was compiled with, which alone take sample weights."""
    monitor: str | None = None
    """The compiled metric that decides; by default the first accuracy, else the loss."""
    mode: str | None = None
    """`min` or `max`: which of its values are better; by default as for CheckpointSaver."""

    @classmethod
    def of(cls, value: Any) -> Validation:
        """Return a Validation as it is, and of anything else, the validation on these data."""
        return value if isinstance(value, Validation) else cls(value)

    @property
    def metric_name(self) -> str | None:
        """What the metric is called in a report, where one is given."""
        if self.metric is None or isinstance(self.metric, str):
            return self.metric
        return str(getattr(self.metric, "__name__", "metric"))


@dataclass(frozen=True)
class Score:
    """What one checkpoint achieves."""

    metrics: Mapping[str, float]
    statistics: RefreshedStatistics | None
    """Its re-estimated BatchNorm statistics, if that was asked for."""


@dataclass(frozen=True)
class Scoring:
    """A score, and what it was given on and by."""

    score: Score
    decides: tuple[str, str]
    """The metric that decides, and which of its values are better."""
    source: str
    """The validation data."""
    rows: int
    digest: str
    """BLAKE2b-256 of the validation rows."""


@dataclass(frozen=True)
class Scorer:
    """Scores checkpoints with one model a process."""

    validation: Validation
    loading: Loading
    refresh: Refresh | None
    origin: Origin | None = None
    """Where it comes from, if it works in other processes."""
    _evaluator: PerProcess[Evaluator] = field(default_factory=PerProcess, compare=False)

    def portable(self) -> Scorer:
        """Return a scorer for processes that run in other folders."""
        refresh = self.refresh
        return Scorer(
            replace(self.validation, data=absolute(self.validation.data)),
            replace(self.loading, model=absolute(self.loading.model)),
            refresh and replace(refresh, data=absolute(refresh.data), model=absolute(refresh.model)),
            Origin.here(),
        )

    @property
    def subject(self) -> str:
        """The file that it is about, for messages."""
        return str(self.validation.data) if isinstance(self.validation.data, str | Path) else "the data"

    def score(self, draft: Path) -> Scoring:
        """Score a checkpoint; errors as for `Evaluator`."""
        with self._evaluator.use(partial(self._load, draft)) as evaluator:
            score = evaluator.score(draft)
            return Scoring(
                score, evaluator.monitor(score), evaluator.source, evaluator.rows, evaluator.digest
            )

    def _load(self, draft: Path) -> Evaluator:
        if self.origin is not None:
            self.origin.adopt()
        return Evaluator.load(draft, self.validation, self.loading, self.refresh)


class Evaluator:
    """One live model that takes the weights of one checkpoint after the other."""

    def __init__(
        self, model: Any, validation: Validation, refresh: Refresh | None, *, compiled: bool
    ) -> None:
        self._model = model
        self._validation = validation
        self._refresh = refresh
        self._places: Places | None = None
        if compiled and not getattr(model, "compiled", False):
            raise UsageError(
                "the model does not say how it was compiled: give a metric, such as MODULE:FUNCTION"
            )
        if compiled:
            model.optimizer = None  # no part of a score, and up to twice as large as the weights
        self.digest = ""
        """BLAKE2b-256 of the validation rows."""
        self.rows = 0
        self.source = ""

    @classmethod
    def load(
        cls, draft: Path, validation: Validation, loading: Loading, refresh: Refresh | None
    ) -> Evaluator:
        """Build the model, once, from the first checkpoint that is scored or from what `loading` names.

        Raises:
            UsageError: it cannot be loaded as it was asked for, or says nothing of metrics.
        """
        compiled = validation.metric is None
        with closing(open_checkpoint(draft)) as checkpoint:
            model = load_model(checkpoint, loading, compiled=compiled)
        return cls(model, validation, refresh, compiled=compiled)

    def score(self, draft: Path) -> Score:
        """Give the model the weights of `draft`, refresh its BatchNorm if that was asked for, and evaluate.

        Raises:
            UsageError: the weights, or the metric, cannot be used.
            UnreadableError: the data cannot be used.
            MismatchError: statistics came out that are not finite.
        """
        statistics = None
        with closing(open_checkpoint(draft)) as checkpoint:
            load_weights(self._model, checkpoint)
            if self._refresh is not None:
                self._places = self._places or find_places(self._model, checkpoint)
                statistics = refresh_loaded(self._model, checkpoint, self._refresh, self._places)
        return Score(self._evaluate(), statistics)

    def monitor(self, score: Score) -> tuple[str, str]:
        """Return which metric decides, and which of its values are better.

        Raises:
            UsageError: there is no such metric, or it is not known which are.
        """
        name = self._validation.monitor or self._validation.metric_name or main_metric(score.metrics)
        if name not in score.metrics:
            raise UsageError(f"monitor {name!r}: the model has {', '.join(score.metrics)}")
        return name, self._validation.mode or direction(self._model, name.rpartition(":")[2])

    def _evaluate(self) -> dict[str, float]:
        meter = _Compiled(self._model) if self._metric is None else _Whole(self._model, self._metric)
        with open_data(self._validation.data, self._spec) as data:
            for x, y, weights, _ in data.labelled():
                try:
                    meter.add(x, *(_arranged(self._model, part) for part in (y, weights)))
                except SwaAvgError:
                    raise
                except Exception as error:  # of whichever class the backend has for shapes and types
                    problem = f"the model cannot be evaluated on these data ({keras_reason(error)})"
                    raise UnreadableError(data.source, problem) from error
            self.digest, self.rows, self.source = data.digest, data.samples, data.source
        metrics = meter.result()
        if self._metric is None:
            return metrics
        return {self._validation.metric_name or "metric": metrics["metric"]}

    @cached_property
    def _metric(self) -> Metric | None:
        metric: Metric | None = _function(self._validation.metric)
        return metric

    @property
    def _spec(self) -> Spec:
        validation = self._validation
        return Spec(
            **inputs_of(self._model),
            bind=validation.inputs,
            batch_size=validation.batch_size,
            samples=validation.samples,
            preprocess=_function(validation.preprocess),
            purpose=VALIDATION,
            bind_targets=validation.targets,
            output_names=_outputs_of(self._model),
        )


def _function(named: Any) -> Any:
    """Return a function, given it or its `MODULE:FUNCTION`; None for None."""
    return import_function(named) if isinstance(named, str) else named


def _outputs_of(model: Any) -> list[str]:
    """Return the names of the outputs where there are several; of a subclassed model, none are known."""
    structure = getattr(model, "_outputs_struct", None)
    if isinstance(structure, Mapping):
        return list(structure)
    names = list(getattr(model, "output_names", None) or [])
    return names if len(names) > 1 else []


def _arranged(model: Any, targets: Any) -> Any:
    """Put targets by name, or sample weights, into the structure of the model's outputs."""
    if isinstance(targets, Mapping) and isinstance(getattr(model, "_outputs_struct", None), list | tuple):
        return [targets.get(name) for name in _outputs_of(model)]
    return targets


class _Compiled:
    """The metrics that a model was compiled with, its loss among them, as `model.evaluate` adds them up."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._logs: Mapping[str, Any] = {}
        model.reset_metrics()

    def add(self, x: Any, y: Any, weights: Any) -> None:
        with _metrics_kept(self._model) if self._logs else nullcontext():
            self._logs = self._model.test_on_batch(x, y, weights, return_dict=True)

    def result(self) -> dict[str, float]:
        return {name: float(np.asarray(value)) for name, value in self._logs.items() if np.ndim(value) == 0}


@contextmanager
def _metrics_kept(model: Any) -> Iterator[None]:
    """Have metrics go on from the batch before: some versions of Keras reset them in `test_on_batch`.

    `model.evaluate` would take the batches as a generator, but loses what it raises, and lists of inputs.
    """
    model.__dict__["reset_metrics"] = lambda: None  # straight into the instance: Keras's __setattr__ tracks
    try:
        yield
    finally:
        del model.__dict__["reset_metrics"]


class _Whole:
    """A function of all targets and all predictions."""

    def __init__(self, model: Any, metric: Metric) -> None:
        self._model = model
        self._metric = metric
        self._targets: list[Any] = []
        self._predictions: list[Any] = []

    def add(self, x: Any, y: Any, weights: Any) -> None:
        self._targets.append(y)
        self._predictions.append(self._model.predict_on_batch(x))

    def result(self) -> dict[str, float]:
        value = self._metric(_joined(self._targets), _joined(self._predictions))
        try:
            return {"metric": float(value)}
        except (TypeError, ValueError) as error:
            raise UsageError(f"metric returned {type(value).__name__}; expected a number") from error


def _joined(parts: Sequence[Any]) -> Any:
    """Put batches together, whatever structure of arrays they are."""
    first = parts[0]
    if isinstance(first, Mapping):
        return {key: _joined([part[key] for part in parts]) for key in first}
    if isinstance(first, list | tuple):
        return [_joined(column) for column in zip(*parts, strict=True)]
    return np.concatenate([np.asarray(part) for part in parts])
