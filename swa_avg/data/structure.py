"""Nested lists, tuples and mappings of tensors, as a model's inputs are and as data come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Tree", "fill", "flatten", "matched", "named"]

Tree = Any
"""Lists, tuples and mappings in each other; everything else in it is a leaf."""


def named(tree: Tree, at: str = "") -> Tree:
    """Return the same structure, with each leaf replaced by its name: position and key, such as `1/meta`."""
    return _mapped(tree, lambda name, _: name, at)


def flatten(tree: Tree) -> dict[str, Any]:
    """Return name -> leaf; a leaf that stands alone has an empty name."""
    leaves: dict[str, Any] = {}
    _mapped(tree, leaves.__setitem__, "")
    return leaves


def fill(names: Tree, values: Mapping[str, Any]) -> Tree:
    """Return a structure of names with each replaced by its value, or by None where it has none."""
    return _mapped(names, lambda _, name: values.get(name), "")


def matched(names: Tree, tree: Tree) -> dict[str, Any] | None:
    """Return name -> leaf if a tree has the structure of `names`, else None; lists are as good as tuples."""
    if isinstance(names, Mapping):
        if not isinstance(tree, Mapping) or not set(names) <= set(tree):
            return None
        pairs = [(names[key], tree[key]) for key in names]
    elif isinstance(names, list | tuple):
        if not isinstance(tree, list | tuple) or len(tree) != len(names):
            return None
        pairs = list(zip(names, tree, strict=True))
    else:
        return None if isinstance(tree, Mapping | list | tuple) else {names: tree}
    found: dict[str, Any] = {}
    for inner, part in pairs:
        leaves = matched(inner, part)
        if leaves is None:
            return None
        found.update(leaves)
    return found


def _mapped(tree: Tree, function: Callable[[str, Any], Any], at: str) -> Tree:
    if isinstance(tree, Mapping):
        return {key: _mapped(part, function, _inside(at, key)) for key, part in tree.items()}
    if isinstance(tree, list | tuple):
        parts = [_mapped(part, function, _inside(at, number)) for number, part in enumerate(tree)]
        if hasattr(tree, "_fields"):  # a named tuple
            return type(tree)(*parts)
        return tuple(parts) if isinstance(tree, tuple) else parts
    return function(at, tree)


def _inside(at: str, key: object) -> str:
    return f"{at}/{key}" if at else str(key)
