"""Two configurations of a model compared by what they mean for its weights. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["config_differences", "stem"]

_AUTO_NUMBERED = re.compile(r"(.+?)(_\d+)?$", re.DOTALL)

# Shapes, which are compared tensor by tensor; an address in the memory of the process that saved; and what
# only training asks for: which weights it changes, from where they start, what they cost, and chance.
_NOT_COMPARED = re.compile(
    r"build_config|shared_object_id|trainable|(\w+_)?seed|seed_generator"
    r"|\w*(initializer|regularizer|constraint)|(\w+_)?dropout(_rate)?"
)
_OF_CLASS = {"rate": re.compile(r"\w*Dropout\w*"), "stddev": re.compile(r"GaussianNoise")}
"""Keys that only training asks for in layers of some classes."""
_WRAPPERS = ("module", "registered_name")
_DEFAULTS = {
    "alpha": 1.0,
    "autocast": True,
    "data_format": "channels_last",
    "oov_method": "floormod",
    "renorm_momentum": 0.99,
    "value_range": [0, 255],
}
"""Keys that some version of Keras added, with the value that they have where nobody gives one, other than
None, False or empty. Taken from the configurations that Keras 3.3 to 3.15 gives its own layers."""
_EXACT = ("class_name", "registered_name", "module", "dtype")


def config_differences(expected: Any, found: Any) -> Iterator[tuple[str, str, str]]:
    """Yield (path, expected, found) for each difference between two model configurations.

    Compile settings the caller has removed. Left out are: what changes no weight's meaning (see
    `_NOT_COMPARED`, and the model's own name); keys that one of the two lacks, if the other gives them their
    default, and masks, which Keras hands on by itself; where a class comes from, if only one of the two says
    it (Keras 2 stops saying so of nested layers once it has saved an .h5 in the same process) or it is Keras
    itself; how a function, a type policy or a single input is written down; and the numbers that Keras
    appends to names by itself, where they are exchanged consistently: the same code run twice in one process
    gives `conv2d` and then `conv2d_1`.
    """
    if expected is found:
        return
    names = _Names()
    pending = [("config", "", expected, found, False)]
    while pending:
        path, owner, one, other, is_name = pending.pop()
        one, other = _plain(one), _plain(other)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            owner = str(one.get("class_name", owner))
            for key in sorted(one.keys() | other.keys(), reverse=True):
                if _is_compared(key, owner, one, other) and f"{path}.{key}" != "config.config.name":
                    values = one.get(key, _ABSENT), other.get(key, _ABSENT)
                    pending.append((f"{path}.{key}", owner, *values, key == "name"))
        elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
            named = _is_reference(one)
            pending.extend(
                (f"{path}[{index}]", owner, a, b, named and index == 0)
                for index, (a, b) in reversed(list(enumerate(zip(one, other, strict=True))))
            )
        elif isinstance(one, str) and isinstance(other, str) and not path.endswith(_EXACT):
            if not names.agree(one, other, is_name):
                yield path, _short(one), _short(other)
        elif not _equal(one, other):
            yield path, _short(one), _short(other)


class _Names:
    """The names that are exchanged for one another: each for one, everywhere."""

    def __init__(self) -> None:
        self._renamed: dict[str, str] = {}
        self._original: dict[str, str] = {}

    def agree(self, one: str, other: str, is_name: bool) -> bool:
        """Tell whether two texts say the same; what is no name, such as `relu`, may also be a layer's."""
        if one == other and not is_name:
            return True
        same = self._renamed.setdefault(one, other) == other and self._original.setdefault(other, one) == one
        return same and stem(one) == stem(other)


def _is_compared(key: str, owner: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if _NOT_COMPARED.fullmatch(key) or (key in _OF_CLASS and _OF_CLASS[key].fullmatch(owner)):
        return False
    if key in one and key in other:
        return not (key in _WRAPPERS and _is_keras(one[key]) and _is_keras(other[key]))
    if key in _WRAPPERS:
        return False
    value = one.get(key, other.get(key))
    is_empty = value is None or value is False or (not isinstance(value, int | float) and not value)
    return not is_empty and value != _DEFAULTS.get(key) and not key.endswith("mask")


def _is_keras(origin: Any) -> bool:
    """Tell whether a module or registered name is of Keras itself, whose modules move between versions."""
    return origin is None or str(origin).split(".")[0].split(">")[0] in ("keras", "tf_keras", "builtins")


def _is_reference(value: Any) -> bool:
    """Tell whether a list names a layer's output: name, node and tensor."""
    return (
        isinstance(value, list)
        and len(value) in (3, 4)
        and isinstance(value[0], str)
        and all(type(place) is int for place in value[1:3])
    )


def _plain(value: Any) -> Any:
    """Return a function or a type policy that is written down as an object as its name, and one input of a
    list as itself."""
    if isinstance(value, Mapping) and isinstance(value.get("class_name"), str):
        kind, config = value["class_name"], value.get("config")
        if kind == "function" and isinstance(config, str):
            return config
        if kind in ("DTypePolicy", "Policy", "FloatDTypePolicy") and isinstance(config, Mapping):
            return config.get("name", value)
    if isinstance(value, list) and len(value) == 1 and _is_reference(value[0]):
        return value[0]
    return value


def _equal(one: Any, other: Any) -> bool:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (one, other))
    return (numbers or type(one) is type(other)) and one == other


def stem(name: str) -> str:
    """Return a name without the number that Keras appends by itself."""
    match = _AUTO_NUMBERED.match(name)
    return match.group(1) if match else name


class _Absent:
    def __repr__(self) -> str:
        return "nothing"


_ABSENT = _Absent()


def _short(value: Any) -> str:
    text = f"{len(value)} entries" if isinstance(value, list | Mapping) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
