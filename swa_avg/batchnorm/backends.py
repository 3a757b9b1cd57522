"""What differs between TensorFlow, JAX and torch: compiling a step, and state that Keras does not know of."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from swa_avg.interrupts import interrupts_held

__all__ = [
    "Step",
    "cannot_be_traced",
    "compiled",
    "functions_inlined",
    "random_state_kept",
    "seed_torch",
    "squared_difference",
    "value_of",
]

Step = Callable[[list[Any], Any], Any]


@contextmanager
def compiled(step: Step, model: Any, *, eager: bool) -> Iterator[Step]:
    """Yield `step` compiled for the backend; what it changes behind Keras's back is put back afterwards.

    TensorFlow traces once for all batch sizes, JAX compiles once for each; torch runs as it is, without
    gradients.
    """
    from keras import backend

    name = backend.backend()
    if name == "torch":
        with _torch_state_kept(model):
            yield step
    elif eager:
        yield step
    elif name == "tensorflow":
        traced = _TensorFlowStep(step)
        try:
            yield traced
        finally:
            traced.restore()
    else:
        import jax

        yield jax.jit(step)


class _TensorFlowStep:
    """A tf.function with a free batch dimension that keeps the bare `tf.Variable`s which the step assigns."""

    def __init__(self, step: Step) -> None:
        import tensorflow as tf

        self._function = tf.function(step, autograph=False, reduce_retracing=True)
        self._kept: dict[int, tuple[Any, Any]] = {}
        self._signatures: set[Any] = set()

    def __call__(self, values: list[Any], inputs: Any) -> Any:
        import tensorflow as tf

        inputs = tf.nest.map_structure(_as_tensor, inputs)
        signature = tuple(
            (tensor.dtype, tensor.shape[1:]) for tensor in tf.nest.flatten(inputs) if tensor is not None
        )
        if signature not in self._signatures:
            self._trace(values, inputs)
            self._signatures.add(signature)
        return self._function(values, inputs)

    @property
    def assigns(self) -> bool:
        """Whether the step assigns to variables behind Keras's back."""
        return bool(self._kept)

    def _trace(self, values: list[Any], inputs: Any) -> None:
        import tensorflow as tf

        free = tf.nest.map_structure(_of_any_size, inputs)
        concrete = self._function.get_concrete_function(values, free)
        for variable in concrete.graph.variables:
            self._kept.setdefault(id(variable), (variable, tf.identity(variable)))

    def restore(self) -> None:
        """Put back what the step assigned behind Keras's back."""
        with interrupts_held():
            for variable, value in self._kept.values():
                variable.assign(value)


def _as_tensor(part: Any) -> Any:
    """Return a tensor; an optional input that was left out stays None, and a ragged tensor what it is."""
    import tensorflow as tf

    return part if part is None or tf.is_tensor(part) else tf.convert_to_tensor(part)


def _of_any_size(tensor: Any) -> Any:
    """Return the type of a batch with as many rows as it likes."""
    import tensorflow as tf

    if tensor is None:
        return None
    shape = [None, *tensor.shape[1:]]
    if isinstance(tensor, tf.RaggedTensor):
        return tf.RaggedTensorSpec(shape, tensor.dtype, tensor.ragged_rank)
    return tf.TensorSpec(shape, tensor.dtype)


@contextmanager
def functions_inlined() -> Iterator[None]:
    """Let functions that are compiled on their own be part of what is traced, or run as plain Python.

    A `tf.function` around a layer keeps what the layer saw to itself, and one that was traced before does not
    even ask the layer.
    """
    from keras import backend

    if backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf

    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


@contextmanager
def _torch_state_kept(model: Any) -> Iterator[None]:
    """Run without gradients; wrapped torch modules have modes and buffers that Keras does not know of."""
    import torch

    known = {id(variable.value) for variable in model.variables}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if id(buffer) not in known]
    modes = [(module, module.training) for module in model.modules()]
    devices = list(range(torch.cuda.device_count()))
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        for module, mode in modes:
            module.training = mode


def seed_torch(seed: int) -> None:
    """Seed torch's own generators, from which dropout without a seed draws there; elsewhere nothing does."""
    from keras import backend

    if backend.backend() == "torch":
        import torch

        torch.manual_seed(seed)


def cannot_be_traced(error: Exception) -> bool:
    """Tell whether tracing failed where running as plain Python does not.

    Moments were computed inside a loop of the graph; or a function that TensorFlow would compile, rewritten
    by AutoGraph, decides by the values of tensors.
    """
    from keras import backend

    if backend.backend() == "jax":
        import jax

        return isinstance(error, jax.errors.UnexpectedTracerError)
    if backend.backend() == "tensorflow":
        names = ("InaccessibleTensorError", "OperatorNotAllowedInGraphError")
        return type(error).__name__ in names or "out of scope" in str(error)
    return False


def value_of(variable: Any) -> Any:
    """Return a Keras variable's value as a tensor, without copying it."""
    from keras import backend

    if backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.convert_to_tensor(variable.value)
    return variable.value


def squared_difference(first: Any, second: Any) -> Any:
    """Return (first - second)²; TensorFlow does not fuse the two operations by itself."""
    from keras import backend, ops

    if backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.math.squared_difference(first, second)
    return ops.square(first - second)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put Python's and NumPy's global generators back on leaving."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
