"""Sources of training data: files, folders, functions, arrays, and anything that yields batches."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from swa_avg.data.array_files import open_arrays
from swa_avg.data.batches import ArrayData, Data, as_array
from swa_avg.data.binding import check_rows, has_structure, pick, unpack
from swa_avg.data.endings import ends, has_length
from swa_avg.data.permutation import Permutation
from swa_avg.data.rows import MemoryRows, Rows, describe
from swa_avg.data.spec import TARGET, WEIGHT, Spec
from swa_avg.data.streams import StreamData
from swa_avg.data.structure import flatten
from swa_avg.data.tfdata import open_saved
from swa_avg.data.user_functions import import_function, import_object, names_function
from swa_avg.errors import UnreadableError, UsageError

__all__ = ["open_data"]


def open_data(source: Any, spec: Spec) -> Data:
    """Open training data.

    Args:
        source: A `.npz` or `.npy` file; a folder that `tf.data.Dataset.save` wrote; `MODULE:FUNCTION`,
            called without arguments, or `MODULE:NAME` of what it would return; arrays in the structure of the
            model's inputs, alone or as (x, y) and (x, y, weights), whose rows are drawn at random; any
            iterable of batches of these, taken as it comes.
        spec: What is wanted, and what the model expects.

    Raises:
        UnreadableError: it is missing or damaged, or does not hold what the model takes.
        UsageError: the function cannot be imported.
        SystemRefusalError: there is no room to unpack a compressed array.
    """
    if isinstance(source, str) and names_function(source) and not Path(source).exists():
        made = import_object(source)
        if isinstance(made, type) or not (isinstance(made, Iterable) or hasattr(made, "__getitem__")):
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
    if _is_arrays(made, spec):
        return _from_arrays(made, source, spec)
    if has_length(made) and hasattr(made, "__getitem__") and not isinstance(made, list | tuple):
        return StreamData(source, spec, _Indexed(made, spec))
    if not isinstance(made, Iterable) and not hasattr(made, "__getitem__"):
        found = type(made).__name__
        raise UnreadableError(source, f"expected arrays or an iterable of batches; found {found}")
    ending = True if spec.samples is not None else ends(made)
    if not ending:
        problem = "has no length, and may never end" if ending is None else "never ends"
        raise UsageError(
            f"{source} {problem}; say how many samples to use"
            + (spec.hint(" with {}-samples") or " (samples, or bn_samples of SWA)")
        )
    known_length = has_length(made) or spec.samples is not None
    return StreamData(source, spec, made, of_known_length=known_length)


def _is_arrays(made: Any, spec: Spec) -> bool:
    """Tell whether something is arrays, to be drawn from by rows, rather than batches.

    A tuple is (x,), (x, y) or (x, y, weights); a list is several inputs where it has their structure.
    """
    if isinstance(made, list) and not has_structure(spec, made):
        return False
    x, rest = unpack(spec, made)
    return all(
        part is None or (hasattr(part, "shape") and hasattr(part, "__array__"))
        for part in (*flatten(x).values(), *flatten(list(rest)).values())
    )


def _from_arrays(made: Any, source: str, spec: Spec) -> Data:
    picked, tree = pick(source, spec, made)
    x, rest = unpack(spec, made)
    keys = {name: key for name, (key, _) in picked.items()}
    if not isinstance(x, Mapping | list | tuple):  # a single array has no name of its own
        alone = "x" if spec.purpose.targets else "array"
        keys |= {name: alone for name in keys if name[:1] != TARGET}
    if rest and not isinstance(rest[0], Mapping | list | tuple):
        keys |= {name: "y" for name in keys if name[:1] == TARGET and name[:2] != WEIGHT}
    rows: dict[str, Rows] = {name: MemoryRows(as_array(values)) for name, (_, values) in picked.items()}
    check_rows(source, spec, {name: (keys[name], array) for name, array in rows.items()})
    data = ArrayData(source, spec, rows, keys)
    data.structure = tree or data.structure
    if isinstance(x, Mapping) and tree is None:
        others = {str(key): as_array(part) for key, part in x.items() if str(key) not in keys.values()}
        data.ignored = tuple(f"{key} {describe(part.dtype, part.shape)}" for key, part in others.items())
    return data


class _Indexed:
    """Batches by number, such as a PyDataset, in the order that the purpose asks for."""

    def __init__(self, batches: Any, spec: Spec) -> None:
        self._batches, self._spec = batches, spec

    def __iter__(self) -> Iterator[Any]:
        count = len(self._batches)
        shuffled = self._spec.purpose.shuffled
        for number in Permutation(count, self._spec.seed)(0, count) if shuffled else range(count):
            yield self._batches[int(number)]
