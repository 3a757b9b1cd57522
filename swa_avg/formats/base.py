"""A checkpoint as a map of named extents, and what a format has to provide.

A format is one module and one entry in the table in `formats/__init__.py`. The module holds

- a `Format`: how its files are recognized, and the function that opens one;
- a subclass of `Checkpoint`, whose fields say what is stored where. It implements `write` and
  `without_optimizer`; of the rest it overrides what does not hold for it.

Nothing outside this package asks which subclass it has at hand. A checkpoint of several files is named,
opened and written by the one file that lists the others, which is published last, or by its folder.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Protocol

from isal.isal_zlib import crc32

from swa_avg.errors import Finding, UnreadableError
from swa_avg.files.location import Location
from swa_avg.files.region import Region

__all__ = [
    "RECORD_NAME",
    "Buffer",
    "Checkpoint",
    "Format",
    "Role",
    "Settings",
    "Stage",
    "StoredRecord",
    "Stream",
    "Tensor",
    "check_written",
    "different_parts",
    "record_in",
    "with_record",
    "write_chunks",
    "write_shard",
]

RECORD_NAME = "swa_avg"
"""Key or attribute under which an output says how it was made."""
Role = Literal["weight", "optimizer", "metric"]
Buffer = bytes | bytearray | memoryview
StoredRecord = Mapping[str, Any] | None
"""What swa-avg says of how an output was made, as JSON; None where it says nothing."""


Stream = Callable[[int], Iterator[Buffer]]
"""Yields the bytes of a shard, by its number."""


class Settings(NamedTuple):
    """What Keras says of a whole model beside its weights: the text of two members of a `.keras` archive."""

    config: bytes
    metadata: bytes


_WINDOW = 256 * 1024
_MAX_METADATA = 64 * 2**20
_Window = list[tuple[int, bytes]]
"""Runs of bytes, each with where it starts."""


@dataclass(frozen=True)
class Tensor:
    """One stored variable: what it is, and the run of bytes that holds it."""

    name: str
    """Path of the variable inside the checkpoint, without a leading slash."""
    shape: tuple[int, ...]
    dtype: str
    """NumPy's name, `bfloat16`, or `opaque16` for two bytes a value of unstated type."""
    shard: int
    """Index into `Checkpoint.shards`."""
    offset: int
    """Bytes from the start of the shard."""
    nbytes: int
    role: Role = "weight"

    @property
    def stop(self) -> int:
        return self.offset + self.nbytes

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class Checkpoint(ABC):
    """One checkpoint on disk, open for positional reads; each format has a subclass."""

    path: Location
    """The file that it is named by."""
    kind: str
    """The kind of checkpoint, in words for the user; all inputs of a run are of one kind."""
    suffixes: tuple[str, ...]
    """What the name of an output may end with, so that Keras finds the right loader; the first is usual, and
    empty for a folder."""
    shards: tuple[Region, ...]
    """The files, or parts of files, that hold the tensors."""
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None = None
    """The model's configuration, without compile settings, where the checkpoint stores one."""
    layer_names: Mapping[str, str] = field(default_factory=dict)
    """Path of a layer's group -> the name that the model gives the layer, where the checkpoint says so; the
    empty path -> the model's own."""
    empty_groups: frozenset[str] = frozenset()
    """Paths of the `vars` groups without a tensor: those of layers without weights."""
    training_config: Mapping[str, Any] | None = None
    """How the model was compiled, where Keras's safe mode does not check that itself."""
    optimizer_config: Any = None
    """Class and settings of the optimizer, as Keras writes them, where the checkpoint says so."""
    record: StoredRecord = None
    """What swa-avg says of how it was made; None where something else wrote it."""
    writer: str | None = None
    """What wrote it, such as `Keras 3.15.1`, where the checkpoint says so."""
    is_legacy: bool = False
    """Whether Keras calls the format legacy; such a file holds LoRA factors unmerged."""

    @property
    def size(self) -> int:
        """Bytes of the shards."""
        return sum(shard.size for shard in self.shards)

    @property
    def files(self) -> tuple[Location, ...]:
        """All its files."""
        return tuple(dict.fromkeys([self.path, *(shard.path for shard in self.shards)]))

    @property
    def weights_path(self) -> Location | None:
        """The file that Keras loads the weights from, without a model; None if it cannot load all of them."""
        return self.path

    @property
    def is_average(self) -> bool:
        """Whether swa-avg wrote it."""
        return self.record is not None

    @abstractmethod
    def write(self, stream: Stream, record: Callable[[], StoredRecord], stage: Stage) -> None:
        """Write a copy of this checkpoint with other shards to `stage`.

        `stream(k)` yields the bytes of shard k from first to last; each shard is asked for once, in order.
        `record()` may be called once: by an archive before the first shard, else after the last.
        """

    @abstractmethod
    def without_optimizer(self, scratch: Callable[[], IO[bytes]]) -> Checkpoint:
        """Return this checkpoint without its optimizer's state, rebuilt in files that `scratch` opens."""

    def as_weights(self) -> Checkpoint | None:
        """Return the model's weights alone as a `.weights.h5`, where the checkpoint holds one; else None."""
        return None

    def differences(self, template: Checkpoint, *, rebuilt: bool) -> Iterator[Finding]:
        """Yield what differs from `template`, a checkpoint of the same kind, in what the fields do not tell.

        The record and the names of files may differ. If `template` was `rebuilt` without its optimizer, the
        bytes between the tensors depend on the version of libhdf5, and are not compared.
        """
        if not rebuilt and not template.shares_layout(self.shards):
            problem = "bytes outside the tensors differ from the newest input's"
            yield Finding(self.path, "HDF5 metadata", problem)

    def shares_layout(self, shards: Sequence[Region]) -> bool:
        """Tell whether `shards` equal this checkpoint's in every byte outside the tensors.

        Those of one run do, as Keras writes them; their tensors then lie in the same places, and parsing one
        of them is enough.
        """
        return (
            len(shards) == len(self.shards)
            and self._metadata is not None
            and all(
                shard.size == own.size and _agrees(shard, windows)
                for shard, own, windows in zip(shards, self.shards, self._metadata, strict=True)
            )
        )

    @cached_property
    def _metadata(self) -> list[list[_Window]] | None:
        """All bytes of each shard that belong to no tensor; None if there are too many to keep."""
        gaps = [
            _gaps((tensor for tensor in self.tensors.values() if tensor.shard == index), shard.size)
            for index, shard in enumerate(self.shards)
        ]
        if sum(stop - start for shard in gaps for start, stop in shard) > _MAX_METADATA:
            return None
        return [_windows(shard, its) for shard, its in zip(self.shards, gaps, strict=True)]

    def write_again(self, value: Callable[[Tensor], Buffer], settings: Settings | None, stage: Stage) -> None:
        """Write this checkpoint with other values and settings to `stage`; its own files are not read.

        They may be closed, or gone. `refilled` has to have been called while they were open.

        Raises:
            ValueError: as for the stream of `refilled`.
        """
        self.write(self.refilled(value), lambda: None, stage)

    def holds(self, settings: Settings | None) -> bool:
        """Tell whether these are its settings, the date apart, and it holds no assets."""
        return settings is None

    def refilled(self, value: Callable[[Tensor], Buffer]) -> Stream:
        """Return a stream of the shards, kept in memory but for the tensors, whose bytes `value` gives.

        Raises:
            ValueError: (here) there is too much beside the tensors to keep; (from the stream) a value does
                not have the size of its tensor, or two tensors share one place.
        """
        kept = self._metadata
        if kept is None:
            raise ValueError("there is too much beside the tensors")

        def refilled(index: int) -> Iterator[Buffer]:
            pieces: list[tuple[int, bytes | Tensor]] = [run for window in kept[index] for run in window]
            pieces += [(t.offset, t) for t in self.tensors.values() if t.shard == index and t.nbytes]
            position = 0
            for start, piece in sorted(pieces, key=lambda piece: piece[0]):
                data = value(piece) if isinstance(piece, Tensor) else piece
                if position != start:
                    raise ValueError(f"the bytes before {start} of a shard end at {position}")
                yield data
                position += len(data)

        return refilled

    def stream(self, index: int) -> Iterator[Buffer]:
        """Yield the bytes of a shard as they are: a `Stream`."""
        return self.shards[index].chunks()

    def check_unchanged(self) -> None:
        """Raise UnreadableError if one of its files was written to since it was opened."""
        for shard in self.shards:
            shard.check_unchanged()

    def close(self) -> None:
        """Close its files."""
        for shard in self.shards:
            shard.close()


class Format(NamedTuple):
    """How the checkpoints of one format are recognized and opened."""

    description: str
    """As in "not a Keras checkpoint: neither a .keras archive, nor HDF5"."""
    suffixes: tuple[str, ...]
    """What the names of such checkpoints end with, the longest first."""
    signature: bytes
    """First bytes of the file that names one, after any white space."""
    open: Callable[[Region, Checkpoint | None], Checkpoint]
    """Called with the path, the file, open for reading, which the checkpoint then owns, and a checkpoint of
    the same run or None: where that one shares the layout, the file need not be parsed. Raises
    UnreadableError if the file is damaged, or is not a checkpoint."""


def record_in(settings: Mapping[str, Any], path: Location) -> StoredRecord:
    """Return what swa-avg says of how a checkpoint was made, from the JSON object where a format keeps it.

    Raises:
        UnreadableError: it is not a JSON object itself.
    """
    if RECORD_NAME not in settings:
        return None
    record = settings[RECORD_NAME]
    if not isinstance(record, dict):
        raise UnreadableError(path, "its record of how it was made is damaged: it is not a JSON object")
    return record


def different_parts(path: Location, own: Mapping[str, Any], theirs: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield the parts of a checkpoint, by name, that are not those of the newest input."""
    for name in sorted(own.keys() | theirs.keys()):
        if own.get(name) != theirs.get(name):
            yield Finding(path, name, "differs from the newest input's")


def with_record(settings: Mapping[str, Any], record: StoredRecord) -> dict[str, Any]:
    """Return a JSON object with a record, if there is one."""
    return dict(settings) if record is None else {**settings, RECORD_NAME: record}


def _gaps(tensors: Iterable[Tensor], size: int) -> list[tuple[int, int]]:
    gaps = []
    position = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset > position:
            gaps.append((position, tensor.offset))
        position = max(position, tensor.stop)
    return [*gaps, (position, size)]


def _windows(shard: Region, gaps: Sequence[tuple[int, int]]) -> list[_Window]:
    """Read the gaps; those that fit into one window are kept, and later read, together."""
    windows: list[_Window] = []
    for (start, stop), data in zip(gaps, shard.ranges(gaps), strict=True):
        if windows and stop - windows[-1][0][0] <= _WINDOW:
            windows[-1].append((start, data))
        else:
            windows.append([(start, data)])
    return windows


def _agrees(shard: Region, windows: Sequence[_Window]) -> bool:
    """Tell whether a shard holds these bytes; each window is one read, of what lies between as well."""
    gap = shard.source.negligible_gap
    parts = [part for window in windows for part in _parts(window, gap)]
    ranges = [(part[0][0], part[-1][0] + len(part[-1][1])) for part in parts]
    return all(
        found.startswith(data, start - first)
        for part, (first, _), found in zip(parts, ranges, shard.ranges(ranges), strict=True)
        for start, data in part
    )


def _parts(window: _Window, gap: int) -> Iterator[_Window]:
    """Split a window where more than `gap` bytes lie between two of its runs."""
    part = window[:1]
    for run in window[1:]:
        if run[0] - (part[-1][0] + len(part[-1][1])) > gap:
            yield part
            part = []
        part.append(run)
    yield part


class Stage(Protocol):
    """Where the files of an output are written; they appear under their names once all are complete."""

    output: Path

    def create(self, name: str, size: int = 0) -> IO[bytes]:
        """Return a new file, open for reading and writing, that is published as `name` beside the output.

        If the output is a folder, `name` begins with its name and a slash, and the folder is published whole.
        Files are published in the order in which they were created. `size` bytes, the least that the file
        will hold, are reserved at once, so that a full disk is noticed before the work is done.
        """


def write_shard(file: IO[bytes], chunks: Iterable[Buffer]) -> None:
    """Write the bytes of a shard to an empty file, and check that they read back."""
    check_written(file, 0, *write_chunks(file, chunks))


def write_chunks(file: IO[bytes], chunks: Iterable[Buffer]) -> tuple[int, int]:
    """Write chunks at the file's current position, and return their size and CRC-32."""
    size = checksum = 0
    for chunk in chunks:
        file.write(chunk)
        checksum = crc32(chunk, checksum)
        size += len(chunk)
    return size, checksum


def check_written(file: IO[bytes], start: int, size: int, checksum: int) -> None:
    """Raise OSError unless `size` bytes at `start` of a file read back with the CRC-32 `checksum`."""
    file.flush()
    file.seek(start)
    found = 0
    buffer = memoryview(bytearray(min(size, _WINDOW)))
    while size:
        count = file.readinto(buffer[:size])  # type: ignore[attr-defined]
        if not count:
            break
        found = crc32(buffer[:count], found)
        size -= count
    if size or found != checksum:
        raise OSError(errno.EIO, "what was written does not read back the same")
