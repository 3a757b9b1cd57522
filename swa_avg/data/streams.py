"""Batches that somebody else makes, in their order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from numpy.typing import NDArray

from swa_avg.data.batches import NO_ROWS, Data, RowDigests, as_array, title
from swa_avg.data.binding import described, pick, unpack
from swa_avg.data.ragged import RaggedBatch, is_ragged
from swa_avg.data.spec import Spec
from swa_avg.data.user_functions import describe_error, names_function
from swa_avg.errors import SwaAvgError, UnreadableError, UsageError

__all__ = ["StreamData"]

Array = NDArray[Any]
_REMEMBERED = 8  # batches


class StreamData(Data):
    """Batches as somebody else makes them, in their order."""

    def __init__(
        self, source: str, spec: Spec, batches: Iterable[Any], *, of_known_length: bool = True
    ) -> None:
        super().__init__(source, spec)
        self._source = batches
        self.batch_size = None
        self._repeats = None if of_known_length else _Repeats()

    def count(self, rows: int, digests: RowDigests) -> None:
        super().count(rows, digests)
        if self._repeats is not None and self._repeats.found(digests, rows):
            raise UsageError(
                f"{self.source} begins again after {self._repeats.period} samples, and so never ends; "
                f"say how many samples to use{self.spec.hint(' with {}-samples')}"
            )

    def _batches(self) -> Iterator[tuple[dict[str, Array], Array | None]]:
        left = self.spec.samples
        for picked in self.raw():
            batch = {name: values for name, (_, values) in picked.items()}
            if left is not None:
                batch = {name: values[:left] for name, values in batch.items()}
                left -= len(next(iter(batch.values())))
            yield batch, None
            if left == 0:
                return

    def check(self) -> None:
        if iter(self._source) is iter(self._source):
            return  # the only one, which a look would move on
        first = next(self._batches(), None)
        if first is None:
            raise UnreadableError(self.source, NO_ROWS)
        self._prepared(*first)

    def raw(self) -> Iterator[dict[str, tuple[str, Array]]]:
        """Yield input of the model -> (key, array) of each batch, whole and unchecked."""
        for element in self._elements():
            if isinstance(element, tuple | list) and not element:
                raise UnreadableError(self.source, "expected batches; found an empty tuple")
            parts, tree = pick(self.source, self.spec, element)
            self.structure = tree or self.structure
            picked = {name: (key, _as_batch(part)) for name, (key, part) in parts.items()}
            for key, values in picked.values():
                if values.ndim == 0:
                    raise UnreadableError(
                        self.source, "expected an array of rows; found a single value", tensor=key or None
                    )
            if not self.used:
                self._describe(unpack(self.spec, element)[0], picked)
            yield picked

    def _elements(self) -> Iterator[Any]:
        """Yield the batches.

        What the batches of a named function raise becomes an error that names it; what a caller's own raise
        is the caller's, except for the system's errors, which would be taken for the output's.
        """
        elements: Iterator[Any] | None = None
        while True:
            try:
                elements = iter(self._source) if elements is None else elements
                element = next(elements)
            except StopIteration:
                return
            except SwaAvgError:
                raise
            except Exception as error:
                if not isinstance(error, OSError) and not names_function(self.source):
                    raise
                raise UnreadableError(self.source, f"no batch came ({describe_error(error)})") from error
            yield element

    def _describe(self, features: Any, picked: Mapping[str, tuple[str, Array]]) -> None:
        for name, (key, values) in picked.items():
            shown = ", ".join(["batch", *map(str, values.shape[1:])])
            self.used[f"{key} {values.dtype}[{shown}]"] = title(name)
            self._keys[name] = key
        if isinstance(features, Mapping):
            taken = set(self._keys.values())
            self.ignored = tuple(described(key, part) for key, part in features.items() if key not in taken)


class _Repeats:
    """Notices that batches are the first ones again."""

    def __init__(self) -> None:
        self._first: list[RowDigests] = []
        self._same = 0
        self._samples = 0
        self.period = 0
        """Samples before the repetition."""

    def found(self, batch: RowDigests, rows: int) -> bool:
        """Take note of a batch, and tell whether as many as are remembered came a second time, in order."""
        if len(self._first) < _REMEMBERED:
            self._first.append(batch)
        else:
            if batch != self._first[self._same]:
                self._same = 0
            if batch == self._first[self._same] and any(other != batch for other in self._first):
                self.period = self.period if self._same else self._samples
                self._same += 1
        self._samples += rows
        return self._same == _REMEMBERED


def _as_batch(part: Any) -> Any:
    return RaggedBatch.of(part) if is_ragged(part) else as_array(part)
