"""Learning-rate schedules for weight averaging: plain functions of the epoch, or Keras schedules by the step.

    LearningRateScheduler(cyclic(0.05, 0.01, cycle_length=5))           # by epoch, as a callback
    SGD(cyclic(0.05, 0.01, cycle_length=5).by_step(steps_per_epoch))    # by step, saved with the model

Epochs and steps count from 0, as Keras gives them. A learning rate is in whatever unit the optimizer takes.
Loading a model with a schedule by the step needs `import swa_avg.callbacks` before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from swa_avg.errors import UsageError

__all__ = ["LR_schedule", "Schedule", "constant", "cyclic", "keras_schedule_class", "linear"]


@dataclass(frozen=True)
class Schedule:
    """A learning rate as a function of the epoch; call it with a 0-based epoch index."""

    kind: str
    """A key of FORMULAS."""
    parameters: Mapping[str, float]
    """Of the formula, with lengths in epochs."""

    def __call__(self, epoch: int, lr: float | None = None) -> float:
        """Return the learning rate of a 0-based epoch; `lr`, which Keras passes, changes nothing."""
        return float(FORMULAS[self.kind](epoch, _if, float, **self.parameters))

    def by_step(self, steps_per_epoch: int) -> Any:
        """Return the same formula as a `keras.optimizers.schedules.LearningRateSchedule`, which counts steps.

        Every length is multiplied by `steps_per_epoch`, so that a cycle takes as many epochs as before, and
        descends within each of them. Computed in float32 on any backend; saved and loaded with the model.

        Raises:
            UsageError: `steps_per_epoch` is not a whole number above 0.
        """
        _check_length("steps_per_epoch", steps_per_epoch)
        parameters = {
            name: value * steps_per_epoch if name in _LENGTHS else value
            for name, value in self.parameters.items()
        }
        return keras_schedule_class()(self.kind, parameters)


def constant(lr: float) -> Schedule:
    """Return a schedule that keeps one learning rate, as Izmailov et al. 2018, section 3.1 suggest for SWA.

    Raises:
        UsageError: the learning rate is negative or not finite.
    """
    _check_rate("lr", lr)
    return Schedule("constant", {"lr": lr})


def linear(lr_start: float, lr_end: float, swa_start: int) -> Schedule:
    """Return a descent that ends before SWA begins: flat to 0.5 of `swa_start`, linear to 0.9, then flat.

    With t = epoch / swa_start and r = lr_end / lr_start, the factor on `lr_start` is 1 for t <= 0.5,
    1 - (1 - r)(t - 0.5)/0.4 for t <= 0.9, and r after that. Source: the training script of Izmailov et al.
    2018 (arXiv:1803.05407), timgaripov/swa, train.py.

    Raises:
        UsageError: `swa_start` is no whole number above 0, `lr_start` is 0, or a rate is negative.
    """
    _check_length("swa_start", swa_start)
    _check_rate("lr_start", lr_start)
    _check_rate("lr_end", lr_end)
    if lr_start == 0:
        raise UsageError("lr_start is 0, and lr_end is taken relative to it; give a rate above 0")
    return Schedule("linear", {"lr_start": lr_start, "lr_end": lr_end, "swa_start": swa_start})


def cyclic(lr_start: float, lr_end: float, cycle_length: int, start: int = 0) -> Schedule:
    """Return a linear saw-tooth that is lowest, at `lr_end`, in the last epoch of each cycle.

    Izmailov et al. 2018 (arXiv:1803.05407), section 3.1: alpha(i) = (1 - t(i)) alpha_1 + t(i) alpha_2 with
    t(i) = (mod(i - 1, c) + 1)/c, where i counts from 1: here i is epoch + 1 - start, or step + 1 - start with
    `by_step`, as in the paper. Before `start` the rate is `lr_start`. A CheckpointSaver with the same start
    and cycle length saves at the minima.

    Raises:
        UsageError: `cycle_length` is no whole number above 0, `start` is negative, or a rate is negative.
    """
    _check_length("cycle_length", cycle_length)
    _check_length("start", start, least=0)
    _check_rate("lr_start", lr_start)
    _check_rate("lr_end", lr_end)
    return Schedule(
        "cyclic", {"lr_start": lr_start, "lr_end": lr_end, "cycle_length": cycle_length, "start": start}
    )


def LR_schedule(  # noqa: N802 (the name that the SWA_keras repository gave it, like its arguments)
    epoch: int,
    flag: bool = False,
    SWA_START: int = 150,  # noqa: N803
    lr_start: float = 0.1,
    lr_end: float = 0.05,
    c: int = 10,
) -> float:
    """Return the learning rate of a 0-based epoch as SWA_keras did: `cyclic` with `flag`, else `linear`.

    Raises:
        UsageError: of the arguments that are used, SWA_START or c is not above 0, or lr_start is 0.
    """
    if flag:
        return cyclic(lr_start, lr_end, _named("c", c))(epoch)
    return linear(lr_start, lr_end, _named("SWA_START", SWA_START))(epoch)


@cache
def keras_schedule_class() -> Any:
    """Return the class of the schedules by the step, and register it with Keras, which is imported for it."""
    import keras

    @keras.saving.register_keras_serializable("swa_avg")
    class StepSchedule(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
        """A formula of this module as a function of the 0-based step, on any backend."""

        def __init__(self, kind: str, parameters: Mapping[str, float]) -> None:
            self.kind = kind
            self.parameters = dict(parameters)

        def __call__(self, step: Any = None) -> Any:
            if step is None:  # as tf_keras calls what it does not know as a schedule
                raise UsageError("by_step is for optimizers of Keras 3: import keras, not tf_keras")

            def to_float(value: Any) -> Any:
                return keras.ops.cast(value, "float32")

            step = keras.ops.cast(keras.ops.convert_to_tensor(step), "int32")
            return to_float(FORMULAS[self.kind](step, keras.ops.where, to_float, **self.parameters))

        def get_config(self) -> dict[str, Any]:
            return {"kind": self.kind, "parameters": self.parameters}

    return StepSchedule


# The formulas serve numbers and tensors alike: `where` chooses, `to_float` converts a count.


def _constant(count: Any, where: Callable[..., Any], to_float: Callable[..., Any], *, lr: float) -> Any:
    return lr


def _linear(
    count: Any,
    where: Callable[..., Any],
    to_float: Callable[..., Any],
    *,
    lr_start: float,
    lr_end: float,
    swa_start: int,
) -> Any:
    t = to_float(count) / swa_start
    ratio = lr_end / lr_start
    falling = 1.0 - (1.0 - ratio) * (t - 0.5) / 0.4
    return lr_start * where(t <= 0.5, 1.0, where(t <= 0.9, falling, ratio))


def _cyclic(
    count: Any,
    where: Callable[..., Any],
    to_float: Callable[..., Any],
    *,
    lr_start: float,
    lr_end: float,
    cycle_length: int,
    start: int,
) -> Any:
    t = to_float((count - start) % cycle_length + 1) / cycle_length
    return where(count < start, lr_start, (1 - t) * lr_start + t * lr_end)


def _if(condition: bool, yes: float, no: float) -> float:
    return yes if condition else no


FORMULAS: Mapping[str, Callable[..., Any]] = {"constant": _constant, "linear": _linear, "cyclic": _cyclic}
_LENGTHS = ("swa_start", "cycle_length", "start")


def _check_rate(name: str, value: float) -> None:
    if isinstance(value, bool) or not math.isfinite(value) or value < 0:
        raise UsageError(f"{name} is {value}; a learning rate is finite and not negative")


def _check_length(name: str, value: int, *, least: int = 1) -> None:
    if isinstance(value, bool) or int(value) != value or value < least:
        raise UsageError(f"{name} is {value}; expected a whole number of at least {least}")


def _named(name: str, value: int) -> int:
    _check_length(name, value)
    return value
