"""Files that are named by URLs, such as `s3://bucket/run/ckpt_1.keras`, by way of fsspec.

fsspec is imported where the first URL is met, and not before.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import io
import re
import secrets
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import IO, Any, cast

from swa_avg.errors import SwaAvgError, SystemRefusalError, UnreadableError, UsageError, first_line

__all__ = [
    "CONNECTIONS",
    "RemoteFile",
    "RemotePath",
    "as_path",
    "find",
    "kept_at_hand",
    "on_this_machine",
    "open_remote",
    "remote",
    "upload",
]

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+(::[A-Za-z0-9+.-]+)*://")  # one letter would be a drive
CONNECTIONS = 10
"""Requests at a time: they wait, and botocore keeps as many connections."""
_SECONDS = 45
"""How long one request may take, retries included; those of a service that is there end sooner."""
_AHEAD = 16 * 1024
_BLOCKS_AHEAD = 128
_COPIED_AT_ONCE = 8
_COPIED = 2 * 2**20
_RANGES_AT_ONCE = 16
_UPLOADED = 8 * 2**20
_MOST_PARTS = 9_000  # S3 takes 10,000
# Where an object is there whole or not at all; elsewhere a file grows under its name while it is uploaded.
_BUCKETS = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss"}
_OBJECT_STORES = _BUCKETS | {"memory"}
# What `info` of one filesystem or the other says of an object's contents: another value is another object.
_VERSION = {
    "size", "etag", "lastmodified", "last_modified", "mtime", "modified", "updated", "created",
    "generation", "versionid", "version_id", "md5hash", "content_md5", "checksum",
}  # fmt: skip


def as_path(name: str | Path | RemotePath) -> Path:
    """Return the path that is named, or for a URL a `RemotePath`, which does what is asked of paths here."""
    if isinstance(name, Path):
        return name
    if isinstance(name, RemotePath):
        return cast(Path, name)
    return cast(Path, RemotePath(str(name))) if _URL.match(str(name)) else Path(name)


def remote(path: object) -> RemotePath | None:
    """Return the path if it is a URL, else None."""
    return path if isinstance(path, RemotePath) else None


class RemotePath:
    """A URL, with as much of `pathlib.Path` as is used of checkpoints, their indices and outputs.

    `copies` is a folder on this machine that files are copied to, whole, when they are opened; without one
    they are read in place.
    """

    def __init__(self, url: str, copies: Path | None = None) -> None:
        self.url = url
        self.copies = copies

    def __str__(self) -> str:
        return self.url

    def __repr__(self) -> str:
        return f"RemotePath({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.url == other.url

    def __hash__(self) -> int:
        return hash(self.url)

    def __reduce__(self) -> tuple[type[RemotePath], tuple[str]]:
        return RemotePath, (self.url,)  # copies are on this machine alone

    @property
    def name(self) -> str:
        url = self.url.partition("?")[0] if self.url.startswith("http") else self.url  # it may be signed
        return url.rsplit("/", 1)[-1]

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.url.rsplit("/", 1)[0], self.copies)

    def with_name(self, name: str) -> RemotePath:
        return self.parent / name

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url}/{name}", self.copies)

    def absolute(self) -> RemotePath:
        return self

    def open(self, mode: str = "rb") -> IO[bytes]:
        return open_remote(self)

    def exists(self) -> bool:
        try:
            self.info()
        except SystemRefusalError as error:
            if error.errno == errno.ENOENT:
                return False
            raise
        return True

    def is_file(self) -> bool:
        return self.exists() and self.info().get("type", "file") == "file"

    def check_bucket(self) -> None:
        """Raise SystemRefusalError if the service says that the bucket of the object does not exist."""
        system, key = self.filesystem()
        with _asked(self.url), contextlib.suppress(PermissionError):
            if _protocols(system) & _BUCKETS:
                system.info(key.split("/")[0], **_limit(system))

    def remove(self) -> None:
        """Remove the object, if the service lets us."""
        with contextlib.suppress(Exception):
            system, key = self.filesystem()
            system.rm_file(key)

    def info(self) -> Mapping[str, Any]:
        """Return what the filesystem says of the object now.

        Raises:
            SystemRefusalError: there is none (ENOENT), or the service did not answer or refused.
        """
        system, key = self.filesystem()
        with _asked(self.url):
            system.invalidate_cache()
            return cast(Mapping[str, Any], system.info(key, **_limit(system)))

    def identity(self) -> tuple[object, str]:
        """Return what is equal for two URLs of one object."""
        return self.filesystem()

    def filesystem(self) -> tuple[Any, str]:
        """Return the filesystem that the URL names, with what is configured for it, and the key in it.

        Raises:
            UsageError: a package is missing, or the protocol is not known.
        """
        try:
            import fsspec
        except ImportError:
            raise UsageError(f"{self.url} is a URL, which needs: pip install 'swa-avg[remote]'") from None
        try:
            with _asked(self.url):
                return cast("tuple[Any, str]", fsspec.url_to_fs(self.url))
        except SystemRefusalError as error:
            if isinstance(error.__cause__, ImportError | ValueError):
                raise UsageError(f"{self.url}: {first_line(error.__cause__)}") from error.__cause__
            raise


def find(pattern: RemotePath) -> list[RemotePath]:
    """Return the files whose URLs match a shell pattern."""
    system, key = pattern.filesystem()
    start = pattern.url[: pattern.url.index("://") + 3]
    with _asked(pattern.url):
        system.invalidate_cache()
        return [RemotePath(start + found) for found in system.glob(key, **_limit(system))]


@contextmanager
def kept_at_hand(path: Path) -> Iterator[Path]:
    """Give a path whose file, and those beside it, are copied to this machine when they are opened.

    For a checkpoint that is read from one end to the other, more than once. A local path is given as it is.
    """
    url = remote(path)
    if url is None:
        yield path
        return
    with TemporaryDirectory(prefix="swa-avg-") as folder:
        yield cast(Path, RemotePath(url.url, Path(folder)))


def on_this_machine(path: Path) -> Path:
    """Return where the file of a path that is kept at hand is found on this machine."""
    url = remote(path)
    return path if url is None or url.copies is None else url.copies / url.name


def open_remote(path: RemotePath) -> IO[bytes]:
    """Open a file for reading at any position: in place, or the copy on this machine.

    Raises:
        UnreadableError: it is a folder, or changed while it was copied.
        SystemRefusalError: there is no such object, or the service did not answer or refused.
        UsageError: a package is missing, or the protocol is not known.
    """
    if path.copies is not None:
        return open(_copied(path, path.copies / path.name), "rb", buffering=0)
    return cast("IO[bytes]", RemoteFile(path))


def _copied(path: RemotePath, copy: Path) -> Path:
    if not copy.exists():
        with RemoteFile(path) as source:
            ranges = [(start, min(start + _COPIED, source.size)) for start in range(0, source.size, _COPIED)]
            try:
                with copy.open("xb") as file:
                    for data in source.ranges(ranges, _COPIED_AT_ONCE):
                        file.write(data)
            except OSError as error:
                if isinstance(error, SwaAvgError):
                    raise
                problem = f"cannot copy {path}: {error.strerror}"
                raise SystemRefusalError(error.errno, problem, str(copy)) from error
            if source.version_now() != source.version:
                raise UnreadableError(path.url, "the file changed while it was being read")
    return copy


class RemoteFile(io.RawIOBase):
    """An object in a store, open for reads at any position from several threads.

    A checkpoint is opened with hundreds of small reads in a few places: until `settle` they are answered from
    whole blocks, of which the last few are kept. Every other read fetches what it asks for and no more.
    """

    def __init__(self, path: RemotePath) -> None:
        self.path = path
        self._system, self._key = path.filesystem()
        info = path.info()
        if info.get("type", "file") != "file":
            raise UnreadableError(path.url, "not a regular file; name a checkpoint file")
        if info.get("size") is None:
            raise SystemRefusalError(errno.EIO, "the service does not say how large it is", path.url)
        self.size = int(info["size"])
        self.version = _version(info)
        """What the service says of the object's contents: size, and date, ETag or generation."""
        self._ahead: OrderedDict[int, bytes] | None = OrderedDict()
        self._position = 0

    def version_now(self) -> tuple[tuple[str, str], ...]:
        return _version(self.path.info())

    def settle(self) -> None:
        """Keep no blocks any longer: the checkpoint is open."""
        self._ahead = None

    def read_at(self, buffer: memoryview, position: int) -> None:
        """Fill `buffer` with the bytes at `position`.

        Raises:
            UnreadableError: the object became shorter.
            SystemRefusalError: the service did not answer or refused.
        """
        stop = position + len(buffer)
        if self._ahead is None or len(buffer) > _AHEAD:
            buffer[:] = self._fetch(position, stop)
            return
        for start in range(position - position % _AHEAD, stop, _AHEAD):
            data = self._block(start)[max(0, position - start) : stop - start]
            place = max(0, start - position)
            buffer[place : place + len(data)] = data

    def ranges(self, ranges: Sequence[tuple[int, int]], at_once: int = _RANGES_AT_ONCE) -> Iterator[bytes]:
        """Yield the bytes of each range (start, stop), of which `at_once` are fetched together."""
        for index in range(0, len(ranges), at_once):
            some = ranges[index : index + at_once]
            full = [(start, stop) for start, stop in some if start < stop]  # others mean the whole file to S3
            starts, stops = [start for start, _ in full], [stop for _, stop in full]
            with _asked(self.path.url):
                keys = [self._key] * len(full)
                found = self._system.cat_ranges(keys, starts, stops, on_error="raise", **_limit(self._system))
            answers = iter(found)
            for start, stop in some:
                yield self._whole(next(answers), stop - start) if start < stop else b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = start + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self.size - self._position))
        self.read_at(view[:count], self._position)
        self._position += count
        return count

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
        with _asked(self.path.url):
            data = self._system.cat_file(self._key, start=start, end=stop, **_limit(self._system))
        return self._whole(data, stop - start)

    def _whole(self, data: bytes, size: int) -> bytes:
        if len(data) < size:
            raise UnreadableError(self.path.url, "the file became shorter while it was being read")
        if len(data) > size:
            problem = "the service answers with the whole file where a part of it is asked for"
            raise SystemRefusalError(errno.EIO, problem, self.path.url)
        return data


def upload(source: Path, target: RemotePath, *, overwrite: bool) -> None:
    """Upload a complete local file such that it is visible whole or not at all.

    Raises:
        UsageError: there is an object of that name, and it may not be replaced.
        SystemRefusalError: the service did not answer or refused.
    """
    exists = UsageError(f"the output {target} exists; name another one, or add --overwrite")
    if not overwrite and target.exists():
        raise exists
    system, key = target.filesystem()
    with _asked(target.url):
        if _protocols(system) & _OBJECT_STORES:
            try:
                _put(system, source, key, "overwrite" if overwrite else "create")
            except FileExistsError:
                raise exists from None
            return
        folder, _, name = key.rpartition("/")
        temporary = f"{folder}/.{name}.{secrets.token_hex(6)}.tmp"
        try:
            _put(system, source, temporary, "overwrite")
            system.mv(temporary, key)
        except BaseException:
            target.with_name(temporary.rpartition("/")[2]).remove()
            raise


def _put(system: Any, source: Path, key: str, mode: str) -> None:
    """Upload by the filesystem's own means: in small parts, and exclusively where it knows how."""
    wanted = {
        "mode": mode,
        "chunksize": max(_UPLOADED, source.stat().st_size // _MOST_PARTS),
        "max_concurrency": 4,
    }
    known = inspect.signature(getattr(system, "_put_file", system.put_file)).parameters
    system.put_file(str(source), key, **{name: value for name, value in wanted.items() if name in known})


def _protocols(system: Any) -> set[str]:
    return {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)


def _version(info: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((key, str(value)) for key, value in info.items() if key.lower() in _VERSION))


def _limit(system: Any) -> dict[str, int]:
    """Return the keyword that ends a call in time, where the filesystem has one."""
    return {"timeout": _SECONDS} if getattr(system, "async_impl", False) else {}


@contextmanager
def _asked(url: str) -> Iterator[None]:
    """Turn what a filesystem raises, which is of many libraries, into one line that names the URL."""
    try:
        yield
    except (SwaAvgError, MemoryError, FileExistsError):
        raise
    except FileNotFoundError as error:
        cause = error.__cause__  # over HTTP fsspec says so of everything that goes wrong
        if type(cause).__module__.startswith("aiohttp") and getattr(cause, "status", None) != 404:
            raise SystemRefusalError(errno.EIO, first_line(cause or error), url) from error
        raise SystemRefusalError(errno.ENOENT, "no such file or bucket", url) from error
    except PermissionError as error:
        reason = f"access denied ({first_line(error)}); check the credentials, and what they allow"
        raise SystemRefusalError(errno.EACCES, reason, url) from error
    except Exception as error:
        if type(error).__name__ in (
            "TimeoutError",
            "FSTimeoutError",
        ):  # whichever of Python's it derives from
            raise SystemRefusalError(errno.ETIMEDOUT, "the service does not answer", url) from error
        number = error.errno if isinstance(error, OSError) and error.errno else errno.EIO
        raise SystemRefusalError(number, first_line(error), url) from error
