"""What a live model takes: the names, shapes and structure of its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from swa_avg.batchnorm.request import Refresh
from swa_avg.data.spec import TRAINING, Purpose, Spec
from swa_avg.data.structure import fill, flatten, named
from swa_avg.data.user_functions import import_function

__all__ = ["inputs_of", "spec_of"]


def spec_of(model: Any, refresh: Refresh, purpose: Purpose = TRAINING) -> Spec:
    """Return what a refresh wants from its data, and what the model expects of them."""
    bind = refresh.inputs
    preprocess = refresh.preprocess
    inputs = inputs_of(model)
    if preprocess is not None and _symbolic(model) is None:
        inputs = {"text": None}  # the function makes what the model takes, of whatever it wants
    return Spec(
        **inputs,
        bind=[f"{key}={name}" for key, name in bind.items()] if isinstance(bind, Mapping) else bind,
        batch_size=refresh.batch_size,
        samples=refresh.samples,
        seed=refresh.seed,
        preprocess=import_function(preprocess) if isinstance(preprocess, str) else preprocess,
        purpose=purpose,
    )


def inputs_of(model: Any) -> dict[str, Any]:
    """Return what a `Spec` says of a model's inputs.

    Of a subclassed model, their shapes are not known, and their number only where Keras noted with which
    shapes it was built.
    """
    structure = _symbolic(model)
    if structure is None:
        return _built(model)
    tensors = flatten(structure)
    if isinstance(structure, Mapping) and set(tensors) == set(structure):
        names = {name: name for name in tensors}  # the keys, which need not be the tensors' names
    else:
        names = {name: tensor.name for name, tensor in tensors.items()}
    return {
        "input_names": list(names.values()),
        "input_shapes": [tuple(tensor.shape) for tensor in tensors.values()],
        "structure": fill(named(structure), names),
        "optional": [names[name] for name, tensor in tensors.items() if _is_optional(tensor)],
        "text": [names[name] for name, tensor in tensors.items() if str(tensor.dtype) == "string"],
    }


def _symbolic(model: Any) -> Any:
    """Return the symbolic tensors that a model was built of, in their structure; None of a subclassed one."""
    try:
        structure = getattr(model, "_inputs_struct", None)
        if structure is not None:
            return structure
        tensors = list(model.inputs or [])
    except (AttributeError, ValueError):
        return None
    return tensors[0] if len(tensors) == 1 else tensors or None


def _built(model: Any) -> dict[str, Any]:
    config = getattr(model, "get_build_config", lambda: None)() or {}
    shapes = config.get("input_shape")
    if shapes is None or (not isinstance(shapes, Mapping) and _is_shape(shapes)):
        return {"text": None}
    structure = named(_without_shapes(shapes))
    names = list(flatten(structure).values())
    if len(names) < 2:
        return {"text": None}
    return {"input_names": names, "input_shapes": [None] * len(names), "structure": structure, "text": None}


def _without_shapes(shapes: Any) -> Any:
    if isinstance(shapes, Mapping):
        return {key: _without_shapes(part) for key, part in shapes.items()}
    if isinstance(shapes, list | tuple) and not _is_shape(shapes):
        return [_without_shapes(part) for part in shapes]
    return None


def _is_shape(shapes: Any) -> bool:
    return all(size is None or isinstance(size, int) for size in shapes)


def _is_optional(tensor: Any) -> bool:
    history = getattr(tensor, "_keras_history", None)
    return bool(history and getattr(history[0], "optional", False))
