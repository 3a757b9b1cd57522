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

from swa_avg.formats.image import Image
from swa_avg.remote import RemoteFile

__all__ = [
    "PROVENANCE",
    "Buffer",
    "Checkpoint",
    "Chunk",
    "Provenance",
    "Role",
    "Stage",
    "Tensor",
    "Written",
    "check_written",
    "write_chunks",
    "write_image",
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

_WINDOW = 256 * 1024
_NEAR = 4096  # what is worth reading between two places of an object, to ask for it once
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
    image: int
    """Index into `Checkpoint.images`."""
    offset: int
    """Bytes from the start of the image."""
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

    path: Path
    kind: str
    """What sort of checkpoint it is, in words; the inputs of one run share it."""
    suffixes: tuple[str, ...]
    """What the name of such a file may end with, so that Keras finds the right loader."""
    images: tuple[Image, ...]
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] | None = None
    """The model's configuration, without compile settings, where the checkpoint stores one."""
    layer_names: Mapping[str, str] = field(default_factory=dict)
    """Path of a layer's group -> the name that the model gives the layer, where the checkpoint says so; the
    empty path -> the model's own."""
    is_average: bool = False
    """Whether swa-avg wrote it."""
    writer: str | None = None
    """What wrote it, such as `Keras 3.15.1`, where the checkpoint says so."""
    empty_groups: frozenset[str] = frozenset()
    """Paths of groups without a tensor: those of layers without weights."""

    @property
    def size(self) -> int:
        """Bytes of the images."""
        return sum(image.size for image in self.images)

    @abstractmethod
    def write(
        self,
        image: Callable[[int, IO[bytes]], Iterator[Chunk]],
        provenance: Callable[[], Provenance],
        stage: Stage,
    ) -> None:
        """Write a copy of this checkpoint with other images to `stage`.

        `image(k, file)` yields the bytes of image k from first to last; each is asked for once, in order. The
        first goes to where `file` stands when it is asked for.
        `provenance()` may be called once, by an archive before the first image, else after the last.
        """

    def shares_layout(self, images: Sequence[Image]) -> bool:
        """Tell whether `images` are this checkpoint's byte for byte outside the tensors' values.

        Keras writes the checkpoints of one run so; their tensors then lie in the same places, and parsing
        one of them is enough.
        """
        return (
            len(images) == len(self.images)
            and self._metadata is not None
            and all(
                image.size == own.size and _agrees(image, windows)
                for image, own, windows in zip(images, self.images, self._metadata, strict=True)
            )
        )

    @cached_property
    def _metadata(self) -> list[list[_Window]] | None:
        """All bytes of each image that belong to no tensor; None if they are too many to keep."""
        gaps = [
            _gaps((tensor for tensor in self.tensors.values() if tensor.image == index), image.size)
            for index, image in enumerate(self.images)
        ]
        if sum(stop - start for image in gaps for start, stop in image) > _MAX_METADATA:
            return None
        return [_windows(image, its) for image, its in zip(self.images, gaps, strict=True)]

    @abstractmethod
    def without_optimizer(self, scratch: Callable[[], IO[bytes]]) -> Checkpoint:
        """Return this checkpoint without its optimizer's state, rebuilt in files that `scratch` opens."""

    def check_unchanged(self) -> None:
        """Raise UnreadableError if one of its files was written to since it was opened."""
        for image in self.images:
            image.check_unchanged()

    def close(self) -> None:
        """Close its files."""
        for image in self.images:
            image.close()


def _gaps(tensors: Iterable[Tensor], size: int) -> list[tuple[int, int]]:
    gaps = []
    position = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset > position:
            gaps.append((position, tensor.offset))
        position = max(position, tensor.stop)
    return [*gaps, (position, size)]


def _windows(image: Image, gaps: Sequence[tuple[int, int]]) -> list[_Window]:
    """Read the gaps; neighbours that lie within one window are kept, and later read, together."""
    windows: list[_Window] = []
    for (start, stop), data in zip(gaps, image.ranges(gaps), strict=True):
        if windows and stop - windows[-1][0][0] <= _WINDOW:
            windows[-1].append((start, data))
        else:
            windows.append([(start, data)])
    return windows


def _agrees(image: Image, windows: Sequence[_Window]) -> bool:
    """Tell whether an image holds these bytes; a window is read at once, what lies between included."""
    if isinstance(image.file, RemoteFile):
        windows = [part for window in windows for part in _near(window)]
    ranges = [(window[0][0], window[-1][0] + len(window[-1][1])) for window in windows]
    return all(
        found.startswith(data, start - first)
        for window, (first, _), found in zip(windows, ranges, image.ranges(ranges), strict=True)
        for start, data in window
    )


def _near(window: _Window) -> Iterator[_Window]:
    """Cut a window where more lies between two of its runs than is worth reading from a service."""
    part = window[:1]
    for run in window[1:]:
        if run[0] - (part[-1][0] + len(part[-1][1])) > _NEAR:
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


def write_image(file: IO[bytes], chunks: Iterable[Chunk]) -> None:
    """Write the bytes of an image to the start of an empty file, and see that they read back."""
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
