"""A checkpoint as a map of named extents."""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Protocol

from isal.isal_zlib import crc32, crc32_combine

from swa_avg.files.location import Location
from swa_avg.files.region import Region

__all__ = [
    "PROVENANCE",
    "Buffer",
    "Checkpoint",
    "Chunk",
    "Provenance",
    "Role",
    "Stage",
    "Stream",
    "Tensor",
    "Written",
    "check_written",
    "write_chunks",
    "write_shard",
]

PROVENANCE = "swa_avg"
"""Where an output says how it was made: a key or an attribute of this name."""
Role = Literal["weight", "optimizer", "metric"]
Buffer = bytes | bytearray | memoryview
Provenance = Mapping[str, Any] | None
"""What an output says of how it was made; None leaves it out."""


class Written(NamedTuple):
    """Bytes of an output that another process has put in their place."""

    size: int
    checksum: int
    """Their CRC-32."""


Chunk = Buffer | Written
"""The next bytes of an output."""
Stream = Callable[[int, IO[bytes] | None], Iterator[Chunk]]
"""Yields the bytes of a shard, by its number; who is given the output, an open file, may write there."""

_WINDOW = 256 * 1024
_MAX_METADATA = 64 * 2**20
_Window = list[tuple[int, bytes]]
"""Runs of bytes, each with where it starts."""


@dataclass(frozen=True)
class Tensor:
    """One stored variable: what it is, and the run of bytes that holds it."""

    name: str
    """Path of the dataset inside the checkpoint, without a leading slash."""
    shape: tuple[int, ...]
    dtype: str
    """NumPy's name, `bfloat16`, or `opaque16` for two untagged bytes a value."""
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
    """One checkpoint on disk, open for positional reads; one subclass a format."""

    path: Location
    kind: str
    """What sort of checkpoint it is, in words; the inputs of one run share it."""
    suffixes: tuple[str, ...]
    """What the name of such a file may end with, so that Keras finds the right loader."""
    shards: tuple[Region, ...]
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None = None
    """The model's configuration, without compile settings, where the checkpoint stores one."""
    layer_names: Mapping[str, str] = field(default_factory=dict)
    """Path of a layer's group -> the name that the model gives the layer, where the checkpoint says so."""
    is_average: bool = False
    """Whether swa-avg wrote it."""
    writer: str | None = None
    """What wrote it, such as `Keras 3.15.1`, where the checkpoint says so."""

    @property
    def size(self) -> int:
        """Bytes of the shards."""
        return sum(shard.size for shard in self.shards)

    @abstractmethod
    def write(
        self,
        stream: Stream,
        provenance: Callable[[], Provenance],
        stage: Stage,
    ) -> None:
        """Write a copy of this checkpoint with other shards to `stage`.

        `stream(k, file)` yields the bytes of shard k from first to last, each asked for once, in order. The
        first goes to where `file` stands when it is asked for.
        `provenance()` may be called once, by an archive before the first shard, else after the last.
        """

    def shares_layout(self, shards: Sequence[Region]) -> bool:
        """Tell whether `shards` are this checkpoint's byte for byte outside the tensors' values.

        Keras writes the checkpoints of one run so; their tensors then lie in the same places, and parsing
        one of them is enough.
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
        """All bytes of each shard that belong to no tensor; None if they are too many to keep."""
        gaps = [
            _gaps((tensor for tensor in self.tensors.values() if tensor.shard == index), shard.size)
            for index, shard in enumerate(self.shards)
        ]
        if sum(stop - start for shard in gaps for start, stop in shard) > _MAX_METADATA:
            return None
        return [_windows(shard, its) for shard, its in zip(self.shards, gaps, strict=True)]

    @abstractmethod
    def without_optimizer(self, scratch: Callable[[], IO[bytes]]) -> Checkpoint:
        """Return this checkpoint without its optimizer's state, rebuilt in files that `scratch` opens."""

    def stream(self, index: int, file: IO[bytes] | None = None) -> Iterator[Buffer]:
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


def _gaps(tensors: Iterable[Tensor], size: int) -> list[tuple[int, int]]:
    gaps = []
    position = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset > position:
            gaps.append((position, tensor.offset))
        position = max(position, tensor.stop)
    return [*gaps, (position, size)]


def _windows(shard: Region, gaps: Sequence[tuple[int, int]]) -> list[_Window]:
    """Read the gaps; neighbours that lie within one window are kept, and later read, together."""
    windows: list[_Window] = []
    for (start, stop), data in zip(gaps, shard.ranges(gaps), strict=True):
        if windows and stop - windows[-1][0][0] <= _WINDOW:
            windows[-1].append((start, data))
        else:
            windows.append([(start, data)])
    return windows


def _agrees(shard: Region, windows: Sequence[_Window]) -> bool:
    """Tell whether a shard holds these bytes; a window is read at once, what lies between included."""
    gap = shard.source.negligible_gap
    parts = [part for window in windows for part in _parts(window, gap)]
    ranges = [(part[0][0], part[-1][0] + len(part[-1][1])) for part in parts]
    return all(
        found.startswith(data, start - first)
        for part, (first, _), found in zip(parts, ranges, shard.ranges(ranges), strict=True)
        for start, data in part
    )


def _parts(window: _Window, gap: int) -> Iterator[_Window]:
    """Cut a window where more than `gap` bytes lie between two of its runs."""
    part = window[:1]
    for run in window[1:]:
        if run[0] - (part[-1][0] + len(part[-1][1])) > gap:
            yield part
            part = []
        part.append(run)
    yield part


class Stage(Protocol):
    """Where the files of an output grow, to appear under their names only when all are complete."""

    output: Path

    def create(self, name: str, size: int = 0) -> IO[bytes]:
        """Return a new file, open for reading and writing, that is published as `name` beside the output.

        Files are published in the order in which they were created. `size`, the least that the file will
        hold, is reserved, so that a full disk is found before the work is done.
        """


def write_shard(file: IO[bytes], chunks: Iterable[Chunk]) -> None:
    """Write the bytes of a shard to the start of an empty file, and see that they read back."""
    check_written(file, 0, *write_chunks(file, chunks))


def write_chunks(file: IO[bytes], chunks: Iterable[Chunk]) -> tuple[int, int]:
    """Write chunks to where the file stands, and return their size and CRC-32."""
    size = checksum = 0
    for chunk in chunks:
        if isinstance(chunk, Written):
            file.seek(chunk.size, os.SEEK_CUR)
            checksum = crc32_combine(checksum, chunk.checksum, chunk.size)
            size += chunk.size
        else:
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
        raise OSError(errno.EIO, "what was written does not read back as it was")
