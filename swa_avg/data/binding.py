"""Which tensor of the data goes to which input of the model, and which is a target."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from swa_avg.data.rows import Rows, describe
from swa_avg.data.spec import TARGET, WEIGHT, Spec, fits
from swa_avg.data.structure import Tree, flatten, matched, named
from swa_avg.errors import UnreadableError
from swa_avg.text import counted

__all__ = ["RESHAPE", "check_rows", "described", "has_structure", "pick", "unpack", "usable"]

RESHAPE = "choose the array with {0}-input, or reshape it with {0}-preprocess"
_Picked = dict[str, tuple[str, Any]]
"""Input of the model, or target -> (key, tensor)."""


def pick(source: str, spec: Spec, element: Any, alone: str = "batches") -> tuple[_Picked, Tree | None]:
    """Return which tensors of a batch, or of arrays, are used; `alone` is what one without a name is called.

    And the structure of names in which the inputs came, where the model does not say in which it takes them.

    Raises:
        UnreadableError: there are more or fewer tensors than inputs, or it is not clear which to take.
    """
    x, rest = unpack(spec, element)
    if not spec.purpose.targets:
        return _inputs(source, spec, x, alone)
    if not rest:
        if isinstance(element, Mapping):
            return _by_key(source, element, spec.choose), None
        raise UnreadableError(source, "expected batches (x, y); found x alone")
    inputs, tree = _inputs(source, spec, x, alone)
    weights = rest[1] if len(rest) > 1 else None
    return {**inputs, **_targets(source, spec, rest[0], alone), **_weights(source, spec, weights)}, tree


def unpack(spec: Spec, element: Any) -> tuple[Any, Sequence[Any]]:
    """Return x, and y and weights where they are there, as Keras tells (x, y) from x.

    A tuple, or a list of torch's loaders, is (x,), (x, y) or (x, y, weights), unless it has the structure of
    several inputs: a single tensor cannot be their x.
    """
    if not isinstance(element, list | tuple) or not element or has_structure(spec, element):
        return element, ()
    return element[0], element[1:]


def has_structure(spec: Spec, element: Any) -> bool:
    """Tell whether something has the structure of the several inputs of a model."""
    return len(spec.names) > 1 and matched(spec.structure or spec.names, element) is not None


def _inputs(source: str, spec: Spec, x: Any, alone: str) -> tuple[_Picked, Tree | None]:
    if isinstance(x, Mapping) and _is_choice(spec, x):
        return _by_key(source, x, spec.choose_inputs), None
    if not spec.names:
        parts = flatten(x)
        if len(parts) > 1:
            return {name: (name, part) for name, part in parts.items() if part is not None}, named(x)
        (part,) = parts.values()
        return {"": (alone, part)}, None
    parts = _known(source, spec, x)
    missing = [name for name, part in parts.items() if part is None and name not in spec.optional]
    if missing:
        raise UnreadableError(source, f"expected {' and '.join(missing)}; found None")
    return {name: (name or alone, part) for name, part in parts.items() if part is not None}, None


def _is_choice(spec: Spec, x: Mapping[str, Any]) -> bool:
    """Tell whether a mapping holds tensors to choose from by name, rather than the model's structure."""
    if any(isinstance(part, Mapping | list | tuple) for part in x.values()):
        return False
    if spec.names or spec.bound:
        return True
    return len(x) == 1 or any(key in x for key in spec.purpose.keys)


def _known(source: str, spec: Spec, x: Any) -> dict[str, Any]:
    """Return input -> tensor of a model whose inputs are known: by their structure, or in order."""
    parts = matched(spec.structure or spec.names, x)
    if parts is not None:
        return parts
    leaves = list(flatten(x).values())
    if len(leaves) == len(spec.names) and not isinstance(spec.structure, Mapping):
        return dict(zip(spec.names, leaves, strict=True))
    found = str(len(leaves)) if len(leaves) != len(spec.names) else "another structure"
    hint = f"give them as {spec.structure}" if len(spec.names) > 1 and spec.structure is not None else ""
    problem = f"expected batches of {counted(len(spec.names), 'input')}; found {found}"
    raise UnreadableError(source, problem, hint=hint)


def _by_key(
    source: str, tensors: Mapping[str, Any], choose: Callable[[str, Mapping[str, object]], dict[str, str]]
) -> _Picked:
    found = {str(key): part for key, part in tensors.items() if part is not None}
    known = {key: described(key, part) for key, part in found.items()}
    return {name: (key, found[key]) for name, key in choose(source, known).items()}


def _targets(source: str, spec: Spec, y: Any, alone: str) -> _Picked:
    if isinstance(y, Mapping):
        return _by_key(source, y, spec.choose_targets)
    parts = list(y) if isinstance(y, list | tuple) else [y]
    names = spec.outputs or ([""] if len(parts) == 1 else [str(number) for number in range(len(parts))])
    if len(names) != len(parts):
        raise UnreadableError(source, f"expected batches of {len(names)} outputs; found {len(parts)}")
    return {TARGET + name: (name or alone, part) for name, part in zip(names, parts, strict=True)}


def _weights(source: str, spec: Spec, weights: Any) -> _Picked:
    """Return the sample weights: those of each output that has some, or those of all."""
    if isinstance(weights, Mapping):
        parts = {str(name): part for name, part in weights.items()}
    elif isinstance(weights, list | tuple):
        names = spec.outputs or [""] * len(weights[:1])
        if len(names) != len(weights):
            found = len(weights)
            raise UnreadableError(source, f"expected sample weights of {len(names)} outputs; found {found}")
        parts = dict(zip(names, weights, strict=True))
    else:
        parts = {"": weights}
    unknown = [name for name in parts if name and name not in spec.outputs]
    if unknown and spec.outputs:
        expected = ", ".join(spec.outputs)
        raise UnreadableError(source, f"expected sample weights of {expected}; found {', '.join(unknown)}")
    return {
        WEIGHT + name: (f"sample weights {name}".rstrip(), part)
        for name, part in parts.items()
        if part is not None
    }


def described(key: object, part: Any) -> str:
    """Return a tensor's key, type and shape, for messages."""
    shape = ", ".join(map(str, getattr(part, "shape", ())))
    return f"{key} {getattr(part, 'dtype', type(part).__name__)}[{shape}]"


def usable(spec: Spec, name: str, dtype: np.dtype[Any]) -> bool:
    """Tell whether an array holds numbers, or strings where an input takes those."""
    return (
        dtype.kind in "fiub"
        or (dtype.kind == "V" and not dtype.hasobject)
        or (dtype.kind in "OSU" and spec.takes_text(name))
    )


def check_rows(source: str, spec: Spec, rows: Mapping[str, tuple[str, Rows]]) -> None:
    """Raise UnreadableError unless arrays have rows of what the model takes."""
    for name, (key, array) in rows.items():
        if not array.shape or not array.shape[0]:
            problem = f"expected at least one row; found {describe(array.dtype, array.shape)}"
            raise UnreadableError(source, problem, tensor=key or None)
        if 0 in array.shape or not usable(spec, name, array.dtype):
            problem = f"expected numbers; found {describe(array.dtype, array.shape)}"
            raise UnreadableError(source, problem, tensor=key or None)
        expected = spec.shape_of(name)
        if spec.preprocess is None and expected is not None and not fits(array.shape, expected):
            problem = f"expected rows of shape {list(expected[1:])}; found {list(array.shape[1:])}"
            raise UnreadableError(source, problem, tensor=key or None, hint=spec.hint(RESHAPE))
