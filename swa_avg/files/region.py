"""Files that are read at their places: on this machine, or named by URLs."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from threading import Lock
from typing import IO, Any

from isal.isal_zlib import crc32

from swa_avg.errors import SwaAvgError, SystemRefusalError, UnreadableError
from swa_avg.files.remote import RemoteFile, open_remote, remote

__all__ = ["Region", "RegionFile", "open_file", "refusal"]

# What an input cannot cause by being what it is: the machine has run out of something.
_SYSTEM_ERRNOS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EINTR}


_CHUNK = 2**18


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


class Region:
    """An HDF5 file in a region of a file: all of a bare one, or one stored member of an archive.

    Reads are positional, hence safe from several threads at once. Pickled, it opens the file again where it
    is unpickled, once it is read from.
    """

    def __init__(self, path: Path, file: IO[bytes], offset: int = 0, size: int | None = None) -> None:
        self.path = path
        self.file = file
        self.offset = offset
        self.size = file.seek(0, os.SEEK_END) if size is None else size
        self.crc32: int | None = None
        """CRC-32 of the whole region where the container declares one."""
        self._state: Hashable = file.version if isinstance(file, RemoteFile) else self._stat()

    def __reduce__(self) -> tuple[Any, ...]:
        # A relative name means something else to a process that runs in another folder.
        place = Path(self.file.name).absolute() if remote(self.path) is None else self.path
        return _ReopenedRegion, (self.path, place, self.offset, self.size, self.crc32, self._state)

    def read_into(self, buffer: memoryview, position: int) -> None:
        """Fill `buffer` with the bytes at `position` of the region.

        Raises:
            UnreadableError: that lies outside the region, or the file was truncated after it was opened.
            SystemRefusalError: the system could not read.
        """
        if position < 0 or position + len(buffer) > self.size:
            raise UnreadableError(
                self.path, f"bytes from {position} on were to be read, which lie outside the file"
            )
        file = self.file
        if isinstance(file, RemoteFile):
            file.read_at(buffer, self.offset + position)
            return
        done = 0
        while done < len(buffer):
            try:
                count = _read_at(file.fileno(), buffer[done:], self.offset + position + done)
            except OSError as error:
                raise SystemRefusalError(
                    error.errno, f"{error.strerror} while reading", str(self.path)
                ) from error
            if count == 0:
                raise UnreadableError(self.path, "the file became shorter while it was being read")
            done += count

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
        if isinstance(self.file, RemoteFile):
            return self.file.ranges([(self.offset + start, self.offset + stop) for start, stop in ranges])
        return (self.read(start, stop - start) for start, stop in ranges)

    def settle(self) -> None:
        """Stop reading ahead, which serves parsing: the structure has been parsed."""
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


class _ReopenedRegion(Region):
    """An region that was opened by another process, maybe on another machine."""

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
        self._opening = Lock()
        self._opened: IO[bytes] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _ReopenedRegion, (self.path, self._place, self.offset, self.size, self.crc32, self._state)

    def __del__(self) -> None:
        if self._opened is not None:  # nobody tells a worker which task is the last
            self.close()

    @property
    def file(self) -> IO[bytes]:  # type: ignore[override]
        """The file, opened when it is first read from.

        Raises:
            UnreadableError: it is missing here, or is another one: of another size or time of modification,
                or other in what a service says of it.
            SystemRefusalError: as for `open_file`.
        """
        with self._opening:  # threads of a worker share the region
            if self._opened is None:
                self._opened = self._open()
            return self._opened

    def _open(self) -> IO[bytes]:
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


class RegionFile(io.RawIOBase):
    """An `Region` as the read-only seekable file that h5py and zipfile take."""

    def __init__(self, region: Region) -> None:
        self._image = region
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
