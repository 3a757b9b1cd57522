"""Sources of training data: files, folders, functions, arrays, and anything that yields batches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from swa_avg.data.array_files import open_arrays
from swa_avg.data.batches import ArrayData, Data, StreamData, as_array, check_rows
from swa_avg.data.permutation import Permutation
from swa_avg.data.rows import MemoryRows, Rows, describe
from swa_avg.data.spec import Spec
from swa_avg.data.tfdata import open_saved
from swa_avg.data.user_functions import import_function, names_function
from swa_avg.errors import UnreadableError, UsageError

__all__ = ["open_data"]

_PARTS = ("x", "y", "weights")


def open_data(source: Any, spec: Spec) -> Data:
    """Open training data.

    Args:
        source: A `.npz` or `.npy` file; a folder that `tf.data.Dataset.save` wrote; `MODULE:FUNCTION`,
            called without arguments; an array or a mapping of arrays, whose rows are drawn at random; any
            iterable of batches x, (x, y), (x, y, weights) or mappings, taken as it comes.
        spec: What is wanted, and what the model expects.

    Raises:
        UnreadableError: it is missing or damaged, or does not hold what the model takes.
        UsageError: the function cannot be imported.
        SystemRefusalError: there is no room to unpack a compressed array.
    """
    if isinstance(source, str) and names_function(source) and not Path(source).exists():
        made = import_function(source)()
        return _from_object(made, source, spec)
    if isinstance(source, str | Path):
        path = Path(source)
        if os.path.isdir(path):  # noqa: PTH112 (which takes any name)
            return open_saved(path, spec)
        return _from_file(path, spec)
    return _from_object(source, "data", spec)


def _from_file(path: Path, spec: Spec) -> Data:
    with ExitStack() as stack:
        file = stack.enter_context(closing(open_arrays(path)))
        chosen = _chosen(str(path), spec, file.arrays)
        whole = spec.samples is None
        rows = {name: file.arrays[key].open(whole) for name, key in chosen.items()}
        check_rows(str(path), spec, {name: (chosen[name], array) for name, array in rows.items()})
        data = ArrayData(str(path), spec, rows, chosen)
        data.check_source = file.check_unchanged
        data.stack = stack.pop_all()
    taken = set(chosen.values())
    others = [str(array) for key, array in file.arrays.items() if key not in taken]
    data.ignored = (*others, *file.others)
    return data


def _chosen(source: str, spec: Spec, arrays: Mapping[str, object]) -> dict[str, str]:
    if list(arrays) == [""]:  # a .npy, whose array has no name
        if len(spec.names) > 1:
            raise UnreadableError(
                source,
                f"expected arrays for {', '.join(spec.names)}; found a single one (.npy)",
                hint="use .npz",
            )
        if spec.bound and "" not in spec.bound.values():
            raise UnreadableError(
                source, f"expected {next(iter(spec.bound.values()))}; found one unnamed array"
            )
        if spec.purpose.targets:
            problem = "expected inputs and targets; found a single array (.npy)"
            raise UnreadableError(source, problem, hint="use .npz")
        return {(spec.names or [""])[0]: ""}
    return spec.choose(source, arrays)


def _from_object(made: Any, source: str, spec: Spec) -> Data:
    if isinstance(made, tuple) and made and all(hasattr(part, "shape") or part is None for part in made):
        made = dict(zip(_PARTS, made, strict=False)) if spec.purpose.targets else made[0]
    if hasattr(made, "shape") and hasattr(made, "__array__"):
        made = {"array": made}
    if isinstance(made, Mapping):
        arrays: dict[str, Rows] = {str(key): MemoryRows(as_array(values)) for key, values in made.items()}
        shown = {key: f"{key} {describe(rows.dtype, rows.shape)}" for key, rows in arrays.items()}
        chosen = spec.choose(source, shown)
        rows = {name: arrays[key] for name, key in chosen.items()}
        check_rows(source, spec, {name: (chosen[name], array) for name, array in rows.items()})
        data = ArrayData(source, spec, rows, chosen)
        data.ignored = tuple(text for key, text in shown.items() if key not in chosen.values())
        return data
    if not hasattr(made, "__iter__") and hasattr(made, "__getitem__") and hasattr(made, "__len__"):
        return StreamData(source, spec, _Indexed(made, spec))
    if not isinstance(made, Iterable):
        found = type(made).__name__
        raise UnreadableError(source, f"expected arrays or an iterable of batches; found {found}")
    if spec.samples is None and _endless(made):
        raise UsageError(f"{source} never ends; say how many samples to use" + spec.hint(" with {}-samples"))
    return StreamData(source, spec, made)


class _Indexed:
    """Batches by number, such as a PyDataset, in the order that the purpose asks for."""

    def __init__(self, batches: Any, spec: Spec) -> None:
        self._batches, self._spec = batches, spec

    def __iter__(self) -> Iterator[Any]:
        count = len(self._batches)
        shuffled = self._spec.purpose.shuffled
        for number in Permutation(count, self._spec.seed)(0, count) if shuffled else range(count):
            yield self._batches[int(number)]


def _endless(batches: Any) -> bool:
    cardinality = getattr(batches, "cardinality", None)
    return callable(cardinality) and int(cardinality()) == -1
