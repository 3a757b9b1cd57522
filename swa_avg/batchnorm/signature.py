"""What a live model takes: the names, shapes and structure of its inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from swa_avg.batchnorm.request import Refresh
from swa_avg.data.spec import TRAINING, Purpose, Shape, Spec
from swa_avg.data.user_functions import import_function

__all__ = ["arranger", "inputs_of", "spec_of"]


def spec_of(model: Any, refresh: Refresh, purpose: Purpose = TRAINING) -> Spec:
    """Return what a refresh wants from its data, and what the model expects of them."""
    names, shapes = inputs_of(model)
    bind = refresh.inputs
    preprocess = refresh.preprocess
    return Spec(
        bind=[f"{key}={name}" for key, name in bind.items()] if isinstance(bind, Mapping) else bind,
        input_names=names,
        input_shapes=shapes,
        batch_size=refresh.batch_size,
        samples=refresh.samples,
        seed=refresh.seed,
        preprocess=import_function(preprocess) if isinstance(preprocess, str) else preprocess,
        purpose=purpose,
    )


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
