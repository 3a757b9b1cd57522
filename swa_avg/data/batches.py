"""Batches of what the model takes, and rows of arrays in a seeded order."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from swa_avg.data.binding import RESHAPE, usable
from swa_avg.data.permutation import Permutation
from swa_avg.data.ragged import RaggedBatch
from swa_avg.data.rows import Rows, describe
from swa_avg.data.spec import TARGET, WEIGHT, Batch, Spec, fits
from swa_avg.data.structure import Tree, fill
from swa_avg.errors import UnreadableError

__all__ = ["NO_ROWS", "ArrayData", "Data", "RowDigests", "as_array", "title"]

Array = NDArray[Any]
RowDigests = dict[str, tuple[str, bytes]]
"""Of each input: type and shape of a row, in words, and the BLAKE2b-256 of each row, one after the other."""
NO_ROWS = "expected at least one row; found none"


class Data(ABC):
    """Batches to run the model on; iterated once."""

    def __init__(self, source: str, spec: Spec) -> None:
        self.source = source
        self.spec = spec
        self.used: dict[str, str] = {}
        """Array, with type and shape -> input of the model, in words."""
        self._keys: dict[str, str] = {}
        self.structure: Tree = spec.structure
        """Names of inputs in the structure in which the model takes them; None where it takes a mapping, or a
        single tensor."""
        """Input -> array."""
        self.ignored: tuple[str, ...] = ()
        self.notes: list[str] = []
        self.total: int | None = spec.samples
        """Rows that will come, where that is known."""
        self.batch_size: int | None = spec.batch_size
        self.samples = 0
        """Rows that have come."""
        self._digests: dict[str, Any] = {}

    @abstractmethod
    def _batches(self) -> Iterator[tuple[dict[str, Array], Array | None]]:
        """Yield raw batches by input, and which rows they are where rows have numbers."""

    @abstractmethod
    def check(self) -> None:
        """Raise what iterating would, as far as a look can tell that leaves all batches there."""

    def __iter__(self) -> Iterator[tuple[Batch, int]]:
        """Yield (batch, rows in it); errors as for `labelled`."""
        for batch, _, _, rows in self.labelled():
            yield batch, rows

    def labelled(self) -> Iterator[tuple[Batch, Batch, Batch, int]]:
        """Yield (batch, its targets, their sample weights, rows in it); what is not there, or not wanted, is
        None.

        Raises:
            UnreadableError: NaN or infinity, another shape than the model's, or no rows.
        """
        for raw, numbers in self._batches():
            batch, targets, weights, rows = self._prepared(raw, numbers)
            self.count(rows, row_digests(raw))
            yield batch, targets, weights, rows
        if not self.samples:
            raise UnreadableError(self.source, NO_ROWS)

    def _prepared(self, raw: dict[str, Array], numbers: Array | None) -> tuple[Batch, Batch, Batch, int]:
        """Check a raw batch, and make it what the model and its loss take; returns as `labelled` yields."""
        rows = self._check(raw, numbers)
        inputs = {name: getattr(part, "tensor", part) for name, part in raw.items() if name[:1] != TARGET}
        weights = {name[2:]: values for name, values in raw.items() if name[:2] == WEIGHT}
        targets = _alone({n[1:]: values for n, values in raw.items() if n[:1] == TARGET and n[:2] != WEIGHT})
        batch = _alone(inputs) if self.spec.names or self.structure is None else fill(self.structure, inputs)
        if self.spec.preprocess is not None:
            batch = self.spec.preprocess(batch)
        if self.spec.names or self.structure is None:
            self._check_shapes(batch)
            batch = self._arranged(batch)
        return batch, targets, weights.get("", weights or None), rows

    def _arranged(self, batch: Batch) -> Batch:
        """Put arrays by name, or the only one, into the structure of the model's inputs."""
        if self.structure is None or isinstance(batch, list | tuple):
            return batch
        if not isinstance(batch, Mapping):
            return fill(self.structure, dict.fromkeys(self.spec.names[:1] or [""], batch))
        return fill(self.structure, batch)

    def count(self, rows: int, digests: RowDigests) -> None:
        """Take note of rows that have been used, here or elsewhere."""
        self.samples += rows
        for name, (kind, each) in digests.items():
            start = hashlib.blake2b(kind.encode(), digest_size=32)
            self._digests.setdefault(name, start).update(each)

    def _check(self, raw: dict[str, Array], numbers: Array | None) -> int:
        sizes = {name: len(values) if np.ndim(values) else 0 for name, values in raw.items()}
        if len(set(sizes.values())) != 1:
            raise UnreadableError(self.source, f"expected equal numbers of rows; found {sizes}")
        for name, values in raw.items():
            if not usable(self.spec, name, values.dtype):
                raise UnreadableError(
                    self.source, f"expected numbers; found {values.dtype}", tensor=name or None
                )
            bad = _row_not_finite(values)
            if bad is not None:
                row = int(numbers[bad]) if numbers is not None else self.samples + bad
                key = self._keys.get(name, name)
                problem = f"expected finite numbers; found NaN or infinity in row {row}"
                raise UnreadableError(self.source, problem, tensor=key or None)
        return next(iter(sizes.values()))

    def _check_shapes(self, batch: Batch) -> None:
        alone = next(iter(self._keys), "")
        entries = batch.items() if isinstance(batch, Mapping) else [(alone, batch)]
        for name, values in entries:
            expected = self.spec.shape_of(name)
            shape = getattr(values, "shape", ())
            if expected is not None and not fits(tuple(shape), expected):
                key = self._keys.get(name, name)
                problem = f"expected rows of shape {list(expected[1:])}; found {list(shape[1:])}"
                hint = self.spec.hint(RESHAPE)
                if fits((1, *shape), expected):
                    hint = "these are single rows: put them together, as dataset.batch(32) does"
                raise UnreadableError(self.source, problem, tensor=key or None, hint=hint)

    @property
    def digest(self) -> str:
        """BLAKE2b-256 of the rows used so far, in their order, whatever the batches: of types, shapes and the
        BLAKE2b-256 of each row."""
        whole = hashlib.blake2b(digest_size=32)
        for name in sorted(self._digests):
            whole.update(f"{name}\0".encode() + self._digests[name].digest())
        return whole.hexdigest()

    def close(self) -> None:  # noqa: B027  (most data have nothing to close)
        """Close what was opened."""

    def __enter__(self) -> Data:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ArrayData(Data):
    """Rows of arrays, in files or in memory, in a seeded random order."""

    def __init__(
        self,
        source: str,
        spec: Spec,
        rows: Mapping[str, Rows],
        keys: Mapping[str, str],
    ) -> None:
        super().__init__(source, spec)
        self._rows = rows
        self.stack = ExitStack()
        """What to close at the end."""
        self.check_source: Callable[[], None] = lambda: None
        """Raises if the source has changed since it was opened."""
        for name, array in rows.items():
            shown = f"{keys[name] or Path(source).name} {describe(array.dtype, array.shape)}"
            self.used[shown] = title(name)
            self._keys[name] = keys[name]
        counts = {array.shape[0] for array in rows.values()}
        if len(counts) != 1:
            found = ", ".join(f"{keys[name]} {array.shape[0]}" for name, array in rows.items())
            raise UnreadableError(source, f"expected arrays of one length; found {found}")
        self._count = counts.pop()
        self._order = Permutation(self._count, spec.seed) if spec.purpose.shuffled else np.arange
        self.total = min(self._count, spec.samples or self._count)
        if spec.whole_batches:
            rest = self.total % spec.batch_size
            self.total -= rest
            if not self.total:
                problem = f"the model takes batches of {spec.batch_size} rows only; found {rest} rows"
                raise UnreadableError(source, problem)
            if rest:
                self.notes.append(
                    f"left out {rest} rows, since the model takes batches of {spec.batch_size} only"
                )

    def _batches(self) -> Iterator[tuple[dict[str, Array], Array | None]]:
        assert self.total is not None
        yield from _ahead(self._read, range(self.batches))
        self.check_source()

    def check(self) -> None:
        for raw, numbers in self._batches():
            self._prepared(raw, numbers)

    @property
    def batches(self) -> int:
        """How many batches there are."""
        assert self.total is not None
        return -(-self.total // self.spec.batch_size)

    def batch(self, number: int) -> tuple[Batch, int, RowDigests]:
        """Return one batch, the rows in it and their digests; errors as for `labelled`."""
        raw, numbers = self._read(number)
        batch, _, _, rows = self._prepared(raw, numbers)
        return batch, rows, row_digests(raw)

    def _read(self, number: int) -> tuple[dict[str, Array], Array | None]:
        assert self.total is not None
        start = number * self.spec.batch_size
        numbers = self._order(start, min(start + self.spec.batch_size, self.total))
        return {name: rows.take(numbers) for name, rows in self._rows.items()}, numbers

    def close(self) -> None:
        self.stack.close()


def row_digests(raw: Mapping[str, Array]) -> RowDigests:
    """Return the digests of a raw batch's rows: they can be computed anywhere, and put together in order."""
    digests = {}
    for name, values in raw.items():
        each = b"".join(hashlib.blake2b(row, digest_size=32).digest() for row in _row_bytes(values))
        digests[name] = str((values.dtype.str, values.shape[1:])), each
    return digests


def _row_bytes(values: Array) -> Iterable[Any]:
    if isinstance(values, RaggedBatch):
        return values.row_bytes()
    if values.dtype.hasobject:  # strings of any length
        return (repr(row.tolist() if isinstance(row, np.ndarray) else row).encode() for row in values)
    if not len(values):
        return ()
    return (row.data for row in np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8))


def _row_not_finite(values: Array | RaggedBatch) -> int | None:
    """Return the first row that holds NaN or infinity."""
    if values.dtype.kind != "f":
        return None
    if isinstance(values, RaggedBatch):
        return next((number for number, row in enumerate(values) if not np.isfinite(row).all()), None)
    finite = np.isfinite(values)
    return None if finite.all() else int(np.flatnonzero(~finite.reshape(len(values), -1).all(axis=1))[0])


def _alone(parts: dict[str, Array]) -> Batch:
    return parts if len(parts) > 1 else next(iter(parts.values()), None)


def title(name: str) -> str:
    """Return what an input or a target is called in reports."""
    if name.startswith(WEIGHT):
        return f"the sample weights {name[2:]}".rstrip()
    if name.startswith(TARGET):
        return f"the target {name[1:]}".rstrip()
    return name or "the input"


def as_array(values: Any) -> Array:
    """Return a tensor of any framework as an array; bfloat16 of torch, which NumPy lacks, as float32."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if str(values.dtype) == "torch.bfloat16" else values
    return np.asarray(values)


def _ahead(read: Callable[[Any], Any], spans: Sequence[Any]) -> Iterator[Any]:
    """Read one batch ahead on another thread."""
    with ThreadPoolExecutor(1) as executor:
        coming: Future[Any] | None = None
        for span in [*spans, None]:
            following = executor.submit(read, span) if span is not None else None
            if coming is not None:
                yield coming.result()
            coming = following
