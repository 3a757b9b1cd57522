"""Save a model on another thread, as it is at one moment, while training goes on."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import keras

from swa_avg.callbacks.run_folder import published

__all__ = ["Snapshot", "Task", "saved_view", "value_of"]


_ATTEMPTS = 5


class Task(threading.Thread):
    """One checkpoint on its way to disk.

    Not a daemon: the interpreter, on its way out, lets it finish its file. Nothing in it waits for anything.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        path: Path,
        write: Callable[[Path], None],
        record: Callable[[], list[str]],
    ) -> None:
        super().__init__(name=f"saving {path.name}", daemon=False)
        self.snapshot = snapshot
        self.path = path
        self.write = write
        self.record = record
        self.warnings: list[str] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            for left in reversed(range(_ATTEMPTS)):
                try:
                    with published(self.path) as temporary, self.snapshot.read_on_this_thread():
                        self.write(temporary)
                    break
                except RuntimeError as error:
                    # Training went on, and added to what was walked through, such as a model's attributes.
                    if not left or "changed size during iteration" not in str(error):
                        raise
            self.warnings = self.record()
        except BaseException as error:
            self.error = error
        finally:
            if self.error is None:
                self.snapshot.clear()


class Snapshot:
    """The values of a model's variables at one moment, in host memory."""

    def __init__(self, model: Any, include_optimizer: bool) -> None:
        variables = [*model.variables, *model.metrics_variables]
        if include_optimizer:
            variables += [variable for optimizer in _optimizers(model) for variable in optimizer.variables]
        unique = {id(variable): variable for variable in variables}.values()
        self._values: list[tuple[Any, Any]] = [(variable, value_of(variable)) for variable in unique]
        self.missed: set[str] = set()
        """Variables that were read on the saving thread, and of which there is no copy."""

    @contextmanager
    def read_on_this_thread(self) -> Iterator[None]:
        """Let every read of a variable on this thread give the value in the snapshot.

        Keras's StatelessScope does that, for the thread that enters it alone. It wants backend tensors, which
        replace the arrays one by one, so that there is never more than one copy, and on the CPU: a device may
        have no room. A variable of our own, read last, tells whether the scope held to the end.
        """
        with keras.device("cpu:0"):
            probe = keras.Variable(0.0, trainable=False, name="probe")
            for number, (variable, values) in enumerate(self._values):
                self._values[number] = variable, keras.ops.convert_to_tensor(values, dtype=variable.dtype)
            mapping = [*self._values, (probe, keras.ops.convert_to_tensor(1.0, dtype=probe.dtype))]
        with _Scope(mapping, self.missed):
            del mapping
            yield
            if float(probe.numpy()) != 1.0:
                raise RuntimeError("the Keras session was cleared, or this Keras reads variables differently")

    @contextmanager
    def assigned(self) -> Iterator[None]:
        """Give the variables the values in the snapshot for a while."""
        current = [(variable, value_of(variable)) for variable, _ in self._values]
        try:
            for variable, values in self._values:
                variable.assign(values)
            yield
        finally:
            for variable, values in current:
                variable.assign(values)

    def clear(self) -> None:
        self._values.clear()


def value_of(variable: Any) -> Any:
    """Return what a variable holds now, in host memory, where nothing changes it.

    TensorFlow's tensors are values: a variable that is written to while a tensor shares its memory takes new
    memory first. JAX gives a step's memory away to the next one, and torch writes in place: copied.
    """
    if keras.backend.backend() == "tensorflow":
        tensor = sys.modules["tensorflow"].convert_to_tensor(variable.value)
        if "CPU" in tensor.device:
            return tensor
    return variable.numpy()


class _Scope(keras.StatelessScope):  # type: ignore[misc]
    """A StatelessScope that remembers what it was asked for in vain."""

    def __init__(self, mapping: Sequence[tuple[Any, Any]], missed: set[str]) -> None:
        super().__init__(state_mapping=mapping)
        self._missed = missed

    def get_current_value(self, variable: Any) -> Any:
        value = super().get_current_value(variable)
        if value is None:
            self._missed.add(variable.path)
        return value


def _optimizers(model: Any) -> list[Any]:
    return [value for value in vars(model).values() if isinstance(value, keras.optimizers.Optimizer)]


def saved_view(model: Any, *, include_optimizer: bool) -> Any:
    """Return a shallow copy of `model` to save: without optimizers, or with a stand-in for each.

    To save an object of the class Optimizer, Keras makes another one, and that is not allowed within a
    StatelessScope. A plain layer that saves the optimizer's variables gives the same file.
    """
    view = object.__new__(type(model))
    attributes = dict(vars(model))
    for name, value in vars(model).items():
        if isinstance(value, keras.optimizers.Optimizer):
            attributes[name] = _stand_in(value) if include_optimizer else None
    if not include_optimizer:
        attributes["compiled"] = False
    view.__dict__.update(attributes)
    return view


def _save_variables(optimizer: Any, store: Any) -> None:
    for number, variable in enumerate(optimizer.variables):
        store[str(number)] = variable


def _stand_in(optimizer: Any) -> Any:
    layer = keras.layers.Layer(name=optimizer.name)
    layer.save_own_variables = optimizer.save_own_variables
    if type(optimizer).save_own_variables is keras.optimizers.Optimizer.save_own_variables:
        # Keras's own copies all of the variables before the first is written.
        layer.save_own_variables = partial(_save_variables, optimizer)
    for name, value in vars(optimizer).items():
        if isinstance(value, keras.optimizers.Optimizer):
            setattr(layer, name, _stand_in(value))
    return layer
