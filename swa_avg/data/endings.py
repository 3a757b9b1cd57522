"""Whether batches that somebody else makes end, as far as that can be told without reading them."""

from __future__ import annotations

import dis
import inspect
import itertools
import operator
import types
from typing import Any

__all__ = ["ends", "has_length"]

_INFINITE = -1  # as a dataset's cardinality
_BUILTIN = (types.GeneratorType, map, filter, zip, enumerate, reversed, itertools.chain, itertools.islice)


def ends(batches: Any) -> bool | None:
    """Tell whether batches end; None where that is not known, as of an iterator in a class of its own.

    What has a length ends. A generator is taken to end if its code can return: one that loops for ever has
    no place that does. Of a dataset of TensorFlow, the cardinality tells, or what it is made of: files end.
    A Keras dataset without a length counts as infinite, there too.
    """
    if has_length(batches):
        return True
    if callable(getattr(batches, "cardinality", None)):
        return _dataset_ends(batches)
    if hasattr(batches, "__getitem__") or isinstance(batches, itertools.cycle | itertools.count):
        return False
    if isinstance(batches, types.GeneratorType):
        return _returns(batches.gi_code)
    if isinstance(batches, _BUILTIN) or operator.length_hint(batches, -1) >= 0:
        return True
    function = getattr(type(batches), "__iter__", None)
    return _returns(function.__code__) if inspect.isgeneratorfunction(function) else None


def has_length(batches: Any) -> bool:
    """Tell whether batches can be counted beforehand."""
    try:
        len(batches)
    except (TypeError, NotImplementedError):
        return False
    return True


def _returns(code: types.CodeType) -> bool:
    return any(
        operation.opname.startswith("RETURN_") and operation.opname != "RETURN_GENERATOR"
        for operation in dis.get_instructions(code)
    )


def _dataset_ends(dataset: Any) -> bool | None:
    """Tell whether a dataset of TensorFlow ends, whose cardinality may be unknown, by what it is made of."""
    cardinality = int(dataset.cardinality())
    if cardinality >= 0 or type(dataset).__name__ == "_TakeDataset":
        return True
    if cardinality == _INFINITE:
        return False
    if not hasattr(dataset, "_inputs"):
        return None
    parts = [_dataset_ends(part) for part in dataset._inputs()]
    if type(dataset).__name__ in ("_ZipDataset", "_TakeWhileDataset"):  # they may end before their parts
        return True if True in parts else None
    parts += [_generator_ends(wrapper) for wrapper in dataset._functions() if _makes_a_generator(wrapper)]
    return False if False in parts else None if None in parts else True


def _makes_a_generator(wrapper: Any) -> bool:
    """Tell whether a function of a dataset calls a generator of Python's, as `from_generator` does."""
    graph = wrapper.function.graph.as_graph_def()
    nodes = itertools.chain(graph.node, *(function.node_def for function in graph.library.function))
    return any(node.op == "GeneratorDataset" for node in nodes)


def _generator_ends(wrapper: Any) -> bool | None:
    """Tell whether what was given to `from_generator` makes ends; None where it is not found.

    Only the functions that TensorFlow made of it refer to it.
    """
    found = wrapper._func
    for name in ("get_iterator_id_fn", "generator_state"):
        found = inspect.getclosurevars(found).nonlocals.get(name) if inspect.isfunction(found) else None
    make = getattr(found, "_generator", None)
    return None if make is None else ends(make())
