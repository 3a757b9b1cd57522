"""A training-mode forward pass that assigns nothing and says what every BatchNorm layer saw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from swa_avg.batchnorm.backends import functions_inlined, squared_difference
from swa_avg.interrupts import interrupts_held

__all__ = ["SEED_STATE", "Outcome", "active_layers", "batchnorm_layers", "layer_path", "make_step"]

Tensor = Any  # of the backend that Keras runs on
SEED_STATE = "seed_generator_state"


@dataclass(frozen=True)
class _Call:
    """One training-mode call of one layer; tensors of shape (channels,)."""

    layer: int
    count: Tensor
    mean: Tensor
    variance: Tensor


Outcome = tuple[Tensor, Tensor, list[Tensor | None]]
"""Of one batch, all calls side by side: integers (2, channels): counts and layers; floats (2, channels):
means and biased variances; then for each of the model's variables the new value, or None where the pass left
it."""


def batchnorm_layers(model: Any) -> list[Any]:
    """Return every BatchNorm layer of `model`, nested and wrapped ones included, each once."""
    import keras

    layers = {id(layer): layer for layer in model._flatten_layers(include_self=True)}
    return [layer for layer in layers.values() if isinstance(layer, keras.layers.BatchNormalization)]


def active_layers(model: Any) -> list[Any]:
    """Return the BatchNorm layers that are refreshed."""
    return [layer for layer in batchnorm_layers(model) if layer.trainable]


def layer_path(layer: Any) -> str:
    """Return the names from the model down to a layer."""
    return str(getattr(layer, "path", None) or layer.name)


def make_step(model: Any, layers: Sequence[Any]) -> Callable[[list[Tensor], Any], Outcome]:
    """Return the function (values of the model's variables, inputs) -> what `layers` saw.

    It runs the whole model with `training=True` in a stateless scope: nothing is assigned, whatever layers
    there are. State other than BatchNorm statistics (seeds of dropout, counters, recurrent states) comes out
    as new values, to be handed to the next call, as in training.

    Batch renormalization runs as plain batch normalization meanwhile: the corrections that it applies come
    from running statistics, which are what is being replaced.
    """
    import keras

    variables = model.variables
    statistics = {id(variable) for layer in layers for variable in layer.non_trainable_variables}

    def step(values: list[Tensor], inputs: Any) -> Outcome:
        mapping = list(zip(variables, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping) as scope:
            before = [scope.get_current_value(variable) for variable in variables]
            with functions_inlined(), _observing(layers, scope) as calls:
                model(inputs, training=True)
            after = [scope.get_current_value(variable) for variable in variables]
        carried = [
            new if new is not old and id(variable) not in statistics else None
            for variable, old, new in zip(variables, before, after, strict=True)
        ]
        return (*_pack(calls), carried)

    return step


def _pack(calls: Sequence[_Call]) -> tuple[Tensor, Tensor]:
    """Put the calls side by side: two arrays to fetch, however many layers there are."""
    from keras import backend, ops

    if not calls:
        return ops.zeros((2, 0), "int32"), ops.zeros((2, 0), "float32")
    double = any(backend.standardize_dtype(call.mean.dtype) == "float64" for call in calls)
    dtype = "float64" if double else "float32"
    integers = [
        ops.concatenate([call.count for call in calls]),
        ops.concatenate([ops.full(call.mean.shape, call.layer, "int32") for call in calls]),
    ]
    floats = [
        ops.concatenate([ops.cast(getattr(call, name), dtype) for call in calls])
        for name in ("mean", "variance")
    ]
    return ops.stack(integers), ops.stack(floats)


@contextmanager
def _observing(layers: Sequence[Any], scope: Any) -> Iterator[list[_Call]]:
    """Collect the moments of every training-mode call of `layers` while the model is run or traced."""
    calls: list[_Call] = []
    overridden = [layer.__dict__.copy() for layer in layers]
    try:
        for index, layer in enumerate(layers):
            # Straight into the instance: Keras's __setattr__ would track it.
            layer.__dict__["_moments"] = _moments_of(index, layer, calls)
            layer.__dict__["call"] = _call_of(index, layer, calls, scope)
            layer.__dict__["renorm"] = False
        yield calls
    finally:
        with interrupts_held():
            for layer, before in zip(layers, overridden, strict=True):
                for name in ("_moments", "call", "renorm"):
                    if name in before:
                        layer.__dict__[name] = before[name]
                    else:
                        layer.__dict__.pop(name, None)


def _moments_of(index: int, layer: Any, calls: list[_Call]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return what stands in for the layer's `_moments`, in its normalization too."""
    import keras

    original = layer._moments
    plain = type(layer)._moments is keras.layers.BatchNormalization._moments

    def moments(inputs: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        count, mean, variance = _two_pass(inputs, mask, layer.axis)
        if not plain:  # a subclass with an idea of its own of what its statistics are
            mean, variance = original(inputs, mask)
        calls.append(_Call(index, count, mean, variance))
        return mean, variance

    return moments


def _call_of(index: int, layer: Any, calls: list[_Call], scope: Any) -> Callable[..., Tensor]:
    """Return what stands in for the layer's `call`: it notices subclasses that compute moments elsewhere.

    Such a call leaves a new moving mean in the scope without having asked for `_moments`; the moments are
    then those of its input.
    """
    original = layer.call

    def call(inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        known, before = len(calls), scope.get_current_value(layer.moving_mean)
        outputs = original(inputs, *args, **kwargs)
        if len(calls) == known and scope.get_current_value(layer.moving_mean) is not before:
            mask = kwargs.get("mask", args[1] if len(args) > 1 else None)
            calls.append(_Call(index, *_two_pass(inputs, mask, layer.axis)))
        return outputs

    return call


def _two_pass(inputs: Tensor, mask: Tensor | None, axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return count, mean and biased variance of each channel along `axis`: int32, and at least float32.

    Two passes over each row, then the rows merged by Chan's formula, and always one axis after the other:
    TensorFlow adds up a reduction over several axes value by value, which costs two of seven digits at
    100,000 values. Its synchronized moments, and torch's, subtract two large squares.
    """
    from keras import backend, ops

    inputs = ops.cast(inputs, backend.result_type(inputs.dtype, "float32"))
    first, *rest = axes = [
        number for number in range(len(inputs.shape)) if number != axis % len(inputs.shape)
    ]
    channels = (inputs.shape[axis],)
    if mask is None:
        size: Any = 1
        for number in axes:
            size = size * ops.shape(inputs)[number]
        count = ops.broadcast_to(ops.cast(size, "int32"), channels)
        means = _fold(ops.mean, inputs, rest)
        within = _fold(ops.mean, squared_difference(inputs, means), rest) if rest else ops.zeros_like(means)
        mean = ops.mean(means, axis=first, keepdims=True)
        variance = ops.mean(within + ops.square(means - mean), axis=first, keepdims=True)
        return count, ops.reshape(mean, channels), ops.reshape(variance, channels)
    seen = ops.broadcast_to(ops.expand_dims(ops.cast(mask, "bool"), axis=-1), ops.shape(inputs))
    count = _fold(ops.sum, ops.cast(seen, "int32"), axes)
    divisor = ops.cast(ops.maximum(count, 1), inputs.dtype)
    mean = _fold(ops.sum, ops.where(seen, inputs, 0), axes) / divisor
    variance = _fold(ops.sum, ops.where(seen, squared_difference(inputs, mean), 0), axes) / divisor
    return ops.reshape(count, channels), ops.reshape(mean, channels), ops.reshape(variance, channels)


def _fold(operation: Callable[..., Tensor], values: Tensor, axes: Sequence[int]) -> Tensor:
    for axis in reversed(axes):
        values = operation(values, axis=axis, keepdims=True)
    return values
