"""Find where a checkpoint stores the statistics of a live model's BatchNorm layers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swa_avg.batchnorm.backends import value_of
from swa_avg.batchnorm.loading import load_weights
from swa_avg.batchnorm.observe import active_layers, layer_path
from swa_avg.batchnorm.statistics import overlaid
from swa_avg.combine.drafts import write_draft
from swa_avg.data.batches import as_array
from swa_avg.errors import Finding, MismatchError
from swa_avg.files.location import local_copy
from swa_avg.formats import Checkpoint, Tensor, open_checkpoint
from swa_avg.interrupts import interrupts_held

__all__ = ["Places", "find_places"]

_BASE = 250
"""Whole numbers up to it are exact in every floating-point type."""


@dataclass(frozen=True)
class Places:
    """Which tensor of a checkpoint each statistic of a live model is loaded from."""

    statistics: Sequence[tuple[Any, str]]
    """Variable, and the name of its tensor."""

    def values(self, checkpoint: Checkpoint) -> dict[str, bytes]:
        """Return the bytes of the statistics as the checkpoint would store them, by tensor."""
        return {
            name: _array(variable).astype(_dtype(checkpoint.tensors[name])).tobytes()
            for variable, name in self.statistics
        }

    def arrays(self, checkpoint: Checkpoint) -> dict[str, NDArray[Any]]:
        """Return the statistics that a checkpoint of this layout stores, by tensor."""
        return {
            name: np.frombuffer(_bytes(checkpoint, name), _dtype(checkpoint.tensors[name]))
            for _, name in self.statistics
        }


def find_places(model: Any, checkpoint: Checkpoint) -> Places:
    """Find the places of all statistics that a refresh may change.

    Keras loads a copy of the checkpoint in which every tensor that may be a statistic is marked, and the
    layers show which of the marks they got: however the writer named things, this Keras finds them as it
    does. The model is then what it was.

    Args:
        model: Has the weights of `checkpoint`.
        checkpoint: A draft, alone in its folder.

    Raises:
        MismatchError: the model holds other values than the checkpoint, or a statistic has no place in it.
    """
    layers = active_layers(model)
    if not layers:
        return Places([])
    _check_loaded(model, checkpoint)
    statistics = [(layer, variable) for layer in layers for variable in layer.non_trainable_variables]
    marks = _marks(checkpoint, {tuple(variable.shape) for _, variable in statistics})
    names = {_key(values): name for name, values in marks.items()}
    with _marked(checkpoint, marks) as marked, _restored(model):
        load_weights(model, marked)
        found = [(variable, names.get(_key(_array(variable)))) for _, variable in statistics]
    places = [(variable, name) for variable, name in found if name is not None]
    lost = [
        (f"{layer_path(layer)}/{variable.name}", "Keras does not load this from the checkpoint")
        for (layer, variable), (_, name) in zip(statistics, found, strict=True)
        if name is None
    ]
    lost += [
        (name, "Keras does not load this as it is stored")
        for name, value in Places(places).values(checkpoint).items()
        if value != _bytes(checkpoint, name)
    ]
    _raise_if(checkpoint, lost)
    return Places(places)


def _check_loaded(model: Any, checkpoint: Checkpoint) -> None:
    """Raise MismatchError if a floating-point tensor of the checkpoint is in no variable of the model."""
    held = {hashlib.blake2b(_array(variable).tobytes()).digest() for variable in model.variables}
    problem = "the model that Keras loads does not hold this tensor"
    _raise_if(
        checkpoint,
        [
            (name, problem)
            for name, tensor in checkpoint.tensors.items()
            if tensor.role == "weight"
            and _is_float(tensor)
            and hashlib.blake2b(_bytes(checkpoint, name)).digest() not in held
        ],
    )


def _raise_if(checkpoint: Checkpoint, problems: Sequence[tuple[str, str]]) -> None:
    if problems:
        path = Path(checkpoint.path.name)  # its folder is a temporary one
        raise MismatchError([Finding(path, subject, problem) for subject, problem in problems[:10]])


def _marks(checkpoint: Checkpoint, shapes: set[tuple[int, ...]]) -> dict[str, NDArray[Any]]:
    """Return values of its own for each tensor that may be a statistic: its number, digit by digit."""
    tensors = [
        tensor
        for tensor in checkpoint.tensors.values()
        if tensor.role == "weight" and tensor.shape in shapes and _is_float(tensor) and tensor.nbytes
    ]
    marks = {}
    for number, tensor in enumerate(sorted(tensors, key=lambda tensor: (tensor.nbytes, tensor.name))):
        digits = [1 + number % _BASE, 1 + number // _BASE]
        marks[tensor.name] = np.resize(np.array(digits), tensor.shape).astype(_dtype(tensor))
    return marks


def _key(values: NDArray[Any]) -> tuple[int, bytes]:
    return values.size, values.ravel()[:2].astype(np.float64).tobytes()


@contextmanager
def _marked(checkpoint: Checkpoint, marks: Mapping[str, NDArray[Any]]) -> Iterator[Checkpoint]:
    """Write a marked copy beside the checkpoint, open for a while."""
    path = local_copy(checkpoint.path).parent / "marked" / checkpoint.path.name
    path.parent.mkdir()
    values = {name: mark.tobytes() for name, mark in marks.items()}
    try:
        write_draft(path, checkpoint, overlaid(checkpoint.stream, checkpoint.tensors, values))
        with closing(open_checkpoint(path)) as marked:
            yield marked
    finally:
        rmtree(path.parent)


@contextmanager
def _restored(model: Any) -> Iterator[None]:
    """Give the variables that may have been marked their values back."""
    before = [
        (variable, np.array(_array(variable))) for variable in model.variables if len(variable.shape) == 1
    ]
    try:
        yield
    finally:
        with interrupts_held():
            for variable, value in before:
                variable.assign(value)


def _is_float(tensor: Tensor) -> bool:
    return "float" in tensor.dtype or tensor.dtype == "opaque16"


def _dtype(tensor: Tensor) -> Any:
    if tensor.dtype in ("bfloat16", "opaque16"):
        import ml_dtypes  # which Keras needs, too

        return ml_dtypes.bfloat16
    return np.dtype(tensor.dtype)


def _array(variable: Any) -> NDArray[Any]:
    return as_array(value_of(variable))


def _bytes(checkpoint: Checkpoint, name: str) -> bytes:
    tensor = checkpoint.tensors[name]
    return checkpoint.shards[tensor.shard].read(tensor.offset, tensor.nbytes)
