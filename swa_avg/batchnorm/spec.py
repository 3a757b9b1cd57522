"""What is wanted from the data, and what the model expects of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from swa_avg.errors import UnreadableError, UsageError

__all__ = ["Batch", "Shape", "Spec", "fits"]

Batch = Any
"""What the model's call takes: an array, or where there are several inputs, a mapping from their names to
arrays."""
Shape = tuple[int | None, ...]

_USUAL_KEYS = ("x", "x_train", "images")
_BATCH_SIZE = 128


class Spec:
    """What the caller wants from the data, and what the model expects."""

    def __init__(
        self,
        *,
        bind: Sequence[str] = (),
        input_names: Sequence[str] = (),
        input_shapes: Sequence[Shape | None] = (),
        batch_size: int | None = None,
        samples: int | None = None,
        seed: int = 0,
        preprocess: Callable[[Batch], Batch] | None = None,
    ) -> None:
        if samples is not None and samples < 1:
            raise UsageError(f"the number of samples must be at least 1, not {samples}")
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"the batch size must be at least 1, not {batch_size}")
        self.names = list(input_names)
        self.shapes = list(input_shapes) or [None] * max(1, len(self.names))
        fixed = next((shape[0] for shape in self.shapes if shape and shape[0]), None)
        if fixed and batch_size and fixed != batch_size:
            raise UsageError(f"the model takes batches of {fixed} only, not of {batch_size}")
        self.whole_batches = fixed is not None
        self.batch_size = fixed or batch_size or _BATCH_SIZE
        self.samples = samples
        self.seed = seed
        self.preprocess = preprocess
        self.bound = self._parse(bind)

    def _parse(self, bind: Sequence[str]) -> dict[str, str]:
        """Return input -> key from `KEY[=INPUT]`."""
        bound: dict[str, str] = {}
        for entry in bind:
            key, _, name = entry.rpartition("=") if "=" in entry else (entry, "", "")
            if not name:
                name = self.names[0] if len(self.names) == 1 else key if key in self.names else ""
            if not key or (self.names and name not in self.names) or name in bound:
                expected = ", ".join(f"{key or 'KEY'}={name}" for name in self.names)
                raise UsageError(
                    f"--bn-input {entry} names no input of the model, or one twice; use {expected}"
                )
            bound[name] = key
        return bound

    def choose(self, source: str, arrays: Mapping[str, object]) -> dict[str, str]:
        """Return input of the model ("" where it has no names) -> key.

        Raises:
            UnreadableError: a key is unknown, or it is not clear which to take; all keys are listed.
        """
        chosen = dict(self.bound)
        names = self.names or list(chosen) or [""]
        for name in names:
            if name not in chosen and name in arrays:
                chosen[name] = name
        if len(names) == 1 and names[0] not in chosen:
            usual = [key for key in _USUAL_KEYS if key in arrays] or list(arrays)
            if len(usual) == 1 or (usual and usual[0] in _USUAL_KEYS):
                chosen[names[0]] = usual[0]
        missing = [name for name in names if name not in chosen]
        unknown = [key for key in chosen.values() if key not in arrays]
        if missing or unknown:
            expected = unknown[0] if unknown else " and ".join(missing) or "one array for the model's input"
            found = ", ".join(map(str, arrays.values())) or "no numeric array"
            hint = "choose with --bn-input KEY" + ("=INPUT" if len(names) > 1 else "")
            raise UnreadableError(source, f"expected {expected or 'one array'}; found {found}", hint=hint)
        return {name: chosen[name] for name in names}

    def shape_of(self, name: str) -> Shape | None:
        return self.shapes[self.names.index(name)] if name in self.names else self.shapes[0]


def fits(shape: tuple[int, ...], expected: Shape) -> bool:
    """Tell whether Keras takes such an array: one last axis of 1 may be missing or too many, as in `fit`."""
    if len(shape) == len(expected) + 1 and shape[-1] == 1:
        shape = shape[:-1]
    elif len(shape) == len(expected) - 1 and expected[-1] == 1:
        shape = (*shape, 1)
    return len(shape) == len(expected) and all(
        size is None or size == found for size, found in zip(expected[1:], shape[1:], strict=True)
    )
