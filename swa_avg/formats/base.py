"""A checkpoint as a map of named extents."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, Protocol

from isal.isal_zlib import crc32, crc32_combine

from swa_avg.errors import SwaAvgError, SystemRefusalError, UnreadableError
from swa_avg.remote import RemoteFile, open_remote, remote

__all__ = [
    "PROVENANCE",
    "Buffer",
    "Checkpoint",
    "Chunk",
    "Image",
    "ImageFile",
    "Provenance",
    "Role",
    "Stage",
    "Tensor",
    "Written",
    "check_written",
    "open_file",
    "refusal",
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

# What an input cannot cause by being what it is: the machine has run out of something.
_SYSTEM_ERRNOS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EINTR}


def open_file(path: Path, *, follow: bool = True) -> IO[bytes]:
    """Open a regular file for reading; `follow` a symbolic link, or refuse it.

    What a URL names is opened in place, or a copy of it: see `RemotePath`. A file is opened without blocking
    and checked afterwards, so that a FIFO or a device named as a checkpoint neither hangs the run nor slips
    in between a check and the open.

    Raises:
        UnreadableError: it is missing, may not be read, or is not a regular file.
        SystemRefusalError: the system is out of file descriptors or memory; a service refused.
    """
    if (url := remote(path)) is not None:
        return open_remote(url)
    flags = os.O_RDONLY | sum(getattr(os, flag, 0) for flag in ("O_NONBLOCK", "O_BINARY", "O_CLOEXEC"))
    flags |= 0 if follow else getattr(os, "O_NOFOLLOW", 0)
    not_regular = UnreadableError(path, "not a regular file; name a checkpoint file")
    try:
        if not follow and path.is_symlink():
            raise UnreadableError(path, "a symbolic link; put the file itself in its place")
        file = open(path, "rb", buffering=0, opener=lambda name, _: os.open(name, flags))  # noqa: SIM115
    except IsADirectoryError:
        raise not_regular from None
    except OSError as error:
        raise refusal(path, error) from error
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise not_regular
    return file


def refusal(path: Path, error: OSError) -> SwaAvgError:
    """Return what an error of the system means for the input `path`."""
    if error.errno in _SYSTEM_ERRNOS:
        return SystemRefusalError(error.errno, f"{error.strerror} while reading", str(path))
    return UnreadableError(path, (error.strerror or str(error)).lower())


class Image:
    """An HDF5 file in a region of a file: all of a bare one, or one stored member of an archive.

    Reads are positional, hence safe from several threads at once. Pickled, it opens the file again where it
    is unpickled, once it is read from.
    """

    def __init__(self, path: Path, file: IO[bytes], offset: int, size: int) -> None:
        self.path = path
        self.file = file
        self.offset = offset
        self.size = size
        self.crc32: int | None = None
        """CRC-32 of the whole image where the container declares one."""
        self._state: Hashable = file.version if isinstance(file, RemoteFile) else self._stat()

    def __reduce__(self) -> tuple[Any, ...]:
        # A relative name means something else to a process that runs in another folder.
        place = Path(self.file.name).absolute() if remote(self.path) is None else self.path
        return _AbsentImage, (self.path, place, self.offset, self.size, self.crc32, self._state)

    def read_into(self, buffer: memoryview, position: int) -> None:
        """Fill `buffer` with the bytes at `position` of the image.

        Raises:
            UnreadableError: that lies outside the image, or the file was truncated after it was opened.
            SystemRefusalError: the system could not read.
        """
        if position < 0 or position + len(buffer) > self.size:
            raise UnreadableError(
                self.path, f"bytes from {position} on were to be read, which lie outside the file"
            )
        if isinstance(self.file, RemoteFile):
            self.file.read_at(buffer, self.offset + position)
            return
        done = 0
        while done < len(buffer):
            try:
                count = _read_at(self.file.fileno(), buffer[done:], self.offset + position + done)
            except OSError as error:
                raise SystemRefusalError(
                    error.errno, f"{error.strerror} while reading", str(self.path)
                ) from error
            if count == 0:
                raise UnreadableError(self.path, "the file became shorter while it was being read")
            done += count

    def read(self, position: int, size: int) -> bytes:
        """Return `size` bytes at `position` of the image; errors as for `read_into`."""
        buffer = bytearray(size)
        self.read_into(memoryview(buffer), position)
        return bytes(buffer)

    def ranges(self, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """Yield the bytes of each range (start, stop); errors as for `read_into`."""
        if isinstance(self.file, RemoteFile):
            return self.file.ranges([(self.offset + start, self.offset + stop) for start, stop in ranges])
        return (self.read(start, stop - start) for start, stop in ranges)

    def settle(self) -> None:
        """Read what is asked for and no more from now on: what a parser looks at has been read."""
        if isinstance(self.file, RemoteFile):
            self.file.settle()

    def check_unchanged(self) -> None:
        """Raise UnreadableError if the file was written to since it was opened."""
        if self._state != (self.file.version_now() if isinstance(self.file, RemoteFile) else self._stat()):
            raise UnreadableError(
                self.path, "the file changed while it was being read", hint="wait for its writer to finish"
            )

    def identity(self) -> Hashable:
        """Return what is equal for two names of one file."""
        url = remote(self.path)
        return self._stat()[:2] if url is None else url.identity()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it was read only: nothing can be lost
            self.file.close()

    def _stat(self) -> tuple[int, int, int, int, int]:
        now = os.fstat(self.file.fileno())
        return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns


class _AbsentImage(Image):
    """An image that was opened by another process, maybe on another machine."""

    def __init__(
        self,
        path: Path,
        place: Path,
        offset: int,
        size: int,
        checksum: int | None,
        state: Any,
    ) -> None:
        self.path = path
        self.offset = offset
        self.size = size
        self.crc32 = checksum
        self._place = place
        self._state = self._seen = state

    def __reduce__(self) -> tuple[Any, ...]:
        return _AbsentImage, (self.path, self._place, self.offset, self.size, self.crc32, self._state)

    def __del__(self) -> None:
        if "file" in self.__dict__:  # nobody tells a worker which task is the last
            self.close()

    @cached_property
    def file(self) -> IO[bytes]:  # type: ignore[override]
        """The file, opened when it is first read from.

        Raises:
            UnreadableError: it is missing here, or is another one: of another size or time of modification,
                or other in what a service says of it.
            SystemRefusalError: as for `open_file`.
        """
        file = open_file(self._place)
        if isinstance(file, RemoteFile):
            file.settle()
            same = file.version == self._state
        else:
            now = os.fstat(file.fileno())
            # Device and inode are numbered by each machine for itself.
            same = (now.st_size, now.st_mtime_ns) == self._seen[2:4]
        if not same:
            file.close()
            problem = "another file here, of another size or time of modification"
            raise UnreadableError(self._place, problem, hint="mount one file system everywhere")
        return file


if hasattr(os, "preadv"):

    def _read_at(descriptor: int, buffer: memoryview, position: int) -> int:
        return os.preadv(descriptor, [buffer], position)

elif hasattr(os, "pread"):  # macOS before 11

    def _read_at(descriptor: int, buffer: memoryview, position: int) -> int:
        data = os.pread(descriptor, len(buffer), position)
        buffer[: len(data)] = data
        return len(data)

else:  # Windows has one position per descriptor
    import threading

    _POSITION = threading.Lock()

    def _read_at(descriptor: int, buffer: memoryview, position: int) -> int:
        with _POSITION:
            os.lseek(descriptor, position, os.SEEK_SET)
            data = os.read(descriptor, len(buffer))
        buffer[: len(data)] = data
        return len(data)


class ImageFile(io.RawIOBase):
    """An `Image` as the read-only seekable file that h5py and zipfile take."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._image.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._image.size - self._position))
        self._image.read_into(view[:count], self._position)
        self._position += count
        return count


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
    """Path of a layer's group -> the name that the model gives the layer, where the checkpoint says so."""
    is_average: bool = False
    """Whether swa-avg wrote it."""
    writer: str | None = None
    """What wrote it, such as `Keras 3.15.1`, where the checkpoint says so."""

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
        """Tell whether `images` hold the same bytes as this checkpoint's, the tensors' values apart.

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
