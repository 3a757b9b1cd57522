"""Runs a live model over batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swa_avg.batchnorm.backends import Step, cannot_be_traced, compiled, seed_torch, value_of
from swa_avg.batchnorm.complaints import keras_reason
from swa_avg.batchnorm.observe import SEED_STATE, Outcome, make_step
from swa_avg.data.batches import ArrayData, Data, RowDigests, as_array
from swa_avg.errors import UnreadableError

__all__ = ["Measured", "Runner", "running"]

_FRAMEWORKS = ("keras", "tensorflow", "jax", "jaxlib", "torch")
"""Whose errors are about shapes, types and values."""


@dataclass(frozen=True)
class Measured:
    """What the layers saw of one batch that was run elsewhere."""

    integers: NDArray[Any]
    floats: NDArray[Any]
    """As in `Outcome`."""
    rows: int
    digests: RowDigests


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
        self._data = data
        self._step, self._fast = step, fast
        self._begun = False
        self.carries_state = False
        """Whether state other than random generators' went from a batch to the next: its order matters."""

    def run(self, number: int, batch: Any) -> tuple[Any, Any]:
        """Return what the layers saw of a batch, as the integers and floats of an `Outcome`."""
        values = _seeded(self._values, self._variables, self._data.spec.seed, number)
        try:
            outcome = self._outcome(values, batch)
        except Exception as error:
            framework = type(error).__module__.partition(".")[0] in _FRAMEWORKS
            if not framework and not isinstance(error, ValueError | TypeError | LookupError):
                raise  # the model's own
            problem = f"the model does not take this data ({keras_reason(error)})"
            raise UnreadableError(self._data.source, problem) from error
        integers, floats, carried = outcome
        self._values = [old if new is None else new for old, new in zip(values, carried, strict=True)]
        self.carries_state = getattr(self._fast, "assigns", False) or any(
            new is not None and variable.name != SEED_STATE
            for variable, new in zip(self._variables, carried, strict=True)
        )
        return integers, floats

    def _outcome(self, values: list[Any], batch: Any) -> Outcome:
        """Run a batch; the first one shows whether the model can be compiled."""
        try:
            outcome: Outcome = self._fast(values, batch)
        except Exception as error:
            if self._begun or not cannot_be_traced(error):
                raise
            self._data.notes.append(
                "a BatchNorm layer is called inside a loop of the graph, or the model decides by values of "
                "tensors, so it runs uncompiled, slowly"
            )
            self._fast = self._step
            outcome = self._step(values, batch)
        self._begun = True
        return outcome

    def measure(self, number: int, data: ArrayData) -> Measured:
        """Run one batch, and return what travels."""
        batch, rows, digests = data.batch(number)
        integers, floats = self.run(number, batch)
        return Measured(as_array(integers), as_array(floats), rows, digests)


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
