"""Regions of files: a whole one, or a run of bytes within it."""

from __future__ import annotations

import io
import os
from collections.abc import Hashable, Iterator, Sequence
from threading import Lock
from typing import Any

from isal.isal_zlib import crc32

from swa_avg.errors import UnreadableError
from swa_avg.files.location import Location
from swa_avg.files.sources import Source, open_source

__all__ = ["Region", "RegionFile"]

_CHUNK = 2**18


class Region:
    """A run of bytes of a file, such as an HDF5 file that is stored in an archive.

    Reads are positional, hence safe from several threads at once. Pickled, it opens the file again where it
    is unpickled, once it is read from.
    """

    def __init__(
        self, source: Source, offset: int = 0, size: int | None = None, crc32: int | None = None
    ) -> None:
        self.source = source
        self.offset = offset
        self.size = source.size if size is None else size
        self.crc32 = crc32
        """CRC-32 of the whole region where the container declares one."""

    def __reduce__(self) -> tuple[Any, ...]:
        own = self.source
        source = _ReopenedSource(own.path, own.size, own.version, own.place)
        return Region, (source, self.offset, self.size, self.crc32)

    @property
    def path(self) -> Location:
        return self.source.path

    def read_into(self, buffer: memoryview, position: int) -> None:
        """Fill `buffer` with the bytes at `position` of the region.

        Raises:
            UnreadableError: that lies outside the region, or the file was truncated after it was opened.
            SystemRefusalError: the system could not read.
        """
        self._check_inside(position, position + len(buffer))
        self.source.read_into(buffer, self.offset + position)

    def read(self, position: int, size: int) -> bytes:
        """Return `size` bytes at `position` of the region; errors as for `read_into`."""
        buffer = bytearray(size)
        self.read_into(memoryview(buffer), position)
        return bytes(buffer)

    def chunks(self, start: int = 0, stop: int | None = None, size: int = _CHUNK) -> Iterator[bytes]:
        """Yield the bytes from `start` to `stop`, by default the end, `size` at a time at most; errors as for
        `read_into`."""
        stop = self.size if stop is None else stop
        for position in range(start, stop, size):
            yield self.read(position, min(size, stop - position))

    def checksum(self, start: int = 0, stop: int | None = None, size: int = _CHUNK) -> int:
        """Return the CRC-32 of the bytes that `chunks` yields."""
        checksum = 0
        for chunk in self.chunks(start, stop, size):
            checksum = crc32(chunk, checksum)
        return checksum

    def ranges(self, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """Yield the bytes of each range (start, stop); errors as for `read_into`."""
        for start, stop in ranges:
            self._check_inside(start, stop)
        return self.source.ranges([(self.offset + start, self.offset + stop) for start, stop in ranges])

    def _check_inside(self, start: int, stop: int) -> None:
        if start < 0 or stop > self.size:
            problem = f"bytes from {start} on were to be read, which lie outside the file"
            raise UnreadableError(self.path, problem)

    def identity(self) -> Hashable:
        """Return what is equal for two names of one file."""
        return self.source.identity()

    def settle(self) -> None:
        """Stop reading ahead, which serves parsing: the structure has been parsed."""
        self.source.settle()

    def check_unchanged(self) -> None:
        """Raise UnreadableError if the file was written to since it was opened."""
        if self.source.has_changed():
            raise UnreadableError(
                self.path, "the file changed while it was being read", hint="wait for its writer to finish"
            )

    def close(self) -> None:
        """Close its file, and so that of every other region in it."""
        self.source.close()


class _ReopenedSource(Source):
    """A file that was opened by another process, maybe on another machine; opened when it is first read."""

    def __init__(self, path: Location, size: int, version: Hashable, place: Location) -> None:
        super().__init__(path, size, version)
        self._place = place
        self._opening = Lock()
        self._opened: Source | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _ReopenedSource, (self.path, self.size, self.version, self.place)

    def __del__(self) -> None:
        self.close()  # nobody tells a worker which task is the last

    @property
    def place(self) -> Location:
        return self._place

    def read_into(self, buffer: memoryview, position: int) -> None:
        self._source().read_into(buffer, position)

    def ranges(self, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        return self._source().ranges(ranges)

    def has_changed(self) -> bool:
        return self._source().has_changed()

    def identity(self) -> Hashable:
        return self._source().identity()

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()

    def _source(self) -> Source:
        """Return the file, open.

        Raises:
            UnreadableError: it is missing here, or is another one: of another size or time of modification,
                or other in what a service says of it.
            SystemRefusalError: as for `open_source`.
        """
        with self._opening:  # threads of a worker share the region
            if self._opened is None:
                source = open_source(self.place)
                if source.version != self.version:
                    source.close()
                    problem = "another file here, of another size or time of modification"
                    raise UnreadableError(self.place, problem, hint="mount one file system everywhere")
                source.path = self.path
                source.settle()
                self._opened = source
            return self._opened


class RegionFile(io.RawIOBase):
    """A `Region` as the read-only seekable file that h5py and zipfile take."""

    def __init__(self, region: Region) -> None:
        self._region = region
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._region.size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._region.size - self._position))
        self._region.read_into(view[:count], self._position)
        self._position += count
        return count
