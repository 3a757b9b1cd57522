"""Files open for reading at any position: on this machine, or in a store."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import IO

from swa_avg.errors import SwaAvgError, SystemRefusalError, UnreadableError
from swa_avg.files.location import Location
from swa_avg.files.remote import RemotePath, limit, service_errors, version_of

__all__ = ["LocalSource", "NotRegularError", "RemoteSource", "Source", "open_source", "refusal"]

# Errors that no input can cause: the machine has run out of something.
_SYSTEM_ERRNOS = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EINTR}
_AHEAD = 16 * 1024
_BLOCKS_AHEAD = 128
_COPIED_AT_ONCE = 8
_COPIED = 2 * 2**20
_RANGES_AT_ONCE = 16


class NotRegularError(UnreadableError):
    """What was named is a folder, a device, a FIFO."""

    def __init__(self, path: Location) -> None:
        super().__init__(path, "not a regular file; name a checkpoint file")


class Source(ABC):
    """A file open for positional reads, which are safe from several threads at once."""

    negligible_gap = 256 * 1024
    """Bytes between two ranges that cost no more to read than to leave out."""

    def __init__(self, path: Location, size: int, version: Hashable) -> None:
        self.path = path
        """What messages call the file."""
        self.size = size
        self.version = version
        """What every machine sees change when the file does."""

    @property
    @abstractmethod
    def place(self) -> Location:
        """Where another process opens the file."""

    @abstractmethod
    def read_into(self, buffer: memoryview, position: int) -> None:
        """Fill `buffer` with the bytes at `position`.

        Raises:
            UnreadableError: the file became shorter.
            SystemRefusalError: the system could not read; a service did not answer or refused.
        """

    def ranges(self, ranges: Sequence[tuple[int, int]]) -> Iterator[bytes]:
        """Yield the bytes of each range (start, stop); errors as for `read_into`."""
        for start, stop in ranges:
            buffer = bytearray(stop - start)
            self.read_into(memoryview(buffer), start)
            yield bytes(buffer)

    def settle(self) -> None:  # noqa: B027 (most sources have nothing to stop)
        """Stop reading ahead, which serves parsing: the structure has been parsed."""

    @abstractmethod
    def has_changed(self) -> bool:
        """Tell whether the file was written to since it was opened."""

    @abstractmethod
    def identity(self) -> Hashable:
        """Return what is equal for two names of one file."""

    @abstractmethod
    def close(self) -> None: ...


class LocalSource(Source):
    """A file of this machine; one that is also written to must be flushed before it is read."""

    def __init__(self, path: Location, file: IO[bytes]) -> None:
        self._file = file
        size = file.seek(0, os.SEEK_END)
        self._status = self._status_now()
        # Device and inode are numbered by each machine for itself.
        super().__init__(path, size, self._status[2:4])

    @property
    def place(self) -> Location:
        # A relative name means something else to a process that runs in another folder.
        return Path(self._file.name).absolute()

    def read_into(self, buffer: memoryview, position: int) -> None:
        done = 0
        while done < len(buffer):
            try:
                count = _read_at(self._file.fileno(), buffer[done:], position + done)
            except OSError as error:
                raise SystemRefusalError(
                    error.errno, f"{error.strerror} while reading", str(self.path)
                ) from error
            if count == 0:
                raise UnreadableError(self.path, "the file became shorter while it was being read")
            done += count

    def has_changed(self) -> bool:
        return self._status_now() != self._status

    def identity(self) -> Hashable:
        return self._status[:2]

    def close(self) -> None:
        with contextlib.suppress(OSError):  # it was read only: nothing can be lost
            self._file.close()

    def _status_now(self) -> tuple[int, int, int, int, int]:
        now = os.fstat(self._file.fileno())
        return now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns


class _CachedSource(LocalSource):
    """The copy on this machine of an object in a store."""

    def __init__(self, path: RemotePath, copy: Path) -> None:
        super().__init__(path, open(copy, "rb", buffering=0))  # noqa: SIM115
        self._url = path

    @property
    def place(self) -> Location:
        return self.path  # the copy is on this machine alone

    def identity(self) -> Hashable:
        return self._url.identity()


class RemoteSource(Source):
    """An object in a store.

    A checkpoint is opened with hundreds of small reads in a few places: until `settle` they are answered from
    whole blocks, of which the last few are kept. Every other read fetches what it asks for and no more.
    """

    negligible_gap = 4096

    def __init__(self, path: RemotePath) -> None:
        self._url = path
        self._system, self._key = path.filesystem()
        info = path.info()
        if info.get("type", "file") != "file":
            raise NotRegularError(path)
        if info.get("size") is None:
            raise SystemRefusalError(errno.EIO, "the service does not say how large it is", path.url)
        super().__init__(path, int(info["size"]), version_of(info))
        self._ahead: OrderedDict[int, bytes] | None = OrderedDict()

    @property
    def place(self) -> Location:
        return self.path

    def read_into(self, buffer: memoryview, position: int) -> None:
        stop = position + len(buffer)
        if self._ahead is None or len(buffer) > _AHEAD:
            buffer[:] = self._fetch(position, stop)
            return
        for start in range(position - position % _AHEAD, stop, _AHEAD):
            data = self._block(start)[max(0, position - start) : stop - start]
            place = max(0, start - position)
            buffer[place : place + len(data)] = data

    def ranges(self, ranges: Sequence[tuple[int, int]], at_once: int = _RANGES_AT_ONCE) -> Iterator[bytes]:
        """Yield the bytes of each range, of which `at_once` are fetched together."""
        for index in range(0, len(ranges), at_once):
            some = ranges[index : index + at_once]
            full = [
                (start, stop) for start, stop in some if start < stop
            ]  # S3 takes an empty one for the whole file
            starts, stops = [start for start, _ in full], [stop for _, stop in full]
            with service_errors(self._url.url):
                keys = [self._key] * len(full)
                found = self._system.cat_ranges(keys, starts, stops, on_error="raise", **limit(self._system))
            answers = iter(found)
            for start, stop in some:
                yield self._whole(next(answers), stop - start) if start < stop else b""

    def settle(self) -> None:
        self._ahead = None

    def has_changed(self) -> bool:
        return version_of(self._url.info()) != self.version

    def identity(self) -> Hashable:
        return self._url.identity()

    def close(self) -> None:
        self._ahead = None

    def _block(self, start: int) -> bytes:
        assert self._ahead is not None
        if start not in self._ahead:
            self._ahead[start] = self._fetch(start, min(start + _AHEAD, self.size))
            if len(self._ahead) > _BLOCKS_AHEAD:
                self._ahead.popitem(last=False)
        self._ahead.move_to_end(start)
        return self._ahead[start]

    def _fetch(self, start: int, stop: int) -> bytes:
        if start == stop:
            return b""
        with service_errors(self._url.url):
            data = self._system.cat_file(self._key, start=start, end=stop, **limit(self._system))
        return self._whole(data, stop - start)

    def _whole(self, data: bytes, size: int) -> bytes:
        if len(data) < size:
            raise UnreadableError(self.path, "the file became shorter while it was being read")
        if len(data) > size:
            problem = "the service answers with the whole file when asked for a part of it"
            raise SystemRefusalError(errno.EIO, problem, self._url.url)
        return data


def open_source(path: Location, *, follow: bool = True) -> Source:
    """Open a regular file for reading; `follow` a symbolic link, or refuse it.

    What a URL names is opened in place, or is copied to this machine first where it is `cached_locally`.

    Raises:
        UnreadableError: it is missing, may not be read, is not a regular file, or changed while it was
            copied.
        SystemRefusalError: the system is out of file descriptors or memory; a service did not answer or
            refused.
        UsageError: a package for this kind of URL is missing, or the kind is not known.
    """
    if not isinstance(path, RemotePath):
        return LocalSource(path, _open_regular(path, follow=follow))
    if path.copies is None:
        return RemoteSource(path)
    copy = path.copies / path.name
    if not copy.exists():
        _copy(path, copy)
    return _CachedSource(path, copy)


def _open_regular(path: Path, *, follow: bool) -> IO[bytes]:
    """Open without blocking, and check afterwards: a FIFO or a device named as a checkpoint must neither hang
    the run nor slip in between a check and the open."""
    flags = os.O_RDONLY | sum(getattr(os, flag, 0) for flag in ("O_NONBLOCK", "O_BINARY", "O_CLOEXEC"))
    flags |= 0 if follow else getattr(os, "O_NOFOLLOW", 0)
    not_regular = NotRegularError(path)
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


def _copy(path: RemotePath, copy: Path) -> None:
    source = RemoteSource(path)
    ranges = [(start, min(start + _COPIED, source.size)) for start in range(0, source.size, _COPIED)]
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with copy.open("xb") as file:
            for data in source.ranges(ranges, _COPIED_AT_ONCE):
                file.write(data)
    except OSError as error:
        if isinstance(error, SwaAvgError):
            raise
        problem = f"cannot copy {path}: {error.strerror}"
        raise SystemRefusalError(error.errno, problem, str(copy)) from error
    if source.has_changed():
        raise UnreadableError(path, "the file changed while it was being read")


def refusal(path: Location, error: OSError) -> SwaAvgError:
    """Return what an error of the system means for the input `path`."""
    if error.errno in _SYSTEM_ERRNOS:
        return SystemRefusalError(error.errno, f"{error.strerror} while reading", str(path))
    return UnreadableError(path, (error.strerror or str(error)).lower())


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
